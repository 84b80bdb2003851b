"""Datasets of a run and their batches. Classes are set once; every rank gets its share of the batches."""

from argparse import Namespace

import torch
from torch.utils.data import DataLoader, Sampler

from datasets.build import DataSettings, build_dataset, data_settings, locate
from datasets.class_map import ClassMap
from datasets.copy_paste import MAX_PASTED
from datasets.image_dataset import ImageDataset, loader_options
from datasets.layouts import FORMATS
from datasets.samplers import BATCHES, EvalBatches, TrainBatches
from datasets.shards import ShardedCoco, ShardStream, build_shard_loader
from util.distributed.collectives import (
    get_rank,
    get_world_size,
)
from util.errors import UserError
from util.logger import print_main


def build_datasets(args: Namespace, class_map: ClassMap | None) -> dict[str, ImageDataset]:
    """Build the datasets that a run reads, with the same class indices.

    class_map: classes of the checkpoint in use, None if it has none.

    Raises:
        UserError: the data lack a part, or --resume or --eval has a checkpoint with other classes.
    """
    if args.cache_mode:
        print_main(
            '--cache_mode is not needed: the operating system keeps files that were read in free memory'
        )
    settings = locate(data_settings(args), alone=args.eval)
    if settings.found:
        print_main(settings.found)
    datasets: dict[str, ImageDataset] = {}
    for part in parts_to_read(args, settings):
        first = datasets['train'].class_map if datasets else None
        datasets[part] = build_dataset(part, settings, class_map if args.eval else first)
    if (args.resume or args.eval) and class_map is not None:
        check_classes(list(datasets.values())[-1].class_map, class_map, args.resume or args.pretrained)
    return datasets


def parts_to_read(args: Namespace, settings: DataSettings) -> list[str]:
    """Return the parts that a run reads. --check_data does without a validation part.

    Raises:
        UserError: there is no validation part.
    """
    parts = ['val'] if args.eval else ['train', 'val'] if args.eval_every else ['train']
    if 'val' not in parts or settings.parts != {'train'}:
        return parts
    text = f'{settings.found or settings.train_ann or settings.coco_path}: there is no validation part'
    if args.check_data and not args.eval:
        share = '--val_share 0.1, or ' if settings.dataset_file in FORMATS else ''
        print_main(f'{text}; a run needs one, or {share}--eval_every 0')
        return ['train']
    if settings.dataset_file not in FORMATS:
        return parts  # building the part names the files that are missing
    others = (
        ''
        if args.eval
        else (', take it from the training images with --val_share 0.1, or leave it out with --eval_every 0')
    )
    raise UserError(f'{text}: name it with --val_images and --val_ann{others}')


def check_classes(class_map: ClassMap, trained: ClassMap, file: str) -> None:
    """Compare the classes of the data with those of a checkpoint.

    Raises:
        UserError: they differ, or have other indices.
    """
    if trained == class_map:
        return
    if {*trained.names, None} == {*class_map.names, None}:
        raise UserError(
            f'{file} numbers its classes in another way ({trained.num_classes} class indices, here '
            f'{class_map.num_classes}): give the --class_ids of its run'
        )
    raise UserError(
        f'{file} was trained on {describe_classes(trained)}, the data has {describe_classes(class_map)}: '
        'evaluate it on its own data, or fine-tune it on this data with --pretrained'
    )


def describe_classes(class_map: ClassMap) -> str:
    names = [name for name in class_map.names if name is not None]
    return f'{len(names)} classes ({", ".join(names[:5])}{", ..." if len(names) > 5 else ""})'


def build_loader(
    dataset: ImageDataset,
    part: str,
    batch_size: int,
    num_workers: int = 0,
    batching: str = 'random',
    seed: int = 0,
) -> DataLoader:
    """Build the loader of this rank's batches of the part 'train' or 'val'.

    Its length is that of a whole epoch, even if the epoch is resumed in the middle (`begin_epoch`).

    Args:
        batch_size: images of this rank.
        batching: how training batches are made, a name in `datasets.samplers.BATCHES`.
        seed: of the order of training images.
    """
    rank, num_replicas = get_rank(), get_world_size()
    if isinstance(dataset, ShardedCoco):
        return build_shard_loader(dataset, batch_size, num_workers, part == 'train', rank, num_replicas)
    batches: Sampler[list[int]] = EvalBatches(len(dataset), batch_size, num_replicas, rank)
    if part == 'train':
        batches = BATCHES[batching](dataset, batch_size, num_replicas, rank, seed)
    return DataLoader(dataset, batch_sampler=batches, **loader_options(num_workers))


def check_steps(loader: DataLoader, num_images: int, batch_size: int, accum_steps: int) -> None:
    """Refuse training images that do not fill one optimizer step."""
    if len(loader) < accum_steps:
        images = batch_size * accum_steps * get_world_size()
        raise UserError(
            f'{num_images} training images do not fill one step of {images}: lower --batch_size or '
            '--total_batch_size'
        )


def begin_epoch(loader: DataLoader, epoch: int, first_batch: int = 0) -> None:
    """Set the epoch that a training loader reads next, and its first batch. Skipped batches are not read."""
    dataset, batches = loader.dataset, loader.batch_sampler
    if isinstance(dataset, ShardStream):
        dataset.data.set_epoch(epoch)
        dataset.data.start_at(first_batch)
    else:
        assert isinstance(dataset, ImageDataset) and isinstance(batches, TrainBatches)
        dataset.set_epoch(epoch)
        batches.set_epoch(epoch, first_batch)


def worst_batch(dataset: ImageDataset, batch_size: int, one_size: bool) -> tuple[tuple[int, int], int]:
    """Return (height, width) of the largest batch that training can meet, and the most objects of an image.

    The sizes are the largest of a few thousand drawn sizes. one_size: all images of a batch have about the
    same size.
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
