"""
Inference of two-stage Deformable DETR (R50, 300 queries, random weights): ours, ours on grid_sample, ours as a CUDA
graph (on a GPU), and the model of the transformers library with the same weights.
"""

import argparse
from collections.abc import Callable

import torch
from torch import Tensor, nn

from models import build_model
from models.ops.functions import describe, use_implementation
from models.weights.load import load_checkpoint
from tools.benchmarks.cuda_graph import GraphedDetector
from tools.benchmarks.timing import time_in_turn
from util.config.settle import settle
from util.nested_tensor import NestedTensor

Outputs = tuple[Tensor, Tensor]


def add_command(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser('model', help='inference of two-stage Deformable DETR')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--height', default=480, type=int)
    parser.add_argument('--width', default=640, type=int)
    parser.add_argument('--batch_size', default=1, type=int)
    parser.add_argument(
        '--threads', default=torch.get_num_threads(), type=int, help='CPU threads (default: all)'
    )
    parser.add_argument('--rounds', default=7, type=int, help='timed rounds of each contender')
    parser.set_defaults(run=benchmark_model)


@torch.no_grad()
def benchmark_model(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    flags = argparse.Namespace(with_box_refine=True, two_stage=True, backbone_weights='none')
    ours = build_model(settle(flags))[0].eval()
    theirs = transformers_model()
    if theirs is not None:
        load_checkpoint(ours, theirs.state_dict())
        theirs.to(args.device)
    ours.to(args.device)
    pixels = torch.randn(args.batch_size, 3, args.height, args.width, device=args.device)
    contenders = {'ours': run_ours(ours, pixels), 'ours, grid_sample': run_on_grid_sample(ours, pixels)}
    if args.device == 'cuda':
        contenders['ours, CUDA graph'] = run_graph(ours, pixels)
    if theirs is not None:
        contenders['transformers'] = run_transformers(theirs, pixels)
    print(
        f'two-stage Deformable DETR, R50, {args.batch_size} x {args.height} x {args.width}, {args.device}, '
        f'{args.threads} thread(s), median of {args.rounds} rounds in turn\n{describe(args.device)}'
    )
    check_agreement(contenders)
    times = time_in_turn(contenders, args.rounds, args.device)
    for name, milliseconds in times.items():
        print(
            f'  {name:<20}{milliseconds:9.1f} ms   ours is {milliseconds / times["ours"]:.2f} times as fast'
        )


def transformers_model() -> nn.Module | None:
    try:
        import transformers
    except ImportError:
        print('transformers is not installed: compared with grid_sample only')
        return None
    backbone = transformers.ResNetConfig(out_features=['stage2', 'stage3', 'stage4'])
    config = transformers.DeformableDetrConfig(
        with_box_refine=True,
        two_stage=True,
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone_config=backbone,
        num_labels=91,
    )
    model = transformers.DeformableDetrForObjectDetection(config).eval()
    for name, parameter in model.named_parameters():
        if (
            'sampling_offsets' not in name and parameter.ndim > 1
        ):  # boxes and classes that differ from query to query
            nn.init.xavier_uniform_(parameter)
    return model


def run_ours(model: nn.Module, pixels: Tensor) -> Callable[[], Outputs]:
    mask = torch.zeros_like(pixels[:, 0], dtype=torch.bool)

    def run() -> Outputs:
        outputs = model(NestedTensor(pixels, mask))
        return outputs['pred_logits'], outputs['pred_boxes']

    return run


def run_graph(model: nn.Module, pixels: Tensor) -> Callable[[], Outputs]:
    samples = NestedTensor(pixels, torch.zeros_like(pixels[:, 0], dtype=torch.bool))
    graphed = GraphedDetector(model, samples)

    def run() -> Outputs:
        outputs = graphed(samples)
        return outputs['pred_logits'], outputs['pred_boxes']

    return run


def run_on_grid_sample(model: nn.Module, pixels: Tensor) -> Callable[[], Outputs]:
    ours = run_ours(model, pixels)

    def run() -> Outputs:
        with use_implementation('pytorch'):
            return ours()

    return run


def run_transformers(model: nn.Module, pixels: Tensor) -> Callable[[], Outputs]:
    mask = torch.ones_like(pixels[:, 0], dtype=torch.long)

    def run() -> Outputs:
        outputs = model(pixel_values=pixels, pixel_mask=mask)
        return outputs.logits, outputs.pred_boxes

    return run


def check_agreement(contenders: dict[str, Callable[[], Outputs]]) -> None:
    """Raise ValueError if a contender's logits or boxes differ by more than 1e-3."""
    expected = contenders['ours']()
    for name, run in contenders.items():
        for ours, other in zip(expected, run(), strict=True):
            difference = (ours - other).abs().amax(-1)  # [B, Q]
            if difference.max() > 1e-3:
                raise ValueError(f'{name} differs from ours by {difference.max():.1e}')
