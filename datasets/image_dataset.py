"""Base class of all datasets of images: what a new dataset must provide."""

import random
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property, partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from datasets.annotations import Inventory
from datasets.class_map import ClassMap
from datasets.coco_json import Annotations
from datasets.headers import Survey
from datasets.image_io import DEFAULT_READER, ImageReader, UnreadableImage
from datasets.transforms import Mix, Sample, Transform, size_after
from datasets.unreadable import UnreadableImages
from util.errors import UserError
from util.nested_tensor import collate_fn
from util.seeding import local_seed

T = TypeVar('T')


def loader_options(num_workers: int) -> dict[str, Any]:
    """Return the DataLoader options that all loaders of images share."""
    return {
        'num_workers': num_workers,
        'collate_fn': collate_fn,
        'persistent_workers': num_workers > 0,
        'pin_memory': torch.cuda.is_available(),
        'generator': torch.Generator(),  # so that loading draws nothing from the run's random numbers
    }


class ImageDataset(Dataset[Sample], ABC):
    """Images with objects. An item is the result of `untransformed`, changed by `mix` (if there is one) and
    by `transforms`.

    A subclass sets `ids` and `class_map`, and defines the abstract members; `datasets.build.build_dataset`
    refuses one that does not. All randomness depends on (seed, epoch, index) only, whatever the number of
    loader workers.
    """

    ids: list[int]  # of the images, unique
    class_map: ClassMap  # class index of the model for each category of the annotations
    most_objects = 100  # in one image; for the trial of the largest batch
    return_masks = False  # targets have masks
    reader = DEFAULT_READER  # of its image files
    # List of the images that could not be read, which others replace; None: such an image is an error.
    unreadable: UnreadableImages | None = None
    # If not 0, only some classes of an image are annotated, and this many detections count (`LvisEvaluator`).
    federated = 0

    def __init__(self, transforms: Transform | None, mix: Mix | None, seed: int) -> None:
        self.transforms, self.mix, self.seed = transforms, mix, seed
        # In shared memory, so that workers that outlive an epoch see the next number too.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    @abstractmethod
    def untransformed(self, idx: int) -> Sample:
        """Return image idx as it is stored, uint8 [3, H, W], and its target (the fields of
        `datasets.coco.CocoDetection`).
        """

    def pixels(self, idx: int) -> Tensor:
        """Return image idx as it is stored, without its objects; it is shown where these are invalid."""
        return self.untransformed(idx)[0]

    @property
    def reading_order(self) -> Sequence[int]:
        """Return the indices of all images, each image once, in the order in which they are read fastest."""
        return range(len(self))

    def read_items(self, indices: Sequence[int]) -> Iterator[tuple[int, Sample | Exception]]:
        """Yield index and untransformed item of some images, or why it cannot be used.

        indices: a part of `reading_order`, in its order.
        """
        for idx in indices:
            try:
                yield idx, self.untransformed(idx)
            except (UserError, OSError) as error:
                yield idx, error

    @property
    def summary(self) -> str:
        """Describe the dataset in one line, with a checksum of its image ids."""
        checksum = zlib.crc32(repr(self.ids).encode())
        return f'{len(self)} images of {self.class_map.num_classes} class indices ({checksum:08x})'

    def inventory(self) -> Inventory | None:
        """Return what the dataset holds; None: that is not known without reading all images."""
        return None

    @abstractmethod
    def image_sizes(self) -> Sequence[Sequence[int]] | np.ndarray:
        """Return height and width of every image, [N, 2]."""

    @cached_property
    def survey(self) -> Survey:
        """Return the headers of its image files, of a part of them if there are many; by default it has none."""
        return Survey()

    def turn_left(self, idx: int) -> int:
        """Return the orientation with which `image_io.turned` makes image idx upright, for drawings of it."""
        return 1

    def use_reader(self, reader: ImageReader) -> None:
        """Read images by this reader from now on."""
        self.reader = reader

    @property
    @abstractmethod
    def ground_truth(self) -> Annotations:
        """Return the annotations in COCO form that evaluation compares with."""

    def __getstate__(self) -> dict:
        """Leave out a cached ground truth and survey: spawned workers do not need them."""
        left_out = ('ground_truth', 'survey')
        return {name: value for name, value in self.__dict__.items() if name not in left_out}

    def __len__(self) -> int:
        return len(self.ids)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch that seeds the random numbers; running workers see it too."""
        self._epoch.fill_(epoch)

    def __getitem__(self, idx: int) -> Sample:
        idx = range(len(self))[idx]
        return self.transformed(idx, partial(self.readable_item, idx), self.random_item)

    def transformed(self, idx: int, item: Callable[[], Sample], random_item: Callable[[], Sample]) -> Sample:
        """Return image idx after mix and transforms, under the seed of (seed, epoch, idx).

        item: returns the untransformed image. random_item: returns any other one, for `mix`.
        """
        with local_seed(self.seed, int(self._epoch), idx):
            image, target = item()
            if self.mix is not None:
                image, target = self.mix(image, target, random_item)
            return (image, target) if self.transforms is None else self.transforms(image, target)

    def drawn_size(self, idx: int, epoch: int, original: Iterable[int]) -> tuple[int, int]:
        """Return the (height, width) that image `idx` will have in an epoch, given its `original` size.

        Nothing is read. Datasets that mix images do not support this.
        """
        assert self.transforms is not None
        with local_seed(self.seed, epoch, idx):
            return size_after(self.transforms, original)

    def random_item(self) -> Sample:
        """Return any image, untransformed, drawn from Python's `random`."""
        return self.readable_item(random.randrange(len(self)))

    def readable_item(self, idx: int) -> Sample:
        """Return image idx, untransformed, or a random one if it cannot be read."""
        return self.first_readable(idx, lambda: range(len(self)), self.untransformed, self.image_name)

    def image_name(self, idx: int) -> str:
        """Return the name of image idx in lists."""
        return f'image {self.ids[idx]}'

    def first_readable(
        self,
        wanted: T,
        others: Callable[[], Sequence[T]],
        read: Callable[[T], Sample],
        name_of: Callable[[T], str],
    ) -> Sample:
        """Return what `read` makes of an image, or of one of `others` if it cannot be read.

        The other one is drawn from Python's `random`, so that the same seed gives the same one.

        Raises:
            UnreadableImage: an image cannot be read, and there is no list of such images.
            UserError: too many images cannot be read, or none can.
        """
        try:
            return read(wanted)
        except UnreadableImage as error:
            unreadable = self.skip(name_of(wanted), error)
        candidates = others()
        for other in random.sample(candidates, min(len(candidates), unreadable.limit + 1)):
            try:
                return read(other)
            except UnreadableImage as error:
                self.skip(name_of(other), error)
        raise UserError(f'no other image can be read ({unreadable.file} has the reasons): fetch them again')

    def skip(self, name: str, error: UnreadableImage) -> UnreadableImages:
        """Put an image on the list of unreadable ones, and return it; without a list, raise the error."""
        if self.unreadable is None:
            raise error
        if self.unreadable.add((name, error)):
            print(f'warning: {error}; another image takes its place', flush=True)
        self.unreadable.check()
        return self.unreadable
