"""
Compare every implementation of deformable attention that this machine has with pure PyTorch in float64:

    python -m tests.ops_check
    python -m tests.ops_check --device cuda --only cuda --brief    # for compute-sanitizer: one launch each

It checks values, the three gradients, numerical gradients, torch.compile and torch.export. The exit status is
1 if anything disagrees, or if an implementation that was asked for by name is missing.
"""

import argparse
import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch._dynamo import lookup_backend

from models.ops.functions import (
    KERNELS,
    Gradients,
    available,
    backward_pytorch,
    describe,
    forward_pytorch,
    implementation,
    problems,
    use_implementation,
)
from models.ops.modules import MSDeformAttn

Inputs = tuple[Tensor, list[int], Tensor, Tensor]
# The largest relative error of output and gradients that passes.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
# Test cases: name -> heads, channels of a head, queries, points, shapes.
SIZES = {
    'official': (2, 2, 2, 2, [6, 4, 3, 2]),
    'detector': (8, 32, 60, 4, [10, 14, 5, 7, 3, 4, 1, 1]),
    'encoder order': (8, 32, 203, 4, [10, 14, 5, 7, 4, 7]),
    'odd': (3, 5, 7, 3, [5, 7, 1, 2, 1, 1]),
    'one channel': (1, 1, 5, 1, [4, 6]),
    '71 channels': (1, 71, 3, 2, [3, 4, 2, 2]),
    'wide heads': (2, 256, 9, 4, [7, 5]),
    '1025 channels': (1, 1025, 3, 2, [3, 4, 2, 2]),
    '3096 channels': (1, 3096, 3, 2, [3, 4, 2, 2]),
}


def make_inputs(size: str, device: str, dtype: torch.dtype, batch: int = 2) -> tuple[Tensor, Inputs]:
    """Make a gradient of the output, and the operator's inputs.

    Many points lie outside the map. None lies near the middle of a pixel, where the slope jumps and rounding
    decides which side counts.
    """
    heads, channels, queries, points, shapes = SIZES[size]
    sides = torch.tensor(shapes, dtype=torch.float64).view(-1, 2)
    generator = torch.Generator().manual_seed(3)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    levels = len(sides)
    value = uniform(batch, int(sides.prod(1).sum()), heads, channels) - 0.5
    pixel = 1.4 * uniform(batch, queries, heads, levels, points, 2) - 0.2
    pixel = pixel * sides.flip(-1)[:, None]
    fraction = pixel - pixel.floor()
    pixel = pixel.floor() + 0.5 + (0.02 + 0.96 * fraction)  # the middle of a pixel is at .5
    weights = uniform(batch, queries, heads, levels * points).softmax(-1).unflatten(-1, (levels, points))
    locations = pixel / sides.flip(-1)[:, None]
    precise = torch.float64 if dtype == torch.float64 else torch.float32
    grad = (uniform(batch, queries, heads * channels) - 0.5).to(device, dtype)
    inputs = value.to(device, dtype), shapes, locations.to(device, precise), weights.to(device, precise)
    return grad, inputs


def relative_errors(name: str, size: str, device: str, dtype: torch.dtype) -> list[float]:
    """Return the relative errors of the output and of the gradients of values, locations and weights."""
    grad, (value, shapes, locations, weights) = make_inputs(size, device, dtype)
    forward, backward = KERNELS[name]
    ours = [
        forward(value, shapes, locations, weights),
        *backward(grad, value, shapes, locations, weights),
    ]
    # On the CPU: a sanitizer of the GPU then watches our kernels alone.
    grad, value, locations, weights = (x.cpu().double() for x in (grad, value, locations, weights))
    exact = value, shapes, locations, weights
    expected = [forward_pytorch(*exact), *backward_pytorch(grad, *exact)]
    return [
        ((a.cpu().double() - b).abs().max() / b.abs().max()).item()
        for a, b in zip(ours, expected, strict=True)
    ]


def largest(errors: list[float]) -> float:
    """Return the maximum, or NaN if there is one; Python's `max` may overlook it."""
    return torch.tensor(errors, dtype=torch.float64).amax().item()


class Direct(torch.autograd.Function):
    """One implementation as an autograd function, without the operator."""

    @staticmethod
    def forward(
        ctx: object, name: str, value: Tensor, shapes: list[int], locations: Tensor, weights: Tensor
    ) -> Tensor:
        ctx.name, ctx.shapes = name, shapes
        ctx.save_for_backward(value, locations, weights)
        return KERNELS[name][0](value, shapes, locations, weights)

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> tuple:
        value, locations, weights = ctx.saved_tensors
        grads: Gradients = KERNELS[ctx.name][1](grad, value, ctx.shapes, locations, weights)
        return None, grads[0], None, grads[1], grads[2]


def numerical_gradients_agree(name: str, channels: int, device: str) -> bool:
    SIZES['gradcheck'] = (2, channels, 2, 2, [6, 4, 3, 2])
    _, (value, shapes, locations, weights) = make_inputs('gradcheck', device, torch.float64, batch=1)
    inputs = [x.requires_grad_() for x in (value, locations, weights)]
    # A GPU adds gradients in any order, so that their rounding varies.
    return torch.autograd.gradcheck(
        lambda v, x, w: Direct.apply(name, v, shapes, x, w),
        inputs,
        nondet_tol=0.0 if device == 'cpu' else 1e-12,
        fast_mode=device != 'cpu',  # thousands of launches otherwise
    )


def module_inputs(device: str) -> tuple[nn.Module, tuple]:
    torch.manual_seed(0)
    module, shapes = MSDeformAttn(32, 2, 4, 3).to(device), [(6, 5), (3, 2)]
    nn.init.normal_(module.sampling_offsets.weight, std=0.1)
    query, memory = torch.randn(2, 7, 32, device=device), torch.randn(2, 36, 32, device=device)
    return module, (query, torch.rand(2, 7, 2, 2, device=device), memory, shapes)


class RecordGraphs:
    """A backend of torch.compile that keeps the graphs and lets another backend run them."""

    def __init__(self, backend: str = 'eager') -> None:
        self.graphs: list[torch.fx.GraphModule] = []
        self.compile = lookup_backend(backend)

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
        self.graphs.append(graph)
        return self.compile(graph, inputs)

    def count(self, name: str) -> int:
        """Count the calls of operators whose names hold this."""
        return sum(name in str(node.target) for graph in self.graphs for node in graph.graph.nodes)


def compiled_equals_eager(name: str, device: str) -> bool:
    """Compare output and gradients of the module with those of its torch.compile in one graph.

    The graph must hold the operator, or grid_sample if that is the implementation.
    """
    module, (query, *rest) = module_inputs(device)
    torch.compiler.reset()
    backend, results = RecordGraphs('aot_eager'), []
    with use_implementation(name):
        for call in (module, torch.compile(module, fullgraph=True, backend=backend)):
            x = query.clone().requires_grad_()
            output = call(x, *rest)
            output.square().sum().backward()
            results.append((output.detach(), x.grad))
    calls = backend.count('detr.ms_deform_attn'), backend.count('grid_sample')
    if calls != ((0, 2) if name == 'pytorch' else (1, 0)):  # of two levels
        return False
    return all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*results, strict=True))


def exported_equals_eager(device: str) -> bool:
    """Export the module with a dynamic number of queries, and compare outputs.

    The program must contain PyTorch's own operators only.
    """
    module, (query, reference, *rest) = module_inputs(device)
    queries = torch.export.Dim.DYNAMIC
    dynamic = ({1: queries}, {1: queries}, None, [(None, None), (None, None)])
    program = torch.export.export(module, (query, reference, *rest), dynamic_shapes=dynamic, strict=False)
    if any('detr' in str(node.target) for node in program.graph.nodes):
        return False
    query, reference = query.repeat(1, 3, 1), reference.repeat(1, 3, 1, 1)
    return torch.allclose(
        program.module()(query, reference, *rest), module(query, reference, *rest), atol=1e-5
    )


def implementations(device: str = '', only: str = '') -> Iterator[tuple[str, str]]:
    """List (device, implementation) of all that can run here, or of one device, or one name."""
    for found in ('cpu', 'cuda') if torch.cuda.is_available() else ('cpu',):
        if device in ('', found):
            yield from ((found, name) for name in available(found) if only in ('', name))


def dtypes(name: str) -> list[torch.dtype]:
    return [torch.float64, torch.float32] if name == 'pytorch' else list(TOLERANCES)


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        '--device', default='', choices=('cpu', 'cuda'), help='check one device (default: all)'
    )
    parser.add_argument(
        '--only', default='', choices=KERNELS, metavar='NAME', help='check one implementation (default: all)'
    )
    parser.add_argument(
        '--brief', action='store_true', help='compare values and gradients only, deterministic sums too'
    )
    return parser


def main(args: argparse.Namespace) -> int:
    failures = 0

    def report(ok: bool, text: str) -> None:
        nonlocal failures
        failures += not ok
        print(f'{"ok  " if ok else "FAIL"} {text}', flush=True)

    found = list(implementations(args.device, args.only))
    devices = list(dict.fromkeys(device for device, _ in found))
    for device in devices:
        print(f'in use: {describe(device)}')
    for name, problem in problems.items():
        print(f'not here: {name}: {problem}')
    if not found:
        report(False, f'{args.only or "no implementation"} cannot run on {args.device or "this machine"}')
    print('\nlargest relative error of              output    d value    d locations  d weights')
    for device, name in found:
        for dtype in dtypes(name):
            for deterministic in (False, True) if args.brief else (False,):
                torch.use_deterministic_algorithms(deterministic, warn_only=True)
                errors = [relative_errors(name, size, device, dtype) for size in SIZES if size != 'gradcheck']
                worst = [largest(column) for column in zip(*errors, strict=True)]
                columns = '  '.join(f'{error:9.1e}' for error in worst)
                label = f'{device} {name} {str(dtype).removeprefix("torch.")}'
                label += ' fixed' if deterministic else ''
                report(largest(worst) <= TOLERANCES[dtype], f'{label:<32}{columns}')
    torch.use_deterministic_algorithms(False)
    if args.brief:
        return int(failures > 0)
    print()
    for device, name in found:
        for channels in (30, 32, 64, 71):
            ok = numerical_gradients_agree(name, channels, device)
            report(ok, f'{device} {name} numerical gradients, {channels} channels')
        if name in (implementation(device), 'pytorch'):  # the operator calls one set of kernels
            report(compiled_equals_eager(name, device), f'{device} {name} torch.compile in one graph')
    for device in devices:
        report(exported_equals_eager(device), f'{device} torch.export, number of queries dynamic')
    return int(failures > 0)


if __name__ == '__main__':
    sys.exit(main(get_args_parser().parse_args()))
