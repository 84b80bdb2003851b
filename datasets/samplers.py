"""
Samplers of images per rank, and of batches, as in Deformable DETR's code and mmdetection.

PyTorch's DistributedSampler, the default of training, deals images out one by one. These samplers keep images
together: consecutive ones, those in one node's memory, those of the same orientation, or those of about the same size.
"""

import math
from collections.abc import Iterator, Sized
from itertools import cycle, islice

import numpy as np
import torch
from torch.utils.data import BatchSampler, DistributedSampler, Sampler

from datasets.image_dataset import ImageDataset

WINDOW = 64  # steps whose images are sorted by size together


class ChunkSampler(Sampler[int]):
    """Sampler of one consecutive run of the (shuffled) images per rank. If they do not divide evenly, the first ones
    are repeated.
    """

    def __init__(
        self, dataset: Sized, num_replicas: int, rank: int, shuffle: bool = True, seed: int = 0
    ) -> None:
        self.dataset = dataset
        self.num_replicas = num_replicas
        self.rank = rank
        self.shuffle = shuffle
        self.seed = seed
        self.epoch = 0
        self.num_samples = math.ceil(len(dataset) / num_replicas)

    def __len__(self) -> int:
        return self.num_samples

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def order(self) -> list[int]:
        """Return all images in the order of the epoch, the same on every rank."""
        if not self.shuffle:
            return list(range(len(self.dataset)))
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return torch.randperm(len(self.dataset), generator=generator).tolist()

    def __iter__(self) -> Iterator[int]:
        order = self.order()
        order += order[: self.num_samples * self.num_replicas - len(order)]
        return iter(order[self.rank * self.num_samples : (self.rank + 1) * self.num_samples])


class NodeSampler(ChunkSampler):
    """Sampler that splits images over the ranks of a node by index, so that a node keeps each image once
    (`--cache_mode`).

    local_rank, local_size: rank of the process on its node, and number of processes there.
    """

    def __init__(
        self,
        dataset: Sized,
        num_replicas: int,
        rank: int,
        local_rank: int,
        local_size: int,
        shuffle: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__(dataset, num_replicas, rank, shuffle, seed)
        self.local_rank = local_rank
        self.local_size = local_size

    def __iter__(self) -> Iterator[int]:
        order = [index for index in self.order() if index % self.local_size == self.local_rank]
        nodes = self.num_replicas // self.local_size
        order += order[: self.num_samples * nodes - len(order)]
        return iter(order[self.rank // self.local_size :: nodes][: self.num_samples])


class AspectSampler(ChunkSampler):
    """Sampler of batches whose images are all wider than high, or all not, which reduces padding.

    As in mmdetection, a kind that does not fill its batches on all ranks starts again. Every image is seen in every
    epoch, some twice (more often if a kind has few), and all ranks have equally many batches. Batches of both kinds
    come in random order.

    sizes: [N, 2] height and width of the images. local_rank, local_size: with --cache_mode, as for `NodeSampler`; a
    rank that holds no image of a kind takes those of other ranks.
    """

    def __init__(
        self,
        sizes: np.ndarray,
        batch_size: int,
        num_replicas: int,
        rank: int,
        local_rank: int = 0,
        local_size: int = 1,
        seed: int = 0,
    ) -> None:
        super().__init__(sizes, num_replicas, rank, seed=seed)
        self.wide = sizes[:, 1] > sizes[:, 0]
        self.batch_size, self.local_rank, self.local_size = batch_size, local_rank, local_size
        self.nodes = num_replicas // local_size
        shares = [self.wide[share::local_size] for share in range(local_size)]
        # Number on the ranks that hold most of a kind, so that all ranks have equally many.
        self.batches = {
            kind: max(math.ceil((share == kind).sum() / (batch_size * self.nodes)) for share in shares)
            for kind in (False, True)
        }
        self.num_samples = batch_size * sum(self.batches.values())

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(len(self.wide), generator=generator).tolist()
        runs = [run for kind in self.batches for run in self.runs(order, kind)]
        mixed = [runs[index] for index in torch.randperm(len(runs), generator=generator)]
        return iter([index for run in mixed[self.rank // self.local_size :: self.nodes] for index in run])

    def runs(self, order: list[int], kind: bool) -> list[list[int]]:
        """Return batches of one kind for the ranks that hold the same share, one per node."""
        images = [index for index in order if self.wide[index] == kind]
        held = [index for index in images if index % self.local_size == self.local_rank] or images
        endless = cycle(held)
        return [list(islice(endless, self.batch_size)) for _ in range(self.batches[kind] * self.nodes)]


class EpochBatches(Sampler[list[int]]):
    """Batches of the images that a sampler gives to a rank."""

    def __init__(
        self, sampler: ChunkSampler | DistributedSampler[int], batch_size: int, drop_last: bool
    ) -> None:
        self.sampler = sampler
        self.batches = BatchSampler(sampler, batch_size, drop_last)
        self.first = 0

    def __len__(self) -> int:
        return len(self.batches)

    def set_epoch(self, epoch: int, first: int = 0) -> None:
        """Set the epoch, and the batch with which it begins."""
        self.sampler.set_epoch(epoch)
        self.first = first

    def __iter__(self) -> Iterator[list[int]]:
        return islice(self.batches, self.first, None)


class EvalBatches(Sampler[list[int]]):
    """Batches of images in order, the same for any number of ranks.

    Padding depends on which images share a batch, and metrics must not depend on the number of ranks. A rank takes
    consecutive batches; if they do not divide evenly, ranks overlap.
    """

    def __init__(self, num_images: int, batch_size: int, num_replicas: int, rank: int) -> None:
        self.num_images, self.batch_size = num_images, batch_size
        total = math.ceil(num_images / batch_size)
        self.share = math.ceil(total / num_replicas)
        self.first = min(rank * self.share, total - self.share)

    def __len__(self) -> int:
        return self.share

    def images(self) -> range:
        """Return all images of this rank, in order."""
        behind = (self.first + self.share) * self.batch_size
        return range(self.first * self.batch_size, min(behind, self.num_images))

    def __iter__(self) -> Iterator[list[int]]:
        images = self.images()
        for start in range(0, len(images), self.batch_size):
            yield list(images[start : start + self.batch_size])


class SizeBatches(Sampler[list[int]]):
    """Batches of images that have about the same size after scaling and cropping (`--bucket_sizes`).

    Little of a batch is padding, and no rank waits long for another. The size of an image is known before it is read
    (`ImageDataset.drawn_size`). In windows of WINDOW steps, the images of all ranks are sorted by size and cut into
    steps, which come in random order. Images that fill no step are left out, others in every epoch.
    """

    def __init__(
        self, dataset: ImageDataset, batch_size: int, num_replicas: int, rank: int, seed: int = 0
    ) -> None:
        self.dataset, self.batch_size, self.rank, self.seed = dataset, batch_size, rank, seed
        self.step_size = batch_size * num_replicas
        self.original_sizes = dataset.image_sizes()
        self.epoch, self.first = 0, 0

    def __len__(self) -> int:
        return len(self.dataset) // self.step_size

    def set_epoch(self, epoch: int, first: int = 0) -> None:
        self.epoch, self.first = epoch, first

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(len(self.dataset), generator=generator).tolist()
        for start in range(0, len(self), WINDOW):
            num_steps = min(WINDOW, len(self) - start)
            shuffled = torch.randperm(num_steps, generator=generator).tolist()
            if start + num_steps <= self.first:
                continue
            window = order[start * self.step_size : (start + num_steps) * self.step_size]
            window.sort(key=self.drawn_size)
            for step in shuffled[max(self.first - start, 0) :]:
                begin = step * self.step_size + self.rank * self.batch_size
                yield window[begin : begin + self.batch_size]

    def drawn_size(self, index: int) -> tuple[bool, int, int]:
        """Return the sort key of an image: portrait or not, longer side, shorter side."""
        height, width = self.dataset.drawn_size(index, self.epoch, self.original_sizes[index])
        return height > width, max(height, width), min(height, width)
