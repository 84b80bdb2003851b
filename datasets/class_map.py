"""Class indices of a model and the categories of annotations, which nothing else in the code relates."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

from util.errors import UserError

PANOPTIC_CLASSES = 250  # of DETR's panoptic models: things have COCO's ids, stuff has those above
CLASS_IDS = ('auto', 'contiguous')
# COCO's 80 category ids are 1..90 with ten gaps, which torchvision names N/A. Official checkpoints use the
# ids as class indices, 0 and gaps included.
COCO_CATEGORIES = [
    {'id': category_id, 'name': name}
    for category_id, name in enumerate(FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta['categories'])
    if name not in ('__background__', 'N/A')
]
COCO_IDS = frozenset(category['id'] for category in COCO_CATEGORIES)


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
        """Keep COCO's own 80 ids (91 classes); number other categories 0..K-1 in ascending order of id."""
        if names_by_id(categories).keys() == COCO_IDS:
            return cls.identity(categories)
        return cls.contiguous(categories)

    @classmethod
    def coco(cls, num_classes: int = 91) -> ClassMap:
        """Return COCO's own 80 ids and names.

        num_classes: more than 91 for DETR's panoptic models, which have stuff classes too.
        """
        things = cls.identity(COCO_CATEGORIES)
        stuff = range(things.num_classes, num_classes)
        return cls((*things.category_ids, *stuff), (*things.names, *(None for _ in stuff)))

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
            raise UserError(f'category id {category_id} occurs twice: give every category another id')
        names[category_id] = str(category.get('name') or category_id)
    return names
