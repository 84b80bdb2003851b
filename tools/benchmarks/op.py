"""
Deformable attention at the shapes of real detectors: every implementation of this machine against grid_sample,
forward and backward.

On a GPU the table also has the share of a floor: the least time that the memory traffic of the case takes at the
rates below.
"""

import argparse
import math

import torch
from torch import Tensor

from models.ops.functions.ms_deform_attn_func import KERNELS, available, describe
from tools.benchmarks.timing import time_in_turn

HEADS, CHANNELS, POINTS = 8, 32, 4
PICTURES = {'160x192': (160, 192), '320x480': (320, 480), '800x1333': (800, 1333)}
# name -> picture, batch, queries (0: every token is one, as in an encoder)
CPU_CASES = {
    'encoder 160x192 b1': ('160x192', 1, 0),
    'encoder 320x480 b1': ('320x480', 1, 0),
    'encoder 800x1333 b1': ('800x1333', 1, 0),
    'decoder 300 320x480 b2': ('320x480', 2, 300),
    'decoder 300 800x1333 b2': ('800x1333', 2, 300),
    'decoder 900 800x1333 b2': ('800x1333', 2, 900),
    'decoder 1800 800x1333 b2': ('800x1333', 2, 1800),
}
GPU_CASES = {
    'encoder 800x1333 b2': ('800x1333', 2, 0),
    'decoder 300 800x1333 b2': ('800x1333', 2, 300),
    'decoder 900 800x1333 b2': ('800x1333', 2, 900),
    'decoder 1800 800x1333 b2': ('800x1333', 2, 1800),
}
# Bytes a second of an H200: memory, first-level cache, additions in the second-level cache.
DRAM, L1, REDUCTIONS = 4.3e12, 33e12, 3.7e12


def add_command(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser('op', help='deformable attention against grid_sample')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--threads', default=1, type=int, help='CPU threads (default: %(default)s)')
    parser.add_argument('--rounds', default=7, type=int, help='timed rounds of each contender')
    parser.add_argument('--only', default='', help='cases whose names contain this')
    parser.set_defaults(run=benchmark_op)


def benchmark_op(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    gpu = args.device == 'cuda'
    where = torch.cuda.get_device_name() if gpu else f'{args.threads} CPU thread(s)'
    print(f'{describe(args.device)}; {where}; median of {args.rounds} rounds in turn')
    names = [name for name in available(args.device) if name != 'pytorch']
    for dtype in (torch.float32, torch.bfloat16) if gpu else (torch.float32,):
        print(f'\n{str(dtype).removeprefix("torch.")}: milliseconds forward + backward')
        for case, sizes in (GPU_CASES if gpu else CPU_CASES).items():
            if args.only in case:
                report(case, sizes, names, args.device, dtype, args.rounds)


def report(
    case: str, sizes: tuple[str, int, int], names: list[str], device: str, dtype: torch.dtype, rounds: int
) -> None:
    picture, batch, queries = sizes
    shapes = level_shapes(*PICTURES[picture])
    value, locations, weights = make_inputs(shapes, batch, queries, device)
    reference = value, [side for shape in shapes for side in shape], locations, weights
    inputs = (value.to(dtype), *reference[1:])
    grad = torch.randn(batch, locations.shape[1], HEADS * CHANNELS, device=device)
    forward, backward = {}, {}
    for name in ('pytorch', *names):
        # grid_sample has no mixed precision: it always runs in float32.
        values, slope = (reference, grad) if name == 'pytorch' else (inputs, grad.to(dtype))
        kernels = KERNELS[name]
        if name == 'pytorch':
            forward[name], backward[name] = grid_sample_with_autograd(values, slope)
        else:
            forward[name] = lambda run=kernels[0], values=values: run(*values)
            backward[name] = lambda run=kernels[1], values=values, slope=slope: run(slope, *values)
    check_agreement(case, forward, dtype)
    fwd, bwd = time_in_turn(forward, rounds, device), time_in_turn(backward, rounds, device)
    floor = floors(batch, shapes, locations, dtype) if device == 'cuda' else None
    for name in fwd:
        ratio = (fwd['pytorch'] + bwd['pytorch']) / (fwd[name] + bwd[name])
        text = f'  {case:<26}{name:<9}{fwd[name]:9.3f} + {bwd[name]:9.3f}   x{ratio:5.1f}'
        if floor:
            shares = [100 * low / taken for low, taken in zip(floor, (fwd[name], bwd[name]), strict=True)]
            text += f"   {shares[0]:3.0f} % and {shares[1]:3.0f} % of the floor's speed"
        print(text, flush=True)


def grid_sample_with_autograd(values: tuple, slope: Tensor) -> tuple:
    """Forward alone, and backward alone with the graph kept, as autograd runs them."""
    from models.ops.functions import ms_deform_attn_core_pytorch
    from models.ops.functions.ms_deform_attn_func import pairs

    inputs = [values[index].detach().clone().requires_grad_() for index in (0, 2, 3)]

    def forward() -> Tensor:
        return ms_deform_attn_core_pytorch(inputs[0], pairs(values[1]), *inputs[1:])

    output = forward()

    def backward() -> object:
        return torch.autograd.grad(output, inputs, slope, retain_graph=True)

    return forward, backward


def check_agreement(case: str, contenders: dict, dtype: torch.dtype) -> None:
    expected = contenders['pytorch']()
    for name, run in contenders.items():
        error = ((run() - expected).abs().max() / expected.abs().max()).item()
        if error > (1e-2 if dtype == torch.bfloat16 else 1e-4):
            raise ValueError(f'{case}: {name} differs from grid_sample by {error:.1e}')


def level_shapes(height: int, width: int) -> list[tuple[int, int]]:
    """Strides 8, 16, 32 and 64."""
    return [(math.ceil(height / stride), math.ceil(width / stride)) for stride in (8, 16, 32, 64)]


def make_inputs(
    shapes: list[tuple[int, int]], batch: int, queries: int, device: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Points around their query as in a freshly built model, one to four pixels away in eight directions, with a
    pixel of noise; a decoder's queries lie anywhere.
    """
    generator = torch.Generator().manual_seed(0)
    sizes = torch.tensor(shapes).flip(-1)  # [L, 2] width, height
    tokens = int(sizes.prod(1).sum())
    if queries:
        centers = torch.rand(queries, 2, generator=generator)
    else:
        grids = [torch.cartesian_prod(torch.arange(h) + 0.5, torch.arange(w) + 0.5).flip(-1) / torch.tensor([w, h])
                 for h, w in shapes]  # fmt: skip
        centers = torch.cat(grids)
    angle = torch.arange(HEADS) * (2 * math.pi / HEADS)
    direction = torch.stack([angle.cos(), angle.sin()], -1)
    direction = direction / direction.abs().amax(-1, keepdim=True)
    steps = torch.arange(1, POINTS + 1)[:, None]
    offsets = torch.randn(batch, len(centers), HEADS, len(shapes), POINTS, 2, generator=generator)
    offsets += direction[:, None, None] * steps
    locations = centers[:, None, None, None] + offsets / sizes[:, None]
    weights = torch.rand(batch, len(centers), HEADS, len(shapes) * POINTS, generator=generator).softmax(-1)
    value = torch.randn(batch, tokens, HEADS, CHANNELS, generator=generator)
    weights = weights.unflatten(-1, (len(shapes), POINTS))
    return value.to(device), locations.to(device), weights.to(device)


def floors(
    batch: int, shapes: list[tuple[int, int]], locations: Tensor, dtype: torch.dtype
) -> tuple[float, float]:
    """Least milliseconds of forward and backward: memory once, four pixels a point through the first-level cache,
    their gradients through the second-level one.
    """
    size = torch.finfo(dtype).bits // 8
    width = HEADS * CHANNELS
    value = batch * sum(h * w for h, w in shapes) * width * size
    points = locations.numel() // 2
    numbers = 4 * 3 * points  # locations and weights, float32
    output = batch * locations.shape[1] * width * size
    gathered = 4 * points * CHANNELS
    forward = max((value + numbers + output) / DRAM, gathered * size / L1)
    backward = max((3 * value + 2 * numbers + output) / DRAM, gathered * size / L1, gathered * 4 / REDUCTIONS)
    return 1e3 * forward, 1e3 * backward
