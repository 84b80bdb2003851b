"""Recorded numbers and small data sets beside the checkout; tests that need them are skipped where they are
absent.
"""

import json
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from datasets.build import build_dataset, data_settings
from datasets.class_map import ClassMap
from datasets.image_dataset import ImageDataset
from tests.rule import uniform

SHARED = Path(__file__).resolve().parents[2] / 'shared'
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason='needs the folder shared/ beside the checkout')


def read_shared(name: str) -> dict:
    """A JSON file of the shared folder; an empty dict where the folder is absent, so that tests can be
    collected.
    """
    return json.loads((SHARED / name).read_text()) if SHARED.is_dir() else {}


def rule_image(name: str, height: int, width: int) -> np.ndarray:
    """uint8 [height, width, 3], the same on every machine."""
    return np.floor((uniform(name, (height, width, 3)) + 1) / 2 * 256).astype(np.uint8)


def assert_target_equals(target: dict[str, Tensor], recorded: dict) -> None:
    """Every recorded field exactly, with its dtype; of masks the shape and the sums."""
    assert set(target) == set(recorded_fields(recorded))
    for key, value in target.items():
        assert str(value.dtype) == recorded[f'{key}_dtype'], key
        if key == 'masks':
            assert list(value.shape) == recorded['masks_shape']
            assert value.flatten(1).sum(1).tolist() == recorded['masks_area']
        else:
            expected = torch.tensor(recorded[key], dtype=value.dtype).reshape(value.shape)
            assert torch.equal(value, expected), f'{key}: {value} instead of {expected}'


def build_data(part: str, args: Namespace, class_map: ClassMap | None = None) -> ImageDataset:
    """A part of the data that flags name; those that are missing have their defaults."""
    return build_dataset(part, data_settings(args), class_map)


def recorded_fields(recorded: dict) -> list[str]:
    """The target's keys, in their order."""
    return [key.removesuffix('_dtype') for key in recorded if key.endswith('_dtype')]


# Pillow starts Ghostscript to read this.
EPS = b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n'


def put_ghostscript(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program in place of Ghostscript that leaves the file `ran` in its folder."""
    path.write_text(f'#!/bin/sh\ntouch {path.parent}/ran\n')
    path.chmod(0o755)
    monkeypatch.setattr('PIL.EpsImagePlugin.gs_binary', str(path))
