"""
Deformable attention at the shapes of real detectors, forward and backward.

Every implementation of this machine is compared with grid_sample and, if its sources are given, with the
official extension. On a GPU the share of a floor is printed too: the least time of the case's memory traffic
at the rates below.
"""

import argparse
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from models.ops.functions import KERNELS, available, ms_deform_attn_core_pytorch, pairs
from tools.benchmarks import common
from tools.benchmarks.official import add_official, load_official

HEADS, POINTS = 8, 4
IMAGES = {'160x192': (160, 192), '320x480': (320, 480), '800x1333': (800, 1333)}


class Case(NamedTuple):
    """A call of the operator.

    queries: 0 takes every token as one, as an encoder does. spread: noise of points, pixels.
    """

    image: str
    batch: int
    queries: int = 0
    spread: float = 1.0  # infinite: anywhere in the image
    levels: int = 4
    channels: int = 32

    def shapes(self) -> list[tuple[int, int]]:
        """Return the shapes of maps with strides 8, 16, 32 and 64; five levels begin with stride 4."""
        height, width = IMAGES[self.image]
        strides = (4, 8, 16, 32, 64)[-self.levels :]
        return [(math.ceil(height / stride), math.ceil(width / stride)) for stride in strides]


CPU_CASES = {
    'encoder 160x192 b1': Case('160x192', 1),
    'encoder 320x480 b1': Case('320x480', 1),
    'encoder 800x1333 b1': Case('800x1333', 1),
    'decoder 300 320x480 b2': Case('320x480', 2, 300),
    'decoder 300 800x1333 b2': Case('800x1333', 2, 300),
    'decoder 900 800x1333 b2': Case('800x1333', 2, 900),
    'decoder 1800 800x1333 b2': Case('800x1333', 2, 1800),
}
GPU_CASES = {
    'encoder 800x1333 b2': Case('800x1333', 2),
    'decoder 300 800x1333 b2': Case('800x1333', 2, 300),
    'decoder 900 800x1333 b2': Case('800x1333', 2, 900),
    'decoder 1800 800x1333 b2': Case('800x1333', 2, 1800),
    'encoder b2, points spread by 3 pixels': Case('800x1333', 2, spread=3.0),
    'encoder b2, points anywhere': Case('800x1333', 2, spread=math.inf),
    'encoder b2, 5 levels': Case('800x1333', 2, levels=5),
    'encoder b2, 64 channels': Case('800x1333', 2, channels=64),
    'encoder b8': Case('800x1333', 8),
}
# Bytes a second: memory by GPU, first-level cache, additions in the second-level cache (Hopper).
DRAM = {'H200': 4.3e12, 'H100': 3.0e12}
L1, REDUCTIONS = 33e12, 3.7e12
# Largest difference from grid_sample, as a share of the largest number.
AGREE = {torch.float32: 1e-4, torch.bfloat16: 1e-2}
RESULTS = 'output', 'gradient of values', 'gradient of locations', 'gradient of weights'
Inputs = tuple[Tensor, list[int], Tensor, Tensor]
Calls = tuple[Callable[[], object], Callable[[], object]]  # forward, backward


def add_command(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser('op', help='deformable attention against its peers')
    common.add_flags(parser, rounds=7, against=True)
    parser.set_defaults(threads=1)
    parser.add_argument('--only', default='', help='cases whose names contain this')
    add_official(parser)
    parser.set_defaults(run=benchmark_op)


def benchmark_op(args: argparse.Namespace) -> None:
    common.start(args, 'Deformable attention, milliseconds')
    gpu = args.device == 'cuda'
    cases = {name: case for name, case in (GPU_CASES if gpu else CPU_CASES).items() if args.only in name}
    if args.against:
        common.compare_checkouts(
            args, ((name, checkout_inputs(case, args.device)) for name, case in cases.items())
        )
        return
    official = load_official(args.official) if args.official else None
    titles = ['case', 'implementation', 'forward', 'backward', 'times grid_sample']
    titles += ['times official'] * (official is not None) + ['share of the floor'] * gpu
    for dtype in (torch.float32, torch.bfloat16) if gpu else (torch.float32,):
        print(f'\n{str(dtype).removeprefix("torch.")} values (peers: float32)\n')
        common.print_head(titles)
        for name, case in cases.items():
            report(name, case, dtype, official, args)


def checkout_inputs(case: Case, device: str) -> dict:
    """Return the inputs of `checkouts.operator_case`."""
    value, locations, weights = draw_inputs(case, device)
    grad = torch.randn(case.batch, locations.shape[1], HEADS * case.channels, device=device)
    shapes = [side for shape in case.shapes() for side in shape]
    return {'value': value, 'shapes': shapes, 'locations': locations, 'weights': weights, 'grad': grad}


def report(name: str, case: Case, dtype: torch.dtype, official: object, args: argparse.Namespace) -> None:
    """Print rows of one case; a ratio is the peer's time divided by the row's, forward and backward."""
    value, shapes, locations, weights, grad = checkout_inputs(case, args.device).values()
    inputs = value, shapes, locations, weights
    contenders = peer_calls(grad, inputs, official)
    peers = list(contenders)
    for kernel in available(args.device):
        if kernel != 'pytorch':
            contenders[kernel] = kernel_calls(kernel, grad.to(dtype), (value.to(dtype), *inputs[1:]))
        if kernel == 'cuda':
            contenders['cuda, deterministic'] = tuple(map(deterministic, contenders[kernel]))
    check_contenders(name, contenders, dtype)
    if args.rounds == 0:
        return
    times = [
        common.time_in_turn(
            {contender: calls[way] for contender, calls in contenders.items()}, args.rounds, args.device
        )
        for way in range(2)
    ]
    floor = floors(case, locations, dtype) if args.device == 'cuda' else None
    for contender in contenders:
        cells = [f'{way[contender]:.3f}' for way in times]
        cells += [' + '.join(f'{way[peer] / way[contender]:.2f}' for way in times) for peer in peers]
        if args.device == 'cuda':
            shares = zip(floor or (), times, strict=False)
            cells.append(' + '.join(f'{100 * least / way[contender]:.0f} %' for least, way in shares) or '-')
        common.print_row((name, contender, *cells))


def kernel_calls(name: str, grad: Tensor, inputs: Inputs) -> Calls:
    forward, backward = KERNELS[name]
    return lambda: forward(*inputs), lambda: backward(grad, *inputs)


def deterministic(call: Callable[[], object]) -> Callable[[], object]:
    def run() -> object:
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            return call()
        finally:
            torch.use_deterministic_algorithms(False)

    return run


def peer_calls(grad: Tensor, inputs: Inputs, official: object) -> dict[str, Calls]:
    value, flat_shapes, locations, weights = inputs
    shapes = torch.tensor(pairs(flat_shapes), device=value.device)
    starts = torch.cat([shapes.new_zeros(1), shapes.prod(1).cumsum(0)[:-1]])
    peers = {
        'grid_sample': with_autograd(
            lambda v, *x: ms_deform_attn_core_pytorch(v, pairs(flat_shapes), *x), grad, inputs
        )
    }
    if official is not None:
        tensors = value, shapes, starts, locations, weights
        peers['official'] = (
            lambda: official.ms_deform_attn_forward(*tensors, 64),
            lambda: official.ms_deform_attn_backward(*tensors, grad, 64),
        )
    return peers


def with_autograd(call: Callable[..., Tensor], grad: Tensor, inputs: Inputs) -> Calls:
    """Return forward alone, and backward alone with the graph kept, as autograd runs them."""
    tensors = [inputs[index].detach().clone().requires_grad_() for index in (0, 2, 3)]
    output = call(*tensors)
    return (
        lambda: call(*tensors).detach(),
        lambda: torch.autograd.grad(output, tensors, grad, retain_graph=True),
    )


def check_contenders(case: str, contenders: dict[str, Calls], dtype: torch.dtype) -> None:
    """Compare outputs and gradients with those of grid_sample.

    Raises:
        ValueError: a contender's differ.
    """

    def results(name: str) -> tuple[Tensor, ...]:
        forward, backward = contenders[name]
        return forward(), *backward()

    expected = results('grid_sample')
    for name in contenders:
        for what, result, reference in zip(RESULTS, results(name), expected, strict=True):
            error = ((result - reference).abs().max() / reference.abs().max()).item()
            if not error <= AGREE[dtype]:
                raise ValueError(
                    f'{case}: the {what} of {name} differs from that of grid_sample by {error:.1e}'
                )


def draw_inputs(case: Case, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Draw values, points and weights; points lie around their query as in a new model, in eight directions.

    A decoder's queries are anywhere. Points are one to four pixels away, with noise. None lies near the
    middle of a pixel, where the slope jumps and rounding decides which side counts.
    """
    generator = torch.Generator().manual_seed(0)
    shapes = case.shapes()
    sizes = torch.tensor(shapes).flip(-1)  # [L, 2] width, height
    tokens = int(sizes.prod(1).sum())
    if case.queries:
        centers = torch.rand(case.queries, 2, generator=generator)
    else:
        grids = [torch.cartesian_prod(torch.arange(h), torch.arange(w)).flip(-1) + 0.5 for h, w in shapes]
        centers = torch.cat([grid / torch.tensor([w, h]) for grid, (h, w) in zip(grids, shapes, strict=True)])
    angle = torch.arange(HEADS) * (2 * math.pi / HEADS)
    direction = torch.stack([angle.cos(), angle.sin()], -1)
    direction = direction / direction.abs().amax(-1, keepdim=True)
    steps = torch.arange(1, POINTS + 1)[:, None]
    grid = case.batch, len(centers), HEADS, len(shapes), POINTS
    if math.isinf(case.spread):
        pixels = torch.rand(*grid, 2, generator=generator) * sizes[:, None]
    else:
        pixels = case.spread * torch.randn(*grid, 2, generator=generator)
        pixels += direction[:, None, None] * steps + centers[:, None, None, None] * sizes[:, None]
    corner = (pixels - 0.5).floor()
    pixels = corner + 0.51 + 0.98 * (pixels - 0.5 - corner)
    weights = torch.rand(*grid[:3], len(shapes) * POINTS, generator=generator).softmax(-1)
    value = torch.randn(case.batch, tokens, HEADS, case.channels, generator=generator)
    weights = weights.unflatten(-1, (len(shapes), POINTS))
    return value.to(device), (pixels / sizes[:, None]).to(device), weights.to(device)


def floors(case: Case, locations: Tensor, dtype: torch.dtype) -> tuple[float, float] | None:
    """Return the least milliseconds of forward and backward, or None if the rates of this GPU are unknown.

    Memory is read once, four pixels per point pass the first-level cache, and their gradients the
    second-level cache.
    """
    card = torch.cuda.get_device_name()
    memory = next((rate for name, rate in DRAM.items() if name in card), None)
    if memory is None:
        return None
    size = torch.finfo(dtype).bits // 8
    width = HEADS * case.channels
    value = case.batch * sum(h * w for h, w in case.shapes()) * width * size
    points = locations.numel() // 2
    numbers = 4 * 3 * points  # locations and weights, float32
    output = case.batch * locations.shape[1] * width * size
    gathered = 4 * points * case.channels
    forward = max((value + numbers + output) / memory, gathered * size / L1)
    backward = max(
        (3 * value + 2 * numbers + output) / memory, gathered * size / L1, gathered * 4 / REDUCTIONS
    )
    return 1e3 * forward, 1e3 * backward
