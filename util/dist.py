"""Processes: who am I, and averages over all of them. Everything works in a single process too."""

import os

import torch
import torch.distributed as dist
from torch import Tensor


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def get_world_size() -> int:
    return dist.get_world_size() if is_distributed() else 1


def get_rank() -> int:
    return dist.get_rank() if is_distributed() else 0


def is_main_process() -> bool:
    return get_rank() == 0


def init_distributed(dist_url: str = 'env://') -> int:
    """Join the process group of torchrun (RANK, WORLD_SIZE, LOCAL_RANK), if there is one.

    Returns this process's number on its machine: the GPU that it uses. 0 in a single process.
    """
    if 'RANK' not in os.environ or 'WORLD_SIZE' not in os.environ:
        return 0
    local_rank = int(os.environ.get('LOCAL_RANK', 0))
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
    dist.init_process_group('nccl' if torch.cuda.is_available() else 'gloo', init_method=dist_url)
    return local_rank


def all_reduce_sum(values: Tensor) -> Tensor:
    """Sum over processes; the tensor itself in a single process."""
    if get_world_size() > 1:
        dist.all_reduce(values)
    return values


def all_gather_object(value: object) -> list:
    """One picklable value of every process, in rank order."""
    if get_world_size() == 1:
        return [value]
    gathered = [None] * get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered
