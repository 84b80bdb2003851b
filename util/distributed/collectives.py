"""Ranks, devices and collectives. All functions work in a single process too."""

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from util.distributed.launch import export_launcher_environment
from util.errors import UserError

# For a collective, for instance while the main process computes metrics. If a process dies, the launcher ends
# the others at once; this limit is for a process that hangs.
TIMEOUT = timedelta(hours=1)


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def get_world_size() -> int:
    return dist.get_world_size() if is_distributed() else 1


def get_rank() -> int:
    return dist.get_rank() if is_distributed() else 0


def get_local_size() -> int:
    """Return the number of processes on this machine (LOCAL_WORLD_SIZE of torchrun, LOCAL_SIZE of others)."""
    if not is_distributed():
        return 1
    return int(os.environ.get('LOCAL_WORLD_SIZE') or os.environ.get('LOCAL_SIZE') or 1)


def is_main_process() -> bool:
    return get_rank() == 0


def choose_device(name: str) -> torch.device:
    """Choose a device. `auto` takes the first of cuda, mps, cpu. Each rank of a machine takes its own GPU.

    Raises:
        UserError: there is no such device.
    """
    export_launcher_environment()
    if name == 'auto':
        name = 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu'
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f'--device {name} is not known: choose auto, cuda, mps or cpu') from error
    if device.type != 'cuda':
        return device
    if not torch.cuda.is_available():
        raise UserError(f'--device {name}: no usable NVIDIA GPU here; use --device auto')
    # Slurm may show a process only its own GPU.
    local = int(os.environ.get('LOCAL_RANK', 0)) % torch.cuda.device_count()
    index = device.index if device.index is not None else local
    torch.cuda.set_device(index)
    return torch.device('cuda', index)


def init_distributed(device: torch.device, dist_url: str = 'env://') -> None:
    """Join the process group of the launcher (RANK, WORLD_SIZE), if any: NCCL for GPUs, else gloo."""
    if 'RANK' not in os.environ or 'WORLD_SIZE' not in os.environ or is_distributed():
        return
    backend = 'nccl' if device.type == 'cuda' else 'gloo'
    rank, size, attempt = (
        int(os.environ.get(name, 0)) for name in ('RANK', 'WORLD_SIZE', 'TORCHELASTIC_RESTART_COUNT')
    )
    place: dict[str, Any] = {'init_method': dist_url}
    # Machines may have different counts of restarts.
    one_machine = os.environ.get('LOCAL_WORLD_SIZE') == str(size)
    if attempt and one_machine and os.environ.get('TORCHELASTIC_USE_AGENT_STORE') == 'True':
        # The store of torchrun still holds the addresses of the processes that have ended.
        address = os.environ['MASTER_ADDR'], int(os.environ['MASTER_PORT'])
        store = dist.TCPStore(*address, size, is_master=False)
        place = {'store': dist.PrefixStore(f'attempt{attempt}', store), 'rank': rank, 'world_size': size}
    dist.init_process_group(backend, timeout=TIMEOUT, **place)


def leave_distributed() -> None:
    """Leave the process group with all other ranks. No variable may refer to a model of DDP any more.

    Such a model would be the last owner of the group. When it is freed, it waits for the threads of the group
    while it holds the lock of Python, and one of them may wait for that lock to free a tensor.
    `destroy_process_group` waits without the lock.
    """
    if is_distributed():
        dist.barrier()
        gc.collect()
        dist.destroy_process_group()


def all_reduce_sum(values: Tensor) -> Tensor:
    """Sum a tensor over all ranks, in place."""
    if get_world_size() > 1:
        dist.all_reduce(values)
    return values


def all_gather_object(value: object) -> list:
    """Gather one picklable value of every rank, in rank order."""
    if get_world_size() == 1:
        return [value]
    gathered = [None] * get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def gather_object(value: object) -> list:
    """Gather one picklable value of every rank on the main process, in rank order; [] on the others."""
    if get_world_size() == 1:
        return [value]
    gathered = [None] * get_world_size() if is_main_process() else None
    dist.gather_object(value, gathered)
    return gathered or []


def broadcast_object(value: Any) -> Any:
    """Return the main process's picklable value on every rank."""
    values = [value]
    if get_world_size() > 1:
        dist.broadcast_object_list(values)
    return values[0]


@contextmanager
def fail_together() -> Iterator[None]:
    """Let an error of one rank stop all ranks at the end of the block, instead of leaving them waiting.

    The block must not hold a collective that only some ranks reach.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as raised:
        error = raised
    texts = all_gather_object(None if error is None else str(error))
    if error is not None:
        raise error
    for rank, text in enumerate(texts):
        if text is not None:
            raise UserError(f'process {rank}: {text}')


def check_agreement(facts: dict[str, object]) -> None:
    """Require that all ranks give the same facts (name to value).

    Raises:
        UserError: they differ; the message names the first difference.
    """
    first, *others = all_gather_object(facts)
    for rank, other in enumerate(others, start=1):
        for name in [*first, *(name for name in other if name not in first)]:
            if first.get(name) != other.get(name):
                raise UserError(
                    f'the processes disagree: {name} is {first.get(name)} in process 0 and {other.get(name)} '
                    f'in process {rank}. Start all of them with the same command, data and versions'
                )
