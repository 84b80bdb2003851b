"""
Which pictures a process sees, as in Deformable DETR's code. PyTorch's own sampler deals pictures out one by one
and is used for training; these two keep runs of them, or those that a node's process holds in memory, together.
"""

import math
from collections.abc import Iterator

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
