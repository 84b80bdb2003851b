"""Divide the images of one annotation file into a training and a validation part (--val_share)."""

import random
from dataclasses import dataclass

import numpy as np

from datasets.annotations import AnnotationTable
from util.errors import UserError


@dataclass(frozen=True)
class Split:
    """The images of 'train' or 'val' among those of a file that holds both. The seed decides which they are."""

    part: str
    share: float  # of the images in 'val'
    seed: int

    def contains(self, table: AnnotationTable) -> np.ndarray:
        """Return whether each image of the table belongs to the part, [N] bool.

        Raises:
            UserError: one of the parts would have no image.
        """
        in_val = choose_images(classes_of(table), self.share, self.seed)
        if not 0 < in_val.sum() < len(in_val):
            empty = 'training' if in_val.all() else 'validation'
            raise UserError(
                f'{table.file}: --val_share {self.share:g} of {len(in_val)} images leaves the {empty} part '
                'empty: give another share, or add images'
            )
        return in_val if self.part == 'val' else ~in_val


def classes_of(table: AnnotationTable) -> list[list[int]]:
    """Return the ids of the classes in each of N images, crowd regions aside."""
    objects = table.objects[~table.objects.crowd]
    rows = np.searchsorted(table.image_ids, objects.image_ids)
    classes: list[list[int]] = [[] for _ in table.image_ids]
    for row, label in np.unique(np.stack([rows, objects.category_ids], axis=1), axis=0).tolist():
        classes[row].append(label)
    return classes


def choose_images(classes: list[list[int]], share: float, seed: int) -> np.ndarray:
    """Choose a share of N images in which each class has about this share of its images too.

    Images are sorted by their classes, the rarest first and those without objects last, equal ones in a
    random order. From a random place on, every (1 / share)-th is taken. The last image of a class stays behind.

    Args:
        classes: of each image, without repetition.

    Returns:
        Whether each image is chosen, [N] bool.
    """
    names, counts = np.unique([label for labels in classes for label in labels], return_counts=True)
    rank = {names[idx]: place for place, idx in enumerate(np.argsort(counts, kind='stable').tolist())}
    ranks = [sorted(rank[label] for label in labels) or [len(rank)] for labels in classes]
    generator = random.Random(seed)
    shuffled = generator.sample(range(len(classes)), len(classes))
    order = sorted(shuffled, key=lambda image: ranks[image])
    start = generator.randrange(len(order))
    order = order[start:] + order[:start]
    chosen = np.zeros(len(order), dtype=bool)
    chosen[order] = np.diff(np.floor(np.arange(len(order) + 1) * share + 0.5)) > 0
    left = np.append(np.sort(counts), len(order))  # images of each class that are not chosen

    def move(image: int, into: bool) -> None:
        chosen[image] = into
        left[ranks[image]] += -1 if into else 1

    for image in np.flatnonzero(chosen).tolist():
        move(image, True)
    for image in np.flatnonzero(chosen).tolist():
        if left[ranks[image]].min() == 0:
            move(image, False)
            others = (each for each in shuffled if not chosen[each] and left[ranks[each]].min() > 1)
            if (other := next(others, None)) is not None:
                move(other, True)
    return chosen
