"""Class indices of a model and the categories of annotations. Nothing else in the code knows how they correspond."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from util.errors import UserError

# COCO's 80 category ids are 1..90 with ten gaps; official checkpoints use the ids as class indices, 0 and
# gaps included.
PANOPTIC_CLASSES = 250  # of DETR's panoptic models: things have COCO's ids, stuff has those above
COCO_GAPS = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)
COCO_IDS = frozenset(range(1, 91)).difference(COCO_GAPS)
CLASS_IDS = ('auto', 'contiguous')
# COCO's names, in order of id.
COCO_NAMES = (
    'person', 'bicycle', 'car', 'motorcycle', 'airplane', 'bus', 'train', 'truck', 'boat', 'traffic light', 'fire hydrant',
    'stop sign', 'parking meter', 'bench', 'bird', 'cat', 'dog', 'horse', 'sheep', 'cow', 'elephant', 'bear', 'zebra',
    'giraffe', 'backpack', 'umbrella', 'handbag', 'tie', 'suitcase', 'frisbee', 'skis', 'snowboard', 'sports ball', 'kite',
    'baseball bat', 'baseball glove', 'skateboard', 'surfboard', 'tennis racket', 'bottle', 'wine glass', 'cup', 'fork',
    'knife', 'spoon', 'bowl', 'banana', 'apple', 'sandwich', 'orange', 'broccoli', 'carrot', 'hot dog', 'pizza', 'donut',
    'cake', 'chair', 'couch', 'potted plant', 'bed', 'dining table', 'toilet', 'tv', 'laptop', 'mouse', 'remote', 'keyboard',
    'cell phone', 'microwave', 'oven', 'toaster', 'sink', 'refrigerator', 'book', 'clock', 'vase', 'scissors', 'teddy bear',
    'hair drier', 'toothbrush',
)  # fmt: skip


@dataclass(frozen=True)
class ClassMap:
    """Category id and name of every class index; a name of None marks an index that no category uses."""

    category_ids: tuple[int, ...]
    names: tuple[str | None, ...]

    @property
    def num_classes(self) -> int:
        """Return the number of class indices, including those without a category."""
        return len(self.category_ids)

    @cached_property
    def label_of(self) -> dict[int, int]:
        """Map each category id to its class index; unused indices are left out."""
        pairs = zip(self.category_ids, self.names, strict=True)
        return {category_id: label for label, (category_id, name) in enumerate(pairs) if name is not None}

    @classmethod
    def from_categories(cls, categories: list[dict]) -> ClassMap:
        """Keep COCO's own 80 ids (91 classes); number any other categories 0..K-1 in ascending order of id."""
        if names_by_id(categories).keys() == COCO_IDS:
            return cls.identity(categories)
        return cls.contiguous(categories)

    @classmethod
    def coco(cls, num_classes: int = 91) -> ClassMap:
        """Return COCO's own 80 ids and names. num_classes: more than 91 for DETR's panoptic models, which know stuff too."""
        pairs = zip(sorted(COCO_IDS), COCO_NAMES, strict=True)
        things = cls.identity([{'id': category_id, 'name': name} for category_id, name in pairs])
        more = range(things.num_classes, num_classes)
        return cls((*things.category_ids, *more), (*things.names, *(None for _ in more)))

    @classmethod
    def contiguous(cls, categories: list[dict]) -> ClassMap:
        """Number the categories 0..K-1 in ascending order of id, also COCO's 80 (mmdetection)."""
        names = names_by_id(categories)
        ids = sorted(names)
        return cls(tuple(ids), tuple(names[category_id] for category_id in ids))

    @classmethod
    def numbered(cls, categories: list[dict], class_ids: str) -> ClassMap:
        """Number the categories as --class_ids asks."""
        if class_ids not in CLASS_IDS:
            raise UserError(f'--class_ids {class_ids!r} is not known: choose one of {", ".join(CLASS_IDS)}')
        return cls.contiguous(categories) if class_ids == 'contiguous' else cls.from_categories(categories)

    @classmethod
    def identity(cls, categories: list[dict]) -> ClassMap:
        """Use category ids as class indices, as the official pipeline does; this gives max id + 1 classes."""
        names = names_by_id(categories)
        ids = tuple(range(max(names) + 1))
        return cls(ids, tuple(names.get(category_id) for category_id in ids))

    def to_dict(self) -> dict[str, list]:
        """Return plain lists, so that a checkpoint that holds them loads with `weights_only=True`."""
        return {'category_ids': list(self.category_ids), 'names': list(self.names)}

    @classmethod
    def from_dict(cls, state: dict[str, list]) -> ClassMap:
        """Invert `to_dict`."""
        return cls(tuple(state['category_ids']), tuple(state['names']))


def names_by_id(categories: list[dict]) -> dict[int, str]:
    """Return the names of COCO-form categories by id; a category without a name is called by its id."""
    if not categories:
        raise UserError(
            'there are no categories: the annotations need at least one, {"id": 1, "name": "..."}'
        )
    names: dict[int, str] = {}
    for category in categories:
        category_id = category.get('id')
        if isinstance(category_id, bool) or not isinstance(category_id, int) or not 0 <= category_id < 2**63:
            raise UserError(f'category {category} needs an integer id, not negative')
        if category_id in names:
            raise UserError(f'category id {category_id} occurs twice: give every category an id of its own')
        names[category_id] = str(category.get('name') or category_id)
    return names
