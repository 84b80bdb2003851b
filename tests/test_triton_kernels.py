"""The Triton kernels equal grid_sample in float64, in Triton's interpreter without a GPU and on a GPU where there is
one; they compile for GPUs that are not there.

Triton reads TRITON_INTERPRET once, when it is imported. So all interpreted checks run in one process of their own:
this file as a script.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec('triton') is None, reason='Triton is not installed'
)
pytestmark = needs_triton

ROUNDING = {torch.float64: 1e-12, torch.float32: 4e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@dataclass(frozen=True)
class Case:
    channels: int = 4
    dtype: torch.dtype = torch.float32
    levels: tuple[tuple[int, int], ...] = ((5, 7), (1, 1))
    points: int = 1
    images: int = 1
    queries: int = 5
    heads: int = 2
    spread: float = 1.4  # of the locations around the middle: above 1 some are outside
    deterministic: bool = False

    @property
    def shapes(self) -> list[int]:
        return [side for level in self.levels for side in level]

    def tensors(self, device: str) -> list[Tensor]:
        """grad_output, value, locations, weights."""
        generator = torch.Generator().manual_seed(0)
        tokens = sum(height * width for height, width in self.levels)
        per_query = self.images, self.queries, self.heads, len(self.levels), self.points
        fine = torch.float64 if self.dtype == torch.float64 else torch.float32
        sizes = {
            (self.images, self.queries, self.heads * self.channels): self.dtype,
            (self.images, tokens, self.heads, self.channels): self.dtype,
            (*per_query, 2): fine,
            per_query: fine,
        }
        grad_output, value, locations, weights = (
            (2 * torch.rand(size, generator=generator, dtype=torch.float64) - 1).to(device, dtype)
            for size, dtype in sizes.items()
        )
        return [grad_output, value, 0.5 + self.spread / 2 * locations, weights]


def reference(
    grad_output: Tensor, value: Tensor, case: Case, locations: Tensor, weights: Tensor
) -> list[Tensor]:
    """Output and gradients of plain PyTorch in float64; points out of range are left out before it."""
    inputs = [tensor.detach().double().requires_grad_() for tensor in (value, locations, weights)]
    value, locations, weights = inputs
    output, first = 0, 0
    for level, (height, width) in enumerate(case.levels):
        size = value.new_tensor([width, height])
        pixels = locations[:, :, :, level] * size - 0.5  # [N, Q, M, P, 2]
        inside = ((pixels > -1) & (pixels < size)).all(-1)
        grid = torch.where(inside[..., None], 2 * locations[:, :, :, level] - 1, 0)
        part = value[:, first : first + height * width].permute(0, 2, 3, 1)  # [N, M, D, H W]
        samples = F.grid_sample(
            part.unflatten(-1, (height, width)).flatten(0, 1),
            grid.transpose(1, 2).flatten(0, 1),
            align_corners=False,
        )  # [N M, D, Q, P]
        share = torch.where(inside, weights[:, :, :, level], 0).transpose(1, 2).flatten(0, 1)
        output = output + (samples * share[:, None]).sum(-1)
        first += height * width
    output = output.unflatten(0, (case.images, case.heads)).permute(0, 3, 1, 2).flatten(2)
    return [output.detach(), *torch.autograd.grad(output, inputs, grad_output.double())]


@contextmanager
def determinism(enabled: bool) -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(enabled)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def run(case: Case, grad_output: Tensor, value: Tensor, *others: Tensor) -> list[Tensor]:
    from models.ops import triton_kernels

    with determinism(case.deterministic):
        output = triton_kernels.forward(value, case.shapes, *others)
        return [output, *triton_kernels.backward(grad_output, value, case.shapes, *others)]


def assert_equal_to_reference(case: Case, tensors: list[Tensor]) -> None:
    grad_output, value, *others = tensors
    ours = run(case, *tensors)
    expected = reference(grad_output, value, case, *others)
    assert [tensor.dtype for tensor in ours] == [case.dtype, case.dtype, others[0].dtype, others[0].dtype]
    for name, a, b in zip(('output', 'value', 'locations', 'weights'), ours, expected, strict=True):
        assert a.is_contiguous(), name
        tolerance = ROUNDING[a.dtype] * max(b.abs().max().item(), 1) if b.numel() else 0
        message = partial('{}: {}'.format, name)
        torch.testing.assert_close(a.double(), b, rtol=0, atol=tolerance, msg=message)


def check_random(case: Case, device: str) -> None:
    assert_equal_to_reference(case, case.tensors(device))


def check_points_without_a_place(device: str) -> None:
    """NaN, infinite, huge and just excluded locations contribute exactly 0, whatever their weight."""
    case = Case(levels=((4, 8),), points=4, queries=4)
    grad_output, value, locations, weights = case.tensors(device)
    locations[:, 0] = torch.tensor([[torch.nan, 0.5], [0.5, torch.nan], [torch.inf, 0.5], [0.5, -torch.inf]])
    locations[:, 1] = torch.tensor([[1e30, 0.5], [0.5, -1e30], [-0.5 / 8, 0.5], [0.5, -0.5 / 4]])  # x, y = -1
    locations[:, 2] = torch.tensor([[8.5 / 8, 0.5], [0.5, 4.5 / 4], [3e9, 3e9], [-3e9, 0.5]])  # x = W, y = H
    weights[:, 0, :, :, 0] = torch.inf
    output, grad_value, grad_locations, grad_weights = run(case, grad_output, value, locations, weights)
    for tensor in (output, grad_locations, grad_weights):
        assert (tensor[:, :3] == 0).all()
        assert (tensor[:, 3] != 0).any()
    assert grad_value.isfinite().all()
    assert_equal_to_reference(case, [grad_output, value, locations, weights])


def check_other_pixels_are_not_read(device: str) -> None:
    """NaN in pixels that no point touches, of another level among them, goes nowhere."""
    case = Case(levels=((1, 1), (4, 4), (1, 1)), queries=3)
    grad_output, value, locations, weights = case.tensors(device)
    locations[:, :, :, ::2] = 5.0  # nothing of the small levels
    locations[:, :, :, 1] = torch.tensor([0.0, 1.0])  # corner: three of the four pixels are missing
    value[:] = torch.nan
    value[:, 1 + 12] = 2.0
    output, _, grad_locations, grad_weights = run(case, grad_output, value, locations, weights)
    torch.testing.assert_close(output.unflatten(2, (2, 4))[..., 0], 0.5 * weights[:, :, :, 1, 0])
    assert grad_locations.isfinite().all()
    assert grad_weights.isfinite().all()


def check_layout_in_memory_does_not_matter(device: str) -> None:
    case = Case(queries=3)
    tensors = case.tensors(device)
    tensors[0] = tensors[0][:, :, :1].expand_as(tensors[0])
    views = [tensor.transpose(0, 1).contiguous().transpose(0, 1) for tensor in tensors[1:]]
    assert_equal_to_reference(case, [tensors[0], *views])


def check_deterministic_sums_do_not_depend_on_order(device: str) -> None:
    for dtype in (torch.float32, torch.float64):
        case = Case(levels=((1, 2),), queries=40, dtype=dtype, deterministic=True)
        tensors = case.tensors(device)
        tensors[0] *= 10 ** torch.linspace(-6, 3, 40, device=device, dtype=dtype)[:, None]
        grad_value = run(case, *tensors)[1]
        tensors[0], *tensors[2:] = (tensor.flip(1) for tensor in (tensors[0], *tensors[2:]))
        assert torch.equal(grad_value, run(case, *tensors)[1])


def check_deterministic_sums_do_not_overflow(device: str) -> None:
    """Every point adds the largest possible share to the same pixel."""
    case = Case(levels=((1, 1),), points=3, queries=40, deterministic=True)
    grad_output, value, locations, weights = (torch.ones_like(tensor) for tensor in case.tensors(device))
    assert (run(case, grad_output, value, 0.5 * locations, weights)[1] == 3 * 40).all()


def check_deterministic_sums_of_any_size(device: str) -> None:
    """Relative to the largest, they are as exact for tiny and huge gradients; what is not finite shows."""
    case = Case(deterministic=True)
    grad_output, *others = case.tensors(device)
    expected = reference(grad_output, others[0], case, *others[1:])[1]
    for size in (1e-30, 1e30):
        grad_value = run(case, size * grad_output, *others)[1]
        torch.testing.assert_close(grad_value.double() / size, expected, rtol=0, atol=1e-6)
    assert (run(case, 0 * grad_output, *others)[1] == 0).all()
    for bad in (torch.nan, torch.inf):
        grad_output[0, 1, 2] = bad
        assert run(case, grad_output, *others)[1].isnan().all()


def check_shapes_that_do_not_fit(device: str) -> None:
    case = Case()
    tensors = case.tensors(device)
    for wrong in (replace(case, levels=((5, 7), (1, 2))), replace(case, levels=((5, 7),))):
        with pytest.raises(RuntimeError, match='do not fit each other'):
            run(wrong, *tensors)
    with pytest.raises(RuntimeError, match='do not fit each other'):
        run(case, *tensors[:3], tensors[3][:, 1:])


FOUR_LEVELS = ((5, 7), (3, 4), (1, 2), (1, 1))
CASES = {
    **{f'32_channels_{str(dtype)[6:]}': Case(channels=32, dtype=dtype) for dtype in ROUNDING},
    '1_channel_4_levels_3_points': Case(channels=1, levels=FOUR_LEVELS, points=3, images=2),
    '9_channels_1_level_4_points': Case(channels=9, levels=((6, 4),), points=4, queries=9),
    '30_channels_4_levels': Case(channels=30, levels=FOUR_LEVELS, heads=1),
    '71_channels': Case(channels=71, levels=((3, 5),), points=3, queries=2, heads=1),
    '1025_channels': Case(channels=1025, levels=((3, 5),), queries=2, heads=1),
    'only_levels_of_one_pixel': Case(levels=((1, 1),) * 4, spread=3),
    'far_outside': Case(levels=FOUR_LEVELS, points=3, queries=9, spread=6),
    'many_queries': Case(channels=1, queries=130),
    'no_queries': Case(queries=0),
    'no_images': Case(images=0),
    'no_queries_deterministic': Case(queries=0, deterministic=True),
    **{
        f'deterministic_{str(dtype)[6:]}': Case(channels=32, dtype=dtype, queries=3, deterministic=True)
        for dtype in ROUNDING
    },
}
CHECKS: dict[str, Callable[[str], None]] = {
    **{name: partial(check_random, case) for name, case in CASES.items()},
    **{
        name[6:]: check
        for name, check in list(globals().items())
        if name.startswith('check_') and name != 'check_random'
    },
}


@pytest.fixture(scope='module')
def interpreted() -> dict[str, str]:
    """Name of each check -> what is wrong, in Triton's interpreter."""
    environment = os.environ | {'TRITON_INTERPRET': '1', 'OMP_NUM_THREADS': '1'}
    command = [sys.executable, '-m', 'tests.test_triton_kernels']
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize('name', CHECKS)
def test_kernels_equal_grid_sample_in_the_interpreter(name: str, interpreted: dict[str, str]) -> None:
    assert not interpreted[name], interpreted[name]


@pytest.mark.gpu
@pytest.mark.parametrize('name', CHECKS)
def test_kernels_equal_grid_sample_on_the_gpu(name: str) -> None:
    CHECKS[name]('cuda')


@pytest.mark.gpu
@pytest.mark.parametrize('changes', [{}, {'dtype': torch.bfloat16}, {'deterministic': True}], ids=str)
def test_kernels_equal_grid_sample_for_a_detector(changes: dict) -> None:
    # Powers of two: rounding moves no point across the middle of a pixel, where the gradient jumps.
    levels = tuple((64 >> level, 128 >> level) for level in range(4))
    case = Case(32, levels=levels, points=4, images=2, queries=2000, heads=8)
    check_random(replace(case, **changes), 'cuda')


@pytest.mark.gpu
def test_nobody_waits_for_the_gpu() -> None:
    case = Case(levels=((11, 3), (2, 13)))
    tensors = case.tensors('cuda')
    run(case, *tensors)  # compiles
    case = replace(case, levels=((3, 11), (13, 2)))  # sizes not seen before
    torch.cuda.set_sync_debug_mode('error')
    try:
        run(case, *tensors)
        run(replace(case, deterministic=True), *tensors)
    finally:
        torch.cuda.set_sync_debug_mode('default')


class Launch:
    """Stands for a kernel and takes note of its arguments instead of running it."""

    def __init__(self, kernel: object) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int]) -> Callable:
        return self.note

    def note(self, *arguments: object, num_warps: int, **constants: int) -> None:
        self.num_warps = num_warps
        named = dict(zip(self.kernel.arg_names, arguments, strict=False))
        self.constants = constants | {name: None for name, argument in named.items() if argument is None}
        self.types = {name: argument_type(named.get(name)) for name in self.kernel.arg_names}

    def compile(self, architecture: int) -> str:
        """For a GPU of this compute capability; returns the PTX code."""
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        aligned = {
            (i,): [['tt.divisibility', 16]] for i, kind in enumerate(self.types.values()) if kind[0] == '*'
        }
        source = ASTSource(self.kernel, self.types, self.constants, aligned)
        target = GPUTarget('cuda', architecture, 32)
        compiled = triton.compile(source, target=target, options={'num_warps': self.num_warps})
        assert compiled.asm['cubin']
        return compiled.asm['ptx']


def argument_type(argument: object) -> str:
    if isinstance(argument, Tensor):
        kind = 'fp' if argument.is_floating_point() else 'i'
        prefix = 'bf' if argument.dtype == torch.bfloat16 else kind
        return f'*{prefix}{8 * argument.element_size()}'
    return 'i32' if isinstance(argument, int) else 'constexpr'


def launches(case: Case, monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """What forward and backward launch, first and second."""
    pytest.importorskip('triton', '3.3', reason='older versions of Triton compile through another interface')
    from models.ops import triton_kernels

    noted = [Launch(triton_kernels.forward_kernel), Launch(triton_kernels.backward_kernel)]
    with monkeypatch.context() as patch:
        patch.setattr(triton_kernels, 'forward_kernel', noted[0])
        patch.setattr(triton_kernels, 'backward_kernel', noted[1])
        run(case, *case.tensors('cpu'))
    return noted


def ptxas(architecture: int) -> Path:
    """Triton's own assembler; its wheels have one more for newer GPUs."""
    import triton.backends.nvidia

    folder = Path(triton.backends.nvidia.__file__).parent / 'bin'
    newer = folder / 'ptxas-blackwell'
    return newer if architecture >= 100 and newer.is_file() else folder / 'ptxas'


DETECTOR = Case(channels=32, levels=FOUR_LEVELS, points=4, queries=3, heads=8)


@pytest.mark.slow
@pytest.mark.parametrize('architecture', [pytest.param(80, marks=pytest.mark.exhaustive), 90, 100])
def test_kernels_compile_without_a_gpu(
    architecture: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """And keep everything in registers; for sm_100 ptxas prefers fewer registers and a spill of 8 bytes."""
    known = subprocess.run([ptxas(architecture), '--help'], capture_output=True, text=True).stdout
    if f'sm_{architecture}' not in known:
        pytest.skip(f"Triton's ptxas does not know sm_{architecture}")
    monkeypatch.setenv('TRITON_CACHE_DIR', str(tmp_path))
    for launch in launches(DETECTOR, monkeypatch):
        code = launch.compile(architecture)
        target = re.search(rf'^\.target (sm_{architecture}\w*)', code, re.MULTILINE)[1]
        (tmp_path / 'kernel.ptx').write_text(code)
        command = [ptxas(architecture), '-v', f'--gpu-name={target}', 'kernel.ptx', '-o', 'kernel.cubin']
        report = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stderr
        spilled = [int(size) for size in re.findall(r'(\d+) bytes spill', report)]
        assert len(spilled) == 2, report
        assert max(spilled) <= (8 if architecture == 100 else 0), report


@pytest.mark.slow
def test_other_types_compile_without_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv('TRITON_CACHE_DIR', str(tmp_path))
    for changes in (
        {'dtype': torch.bfloat16},
        {'channels': 71, 'dtype': torch.float64, 'deterministic': True},
    ):
        for launch in launches(replace(DETECTOR, **changes), monkeypatch):
            launch.compile(90)


def test_a_new_image_size_compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = ((5, 7), (1, 1)), ((16, 32), (16, 16))
    small, large = (launches(Case(levels=levels, queries=8), monkeypatch) for levels in sizes)
    for a, b in zip(small, large, strict=True):
        assert (a.types, a.constants, a.num_warps) == (b.types, b.constants, b.num_warps)
        plain = [name for name, kind in a.types.items() if kind == 'i32']
        parameters = {parameter.name: parameter for parameter in a.kernel.params}
        assert all(parameters[name].do_not_specialize for name in plain)


def problem(check: Callable[[str], None]) -> str:
    try:
        check('cpu')
    except Exception:
        return traceback.format_exc()
    return ''


if __name__ == '__main__':
    torch.set_num_threads(1)
    print(json.dumps({name: problem(check) for name, check in CHECKS.items()}))
