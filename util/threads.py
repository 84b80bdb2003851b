"""Threads of this process for work that does not hold Python's lock."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from typing import TypeVar

import numpy as np

from util.distributed.collectives import get_local_size

Result = TypeVar('Result')


def num_threads() -> int:
    """Return how many of the cores that this process may use are its own; the processes of a machine share
    them.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    return max(cores // get_local_size(), 1)


@cache
def helpers() -> ThreadPoolExecutor:
    """Return the threads beside the calling one, which stay until the process ends."""
    return ThreadPoolExecutor(max(num_threads() - 1, 1), 'helper')


if hasattr(os, 'register_at_fork'):
    os.register_at_fork(after_in_child=helpers.cache_clear)  # a child has the object without its threads


def in_parallel(function: Callable[[np.ndarray], Result], arrays: Sequence[np.ndarray]) -> list[Result]:
    """Return the results of a function for arrays, in their order. Whichever thread is free takes the largest
    that is left.

    The calling thread takes part, so that it does not wait for others to wake up. An exception of a call is
    raised when all threads are done.
    """
    results: dict[int, Result] = {}
    order = iter(sorted(range(len(arrays)), key=lambda index: -arrays[index].size))

    def work() -> None:
        for index in order:  # all threads draw from the same iterator
            results[index] = function(arrays[index])

    others = [helpers().submit(work) for _ in range(min(num_threads(), len(arrays)) - 1)]
    try:
        work()
    finally:
        begun = [other for other in others if not other.cancel()]
        wait(begun)
    for other in begun:
        other.result()
    return [results[index] for index in range(len(arrays))]
