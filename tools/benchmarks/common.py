"""What benchmarks share: flags, detectors, batches, tables, and timing of contenders in turn."""

import argparse
import math
import statistics
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from models import build_model
from models.ops.functions import describe
from tools.benchmarks import checkouts
from util.config.networks import level_strides
from util.config.settle import Settled, settle

TRICKS = {'with_box_refine': True, 'two_stage': True, 'mixed_selection': True, 'look_forward_twice': True}
WIDE = TRICKS | {'dim_feedforward': 2048, 'dropout': 0.0}
HYBRID = {'hybrid_queries': 1500, 'hybrid_k': 6}
HEADS = {'co_aux_heads': ['faster_rcnn', 'atss']}
DINO = {'dino': True, 'num_feature_levels': 5, 'num_queries': 900, 'dn_number': 100}
MODELS = {
    'DETR': {},
    'Conditional DETR': {'conditional': True},
    'Deformable DETR, two stages': {'with_box_refine': True, 'two_stage': True},
    'H-Deformable-DETR': WIDE | HYBRID,
    'MS-DETR': WIDE | {'num_queries': 900, 'use_ms_detr': True, 'use_aux_ffn': True},
    'Co-Deformable-DETR': WIDE | HEADS,
    'Co-DINO, five levels': DINO | HEADS,
}


def add_flags(
    parser: argparse.ArgumentParser,
    rounds: int,
    size: tuple[int, int, int] | None = None,
    against: bool = False,
) -> None:
    """Declare the flags of all benchmarks and, with a size (batch, height, width), those of a batch.

    against: declare `--against` too.
    """
    flag, threads = parser.add_argument, torch.get_num_threads()
    flag('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    flag('--threads', default=threads, type=int, help='CPU threads (default: %(default)s)')
    flag('--rounds', default=rounds, type=int, help='timed rounds of each contender (default: %(default)s)')
    for name, default in zip(('batch_size', 'height', 'width'), size or (), strict=False):
        flag(f'--{name}', default=default, type=int, help='(default: %(default)s)')
    if against:
        add_against(parser)


def add_against(parser: argparse.ArgumentParser) -> None:
    text = 'compare with another checkout alone, for example a worktree of an older commit'
    parser.add_argument('--against', type=checkout, metavar='DIR', help=text)


def checkout(text: str) -> Path:
    """Return the absolute folder of `--against`."""
    folder = Path(text).resolve()
    if not (folder / 'models').is_dir():
        raise argparse.ArgumentTypeError(f'{text} has no models/: name a checkout of this repository')
    return folder


def start(args: argparse.Namespace, title: str) -> None:
    """Seed, set the number of threads, and print what is measured, where, and on which kernels."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    size = f', {args.batch_size} x {args.height} x {args.width}' if hasattr(args, 'height') else ''
    where = torch.cuda.get_device_name() if args.device == 'cuda' else f'CPU, {args.threads} thread(s)'
    print(
        f'{title}{size}, {where}, PyTorch {torch.__version__}, median of {args.rounds} rounds in turn; '
        f'{describe(args.device)}\n'
    )


def print_head(titles: Iterable[str]) -> None:
    print_row(titles := list(titles))
    print(f'|{" --- |" * len(titles)}')


def print_row(cells: Iterable[object]) -> None:
    print(f'| {" | ".join(map(str, cells))} |', flush=True)


def print_times(times: dict[str, float]) -> None:
    """Print a row for each contender; the others are compared with the first one."""
    first = next(iter(times.values()))
    print_head(('contender', 'ms', 'the first is faster by'))
    for name, ms in times.items():
        print_row((name, f'{ms:.1f}', f'{ms / first:.2f}'))


def detector_flags(args: argparse.Namespace, **flags: object) -> Settled:
    """Settle flags of a detector with random weights.

    Two stages need as many tokens as queries, so small images get fewer queries.
    """
    settled = settle(argparse.Namespace(**{'backbone_weights': 'none'} | flags))
    if settled.family != 'deformable':
        return settled
    strides = level_strides(settled)
    tokens = sum(math.ceil(args.height / stride) * math.ceil(args.width / stride) for stride in strides)
    part = min(1.0, tokens / (settled.num_queries + (settled.hybrid_queries or 0)))
    hybrid = settled.hybrid_queries and int(part * settled.hybrid_queries)
    return settled.but(num_queries=int(part * settled.num_queries), hybrid_queries=hybrid)


def training_batch(args: argparse.Namespace, objects: int = 7) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """Draw images [B, 3, H, W] and the objects of each, with boxes cxcywh in [0, 1]."""
    images = torch.randn(args.batch_size, 3, args.height, args.width)
    targets = []
    for _ in range(args.batch_size):
        boxes = torch.cat([0.3 + 0.4 * torch.rand(objects, 2), 0.05 + 0.3 * torch.rand(objects, 2)], dim=1)
        labels = torch.randint(1, 91, (objects,))
        targets.append({'labels': labels.to(args.device), 'boxes': boxes.to(args.device)})
    return images.to(args.device), targets


def detector_inputs(args: argparse.Namespace, task: str, objects: int = 7, **flags: object) -> dict:
    """Return the inputs of `checkouts.detector_case` for a detector with these flags and without dropout."""
    settled = detector_flags(args, **flags, dropout=0.0)
    numbers = {
        name: number for name in ('num_queries', 'hybrid_queries') if (number := getattr(settled, name))
    }
    images, targets = training_batch(args, objects)
    return {
        'task': task,
        'flags': flags | numbers | {'dropout': 0.0, 'backbone_weights': 'none'},
        'weights': build_model(settled)[0].state_dict(),
        'images': images,
        'targets': targets,
    }


def compare_checkouts(args: argparse.Namespace, cases: Iterable[tuple[str, dict]]) -> None:
    """Print the times of this checkout and of `args.against` in each case (name, and inputs of `build_case`).

    Raises:
        ValueError: their results differ.
    """
    print_head(('case', 'this checkout, ms', f'{args.against}, ms', 'this checkout is faster by'))
    for name, inputs in cases:
        with tempfile.NamedTemporaryFile(suffix='.pt') as file:
            torch.save(inputs, file.name)
            with (
                checkouts.Worker(checkouts.ROOT, file.name, args) as this,
                checkouts.Worker(args.against, file.name, args) as other,
            ):
                if this.kernels != other.kernels:
                    print(f'this checkout: {this.kernels}; {args.against}: {other.kernels}')
                checkouts.check_results(name, this.results, other.results)
                rounds = [(this.ask(), other.ask()) for _ in range(args.rounds)]
        new, old = map(statistics.median, zip(*rounds, strict=True))
        print_row((name, f'{new:.3f}', f'{old:.3f}', f'{old / new:.2f}'))


def time_in_turn(
    contenders: dict[str, Callable[[], object]], rounds: int, device: str = 'cpu'
) -> dict[str, float]:
    """Return median milliseconds of each contender, after a round to warm up.

    Each begins with data of the others in the cache, as in a real step.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds + 1):
        for name, call in contenders.items():
            times[name].append(checkouts.time_once(call, device))
    return {name: statistics.median(values[1:]) for name, values in times.items()}
