"""Loading the same images from files and from tar shards: reading alone, and up to the network's input."""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from datasets.augmentations import DETRAugmentation
from datasets.coco import CocoDetection
from datasets.image_io import stored_size
from datasets.streaming.index import import_webdataset
from datasets.streaming.shards import ShardedCoco, ShardStream
from tools.make_shards import get_args_parser, make_shards
from util.errors import UserError

BOXES = 7  # as many as COCO has an image


def report_shards(root: Path, paths: list[Path], folder: Path, args: argparse.Namespace) -> None:
    """Write shards of the images into the folder, and print images per second. WebDataset may be missing."""
    try:
        import_webdataset()
    except UserError as error:
        print(f'\nfiles against shards: left out, {error}')
        return
    annotations, place = folder / 'boxes.json', folder / 'shards'
    annotations.write_text(json.dumps(coco_form(root, paths)))
    words = ['--images', str(root), '--ann', str(annotations), '--output', str(place), '--shard_size', '1000']
    make_shards(get_args_parser().parse_args(words))
    transforms = DETRAugmentation().transforms('train')
    files = CocoDetection(root, annotations, transforms, seed=args.seed)
    shards = ShardedCoco(str(place), transforms, seed=args.seed)
    stream = ShardStream(shards, 1, True, 0, 1)
    check_agreement(files, stream)
    print('\nfiles against tar shards, in the page cache; items of both are equal')
    report('reading alone', len(paths), args.rounds, {
        'files': lambda: [path.read_bytes() for path in paths],
        'tar shards': lambda: list(shards.read(range(len(paths)))),
    })  # fmt: skip
    report('training input', len(paths), args.rounds, {
        'files': lambda: sum(files[idx][0].shape[0] for idx in range(len(paths))),
        'tar shards': lambda: sum(image.shape[0] for image, _ in stream),
    })  # fmt: skip


def coco_form(root: Path, paths: list[Path]) -> dict:
    """Make annotations of the images with a row of boxes each."""
    images, annotations = [], []
    for number, path in enumerate(paths):
        height, width = stored_size(path)
        images.append(
            {'id': number, 'file_name': str(path.relative_to(root)), 'height': height, 'width': width}
        )
        for box in range(BOXES):
            bbox = [box * width / BOXES, box, width / BOXES, height / 2]
            annotations.append(
                {'id': len(annotations) + 1, 'image_id': number, 'category_id': 1, 'bbox': bbox}
            )
    return {'images': images, 'annotations': annotations, 'categories': [{'id': 1, 'name': 'box'}]}


def check_agreement(files: CocoDetection, stream: ShardStream) -> None:
    """Raise ValueError if an item differs."""
    for image, target in stream:
        expected, expected_target = files[files.ids.index(int(target['image_id']))]
        if not torch.equal(image, expected) or not torch.equal(target['boxes'], expected_target['boxes']):
            raise ValueError(f'image {int(target["image_id"])} differs between files and shards')


def report(title: str, images: int, rounds: int, contenders: dict[str, Callable[[], object]]) -> None:
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds + 1):  # one to warm up
        for name, load in contenders.items():
            start = time.perf_counter()
            load()
            seconds[name].append(time.perf_counter() - start)
    for name, times in seconds.items():
        median = statistics.median(times[1:])
        print(f'  {title}, {name:<12}{images / median:10.1f} images/s a core {1e3 * median / images:8.2f} ms')
