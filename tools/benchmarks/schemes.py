"""
Cost of each way of supervision: time of a training step and memory kept for the backward pass, against plain two-stage
Deformable DETR (R50, tricks, random weights).
"""

import argparse
from argparse import Namespace
from collections.abc import Callable

import torch
from torch import Tensor, nn

from models import build_model
from models.ops.functions import describe
from models.training.criterion import weighted_sum
from tools.benchmarks.inputs import TRICKS, random_objects
from tools.benchmarks.timing import time_in_turn
from util.config.settle import settle

SAME = {'dim_feedforward': 2048, 'dropout': 0.0, 'input_proj_bias': False, 'backbone_weights': 'none'}
SCHEMES = {
    'plain': {},
    'hybrid': {'hybrid_queries': 1500, 'hybrid_k': 6},
    'mixed': {'use_ms_detr': True, 'use_aux_ffn': True},
    'denoising': {'dn_number': 100},
    'co, ATSS': {'co_aux_heads': ['atss']},
    'co, both heads': {'co_aux_heads': ['faster_rcnn', 'atss']},
    'Co-DINO, 5 levels': {'dino': True, 'num_feature_levels': 5, 'dn_number': 100, 'co_aux_heads': ['faster_rcnn', 'atss']},
}  # fmt: skip


def add_command(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser('schemes', help='a training step with each way of supervision')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--height', default=384, type=int)
    parser.add_argument('--width', default=512, type=int)
    parser.add_argument('--batch_size', default=2, type=int)
    parser.add_argument('--schemes', nargs='+', default=list(SCHEMES), choices=SCHEMES, help='(default: all)')
    parser.add_argument(
        '--threads', default=torch.get_num_threads(), type=int, help='CPU threads (default: all)'
    )
    parser.add_argument('--rounds', default=3, type=int, help='timed rounds of each contender')
    parser.set_defaults(run=benchmark_schemes)


def training_step(flags: dict, images: Tensor, targets: list[dict]) -> tuple[nn.Module, Callable[[], Tensor]]:
    """Build a model on the images' device, and a function that computes its loss."""
    model, criterion, _ = build_model(settle(Namespace(**TRICKS | SAME | flags)))
    model.to(images.device).train()

    def loss() -> Tensor:
        return weighted_sum(criterion(model(images, targets), targets), criterion.weight_dict)

    return model, loss


def kept_bytes(loss: Callable[[], Tensor], model: nn.Module) -> int:
    """Count the memory that the backward pass needs, each tensor once, without parameters."""
    kept = {}
    own = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        total = loss()  # keeps the graph, and so the addresses, until they are counted
    number = sum(kept.values())
    del total
    return number


def benchmark_schemes(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    images = torch.randn(args.batch_size, 3, args.height, args.width, device=args.device)
    targets = [random_objects(7, args.device) for _ in range(args.batch_size)]
    names = ['plain', *(name for name in args.schemes if name != 'plain')]
    built = {name: training_step(SCHEMES[name], images, targets) for name in names}

    def step(name: str) -> None:
        model, loss = built[name]
        model.zero_grad(set_to_none=True)
        loss().backward()

    memory = {name: kept_bytes(loss, model) for name, (model, loss) in built.items()}
    times = time_in_turn({name: lambda name=name: step(name) for name in names}, args.rounds, args.device)
    print(
        f'forward and backward, R50, {args.batch_size} x {args.height} x {args.width}, {args.device}, {args.threads} '
        f'thread(s), median of {args.rounds} rounds in turn\n{describe(args.device)}\n'
        f'{"":<20}{"time":>12}{"x plain":>9}{"kept":>12}{"x plain":>9}{"parameters":>14}'
    )
    for name, (model, _) in built.items():
        parameters = sum(p.numel() for p in model.parameters())
        print(
            f'{name:<20}{times[name]:9.0f} ms{times[name] / times["plain"]:9.2f}{memory[name] / 2**20:8.0f} MiB'
            f'{memory[name] / memory["plain"]:9.2f}{parameters:14,}'
        )
