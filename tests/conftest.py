"""Tests marked `gpu` are skipped without an NVIDIA GPU, those marked `exhaustive` without --exhaustive."""

import subprocess
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
import torch

import main
from tests.processes import EXTRAS

REASON = 'shows on one more case what another test shows: add --exhaustive'


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption('--exhaustive', action='store_true', help='run all cases of what a few cases show too')


@pytest.fixture
def exhaustive(request: pytest.FixtureRequest) -> bool:
    """Whether every case is asked for."""
    return request.config.getoption('--exhaustive')


@pytest.fixture(autouse=True)
def plain_runs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let runs in a test draw nothing and count no operations, unless it is marked `draws`, to save time."""
    if not request.node.get_closest_marker('draws'):
        for name, module in EXTRAS.items():
            place = main if hasattr(main, name) else import_module(module)
            monkeypatch.setattr(place, name, lambda *_: '')


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 96 MB, four and a half checkpoints."""
    place = tmp_path / 'disk'
    place.mkdir()
    mounted = subprocess.run(
        ['mount', '-t', 'tmpfs', '-o', 'size=96m', 'none', str(place)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip('needs the right to mount a small file system')
    yield place
    subprocess.run(['umount', '-l', str(place)], check=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker('gpu') and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason='needs an NVIDIA GPU'))
        if item.get_closest_marker('exhaustive') and not config.getoption('--exhaustive'):
            item.add_marker(pytest.mark.skip(reason=REASON))
