"""Timing of contenders in turn: each begins with the others' data in the cache, as in a real step."""

import statistics
import time
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

FLUSHED_BYTES = 2**29  # more than any cache holds; writing them takes 0.1 to 0.2 ms


def time_in_turn(
    contenders: dict[str, Callable[[], object]], rounds: int, device: str = 'cpu'
) -> dict[str, float]:
    """Return median milliseconds of each contender, after one more round to warm up."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds + 1):
        for name, call in contenders.items():
            times[name].append(time_once(call, device))
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def time_once(call: Callable[[], object], device: str) -> float:
    """Time one call; on a GPU by events, with empty caches.

    While the caches are emptied, the host gets ahead. A single kernel is thus timed without its launch, and a step of
    many with all its waits for the host.
    """
    if device != 'cuda':
        start = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - start)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    flushed().zero_()
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end)


@cache
def flushed() -> Tensor:
    return torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device='cuda')
