"""
Measure the inference of detectors (R50, random weights): `fps` and `model`.

The input is one batch of images of one size without padding, on the device. On a GPU the same is also
replayed as one recorded CUDA graph.

    python tools/benchmark.py fps                       each method, in images a second
    python tools/benchmark.py fps --batch_size 8 -- --two_stage --with_box_refine --backbone swin_tiny
    python tools/benchmark.py model                     two-stage Deformable DETR against its peers
"""

import argparse
from collections.abc import Callable

import torch
from torch import Tensor, nn

from models import build_model
from models.cuda_graph import GraphedDetector
from models.ops.functions import use_implementation
from models.weights.load import load_checkpoint
from tools.benchmarks import common
from util.config.settle import Settled
from util.nested_tensor import NestedTensor, nested_tensor_from_tensor_list
from util.precision import Precision, avoid_plans_per_shape, set_tf32

PRECISIONS = ('fp32', 'tf32', 'bf16')
NAMES = [name for name in common.MODELS if name != 'Co-Deformable-DETR']  # at inference H-Deformable-DETR
Outputs = tuple[Tensor, Tensor]


def add_command(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser('model', help='inference of two-stage Deformable DETR against its peers')
    common.add_flags(parser, rounds=7, size=(1, 480, 640), against=True)
    parser.set_defaults(run=benchmark_model)
    parser = commands.add_parser('fps', help='inference of each method, in images a second')
    common.add_flags(parser, rounds=20, size=(1, 800, 1333))
    parser.add_argument('--models', nargs='+', default=NAMES, choices=NAMES, help='(default: all)')
    parser.add_argument(
        '--precisions', nargs='+', default=PRECISIONS, choices=PRECISIONS, help='(default: all)'
    )
    parser.add_argument('flags', nargs='*', help="after --: flags of main.py's model, instead of --models")
    parser.set_defaults(run=benchmark_fps)


@torch.no_grad()
def benchmark_model(args: argparse.Namespace) -> None:
    method = 'Deformable DETR, two stages'
    common.start(args, f'Inference of {method}, R50')
    if args.against:
        inputs = common.detector_inputs(args, 'model', **common.MODELS[method])
        common.compare_checkouts(args, [('inference', inputs)])
        return
    model = build_model(common.detector_flags(args, **common.MODELS[method]))[0].eval()
    peer = None
    if transformers := common.import_transformers():
        peer = common.transformers_model(transformers, method).eval()
        for name, parameter in peer.named_parameters():  # boxes and classes that differ from query to query
            if 'sampling_offsets' not in name and parameter.ndim > 1:
                nn.init.xavier_uniform_(parameter)
        load_checkpoint(model, peer.state_dict())
        peer.to(args.device)
    model.to(args.device)
    samples = NestedTensor(
        torch.randn(args.batch_size, 3, args.height, args.width, device=args.device),
        torch.zeros(args.batch_size, args.height, args.width, dtype=torch.bool, device=args.device),
    )
    contenders = model_contenders(model, peer, samples)
    check_agreement(contenders)
    common.print_times(common.time_in_turn(contenders, args.rounds, args.device))


def model_contenders(
    model: nn.Module, peer: nn.Module | None, samples: NestedTensor
) -> dict[str, Callable[[], Outputs]]:
    """Return calls that compute logits and boxes. peer: the same model of the transformers library."""

    def detect(run: Callable[[NestedTensor], dict] = model) -> Outputs:
        outputs = run(samples)
        return outputs['pred_logits'], outputs['pred_boxes']

    def detect_on_grid_sample() -> Outputs:
        with use_implementation('pytorch'):
            return detect()

    def detect_with_peer() -> Outputs:
        outputs = peer(pixel_values=samples.tensors, pixel_mask=(~samples.mask).long())
        return outputs.logits, outputs.pred_boxes

    contenders = {'kernels': detect, 'grid_sample': detect_on_grid_sample}
    if samples.tensors.is_cuda:
        graphed = GraphedDetector(model, samples)
        contenders['kernels, CUDA graph'] = lambda: detect(graphed)
    return contenders if peer is None else contenders | {'transformers': detect_with_peer}


def check_agreement(contenders: dict[str, Callable[[], Outputs]]) -> None:
    """Raise ValueError if a contender's logits or boxes differ by more than 1e-3."""
    expected = contenders['kernels']()
    for name, run in contenders.items():
        difference = max((a - b).abs().max().item() for a, b in zip(expected, run(), strict=True))
        if not difference <= 1e-3:
            raise ValueError(f'{name} differs from the kernels by {difference:.1e}')


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
