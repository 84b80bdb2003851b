"""The contract of a data set of images. Whoever adds one reads this file."""

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from datasets.class_map import ClassMap
from datasets.coco_json import Annotations
from datasets.transforms import Sample, Target, Transform
from util.nested_tensor import collate_fn
from util.seeding import local_seed

# Image, target and a function that gives a further one, drawn at random and untransformed, to image and target.
Mix = Callable[[Tensor, Target, Callable[[], Sample]], Sample]


def loader_options(num_workers: int) -> dict[str, Any]:
    """What all loaders of images have in common."""
    return {
        'num_workers': num_workers,
        'collate_fn': collate_fn,
        'persistent_workers': num_workers > 0,
        'pin_memory': torch.cuda.is_available(),
        'generator': torch.Generator(),  # its own, so that loading draws nothing from the run's random numbers
    }


class ImageDataset(Dataset[Sample], ABC):
    """Images with objects. An item is what `untransformed` gives, after `mix`, if there is one, and `transforms`.

    A subclass sets `ids` and `class_map`, and defines the abstract members; `datasets.build_dataset` refuses one that does not.
    All randomness depends on (seed, epoch, index) only, whatever the number of loader workers.
    """

    ids: list[int]  # of the images, unique
    class_map: ClassMap  # class index of the model for each category of the annotations
    most_objects = 100  # in one image; for the rehearsal of the largest batch
    return_masks = False  # targets have masks

    def __init__(self, transforms: Transform | None, mix: Mix | None, seed: int) -> None:
        self.transforms, self.mix, self.seed = transforms, mix, seed
        # In shared memory, so that workers that outlive an epoch see the next number too.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    @abstractmethod
    def untransformed(self, idx: int) -> Sample:
        """Return image idx as it is stored, uint8 [3, H, W], and its target (the fields of `datasets.coco.CocoDetection`)."""

    @abstractmethod
    def image_sizes(self) -> np.ndarray:
        """Return height and width of every image, [N, 2]."""

    @property
    @abstractmethod
    def ground_truth(self) -> Annotations:
        """Annotations in COCO form, which evaluation compares with."""

    def keep_files(self, local_rank: int, local_size: int) -> None:
        """Keep this process's share of the compressed files in memory (`--cache_mode`).

        Raises:
            ValueError: the data set has no files.
        """
        raise ValueError(f'--cache_mode keeps image files, and {type(self).__name__} has none: leave it out')

    def __len__(self) -> int:
        return len(self.ids)

    def set_epoch(self, epoch: int) -> None:
        """Choose the random numbers of an epoch; reaches running workers too."""
        self._epoch.fill_(epoch)

    def __getitem__(self, idx: int) -> Sample:
        idx = range(len(self))[idx]
        return self.transformed(idx, partial(self.untransformed, idx), self.random_item)

    def transformed(self, idx: int, item: Callable[[], Sample], random_item: Callable[[], Sample]) -> Sample:
        """Image idx by its own random numbers, from where its untransformed item and that of any other come."""
        with local_seed(self.seed, int(self._epoch), idx):
            image, target = item()
            if self.mix is not None:
                image, target = self.mix(image, target, random_item)
            return (image, target) if self.transforms is None else self.transforms(image, target)

    def drawn_size(self, idx: int, epoch: int, original: Iterable[int]) -> tuple[int, int]:
        """(height, width) that image `idx` will have in that epoch, from its `original` one; nothing is read: the
        transforms act on an image without pixels. Not for data sets that mix images.
        """
        assert self.transforms is not None
        with local_seed(self.seed, epoch, idx):
            image = torch.empty(3, *map(int, original), dtype=torch.uint8, device='meta')
            image, _ = self.transforms(image, None)
        height, width = image.shape[-2:]
        return height, width

    def random_item(self) -> Sample:
        """Any image, untransformed; drawn from Python's `random`."""
        return self.untransformed(random.randrange(len(self)))
