"""
Measure the inference speed of detectors (R50, random weights), as a table in markdown.

The input is one batch of uint8 images of one size without padding, on the device. A round is one forward pass, from
normalisation to boxes in [0, 1], or to detections in pixels ('with postprocessing', the method's default). All columns
run in turn; the first round warms up, and the median is given. On a GPU the same is also replayed as one recorded CUDA
graph.

    python tools/benchmark.py fps
    python tools/benchmark.py fps --batch_size 8 -- --two_stage --with_box_refine --backbone swin_tiny
"""

import argparse
from argparse import Namespace
from collections.abc import Callable

import torch
from torch import nn

from models import build_model
from models.ops.functions import describe
from tools.benchmarks.cuda_graph import GraphedDetector
from tools.benchmarks.inputs import limit_queries
from tools.benchmarks.step import MODELS
from tools.benchmarks.timing import time_in_turn
from util.config.settle import settle
from util.nested_tensor import NestedTensor, nested_tensor_from_tensor_list
from util.precision import Precision, avoid_plans_per_shape, set_tf32

PRECISIONS = ('fp32', 'tf32', 'bf16')
NAMES = [name for name in MODELS if name != 'Co-Deformable-DETR']  # at inference it is H-Deformable-DETR


def add_command(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        'fps',
        help='inference of each method, in images a second',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--height', default=800, type=int)
    parser.add_argument('--width', default=1333, type=int)
    parser.add_argument('--batch_size', default=1, type=int)
    parser.add_argument('--models', nargs='+', default=NAMES, choices=NAMES, help='(default: all)')
    parser.add_argument(
        '--precisions', nargs='+', default=PRECISIONS, choices=PRECISIONS, help='(default: all)'
    )
    parser.add_argument(
        '--threads', default=torch.get_num_threads(), type=int, help='CPU threads (default: all)'
    )
    parser.add_argument('--rounds', default=20, type=int, help='timed rounds of each column')
    parser.add_argument('flags', nargs='*', help="after --: flags of main.py's model, instead of --models")
    parser.set_defaults(run=benchmark_fps)


def benchmark_fps(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    avoid_plans_per_shape()
    on_gpu = args.device == 'cuda'
    where = torch.cuda.get_device_name() if on_gpu else f'CPU, {args.threads} thread(s)'
    print(
        f'Inference, {args.batch_size} x {args.height} x {args.width}, {where}, PyTorch {torch.__version__}, median of '
        f'{args.rounds} rounds in turn; {describe(args.device)}.\n'
    )
    columns = ('forward', 'with postprocessing', *(('recorded graph',) if on_gpu else ()))
    print(f'| method | precision | {" | ".join(f"{column}: ms | images/s" for column in columns)} |')
    print(f'|{" --- |" * (2 + 2 * len(columns))}')
    for name, flags in chosen(args).items():
        flags = limit_queries(flags, args.height, args.width)
        torch.manual_seed(0)
        model, _, postprocessors = build_model(flags)
        model.to(args.device).eval()
        for precision in args.precisions:
            if on_gpu or precision != 'tf32':  # CPUs have none
                times = time_detector(model, postprocessors['bbox'], precision, args)
                cells = [f'{ms:.1f} | {1e3 * args.batch_size / ms:.1f}' for ms in times.values()]
                print(f'| {name} | {precision} | {" | ".join(cells)} |', flush=True)


def chosen(args: argparse.Namespace) -> dict[str, Namespace]:
    """Return resolved flags by the name of a row."""
    if not args.flags:
        return {name: settle(Namespace(**MODELS[name], backbone_weights='none')) for name in args.models}
    from main import get_args_parser

    flags = get_args_parser().parse_args([*args.flags, '--backbone_weights', 'none'])
    return {' '.join(args.flags): settle(flags)}


@torch.no_grad()
def time_detector(
    model: nn.Module, postprocess: nn.Module, precision: str, args: argparse.Namespace
) -> dict[str, float]:
    """Return milliseconds of each column."""
    size = args.height, args.width
    samples = nested_tensor_from_tensor_list(
        torch.randint(0, 256, (args.batch_size, 3, *size), dtype=torch.uint8, device=args.device)
    )
    sizes = torch.tensor([size] * args.batch_size, device=args.device)
    autocast = Precision('bf16' if precision == 'bf16' else 'off', sizes.device).autocast
    if args.device == 'cuda':
        set_tf32(precision != 'fp32')

    def forward() -> dict:
        with autocast():
            return model(samples)

    def detect() -> list:
        return postprocess(forward(), sizes)

    contenders: dict[str, Callable[[], object]] = {'forward': forward, 'with postprocessing': detect}
    if args.device == 'cuda':
        contenders['recorded graph'] = recorded(model, samples, autocast)
    return time_in_turn(contenders, args.rounds, args.device)


def recorded(model: nn.Module, samples: NestedTensor, autocast: Callable) -> Callable[[], object]:
    graphed = GraphedDetector(model, samples, autocast)
    return lambda: graphed(samples)
