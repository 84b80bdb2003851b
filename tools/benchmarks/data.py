"""Loading of images, from a JPEG file to the network's input, at evaluation and at training."""

import argparse
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torchvision.io import write_jpeg

from datasets.augmentations import DETRAugmentation
from datasets.image_io import ImageReader
from datasets.shapes import ShapesDetection
from tools.benchmarks.common import time_in_turn
from util.errors import UserError
from util.seeding import local_seed

IMAGE_SETS = {'evaluation': 'val', 'training': 'train'}


def add_command(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser('data', help='loading of images, from JPEG file to network input')
    parser.add_argument('--coco_path', help='folder searched for JPEGs; by default images are drawn')
    parser.add_argument('--num_images', default=32, type=int, help='number of images per round')
    parser.add_argument('--rounds', default=7, type=int, help='timed rounds of each contender')
    parser.add_argument('--seed', default=0, type=int, help='seed of drawn images and of augmentation')
    parser.set_defaults(run=benchmark_data)


def benchmark_data(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        paths = find_files(args.coco_path) if args.coco_path else write_images(folder, args)
        paths = paths[: args.num_images]
        loaders = {name: loader(image_set, args.seed) for name, image_set in IMAGE_SETS.items()}
        contenders = {name: partial(load_all, load, paths) for name, load in loaders.items()}
        times = time_in_turn(contenders, args.rounds)
    print(f'{len(paths)} JPEG images, one thread, median of {args.rounds} rounds in turn')
    for name, ms in times.items():
        print(f'  {name:<12}{1e3 * len(paths) / ms:8.1f} images/s a core')


def load_all(load: Callable[[Path], Tensor], paths: list[Path]) -> None:
    for path in paths:
        load(path)


def find_files(root: str) -> list[Path]:
    paths = sorted(Path(root).rglob('*.jpg'))
    if not paths:
        raise UserError(f'--coco_path {root} has no .jpg file in it or below: give the folder of a dataset')
    return paths


def write_images(folder: str, args: argparse.Namespace) -> list[Path]:
    """Write built-in images as JPEGs, the longer side 640 pixels, with the noise of a sensor."""
    generator = torch.Generator().manual_seed(args.seed)
    images = ShapesDetection(args.num_images, seed=args.seed, image_size=640)
    paths = [Path(folder) / f'{index:04d}.jpg' for index in range(args.num_images)]
    for index, path in enumerate(paths):
        image = images[index][0]
        noisy = image + 6 * torch.randn(image.shape, generator=generator)
        write_jpeg(noisy.clamp(0, 255).byte(), str(path), quality=90)
    return paths


def loader(image_set: str, seed: int) -> Callable[[Path], Tensor]:
    """Return the loader of an image file: uint8 up to the batch; the model normalizes on its device."""
    transforms = DETRAugmentation().transforms(image_set)

    def load(path: Path) -> Tensor:
        image = ImageReader().read(path)
        height, width = image.shape[-2:]
        # Seven boxes, the average of a COCO image.
        corners = torch.rand(7, 2, 2, generator=torch.Generator().manual_seed(0)).sort(dim=1).values
        target = {
            'boxes': (corners * torch.tensor([width, height])).flatten(1),
            'labels': torch.arange(7),
            'area': torch.ones(7),
            'iscrowd': torch.zeros(7, dtype=torch.int64),
            'size': torch.tensor([height, width]),
        }
        with local_seed(seed, 0):
            return transforms(image, target)[0]

    return load
