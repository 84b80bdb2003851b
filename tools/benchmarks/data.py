"""Loading of images, from a JPEG file to the network's input, at evaluation and at training."""

import argparse
import tempfile
from pathlib import Path

import torch
from torchvision.io import write_jpeg

from datasets.shapes import ShapesDetection
from tools.benchmarks import common
from tools.benchmarks.checkouts import loading_case
from util.errors import UserError

IMAGE_SETS = {'evaluation': 'val', 'training': 'train'}


def add_command(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser('data', help='loading of images, from JPEG file to network input')
    parser.add_argument('--coco_path', help='folder searched for JPEGs; by default images are drawn')
    parser.add_argument('--num_images', default=32, type=int, help='number of images per round')
    parser.add_argument('--rounds', default=7, type=int, help='timed rounds of each contender')
    parser.add_argument('--seed', default=0, type=int, help='seed of drawn images and of augmentation')
    common.add_against(parser)
    parser.set_defaults(run=benchmark_data, threads=1, device='cpu')


def benchmark_data(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        paths = find_files(args.coco_path) if args.coco_path else write_images(folder, args)
        files = [str(path) for path in paths[: args.num_images]]
        cases = {name: {'paths': files, 'part': part, 'seed': args.seed} for name, part in IMAGE_SETS.items()}
        if args.against:
            common.compare_checkouts(args, cases.items())
            return
        contenders = {name: loading_case(**inputs) for name, inputs in cases.items()}
        times = common.time_in_turn(contenders, args.rounds)
    print(f'{len(files)} JPEG images, one thread, median of {args.rounds} rounds in turn')
    for name, ms in times.items():
        print(f'  {name:<12}{1e3 * len(files) / ms:8.1f} images/s a core')


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
