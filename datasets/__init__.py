"""Data sets by the name of their format."""

import argparse

from torch.utils.data import Dataset

from datasets.class_map import ClassMap

DATASETS = ('coco', 'shapes')


def shards_of(image_set: str, args: argparse.Namespace) -> str | None:
    """Where the flags say that this part's tar shards are; None = it is read from files."""
    if image_set == 'train':
        return getattr(args, 'train_shards', None)
    return getattr(args, 'val_shards', None)


def build_dataset(image_set: str, args: argparse.Namespace, class_map: ClassMap | None = None) -> Dataset:
    """The 'train' or 'val' part of --dataset_file; class_map: class indices that are already settled, for
    instance those of the training part or of a checkpoint.
    """
    if shards_of(image_set, args):
        from datasets import shards

        return shards.build_shards(image_set, args, class_map)
    if args.dataset_file == 'coco':
        from datasets import coco

        return coco.build(image_set, args, class_map)
    if args.dataset_file == 'shapes':
        from datasets import shapes

        return shapes.build(image_set, args)
    raise ValueError(
        f'--dataset_file {args.dataset_file!r} is not known: choose one of {", ".join(DATASETS)}'
    )
