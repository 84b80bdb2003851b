"""
Matching and losses of H-Deformable-DETR at its training size, forward and backward.

The size is 6 layers, 300 + 1500 queries, 22,223 proposals and every object 6 times. Stacked computation is compared
with a loop over layers and images.
"""

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

from models.training import build_supervision
from models.training.criterion import weighted_sum
from models.training.flags import resolve_all
from tools.benchmarks.reference_criterion import hybrid_batch, reference_losses
from tools.benchmarks.timing import time_in_turn

REPEATS = 6


def add_command(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser('criterion', help='matching and losses of H-Deformable-DETR')
    parser.add_argument('--objects', default=20, type=int, help='objects in each of the two images')
    parser.add_argument('--proposals', default=22223, type=int, help='proposals of the encoder')
    parser.add_argument(
        '--threads', default=torch.get_num_threads(), type=int, help='CPU threads (default: all)'
    )
    parser.add_argument('--rounds', default=7, type=int, help='timed rounds of each contender')
    parser.set_defaults(run=benchmark_criterion)


def benchmark_criterion(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    flags = argparse.Namespace(two_stage=True, with_box_refine=True, hybrid_k=REPEATS)
    criterion, _, _ = build_supervision(resolve_all(flags))
    predictions, targets = hybrid_batch((args.objects, args.objects), args.proposals)
    leaves = [x for p in predictions for x in (p.logits, p.boxes)]

    def stacked() -> Tensor:
        return weighted_sum(criterion({'predictions': predictions}, targets), criterion.weight_dict)

    def plain() -> Tensor:
        return weighted_sum(reference_losses(predictions, targets, REPEATS)[0], criterion.weight_dict)

    totals = stacked(), plain()
    torch.testing.assert_close(*totals, rtol=1e-5, atol=0)
    print(
        f'criterion of H-Deformable-DETR, {args.objects} objects an image, {args.threads} thread(s), median of {args.rounds} '
        'rounds in turn'
    )
    for title, contenders in (
        ('forward', {'stacked': stacked, 'plain': plain}),
        ('both', {'stacked': with_backward(stacked, leaves), 'plain': with_backward(plain, leaves)}),
    ):
        times = time_in_turn(contenders, args.rounds)
        print(
            f'  {title:<8} stacked {times["stacked"]:7.1f} ms   plain {times["plain"]:7.1f} ms   '
            f'{times["plain"] / times["stacked"]:.2f} times as fast'
        )


def with_backward(forward: Callable[[], Tensor], leaves: list[Tensor]) -> Callable[[], object]:
    return lambda: torch.autograd.grad(forward(), leaves)
