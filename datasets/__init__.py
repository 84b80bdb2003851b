"""Data sets by the name of their format. Inference needs a few modules of this package, and none that reads annotations."""

from __future__ import annotations

import argparse
from importlib import import_module
from typing import TYPE_CHECKING

from datasets.class_map import ClassMap
from util.errors import UserError

if TYPE_CHECKING:
    from datasets.image_dataset import ImageDataset

# Value of --dataset_file -> module whose `build(image_set, args, class_map)` makes the data set.
DATASETS = {
    'coco': 'datasets.coco',
    'lvis': 'datasets.lvis',
    'voc': 'datasets.foreign',
    'yolo': 'datasets.foreign',
    'shapes': 'datasets.shapes',
}


def build_dataset(
    image_set: str, args: argparse.Namespace, class_map: ClassMap | None = None
) -> ImageDataset:
    """Build the 'train' or 'val' part of --dataset_file, or of --train_shards and --val_shards.

    Args:
        class_map: class indices that are settled already, for instance those of the training part or of a checkpoint.

    Raises:
        UserError: the format is not known, or the data are wrong.
        TypeError: the data set does not keep the contract of `datasets.image_dataset.ImageDataset`.
    """
    from datasets.image_dataset import ImageDataset

    if getattr(args, f'{image_set}_shards', None):
        module = 'datasets.streaming.shards'
    elif args.dataset_file in DATASETS:
        module = DATASETS[args.dataset_file]
    else:
        raise UserError(
            f'--dataset_file {args.dataset_file!r} is not known: choose one of {", ".join(DATASETS)}'
        )
    dataset = import_module(module).build(image_set, args, class_map)
    missing = [name for name in ('ids', 'class_map') if not hasattr(dataset, name)]
    if not isinstance(dataset, ImageDataset) or missing:
        lacks = f'lacks {" and ".join(missing)}' if missing else 'is no ImageDataset'
        raise TypeError(f'{type(dataset).__name__} of {module} {lacks}: see datasets/image_dataset.py')
    return dataset
