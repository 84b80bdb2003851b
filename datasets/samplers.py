"""
Batches of image indices: of training, in three orders (`--batches`), and of evaluation.

`random` distributes images one by one, as PyTorch does. `aspect` (as mmdetection) and `size` put images
together that need little padding.
"""

import math
from collections.abc import Iterator
from itertools import cycle, islice

import numpy as np
import torch
from torch.utils.data import Sampler

from datasets.image_dataset import ImageDataset
from util.errors import UserError

WINDOW = 64  # steps whose images are sorted by size together


class TrainBatches(Sampler[list[int]]):
    """Batches of one rank in random order, that of PyTorch's DistributedSampler.

    Every rank has equally many. The order depends on the seed and the epoch. Images that fill no batch are
    left out, different ones in each epoch.
    """

    def __init__(
        self, dataset: ImageDataset, batch_size: int, num_replicas: int, rank: int, seed: int = 0
    ) -> None:
        self.dataset, self.batch_size, self.seed = dataset, batch_size, seed
        self.num_replicas, self.rank = num_replicas, rank
        self.epoch, self.first = 0, 0

    def set_epoch(self, epoch: int, first: int = 0) -> None:
        """Set the epoch, and the batch with which it begins."""
        self.epoch, self.first = epoch, first

    def __len__(self) -> int:
        return len(self.dataset) // self.num_replicas // self.batch_size

    def __iter__(self) -> Iterator[list[int]]:
        order, _ = self.shuffled()
        images = order[self.rank :: self.num_replicas]
        for batch in range(self.first, len(self)):
            yield images[batch * self.batch_size : (batch + 1) * self.batch_size]

    def shuffled(self) -> tuple[list[int], torch.Generator]:
        """Return all images in the order of the epoch, the same on every rank, and its random generator."""
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return torch.randperm(len(self.dataset), generator=generator).tolist(), generator


class AspectBatches(TrainBatches):
    """Batches whose images are all wider than high, or all not, which reduces padding.

    As in mmdetection, a kind that does not fill its batches on all ranks starts again. Every image is seen in
    every epoch, some twice (more often if a kind has few). Batches of both kinds come in random order.
    """

    def __init__(
        self, dataset: ImageDataset, batch_size: int, num_replicas: int, rank: int, seed: int = 0
    ) -> None:
        super().__init__(dataset, batch_size, num_replicas, rank, seed)
        sizes = np.asarray(dataset.image_sizes())
        self.wide = sizes[:, 1] > sizes[:, 0]
        counts = {kind: int((self.wide == kind).sum()) for kind in (False, True)}
        self.num_batches = {kind: math.ceil(n / (batch_size * num_replicas)) for kind, n in counts.items()}

    def __len__(self) -> int:
        return sum(self.num_batches.values())

    def __iter__(self) -> Iterator[list[int]]:
        order, generator = self.shuffled()
        batches = []
        for kind, number in self.num_batches.items():
            images = cycle(index for index in order if self.wide[index] == kind)
            batches += [list(islice(images, self.batch_size)) for _ in range(number * self.num_replicas)]
        mixed = torch.randperm(len(batches), generator=generator).tolist()
        return (batches[index] for index in mixed[self.rank :: self.num_replicas][self.first :])


class SizeBatches(TrainBatches):
    """Batches of images that have about the same size after scaling and cropping.

    Little of a batch is padding, and no rank waits long for another. The size of an image is known before it
    is read (`ImageDataset.drawn_size`). In windows of WINDOW steps, the images of all ranks are sorted by
    size and cut into steps, which come in random order. Images that fill no step are left out, others in
    every epoch.
    """

    def __init__(
        self, dataset: ImageDataset, batch_size: int, num_replicas: int, rank: int, seed: int = 0
    ) -> None:
        super().__init__(dataset, batch_size, num_replicas, rank, seed)
        if dataset.mix is not None:
            raise UserError(
                '--batches size sorts images by their size, and this --aug mixes them: give another'
            )
        self.original_sizes = dataset.image_sizes()

    def __iter__(self) -> Iterator[list[int]]:
        order, generator = self.shuffled()
        step_size = self.batch_size * self.num_replicas
        for start in range(0, len(self), WINDOW):
            num_steps = min(WINDOW, len(self) - start)
            shuffled = torch.randperm(num_steps, generator=generator).tolist()
            if start + num_steps <= self.first:
                continue
            window = order[start * step_size : (start + num_steps) * step_size]
            window.sort(key=self.sort_key)
            for step in shuffled[max(self.first - start, 0) :]:
                begin = step * step_size + self.rank * self.batch_size
                yield window[begin : begin + self.batch_size]

    def sort_key(self, index: int) -> tuple[bool, int, int]:
        """Return of an image: portrait or not, longer side, shorter side."""
        height, width = self.dataset.drawn_size(index, self.epoch, self.original_sizes[index])
        return height > width, max(height, width), min(height, width)


# Value of --batches -> how training batches are made.
BATCHES = {'random': TrainBatches, 'aspect': AspectBatches, 'size': SizeBatches}


class EvalBatches(Sampler[list[int]]):
    """Batches of images in order, the same for any number of ranks.

    Padding depends on which images share a batch, and metrics must not depend on the number of ranks. A rank
    takes consecutive batches; if they do not divide evenly, ranks overlap.
    """

    def __init__(self, num_images: int, batch_size: int, num_replicas: int, rank: int) -> None:
        total = math.ceil(num_images / batch_size)
        self.batch_size, self.num_batches = batch_size, math.ceil(total / num_replicas)
        start = min(rank * self.num_batches, total - self.num_batches) * batch_size
        # All images of this rank, in order.
        self.images = range(start, min(start + self.num_batches * batch_size, num_images))

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[list[int]]:
        for start in range(0, len(self.images), self.batch_size):
            yield list(self.images[start : start + self.batch_size])
