"""Matching on threads: the same pairs, whoever finds them, in any process."""

import os
import threading
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from models.training import matcher
from util import threads
from util.threads import in_parallel, num_threads

WAIT = 2  # seconds until a test gives up


@pytest.fixture(autouse=True)
def three_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(threads, 'num_threads', lambda: 3)
    threads.helpers.cache_clear()
    yield
    threads.helpers().shutdown()
    threads.helpers.cache_clear()


def arrays(*sizes: int) -> list[np.ndarray]:
    return [np.full(size, size) for size in sizes]


@pytest.mark.parametrize('repeats', [1, 3])
def test_threads_find_the_same_pairs(repeats: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the same order, for images without objects and with more than queries, too."""
    sizes, found = [5, 0, 30, 12], []
    cost = np.random.default_rng(0).random((4, len(sizes), max(sizes), 20), dtype=np.float32)
    for worth in (0, 10**9):
        monkeypatch.setattr(matcher, 'WORTH_THREADS', worth)
        found.append(matcher.HungarianMatcher(repeats=repeats).solve(cost, sizes))
    for ours, theirs in zip(*found, strict=True):
        for name in ('batch', 'query', 'target'):
            assert torch.equal(getattr(ours, name), getattr(theirs, name))
            assert getattr(ours, name).dtype == torch.int64


def test_layers_and_images_are_matched_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    original, three = matcher.linear_sum_assignment, threading.Barrier(3)

    def together(cost: np.ndarray) -> tuple:
        three.wait(WAIT)
        return original(cost)

    monkeypatch.setattr(matcher, 'linear_sum_assignment', together)
    layers = matcher.HungarianMatcher(repeats=6).solve(np.zeros((3, 2, 20, 300), dtype=np.float32), [20, 20])
    assert [len(layer.query) for layer in layers] == [240] * 3


def test_small_problems_wake_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matcher, 'in_parallel', None)
    matcher.HungarianMatcher().solve(np.zeros((6, 2, 20, 300), dtype=np.float32), [20, 20])


def test_the_largest_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, 'num_threads', lambda: 1)
    begun: list[int] = []
    assert in_parallel(lambda x: begun.append(x.size) or x.size, arrays(3, 0, 7, 5)) == [3, 0, 7, 5]
    assert begun == [7, 5, 3, 0]
    assert in_parallel(len, []) == []


@pytest.mark.parametrize('in_helper', [True, False])
def test_an_exception_comes_out_and_threads_stay_usable(in_helper: bool) -> None:
    caller, three = threading.current_thread(), threading.Barrier(3)

    def fails(x: np.ndarray) -> int:
        three.wait(WAIT)
        if (threading.current_thread() is caller) != in_helper:
            raise KeyError('mine')
        return x.size

    with pytest.raises(KeyError, match='mine'):
        in_parallel(fails, arrays(1, 2, 3))
    assert in_parallel(len, arrays(1, 2, 3)) == [1, 2, 3]


class InWorker(Dataset):
    """Matches in a forked process of a loader."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, idx: int) -> int:
        three = threading.Barrier(3)
        return sum(in_parallel(lambda x: three.wait(WAIT) * 0 + x.size, arrays(1, 2, 3)))


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork')
def test_a_forked_process_has_threads_of_its_own() -> None:
    assert in_parallel(len, arrays(1, 2, 3)) == [1, 2, 3]  # the threads of this process exist
    loader = DataLoader(InWorker(), batch_size=None, num_workers=1, multiprocessing_context='fork')
    assert list(loader) == [6]


def test_processes_share_the_cores_that_they_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, 'sched_getaffinity', lambda process: set(range(8)), raising=False)
    for processes, expected in ((1, 8), (3, 2), (16, 1)):
        monkeypatch.setattr(threads, 'get_local_size', lambda processes=processes: processes)
        assert num_threads() == expected
