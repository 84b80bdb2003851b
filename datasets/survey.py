"""What the files of a run's data show at its start: their number, what is unusual, and how images are read."""

import tempfile
from argparse import Namespace
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

from datasets import coco, lvis
from datasets.build import build_dataset, data_limits, data_settings, locate
from datasets.coco_json import Issues, read_lists
from datasets.headers import describe_headers, find_flat, find_reading
from datasets.image_dataset import ImageDataset
from datasets.inventory import print_inventory, take_inventories
from datasets.readers import build_reader
from datasets.shard_index import read_index
from datasets.unreadable import UnreadableImages
from util.config.rules import is_shards
from util.config.settle import Settled
from util.distributed.collectives import broadcast_object, fail_together, is_main_process
from util.errors import FileError
from util.logger import print_main


def survey_files(args: Settled, datasets: Mapping[str, ImageDataset]) -> dict[str, Any]:
    """Print what the data hold, and settle how their images are read. All ranks call it.

    Returns:
        The flags of `find_reading`.

    Raises:
        UserError: there is no training object, or too many images cannot be read.
    """
    with fail_together():
        if is_main_process():
            names = list(datasets.values())[-1].class_map.names
            print_inventory(take_inventories(datasets), names, **data_limits(args))
    handle_unreadable(datasets, data_settings(args).most_unreadable, args.output_dir)
    with fail_together():
        found = settle_reading(args, datasets) if is_main_process() else {}
    found = broadcast_object(found)
    use_readers(args.but(**found), datasets.values())
    return found


def handle_unreadable(datasets: Mapping[str, ImageDataset], limit: int, output_dir: str | None) -> None:
    """Let other images take the place of unreadable training images, and look for some. All ranks call it.

    limit: how many training images may be unreadable (--skip_unreadable).

    Raises:
        UserError: the headers of more training images, or of a validation image, cannot be read.
    """
    train = datasets.get('train')
    if train is not None and limit:
        temporary = Path(tempfile.gettempdir()) / broadcast_object(f'unreadable.{uuid4().hex}.txt')
        train.unreadable = UnreadableImages(
            Path(output_dir) / 'unreadable.txt' if output_dir else temporary, limit
        )
    with fail_together():
        for part, dataset in datasets.items() if is_main_process() else ():
            list_unreadable(part, dataset)


def list_unreadable(part: str, dataset: ImageDataset) -> None:
    """List images without a readable header, or refuse them if the dataset has no list for them."""
    found = dataset.survey.unreadable
    if dataset.unreadable is None:
        if found:
            raise FileError(f'{len(found)} {part} images cannot be read, the first is: {found[0][1]}')
        return
    dataset.unreadable.begin()
    dataset.unreadable.add(*((str(path), error) for path, error in found))
    dataset.unreadable.check()
    if found:
        print(
            f'warning: {len(found)} {part} images cannot be read, and others take their place '
            f'({dataset.unreadable.file} has the reasons); the first is {found[0][0]}'
        )


def settle_reading(args: Settled, datasets: Mapping[str, ImageDataset]) -> dict[str, Any]:
    """Let the datasets of a run read their images as flags and files say, and print what is found.

    Returns the flags of `find_reading`.
    """
    found = find_reading(args, [dataset.survey for dataset in datasets.values()])
    use_readers(args.but(**found), datasets.values())
    for part, dataset in datasets.items():
        for line in describe_headers(dataset.survey, dataset.reader).lines():
            print(f'{part} {line}')
        for line in find_flat(dataset.survey, dataset.reader):
            print(f'warning: {part} {line}', flush=True)
    return found


def use_readers(settings: object, datasets: Iterable[ImageDataset]) -> None:
    """Let datasets read their images as flags say."""
    for dataset in datasets:
        dataset.use_reader(build_reader(settings))


def count_train_images(args: Namespace) -> int | None:
    """Return the number of training images at hand, for --dry_run; None if flags name none.

    Of annotations in COCO form only the list of images is read.

    Raises:
        UserError: the data are invalid, or not clear.
    """
    place = args.train_ann or args.coco_path
    if place is None or args.dataset_file == 'shapes':
        return None
    if not Path(place).exists():
        name = 'LVIS' if args.dataset_file == 'lvis' else 'COCO'
        print_main(f'{place} does not exist: the number of images is that of {name}')
        return None
    settings = locate(data_settings(args))
    if settings.found:
        print_main(settings.found)
    if is_shards(settings.train_ann):
        return read_index(settings.train_ann, settings.allow_pipe).images
    if settings.dataset_file not in ('coco', 'lvis'):
        return len(build_dataset('train', settings))
    if settings.dataset_file == 'lvis':
        file = lvis.find_annotations('train', settings)
    else:
        _, file = coco.find_files('train', settings.coco_path, settings.train_images, settings.train_ann)
    total = len(read_lists(file, Issues())['images'])
    return total - int(total * settings.val_share + 0.5)
