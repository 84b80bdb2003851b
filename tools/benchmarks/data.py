"""Loading of images, from a JPEG file to the network's input: Pillow and floats against our loader."""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import PIL.Image
import torch
from torch import Tensor
from torchvision.io import write_jpeg
from torchvision.transforms import functional as classic

from datasets.augmentations import DETRAugmentation
from datasets.image_io import read_image
from datasets.shapes import ShapesDetection
from tools.benchmarks.common import time_in_turn
from util.errors import UserError
from util.seeding import local_seed

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def add_command(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser('data', help='from JPEG file to network input: Pillow, or our loader')
    parser.add_argument('--coco_path', help='folder searched for JPEGs; by default images are drawn')
    parser.add_argument('--num_images', default=32, type=int, help='number of images per round')
    parser.add_argument('--rounds', default=7, type=int, help='timed rounds of each contender')
    parser.add_argument('--seed', default=0, type=int, help='seed of drawn images and of augmentation')
    parser.set_defaults(run=benchmark_data)


def benchmark_data(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        paths = find_images(args.coco_path) if args.coco_path else draw_images(folder, args)
        paths = paths[: args.num_images]
        load = {image_set: loader(image_set, args.seed) for image_set in ('val', 'train')}
        sizes = check_agreement(paths, load['val'])
        contenders = {
            'evaluation, Pillow and float32': lambda: [
                load_with_pillow(*pair) for pair in zip(paths, sizes, strict=True)
            ],
            'evaluation, our loader': lambda: [load['val'](path) for path in paths],
            'training, our loader': lambda: [load['train'](path) for path in paths],
        }
        times = time_in_turn(contenders, args.rounds)
    print(f'{len(paths)} JPEG images, one thread, median of {args.rounds} rounds in turn')
    for name, ms in times.items():
        print(f'  {name:<32}{1e3 * len(paths) / ms:8.1f} images/s a core')
    slow, fast, _ = times.values()
    print(f'  evaluation: our loader is faster by {slow / fast:.2f}')


def find_images(root: str) -> list[Path]:
    paths = sorted(Path(root).rglob('*.jpg'))
    if not paths:
        raise UserError(f'--coco_path {root} has no .jpg file in it or below: give the folder of a dataset')
    return paths


def draw_images(folder: str, args: argparse.Namespace) -> list[Path]:
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
    """Return our loader of an image file: uint8 up to the batch; the model normalizes on its device."""
    transforms = DETRAugmentation().transforms(image_set)

    def load(path: Path) -> Tensor:
        image = read_image(path)
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


def load_with_pillow(path: Path, size: tuple[int, int]) -> Tensor:
    """Load as the official code does at evaluation: Pillow resizes; float32, normalized, on the CPU."""
    with PIL.Image.open(path) as opened:
        image = opened.convert('RGB')
    return classic.normalize(classic.to_tensor(classic.resize(image, list(size))), MEAN, STD)


def check_agreement(paths: list[Path], load: Callable[[Path], Tensor]) -> list[tuple[int, int]]:
    """Compare our images with Pillow's, and return the height and width of each.

    Raises:
        ValueError: a pixel differs by more than one grey level.
    """
    sizes = []
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    for path in paths:
        image = load(path)
        sizes.append((image.shape[1], image.shape[2]))
        levels = 255 * (load_with_pillow(path, sizes[-1]) * std + mean)
        if (levels - image).abs().max() > 1.01:
            raise ValueError(f'{path}: our image differs from that of Pillow by more than one grey level')
    return sizes
