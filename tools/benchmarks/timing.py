"""Timing contenders turn about: each begins with the others' data in the cache, as in a real step."""

import statistics
import time
from collections.abc import Callable

import torch


def time_in_turn(
    contenders: dict[str, Callable[[], object]], rounds: int, device: str = 'cpu'
) -> dict[str, float]:
    """Median milliseconds of each; one round more warms up. On a GPU by events, without the launch time of the
    first call.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds + 1):
        for name, call in contenders.items():
            times[name].append(time_once(call, device))
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def time_once(call: Callable[[], object], device: str) -> float:
    if device != 'cuda':
        start = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - start)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end)
