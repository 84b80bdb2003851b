"""
Which pictures a process sees, as in Deformable DETR's code and mmdetection. PyTorch's own sampler deals pictures out
one by one and is used for training; these keep runs of them, those that a node's process holds in memory, or those that
are wider than high together.
"""

import math
from collections.abc import Iterator
from itertools import cycle, islice

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler


class ChunkSampler(Sampler[int]):
    """Each process takes one run of the (shuffled) pictures; the first ones come again where they do not divide
    evenly.
    """

    def __init__(
        self, dataset: Dataset, num_replicas: int, rank: int, shuffle: bool = True, seed: int = 0
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
        """All pictures, the same on every process."""
        if not self.shuffle:
            return list(range(len(self.dataset)))
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return torch.randperm(len(self.dataset), generator=generator).tolist()

    def __iter__(self) -> Iterator[int]:
        order = self.order()
        order += order[: self.num_samples * self.num_replicas - len(order)]
        return iter(order[self.rank * self.num_samples : (self.rank + 1) * self.num_samples])


class NodeSampler(ChunkSampler):
    """A process sees only pictures whose index leaves its own remainder, so that a node keeps each picture once
    (`--cache_mode`).

    local_rank, local_size: place of the process on its node, and processes there.
    """

    def __init__(
        self,
        dataset: Dataset,
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
    """Batches of pictures that are all wider than high, or all not: less of a batch is padding.

    As in mmdetection, a kind that does not fill its batches on all processes begins again: every picture is seen in
    every epoch, some twice (more often where a kind has few), and all processes have as many batches. Batches of both
    kinds come in random order.

    sizes: [N, 2] height and width of the pictures. local_rank, local_size: with --cache_mode, as for `NodeSampler`;
    where a process holds no picture of a kind that others hold, it takes theirs.
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
        # Of the processes that hold most of a kind: all have the same number.
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
        """Batches of one kind for the processes that hold the same share, one a node."""
        pictures = [index for index in order if self.wide[index] == kind]
        held = [index for index in pictures if index % self.local_size == self.local_rank] or pictures
        endless = cycle(held)
        return [list(islice(endless, self.batch_size)) for _ in range(self.batches[kind] * self.nodes)]
