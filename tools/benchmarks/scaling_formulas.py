"""
What training on many GPUs costs, as formulas: bytes, seconds, shares in [0, 1]. Nothing is measured here.

Left out on purpose: congestion between jobs, jitter of the network, and collectives that NCCL does inside switches.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Links:
    """What GPUs are connected by. Rates are bytes/s of one GPU in one direction, as they are reached; hop: seconds."""

    node_gpus: int
    in_node: float
    between_nodes: float
    hop: float


@dataclass(frozen=True)
class Saving:
    """What checkpoints cost, seconds. cost: training stands still for one; restart: from a failure to the next step;
    mtbf: mean time between failures of the whole job.
    """

    cost: float
    restart: float
    mtbf: float

    def best_interval(self) -> float:
        """Seconds of work between two checkpoints that lose least (Young 1974; Daly 2006, first order)."""
        return math.sqrt(2 * self.cost * self.mtbf)

    def lost_share(self, interval: float) -> float:
        """Saving, half an interval of work repeated per failure, and the restart; at most 1. First order: only good
        where an interval is much shorter than the time between failures.
        """
        return min(self.cost / interval + (interval / 2 + self.restart) / self.mtbf, 1.0)


def ring_bytes(world: int, payload: float) -> float:
    """What each process sends, and receives, in a ring all-reduce: a reduce-scatter, then an all-gather."""
    return 2 * shard_bytes(world, payload)


def shard_bytes(world: int, payload: float) -> float:
    """What each process sends, and receives, in an all-gather or a reduce-scatter of `payload` in all."""
    return (world - 1) / world * payload


def fsdp_bytes(world: int, parameters: float, gradients: float) -> float:
    """A step of FSDP2: parameters are gathered for the forward and again for the backward pass, gradients scattered."""
    return 2 * shard_bytes(world, parameters) + shard_bytes(world, gradients)


def tree_latency(world: int, links: Links) -> float:
    """Seconds of an all-reduce of next to nothing: up and down a binary tree, as NCCL does it for small payloads."""
    return 2 * math.ceil(math.log2(world)) * links.hop


def all_reduce_seconds(world: int, payload: float, links: Links) -> float:
    """Every GPU has its own network card, and nodes exchange sums: a card carries its share of what leaves a node."""
    if world == 1:
        return 0.0
    per_node = min(links.node_gpus, world)
    inside = ring_bytes(world, payload) / links.in_node
    across = ring_bytes(math.ceil(world / per_node), payload) / (per_node * links.between_nodes)
    return max(inside, across) + tree_latency(world, links)


def fsdp_seconds(world: int, parameters: float, gradients: float, links: Links) -> float:
    """Two gathers and a scatter are one and a half all-reduces; latencies of single layers left out."""
    return all_reduce_seconds(world, parameters, links) + all_reduce_seconds(world, gradients, links) / 2


def exposed_seconds(world: int, gradients: float, bucket: float, backward: float, links: Links) -> float:
    """What DDP adds to a step. All buckets but the last travel during the backward pass (`backward` seconds), one
    after the other; the last, of the first layers, has nothing left to hide behind.
    """
    bucket = min(bucket, gradients)
    last = all_reduce_seconds(world, bucket, links)
    rest = (math.ceil(gradients / bucket) - 1) * last
    return last + max(rest - backward, 0.0)


def job_mtbf(world: int, gpu_mtbf: float) -> float:
    """Failures of GPUs are independent, and one ends the job."""
    return gpu_mtbf / world


def waiting(
    sizes: Tensor, world: int, batch_size: int, bucketed: bool, steps: int = 64
) -> tuple[float, float]:
    """Padding as a share of a batch, and pixels of the largest batch of a step over those of the mean batch.

    sizes: [N, 2] heights and widths to draw from, with replacement. bucketed: images of `steps` steps are sorted by
    size before they are dealt out, else as they come.
    """
    generator = torch.Generator().manual_seed(0)
    drawn = sizes[torch.randint(len(sizes), (steps * world * batch_size,), generator=generator)].double()
    if bucketed:
        # Wide and high ones apart; within each by area.
        area, wide = drawn.prod(dim=1), drawn[:, 1] > drawn[:, 0]
        drawn = drawn[torch.argsort(area + wide * 2 * area.max())]
    batches = drawn.view(steps, world, batch_size, 2)
    padded = batch_size * batches.amax(dim=2).prod(dim=-1)  # [steps, world]
    padding = 1 - drawn.prod(dim=1).sum() / padded.sum()
    return float(padding), float(padded.amax(dim=1).sum() / padded.mean(dim=1).sum())
