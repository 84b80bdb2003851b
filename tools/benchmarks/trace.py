"""
Profile one training step: how long the device works, how often it is called, what takes the time, and where
it waits.

On a GPU the rows are its kernels, on a CPU the operators that no other calls.
"""

import argparse
from collections import defaultdict
from itertools import pairwise

import torch
from torch.profiler import DeviceType, ProfilerActivity, profile

from tools.benchmarks import common
from tools.benchmarks.step import PRECISIONS, make_contenders
from util.precision import avoid_plans_per_shape

ROWS = 20  # kernels, and gaps, that are printed
Span = tuple[float, float, str]  # begin and end in microseconds, name


def add_command(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser('profile', help='where the time of a training step goes')
    common.add_flags(parser, rounds=5, size=(2, 800, 1333))
    parser.add_argument('--method', default='H-Deformable-DETR', choices=common.MODELS)
    parser.add_argument('--precision', default='bf16', choices=PRECISIONS)
    parser.set_defaults(run=profile_step)


def profile_step(args: argparse.Namespace) -> None:
    """Trace one step, after rounds in which plans are chosen and memory is reserved."""
    common.start(args, f'A training step of {args.method} in {args.precision}')
    avoid_plans_per_shape()
    flags = common.detector_flags(args, **common.MODELS[args.method])
    step = make_contenders(flags, [args.precision], common.training_batch(args))[args.precision].step
    for _ in range(args.rounds if args.device == 'cuda' else 1):
        step()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if args.device == 'cuda' else [])]
    with profile(activities=activities) as trace:
        step()
        if args.device == 'cuda':
            torch.cuda.synchronize()
    report(spans(trace, args.device))


def spans(trace: profile, device: str) -> list[Span]:
    """Return when the device worked on what, in order of time."""
    wanted = DeviceType.CUDA if device == 'cuda' else DeviceType.CPU
    found = [
        (event.time_range.start, event.time_range.end, event.name)
        for event in trace.events() or ()
        if event.device_type == wanted and not event.is_user_annotation and event.cpu_parent is None
    ]
    return sorted(found)


def report(found: list[Span]) -> None:
    """Print the share of time that the device works, the longest kernels by name, and the longest gaps."""
    busy, end, gaps = 0.0, found[0][0], []
    for (_, _, before), (begin, stop, name) in pairwise([(0.0, 0.0, 'start'), *found]):
        if begin > end:
            gaps.append((begin - end, before, name))
        busy += max(0.0, stop - max(begin, end))
        end = max(end, stop)
    whole = end - found[0][0]
    times: dict[str, list[float]] = defaultdict(list)
    for begin, stop, name in found:
        times[name].append(stop - begin)
    common.print_head(('of a step', ''))
    common.print_row(('time', f'{whole / 1e3:.1f} ms'))
    common.print_row(('of it the device works', f'{100 * busy / whole:.0f} %'))
    common.print_row(('launches', len(found)))
    common.print_row(('gaps above 20 us', sum(gap > 20 for gap, *_ in gaps)))
    print()
    common.print_head(('the longest', 'calls', 'ms', 'share'))
    for name, taken in sorted(times.items(), key=lambda item: -sum(item[1]))[:ROWS]:
        spent = sum(taken)
        common.print_row((name[:90], len(taken), f'{spent / 1e3:.2f}', f'{100 * spent / busy:.1f} %'))
    print()
    common.print_head(('gap, us', 'after', 'before'))
    for gap, before, after in sorted(gaps, reverse=True)[:ROWS]:
        common.print_row((f'{gap:.0f}', before[:60], after[:60]))
