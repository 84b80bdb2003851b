"""
Multi-scale deformable attention (arXiv:2010.04159, Eq. 3) as one registered operator, `detr::ms_deform_attn`.

The operator has several implementations: `cpp` (CPU) and `cuda`, built by `models/ops/setup.py`, and `triton`
(CUDA, nothing to build). A device uses the first that runs on it and agrees with pure PyTorch on a small
case. Otherwise, and whenever a model is exported, `pytorch` runs: grid_sample, on any device, without the
operator. The choice is made at import for the CPU, and at the first use of other devices.

Letters: N images, S tokens, M heads, D channels of a head, Q queries, L levels, P points.
"""

import importlib.util
import logging
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

Shapes = Sequence[tuple[int, int]]  # (height, width) of each level
Gradients = tuple[Tensor, Tensor, Tensor]

LIBRARY_FILE = Path(__file__).resolve().parent / (
    f'_C_torch{torch.__version__}'.replace('.', '_').replace('+', '_')
    + ('.pyd' if sysconfig.get_platform().startswith('win') else '.so')
)
logger = logging.getLogger(__name__)


def ms_deform_attn_core_pytorch(
    value: Tensor, spatial_shapes: Shapes, sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """Compute the operator (see `ms_deform_attn`) in plain PyTorch: exportable, and on any device."""
    value = value.to(sampling_locations.dtype)
    batch, _, heads, channels = value.shape
    _, queries, _, levels, points, _ = sampling_locations.shape
    grids = (2 * sampling_locations - 1).transpose(1, 2).flatten(0, 1)  # [N M, Q, L, P, 2]
    parts = value.split([height * width for height, width in spatial_shapes], dim=1)
    samples = [
        F.grid_sample(
            part.permute(0, 2, 3, 1).reshape(batch * heads, channels, height, width),
            grids[:, :, level],
            align_corners=False,
        )
        for level, (part, (height, width)) in enumerate(zip(parts, spatial_shapes, strict=True))
    ]  # [N M, D, Q, P] each
    weights = attention_weights.transpose(1, 2).reshape(batch * heads, 1, queries, levels * points)
    output = (torch.cat(samples, dim=-1) * weights).sum(-1)  # [N M, D, Q]
    return output.view(batch, heads * channels, queries).transpose(1, 2)


def pairs(flat_shapes: Sequence[int]) -> Shapes:
    """Turn [H0, W0, H1, W1 ...] into [(H0, W0), (H1, W1) ...]."""
    return list(zip(flat_shapes[::2], flat_shapes[1::2], strict=True))


def forward_pytorch(value: Tensor, shapes: Sequence[int], locations: Tensor, weights: Tensor) -> Tensor:
    output = ms_deform_attn_core_pytorch(value, pairs(shapes), locations, weights)
    return output.to(value.dtype).contiguous()


def backward_pytorch(
    grad_output: Tensor, value: Tensor, shapes: Sequence[int], locations: Tensor, weights: Tensor
) -> Gradients:
    with torch.enable_grad():
        inputs = [tensor.detach().requires_grad_() for tensor in (value, locations, weights)]
        output = ms_deform_attn_core_pytorch(inputs[0], pairs(shapes), *inputs[1:])
        return torch.autograd.grad(output, inputs, grad_output.to(output.dtype))


SCHEMA = 'Tensor value, SymInt[] spatial_shapes, Tensor sampling_locations, Tensor attention_weights'
library = torch.library.Library('detr', 'FRAGMENT')


def define_operator() -> None:
    """Define the operator. Pure PyTorch is its implementation on devices for which no other is registered."""
    tag = torch.Tag.pt2_compliant_tag
    library.define(f'ms_deform_attn({SCHEMA}) -> Tensor', tags=tag)
    library.define(
        f'ms_deform_attn_backward(Tensor grad_output, {SCHEMA}) -> (Tensor, Tensor, Tensor)', tags=tag
    )
    library.impl('ms_deform_attn', forward_pytorch, 'CompositeExplicitAutograd')
    library.impl('ms_deform_attn_backward', backward_pytorch, 'CompositeExplicitAutograd')
    torch.library.register_fake('detr::ms_deform_attn', forward_fake, lib=library)
    torch.library.register_fake('detr::ms_deform_attn_backward', backward_fake, lib=library)
    torch.library.register_autograd('detr::ms_deform_attn', backward, setup_context=save_inputs, lib=library)
    library.impl('ms_deform_attn', make_autocast('cuda'), 'AutocastCUDA')
    library.impl('ms_deform_attn', make_autocast('cpu'), 'AutocastCPU')
    register_flop_formula(torch.ops.detr.ms_deform_attn)(forward_flops)
    register_flop_formula(torch.ops.detr.ms_deform_attn_backward)(backward_flops)


def forward_fake(value: Tensor, shapes: Sequence[int], locations: Tensor, weights: Tensor) -> Tensor:
    batch, _, heads, channels = value.shape
    return value.new_empty(batch, locations.shape[1], heads * channels)


def backward_fake(
    grad_output: Tensor, value: Tensor, shapes: Sequence[int], locations: Tensor, weights: Tensor
) -> Gradients:
    return tuple(tensor.new_empty(tensor.shape) for tensor in (value, locations, weights))


def save_inputs(ctx: object, inputs: tuple, output: Tensor) -> None:
    value, ctx.shapes, locations, weights = inputs
    ctx.save_for_backward(value, locations, weights)


def backward(ctx: object, grad_output: Tensor) -> tuple[Tensor, None, Tensor, Tensor]:
    value, locations, weights = ctx.saved_tensors
    grads = torch.ops.detr.ms_deform_attn_backward(grad_output, value, ctx.shapes, locations, weights)
    return grads[0], None, grads[1], grads[2]


def exact_points(value: Tensor, locations: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Convert locations and weights to float32 at least: 16 bits place a point to a third of a pixel."""
    dtype = torch.promote_types(value.dtype, torch.float32)
    return locations.to(dtype), weights.to(dtype)


def make_autocast(device_type: str) -> Callable:
    """Make the operator's autocast rule: values keep their type, locations and weights become float32."""

    def autocast(value: Tensor, shapes: Sequence[int], locations: Tensor, weights: Tensor) -> Tensor:
        with torch.autocast(device_type, enabled=False):
            return torch.ops.detr.ms_deform_attn(value, shapes, *exact_points(value, locations, weights))

    return autocast


def forward_flops(
    value: Sequence[int], shapes: object, locations: Sequence[int], *_: object, **__: object
) -> int:
    """Count four pixels per point, with a multiplication and an addition per channel."""
    batch, queries, heads, levels, points, _ = locations
    return 8 * value[-1] * batch * queries * heads * levels * points


def backward_flops(
    grad: object, value: Sequence[int], shapes: object, locations: Sequence[int], *_: object, **__: object
) -> int:
    """Count twice the forward pass: products with the pixels, and additions to their gradients."""
    return 2 * forward_flops(value, shapes, locations)


def ms_deform_attn(
    value: Tensor, spatial_shapes: Shapes, sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """Sum weighted bilinear samples of feature maps (Eq. 3) for every head, and return [N, Q, M D].

    Args:
        value: [N, S, M, D], levels one after the other, row by row.
        spatial_shapes: (H, W) of each level, plain integers.
        sampling_locations: [N, Q, M, L, P, 2] x, y in units of the level, whose edges are 0 and 1. Pixels
            outside are 0.
        attention_weights: [N, Q, M, L, P], used as they are.

    Raises:
        RuntimeError: the shapes do not fit each other.
    """
    locations, weights = exact_points(value, sampling_locations, attention_weights)
    if is_exporting() or implementation(value.device.type) == 'pytorch':
        return ms_deform_attn_core_pytorch(value, spatial_shapes, locations, weights).to(value.dtype)
    flat_shapes = [side for shape in spatial_shapes for side in shape]
    return torch.ops.detr.ms_deform_attn(value, flat_shapes, locations, weights)


def is_exporting() -> bool:
    """Return whether the model is being exported: such a program may contain PyTorch's own operators only."""
    return torch.jit.is_tracing() or in_torch_export()


def in_torch_export() -> bool:
    """Return whether torch.export runs, from PyTorch 2.7 on.

    `torch.compiler.is_exporting` would do, but up to PyTorch 2.13 torch.compile takes it for True, too. Some
    versions do not set the flag while they export with strict=True.
    """
    return getattr(torch.compiler, '_is_exporting_flag', False)


chosen: dict[str, str] = {}  # type of device -> implementation in use
forced: list[str] = []  # implementations in `use_implementation`, the innermost last
problems: dict[str, str] = {}  # implementation -> why it is not used


@torch.compiler.assume_constant_result
def implementation(device_type: str) -> str:
    """Return the implementation in use on a type of device. The first call chooses, checks and logs it."""
    if forced:
        return forced[-1]
    if device_type == 'meta':
        return 'operator'  # shapes and FLOPs only
    if device_type not in chosen:
        chosen[device_type] = choose(device_type)
        logger.info('%s', describe(device_type))
    return chosen[device_type]


def choose(device_type: str) -> str:
    """Return the best implementation that works on a type of device; `problems` gets why others do not."""
    for name in CANDIDATES.get(device_type, ()):
        if name in problems:
            continue
        problem = disagreement(name, device_type)
        if problem is None:
            if name == 'triton':  # compiled kernels have registered themselves
                problem = register(KERNELS[name], 'CUDA')
            if problem is None:
                return name
        problems[name] = problem
    return 'pytorch'


def register(kernels: tuple[Callable, Callable], key: str) -> str | None:
    """Register kernels as the operator's implementation; return None, or why that is impossible."""
    options = {'allow_override': True} if has_kernel(key) else {}
    try:
        for name, kernel in zip(OPERATORS, kernels, strict=True):
            library.impl(name, kernel, key, **options)
    except TypeError:
        return f'PyTorch {torch.__version__} cannot replace compiled kernels: remove {LIBRARY_FILE.name}'
    return None


def available(device_type: str) -> list[str]:
    """List the implementations that can run on a type of device, the one in use first."""
    first = implementation(device_type)
    others = [name for name in CANDIDATES.get(device_type, ()) if name not in problems]
    return list(dict.fromkeys([first, *others, 'pytorch']))


def describe(device_type: str) -> str:
    """Say in one line which implementation is in use, and why no better one is."""
    name = implementation(device_type)
    better = CANDIDATES.get(device_type, ())
    better = better[: better.index(name)] if name in better else better
    skipped = [f'{other}: {problems[other]}' for other in better]
    reason = f' ({"; ".join(skipped)})' if skipped else ''
    return f'{name} kernels of deformable attention on {device_type}{reason}'


@contextmanager
def use_implementation(name: str) -> Iterator[None]:
    """Force an implementation that `available` lists, in tests and benchmarks."""
    forced.append(name)
    try:
        yield
    finally:
        forced.pop()


@torch.inference_mode(False)  # whatever the mode of a model whose first call asks for this
def disagreement(name: str, device_type: str) -> str | None:
    """Compare with pure PyTorch on small cases, with points inside, at the edge and outside.

    Return None if output and gradients agree, else the problem.
    """
    generator = torch.Generator().manual_seed(0)
    forward, backward = KERNELS[name]
    # A decoder of 8 channels, and an encoder (as many queries as tokens) of 32, which has special kernels.
    for queries, channels in ((5, 8), (23, 32)):
        points = 1, queries, 2, 2, 3
        shapes = (1, 23, 2, channels), (*points, 2), points, (1, queries, 2 * channels)
        value, locations, weights, grad = (
            torch.rand(shape, generator=generator, dtype=torch.float32) for shape in shapes
        )
        exact = value, (5, 4, 1, 3), 1.4 * locations - 0.2, weights
        arguments = [x.to(device_type) if isinstance(x, Tensor) else x for x in exact]
        with torch.autocast(device_type, enabled=False):
            expected = [forward_pytorch(*exact), *backward_pytorch(grad, *exact)]
            try:
                results = [forward(*arguments), *backward(grad.to(device_type), *arguments)]
                errors = [
                    (a.cpu() - b).abs().max() / b.abs().max() for a, b in zip(results, expected, strict=True)
                ]
            except Exception as error:  # whatever a driver or compiler raises, another implementation can run
                return f'failed ({str(error).splitlines()[0] if str(error) else type(error).__name__})'
        worst = torch.stack(errors).amax().item()
        if not worst < 1e-4:  # also true for NaN
            return f'differs from PyTorch by {worst:.1e}'
    return None


def load_library() -> None:
    """Load the compiled kernels, which register themselves for the CPU and CUDA."""
    if not LIBRARY_FILE.is_file():
        problems['cpp'] = problems['cuda'] = 'not built: bash scripts/build_ops.sh'
        return
    try:
        torch.ops.load_library(str(LIBRARY_FILE))
    except OSError as error:
        problems['cpp'] = problems['cuda'] = (
            f'{LIBRARY_FILE.name} does not load ({error}): bash scripts/build_ops.sh'
        )
        return
    if not has_kernel('CUDA'):
        problems['cuda'] = 'built without CUDA: bash scripts/build_ops.sh where nvcc is'


def has_kernel(key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key('detr::ms_deform_attn', key)


def triton_kernel(name: str) -> Callable:
    """Wrap a function of `models.ops.triton_kernels`, which is imported at the first call."""

    def call(*arguments: object) -> object:
        from models.ops import triton_kernels

        return getattr(triton_kernels, name)(*arguments)

    return call


if not hasattr(torch.ops.detr, 'ms_deform_attn'):  # defined by another copy of this file, from torch.hub
    define_operator()
load_library()
CANDIDATES = {'cpu': ('cpp',), 'cuda': ('cuda', 'triton')}  # best first; any device has `pytorch` in the end
OPERATORS = 'ms_deform_attn', 'ms_deform_attn_backward'
COMPILED = tuple(getattr(torch.ops.detr, name) for name in OPERATORS)
KERNELS: dict[str, tuple[Callable, Callable]] = {
    'cpp': COMPILED,
    'cuda': COMPILED,
    'triton': (triton_kernel('forward'), triton_kernel('backward')),
    'pytorch': (forward_pytorch, backward_pytorch),
}
if importlib.util.find_spec('triton') is None:
    problems['triton'] = 'not installed'
implementation('cpu')  # that of a GPU is chosen at its first use: an import must not touch it
