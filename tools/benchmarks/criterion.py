"""
Matching and losses of H-Deformable-DETR at its training size, forward and backward.

The size is 6 layers, 300 + 1500 queries, 22,223 proposals and every object 6 times. Stacked computation is compared
with a loop over layers and images, and the assignment alone, of layers and images on threads, with that on one thread.
"""

import argparse
import math
from collections.abc import Callable

import torch
from torch import Tensor

from models.structures import Prediction
from models.training import build_supervision, matcher
from models.training.criterion import SetCriterion, weighted_sum
from tools.benchmarks.reference_criterion import hybrid_batch, reference_losses
from tools.benchmarks.timing import time_in_turn
from util.config.settle import settle
from util.threads import num_threads

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
    criterion, _, _ = build_supervision(settle(flags))
    predictions, targets = hybrid_batch((args.objects, args.objects), args.proposals)
    leaves = [x for p in predictions.values() for x in (p.logits, p.boxes)]

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
    for kind in ('one2many', 'enc'):
        compare_threads(criterion, kind, predictions[kind], targets, args.rounds)


def compare_threads(
    criterion: SetCriterion, kind: str, prediction: Prediction, targets: list[dict], rounds: int
) -> None:
    """Print how long the assignment of a kind of prediction takes on the threads of `util.threads`, and on one."""
    used, packed = criterion.table[kind].matcher, matcher.Targets.pack(targets)
    cost = used.cost(prediction, packed).numpy()
    worth = matcher.WORTH_THREADS

    def solve(worth_threads: float) -> None:
        matcher.WORTH_THREADS = worth_threads
        used.solve(cost, packed.sizes)
        matcher.WORTH_THREADS = worth

    contenders = {'threads': lambda: solve(0), 'one': lambda: solve(math.inf)}
    times = time_in_turn(contenders, rounds)
    print(
        f'  assignment, {kind:<8} {num_threads()} threads {times["threads"]:7.1f} ms   one {times["one"]:7.1f} ms   '
        f'{times["one"] / times["threads"]:.2f} times as fast'
    )


def with_backward(forward: Callable[[], Tensor], leaves: list[Tensor]) -> Callable[[], object]:
    return lambda: torch.autograd.grad(forward(), leaves)
