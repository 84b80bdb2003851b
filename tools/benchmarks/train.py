"""
Time of a training step of H-Deformable-DETR (R50, 300 + 1500 queries, tricks, random weights).

Ours is compared with the same model on grid_sample whose query groups share one masked attention.
"""

import argparse
import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn

import models.deformable_transformer as deformable
from engine import build_optimizer
from models import build_model
from models.ops.functions import describe, use_implementation
from models.parts import compile_parts
from models.structures import AttentionBlock, QueryGroup, attention_blocks
from models.training.criterion import weighted_sum
from models.training.flags import resolve_all
from models.transformer import Blocks
from tools.benchmarks.timing import time_in_turn

TRICKS = {'with_box_refine': True, 'two_stage': True, 'mixed_selection': True, 'look_forward_twice': True}


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


@contextmanager
def plain_path() -> Iterator[None]:
    """Use grid_sample, and one attention over all queries with a mask between the groups."""

    def one_block(groups: list[QueryGroup]) -> Blocks:
        return [under_one_mask(attention_blocks(groups), groups[0].tgt.device)]

    original = deformable.attention_blocks
    deformable.attention_blocks = one_block
    try:
        with use_implementation('pytorch'):
            yield
    finally:
        deformable.attention_blocks = original


def under_one_mask(blocks: Blocks, device: torch.device | None = None) -> AttentionBlock:
    """Return the same attention as one block over all queries."""
    total = blocks[-1].queries.stop
    hidden = torch.ones(total, total, dtype=torch.bool)
    for block in blocks:
        columns = block.pick(torch.arange(total), dim=0)
        hidden[block.queries, columns] = False if block.hidden is None else block.hidden.cpu()
    everything = slice(0, total)
    return AttentionBlock(everything, [everything], hidden.to(device))


def benchmark_train(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    flags = argparse.Namespace(
        **TRICKS, hybrid_queries=1500, hybrid_k=6, dropout=0.0, backbone_weights='none'
    )
    resolved = resolve_all(flags)
    model, criterion, _ = build_model(resolved)
    model.to(args.device).train()
    optimizer = build_optimizer(model, 0.0, 0.0, 0.0)  # weights stay, so that all steps are the same
    images = torch.randn(args.batch_size, 3, args.height, args.width, device=args.device)
    targets = [
        {
            'labels': torch.randint(1, 91, (7,), device=args.device),
            'boxes': torch.cat([torch.rand(7, 2), 0.05 + 0.3 * torch.rand(7, 2)], dim=1).to(args.device),
        }
        for _ in range(args.batch_size)
    ]
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
        with plain_path():
            step()

    contenders: dict[str, Callable[[], object]] = {'ours': step, 'grid_sample, masked attention': plain_step}
    if args.compile:
        own = copy.deepcopy(model)
        compile_parts(own)
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
