"""
Time of a training step of H-Deformable-DETR (R50, 300 + 1500 queries, tricks, random weights).

Ours is compared with the same model on grid_sample whose query groups share one masked attention.
"""

import argparse
import copy
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from engine import build_optimizer
from models import build_model
from models.ops.functions import describe
from models.training.criterion import weighted_sum
from models.units import compile_units
from tools.benchmarks.inputs import TRICKS, limit_queries, random_objects
from tools.benchmarks.official_path import official_path
from tools.benchmarks.timing import time_in_turn
from util.config.settle import settle


def add_command(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser('train', help='a training step of H-Deformable-DETR')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--height', default=384, type=int)
    parser.add_argument('--width', default=512, type=int)
    parser.add_argument('--batch_size', default=2, type=int)
    parser.add_argument(
        '--threads', default=torch.get_num_threads(), type=int, help='CPU threads (default: all)'
    )
    parser.add_argument('--rounds', default=3, type=int, help='timed rounds of each contender')
    parser.add_argument('--compile', action='store_true', help='time a compiled copy, too')
    parser.set_defaults(run=benchmark_train)


def benchmark_train(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    flags = argparse.Namespace(
        **TRICKS, hybrid_queries=1500, hybrid_k=6, dropout=0.0, backbone_weights='none'
    )
    resolved = settle(flags)
    resolved = limit_queries(resolved, args.height, args.width)
    model, criterion, _ = build_model(resolved)
    model.to(args.device).train()
    optimizer = build_optimizer(model, 0.0, 0.0, 0.0)  # weights stay, so that all steps are the same
    images = torch.randn(args.batch_size, 3, args.height, args.width, device=args.device)
    targets = [random_objects(7, args.device) for _ in range(args.batch_size)]
    totals = []

    def step(model: nn.Module = model, optimizer: torch.optim.Optimizer = optimizer) -> None:
        optimizer.zero_grad(set_to_none=True)
        losses = criterion(model(images, targets), targets)
        total = weighted_sum(losses, criterion.weight_dict)
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        totals.append(total.detach())

    def plain_step() -> None:
        with official_path():
            step()

    contenders: dict[str, Callable[[], object]] = {'ours': step, 'grid_sample, masked attention': plain_step}
    if args.compile:
        own = copy.deepcopy(model)
        compile_units(own)
        contenders['ours, compiled'] = partial(step, own, build_optimizer(own, 0.0, 0.0, 0.0))
    print(
        f'training step of H-Deformable-DETR, R50, {args.batch_size} x {args.height} x {args.width}, {args.device}, '
        f'{args.threads} thread(s), median of {args.rounds} rounds in turn\n{describe(args.device)}'
    )
    times = time_in_turn(contenders, args.rounds, args.device)
    for total in totals[1 : len(contenders)]:
        torch.testing.assert_close(totals[0], total, rtol=1e-3, atol=0)
    for name, milliseconds in times.items():
        print(
            f'  {name:<30}{milliseconds:9.1f} ms   ours is {milliseconds / times["ours"]:.2f} times as fast'
        )
