"""Whole runs of main.py on the built-in images, so small that each takes seconds, and what they leave."""

import contextlib
from argparse import Namespace
from pathlib import Path

import torch

import main

ROOT = Path(__file__).resolve().parents[1]
TINY = """--dataset_file shapes --shapes_train 12 --shapes_val 4 --shapes_size 64 --img_size 64 --max_size 64
    --backbone resnet10 --backbone_weights none --backbone_norm batch --backbone_stages 3 --hidden_dim 32
    --nheads 4 --enc_layers 1 --dec_layers 2 --dim_feedforward 64 --num_queries 10 --conditional
    --batch_size 4 --num_workers 0 --epochs 3 --lr_drop 2 --device cpu --lr 1e-3 --lr_backbone 1e-3"""


def run(folder: Path | str, *more: str, flags: str = TINY) -> None:
    main.main(parse(folder, *more, flags=flags))


def parse(folder: Path | str, *more: str, flags: str = TINY) -> Namespace:
    return main.get_args_parser().parse_args([*flags.split(), '--output_dir', str(folder), *more])


def load(folder: Path) -> dict:
    return torch.load(folder / 'checkpoint.pth', weights_only=True)


def assert_same(ours: object, theirs: object, where: str = 'checkpoint') -> None:
    """Equal to the last bit, all the way down; the folder of a run may differ."""
    assert type(ours) is type(theirs), where
    if isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs), where
    elif isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), where
        for key in set(ours) - {'output_dir', 'resume', 'num_workers'}:
            assert_same(ours[key], theirs[key], f'{where}.{key}')
    elif isinstance(ours, (list, tuple)):
        assert len(ours) == len(theirs), where
        for index, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            assert_same(one, other, f'{where}[{index}]')
    else:
        assert ours == theirs, where


def fill_disk(place: Path) -> None:
    """Leave no room on a file system, by a file `filler`."""
    with (place / 'filler').open('wb', buffering=0) as filler, contextlib.suppress(OSError):
        while True:
            filler.write(bytes(4096))
