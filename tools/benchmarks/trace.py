"""
Profile one training step: how long the device works, how often it is called, what takes the time, and where it waits.

On a GPU the rows are its kernels, on a CPU the operators that no other calls.
"""

import argparse
from collections import defaultdict
from itertools import pairwise

import torch
from torch.profiler import DeviceType, ProfilerActivity, profile

from models.ops.functions import describe
from tools.benchmarks.step import MODELS, PRECISIONS, make_batch, make_contenders, method_flags
from util.precision import avoid_plans_per_shape

WARM_UP = 5  # steps before, in which plans are chosen and memory is reserved
ROWS = 20  # kernels, and gaps, that are printed
Span = tuple[float, float, str]  # begin and end in microseconds, name


def add_command(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser('profile', help='where the time of a training step goes')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--height', default=800, type=int)
    parser.add_argument('--width', default=1333, type=int)
    parser.add_argument('--batch_size', default=2, type=int)
    parser.add_argument('--method', default='H-Deformable-DETR', choices=MODELS)
    parser.add_argument('--precision', default='bf16', choices=PRECISIONS)
    parser.set_defaults(run=profile_step)


def profile_step(args: argparse.Namespace) -> None:
    avoid_plans_per_shape()
    flags = method_flags(args.method, args)
    step = make_contenders(flags, [args.precision], make_batch(args))[args.precision].step
    for _ in range(WARM_UP if args.device == 'cuda' else 1):
        step()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if args.device == 'cuda' else [])]
    with profile(activities=activities) as trace:
        step()
        if args.device == 'cuda':
            torch.cuda.synchronize()
    print(
        f'A training step of {args.method} in {args.precision}, {args.batch_size} x {args.height} x {args.width}; '
        f'{describe(args.device)}\n'
    )
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
    """Print the share of the time that the device works, the longest kernels by name, and the longest gaps between any two."""
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
    print('| of a step | |\n| --- | --- |')
    print(f'| time | {whole / 1e3:.1f} ms |\n| of it the device works | {100 * busy / whole:.0f} % |')
    print(f'| launches | {len(found)} |\n| gaps above 20 us | {sum(gap > 20 for gap, *_ in gaps)} |')
    print('\n| the longest | calls | ms | share |\n| --- | --- | --- | --- |')
    for name, taken in sorted(times.items(), key=lambda item: -sum(item[1]))[:ROWS]:
        print(f'| {name[:90]} | {len(taken)} | {sum(taken) / 1e3:.2f} | {100 * sum(taken) / busy:.1f} % |')
    print('\n| gap, us | after | before |\n| --- | --- | --- |')
    for gap, before, after in sorted(gaps, reverse=True)[:ROWS]:
        print(f'| {gap:.0f} | {before[:60]} | {after[:60]} |')
