"""Which class index of a model stands for which category of the annotations. Nothing else in the code knows
it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

# COCO's 80 category ids are 1..90 with ten gaps; official checkpoints use the ids as class indices, 0 and
# gaps included.
COCO_GAPS = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)
COCO_IDS = frozenset(range(1, 91)).difference(COCO_GAPS)
CLASS_IDS = ('auto', 'contiguous')


@dataclass(frozen=True)
class ClassMap:
    """One entry a class index; a name of None marks an index that no category uses."""

    category_ids: tuple[int, ...]
    names: tuple[str | None, ...]

    @property
    def num_classes(self) -> int:
        """Number of class indices, those without a category included."""
        return len(self.category_ids)

    @cached_property
    def label_of(self) -> dict[int, int]:
        """Category id to class index; only ids that are categories."""
        pairs = zip(self.category_ids, self.names, strict=True)
        return {category_id: label for label, (category_id, name) in enumerate(pairs) if name is not None}

    @classmethod
    def from_categories(cls, categories: list[dict]) -> ClassMap:
        """Class indices 0..K-1 in ascending order of id; COCO's own 80 ids are kept, with 91 classes."""
        if names_by_id(categories).keys() == COCO_IDS:
            return cls.identity(categories)
        return cls.contiguous(categories)

    @classmethod
    def contiguous(cls, categories: list[dict]) -> ClassMap:
        """Class indices 0..K-1 in ascending order of id, COCO's 80 too (mmdetection)."""
        names = names_by_id(categories)
        ids = sorted(names)
        return cls(tuple(ids), tuple(names[category_id] for category_id in ids))

    @classmethod
    def numbered(cls, categories: list[dict], class_ids: str) -> ClassMap:
        """The class indices that --class_ids asks for."""
        if class_ids not in CLASS_IDS:
            raise ValueError(f'--class_ids {class_ids!r} is not known: choose one of {", ".join(CLASS_IDS)}')
        return cls.contiguous(categories) if class_ids == 'contiguous' else cls.from_categories(categories)

    @classmethod
    def identity(cls, categories: list[dict]) -> ClassMap:
        """Class index = category id, as in the official pipeline; max id + 1 classes."""
        names = names_by_id(categories)
        if min(names) < 0:
            raise ValueError(f'category id {min(names)} cannot be a class index; use ids from 0 upwards')
        ids = tuple(range(max(names) + 1))
        return cls(ids, tuple(names.get(category_id) for category_id in ids))

    def to_dict(self) -> dict[str, list]:
        """Plain lists, so that a checkpoint that holds it loads with `weights_only=True`."""
        return {'category_ids': list(self.category_ids), 'names': list(self.names)}

    @classmethod
    def from_dict(cls, state: dict[str, list]) -> ClassMap:
        """Inverse of `to_dict`."""
        return cls(tuple(state['category_ids']), tuple(state['names']))


def names_by_id(categories: list[dict]) -> dict[int, str]:
    """Names of COCO-form categories by id; a category without a name is called by its id."""
    if not categories:
        raise ValueError(
            'there are no categories: the annotations need at least one, {"id": 1, "name": "..."}'
        )
    names: dict[int, str] = {}
    for category in categories:
        category_id = category.get('id')
        if isinstance(category_id, bool) or not isinstance(category_id, int):
            raise ValueError(f'category {category} needs an integer id')
        if category_id in names:
            raise ValueError(f'category id {category_id} occurs twice: give every category an id of its own')
        names[category_id] = str(category.get('name') or category_id)
    return names
