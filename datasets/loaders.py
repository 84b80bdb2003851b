"""Data sets of a run and their batches. Classes are set once; every rank gets its share of the batches."""

from argparse import Namespace

import numpy as np
import torch
from torch.utils.data import DataLoader, DistributedSampler, Sampler

from datasets.build import build_dataset, data_settings
from datasets.class_map import ClassMap
from datasets.copy_paste import MAX_PASTED
from datasets.image_dataset import ImageDataset, loader_options
from datasets.samplers import (
    AspectSampler,
    ChunkSampler,
    EpochBatches,
    EvalBatches,
    NodeSampler,
    SizeBatches,
)
from datasets.streaming.shards import ShardedCoco, ShardStream, build_shard_loader
from util.distributed.collectives import get_local_rank, get_local_size, get_rank, get_world_size
from util.errors import UserError


def build_datasets(args: Namespace, class_map: ClassMap | None) -> dict[str, ImageDataset]:
    """Build the data sets that the run will read, with the same class indices.

    class_map: classes of the checkpoint in use, None if it has none.

    Raises:
        UserError: --resume or --eval of a checkpoint with other classes.
    """
    settings = data_settings(args)
    if args.eval:
        datasets = {'val': build_dataset('val', settings, class_map)}
    else:
        train = build_dataset('train', settings)
        datasets = {'train': train}
        if args.eval_every:
            datasets['val'] = build_dataset('val', settings, train.class_map)
    found = list(datasets.values())[-1].class_map
    if (args.resume or args.eval) and class_map is not None and class_map != found:
        if {*class_map.names, None} == {*found.names, None}:
            raise UserError(
                f'{args.resume or args.pretrained} numbers its classes otherwise ({class_map.num_classes} class indices, here '
                f'{found.num_classes}): give the --class_ids of its run'
            )
        raise UserError(
            f'{args.resume or args.pretrained} was trained on {describe(class_map)}, the data has {describe(found)}: evaluate it on its own '
            'data, or fine-tune it on this data with --pretrained'
        )
    return datasets


def describe(class_map: ClassMap) -> str:
    names = [name for name in class_map.names if name is not None]
    return f'{len(names)} classes ({", ".join(names[:5])}{", ..." if len(names) > 5 else ""})'


def build_loader(dataset: ImageDataset, split: str, args: Namespace) -> DataLoader:
    """Build the loader of this rank's batches. Its length is that of a whole epoch, even if the epoch is resumed in
    the middle (`begin_epoch`).
    """
    train = split == 'train'
    if isinstance(dataset, ShardedCoco):
        loader = build_shard_loader(dataset, args.batch_size, args.num_workers, train)
    else:
        batches = build_batches(dataset, train, args)
        loader = DataLoader(dataset, batch_sampler=batches, **loader_options(args.num_workers))
    if train and len(loader) < args.accum_steps:
        images = args.batch_size * args.accum_steps * get_world_size()
        raise UserError(
            f'{len(dataset)} training images do not fill one step of {images}: lower --batch_size or '
            '--total_batch_size'
        )
    return loader


def build_batches(dataset: ImageDataset, train: bool, args: Namespace) -> Sampler[list[int]]:
    """Build the batch sampler of this rank; a batch is a list of image indices."""
    replica, share = (get_world_size(), get_rank()), (0, 1)
    if args.cache_mode:
        share = get_local_rank(), get_local_size()
        dataset.keep_files(*share)
    if train and args.bucket_sizes:
        return SizeBatches(dataset, args.batch_size, *replica, args.seed)
    sampler: ChunkSampler | DistributedSampler[int]
    if train and args.group_aspect_ratio:
        sizes = np.asarray(dataset.image_sizes())
        sampler = AspectSampler(sizes, args.batch_size, *replica, *share, seed=args.seed)
    elif args.cache_mode:
        sampler = NodeSampler(dataset, *replica, *share, train, args.seed)
    elif train:
        drop_last = get_world_size() > 1
        sampler = DistributedSampler(dataset, *replica, shuffle=True, seed=args.seed, drop_last=drop_last)
    else:
        return EvalBatches(len(dataset), args.batch_size, *replica)
    return EpochBatches(sampler, args.batch_size, drop_last=train)


def begin_epoch(loader: DataLoader, epoch: int, first_batch: int = 0) -> None:
    """Set the epoch of a training loader's next pass, and the batch with which it begins. Skipped batches are not read."""
    dataset, batches = loader.dataset, loader.batch_sampler
    if isinstance(dataset, ShardStream):
        dataset.set_epoch(epoch)
        dataset.data.start_at(first_batch)
    else:
        assert isinstance(dataset, ImageDataset) and isinstance(batches, EpochBatches | SizeBatches)
        dataset.set_epoch(epoch)
        batches.set_epoch(epoch, first_batch)


def worst_batch(dataset: ImageDataset, batch_size: int, one_size: bool) -> tuple[tuple[int, int], int]:
    """Return (height, width) of the largest batch that training can meet, and the most objects of an image.

    The sizes are the largest of a few thousand drawn ones. one_size: all images of a batch have about the same size.
    """
    if dataset.mix is not None:
        height, width = dataset[0][0].shape[-2:]
        pasted = min(dataset.most_objects, MAX_PASTED) if dataset.return_masks else 0
        return (height, width), dataset.most_objects + pasted
    originals = dataset.image_sizes()
    chosen = torch.linspace(0, len(originals) - 1, min(len(originals), 500)).long().tolist()
    drawn = [dataset.drawn_size(idx, epoch, originals[idx]) for epoch in range(4) for idx in chosen]
    if one_size or batch_size == 1:
        return max(drawn, key=lambda size: size[0] * size[1]), dataset.most_objects
    return (max(size[0] for size in drawn), max(size[1] for size in drawn)), dataset.most_objects
