"""Threads of this process for work that releases the lock of Python."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from typing import TypeVar

import numpy as np

from util.distributed.collectives import get_local_size

Result = TypeVar('Result')


def num_threads() -> int:
    """Return this process's share of the cores, which the processes of a machine divide."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    return max(cores // get_local_size(), 1)


@cache
def helpers() -> ThreadPoolExecutor:
    """Return the threads that help the calling one. They stay until the process ends."""
    return ThreadPoolExecutor(max(num_threads() - 1, 1), 'helper')


if hasattr(os, 'register_at_fork'):
    os.register_at_fork(after_in_child=helpers.cache_clear)  # a forked child has no threads


def in_parallel(function: Callable[[np.ndarray], Result], arrays: Sequence[np.ndarray]) -> list[Result]:
    """Return the results of a function for arrays, in order. A free thread takes the largest one left.

    The calling thread works too, so that it does not wait for others to wake up. An exception of a call is
    raised when all threads are done.
    """
    results: dict[int, Result] = {}
    order = iter(sorted(range(len(arrays)), key=lambda index: -arrays[index].size))

    def work() -> None:
        for index in order:  # all threads share the iterator
            results[index] = function(arrays[index])

    others = [helpers().submit(work) for _ in range(min(num_threads(), len(arrays)) - 1)]
    try:
        work()
    finally:
        started = [other for other in others if not other.cancel()]
        wait(started)
    for other in started:
        other.result()
    return [results[index] for index in range(len(arrays))]
