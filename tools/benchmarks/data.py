"""Loading from JPEG files to network input: Pillow and floats against our loader, and files against tar shards."""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageDraw
import torch
from torch import Tensor
from torchvision.transforms import functional as classic

from datasets.augmentations import DETRAugmentation
from datasets.image_io import open_image, read_image, stored_size
from datasets.transforms import Compose, Target, resized_size
from models.backbone import IMAGENET_MEAN, IMAGENET_STD
from tools.benchmarks.shards import report_shards
from util.seeding import local_seed

Loader = Callable[[Path, Target, Compose], tuple[Tensor, Target]]


def add_command(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        'data', help='from JPEG file to network input: Pillow and floats, or our loader'
    )
    parser.add_argument(
        '--coco_path', default=None, help='folder searched for JPEGs; by default images are drawn'
    )
    parser.add_argument('--num_images', default=32, type=int, help='number of images per round')
    parser.add_argument(
        '--rounds', default=7, type=int, help='timed rounds of each contender, after one to warm up'
    )
    parser.add_argument('--seed', default=0, type=int, help='seed of drawn images and of augmentation')
    parser.set_defaults(run=benchmark_data)


def benchmark_data(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        paths = find_images(args.coco_path) if args.coco_path else draw_images(folder, args)
        paths = paths[: args.num_images]
        print(f'{len(paths)} JPEG images, one thread, {args.rounds} rounds of each contender in turn')
        samples = [(path, make_target(path), DETRAugmentation().transforms('val')) for path in paths]
        print(
            f'\nevaluation, 800/1333: largest pixel difference {check_agreement(samples, args.seed):.2f}/255'
        )
        report_speed(samples, args)
        root = Path(args.coco_path or folder)
        with tempfile.TemporaryDirectory() as place:
            report_shards(root, paths, Path(place), args)


def find_images(root: str) -> list[Path]:
    paths = sorted(Path(root).rglob('*.jpg'))
    if not paths:
        raise ValueError(f'--coco_path {root} has no .jpg file in it or below: give the folder of a data set')
    return paths


def draw_images(folder: str, args: argparse.Namespace) -> list[Path]:
    """Draw JPEGs of 640 x 480, quality 90: a smooth background, some shapes, sensor noise."""
    generator = np.random.default_rng(args.seed)
    paths = []
    for idx in range(args.num_images):
        coarse = generator.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        image = PIL.Image.fromarray(coarse).resize((640, 480), PIL.Image.Resampling.BICUBIC)
        draw = PIL.ImageDraw.Draw(image)
        for x, y, width, height, *color in generator.integers(0, 256, (12, 7)).tolist():
            corners = (2 * x, 1.5 * y, 2 * x + width, 1.5 * y + height)
            (draw.ellipse if color[0] % 2 else draw.rectangle)(corners, fill=tuple(color))
        noisy = np.asarray(image) + generator.normal(0, 6, (480, 640, 3))
        paths.append(Path(folder) / f'{idx:04d}.jpg')
        PIL.Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(paths[-1], quality=90)
    return paths


def make_target(path: Path) -> Target:
    """Make seven boxes, the average of a COCO image."""
    height, width = stored_size(path)
    corners = torch.rand(7, 2, 2, generator=torch.Generator().manual_seed(len(path.name))).sort(dim=1).values
    boxes_xyxy = (corners * torch.tensor([width, height])).flatten(1)
    size = torch.tensor([height, width])
    labels, iscrowd = torch.arange(7), torch.zeros(7, dtype=torch.int64)
    return {'boxes': boxes_xyxy, 'labels': labels, 'area': torch.ones(7), 'iscrowd': iscrowd, 'size': size}


def load_with_pillow(path: Path, target: Target, transforms: Compose) -> tuple[Tensor, Target]:
    """Load as the official code does at evaluation: Pillow resizes; float32, normalised, on the CPU."""
    with open_image(path) as opened:
        image = opened.convert('RGB')
    image = image.resize(resized_size(image.size, 800, 1333), PIL.Image.Resampling.BILINEAR)
    return classic.normalize(classic.to_tensor(image), IMAGENET_MEAN, IMAGENET_STD), target


def load_with_tensors(path: Path, target: Target, transforms: Compose) -> tuple[Tensor, Target]:
    """Load as we do: uint8 from the file to the batch; the model normalises on its device."""
    return transforms(read_image(path), target)


CONTENDERS: dict[str, Loader] = {'Pillow, float32': load_with_pillow, 'ours, uint8': load_with_tensors}


def check_agreement(samples: list[tuple[Path, Target, Compose]], seed: int) -> float:
    """Return the largest difference of a pixel in grey levels.

    Raises:
        ValueError: it is above one, or sizes differ.
    """
    worst = 0.0
    for idx, sample in enumerate(samples):
        with local_seed(seed, idx):
            reference, _ = load_with_pillow(*sample)
        with local_seed(seed, idx):
            image, _ = load_with_tensors(*sample)
        if reference.shape != image.shape:
            raise ValueError(f'{sample[0]}: the size differs between the contenders')
        mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
        worst = max(worst, float(((reference * std + mean) * 255 - image).abs().max()))
    if worst > 1.01:
        raise ValueError(f'images differ by {worst:.2f} grey levels between the contenders')
    return worst


def report_speed(samples: list[tuple[Path, Target, Compose]], args: argparse.Namespace) -> None:
    seconds: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    for _ in range(args.rounds + 1):
        for name, load in CONTENDERS.items():
            seconds[name].append(time_round(load, samples, args.seed))
    speeds = {name: len(samples) / statistics.median(times[1:]) for name, times in seconds.items()}
    for name, speed in speeds.items():
        print(f'  {name:<16}{speed:8.1f} images/s a core {1e3 / speed:8.2f} ms')
    slow, fast = speeds.values()
    print(f'  ratio {fast / slow:.2f}')


def time_round(load: Loader, samples: list[tuple[Path, Target, Compose]], seed: int) -> float:
    start = time.perf_counter()
    for idx, sample in enumerate(samples):
        with local_seed(seed, idx):
            load(*sample)
    return time.perf_counter() - start
