"""
Measure the inference of detectors (R50, random weights) in images a second.

The input is one batch of images of one size without padding, on the device. On a GPU the same is also
replayed as one recorded CUDA graph.

    python tools/benchmark.py fps                       each method
    python tools/benchmark.py fps --batch_size 8 -- --two_stage --with_box_refine --backbone swin_tiny
"""

import argparse

import torch
from torch import nn

from models import build_model
from models.cuda_graph import GraphedDetector
from tools.benchmarks import common
from util.config.settle import Settled
from util.nested_tensor import nested_tensor_from_tensor_list
from util.precision import Precision, avoid_plans_per_shape, set_tf32

PRECISIONS = ('fp32', 'tf32', 'bf16')
NAMES = [name for name in common.MODELS if name != 'Co-Deformable-DETR']  # at inference H-Deformable-DETR


def add_command(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser('fps', help='inference of each method, in images a second')
    common.add_flags(parser, rounds=20, size=(1, 800, 1333))
    parser.add_argument('--models', nargs='+', default=NAMES, choices=NAMES, help='(default: all)')
    parser.add_argument(
        '--precisions', nargs='+', default=PRECISIONS, choices=PRECISIONS, help='(default: all)'
    )
    parser.add_argument('flags', nargs='*', help="after --: flags of main.py's model, instead of --models")
    parser.set_defaults(run=benchmark_fps)


def benchmark_fps(args: argparse.Namespace) -> None:
    """Print a table; a forward pass is from normalization to boxes in [0, 1], or to detections in pixels."""
    common.start(args, 'Inference, R50 unless flags name another backbone')
    avoid_plans_per_shape()
    on_gpu = args.device == 'cuda'
    columns = ('forward', 'with postprocessing', *(('recorded graph',) if on_gpu else ()))
    common.print_head(
        ('method', 'precision', *(f'{name}: {unit}' for name in columns for unit in ('ms', 'images/s')))
    )
    for name, flags in chosen_models(args).items():
        torch.manual_seed(0)
        model, _, postprocessors = build_model(flags)
        model.to(args.device).eval()
        for precision in args.precisions:
            if on_gpu or precision != 'tf32':  # CPUs have no TF32
                times = time_detector(model, postprocessors['bbox'], precision, args)
                cells = [(f'{ms:.1f}', f'{1e3 * args.batch_size / ms:.1f}') for ms in times.values()]
                common.print_row((name, precision, *(cell for pair in cells for cell in pair)))


def chosen_models(args: argparse.Namespace) -> dict[str, Settled]:
    """Return settled flags by the name of a row."""
    if not args.flags:
        return {name: common.detector_flags(args, **common.MODELS[name]) for name in args.models}
    from main import get_args_parser

    flags = vars(get_args_parser().parse_args([*args.flags, '--backbone_weights', 'none']))
    return {' '.join(args.flags): common.detector_flags(args, **flags)}


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

    def forward() -> dict:
        with autocast():
            return model(samples)

    contenders = {'forward': forward, 'with postprocessing': lambda: postprocess(forward(), sizes)}
    if args.device == 'cuda':
        set_tf32(precision != 'fp32')
        graphed = GraphedDetector(model, samples, autocast)
        contenders['recorded graph'] = lambda: graphed(samples)
    return common.time_in_turn(contenders, args.rounds, args.device)
