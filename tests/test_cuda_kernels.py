"""
The CUDA kernels of deformable attention without a GPU: `cuda_on_cpu.h` runs them on the CPU, thread by thread,
and their results are compared with grid_sample in float64; and nvcc compiles them for several GPUs.

Letters: N images, S tokens, M heads, D channels of a head, Q queries, L levels, P points.
"""

import platform
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytestmark = pytest.mark.slow
TESTS = Path(__file__).resolve().parent
SOURCE = TESTS.parent / 'models/ops/src/cuda'
KERNELS = SOURCE / 'ms_deform_attn_kernels.cu'

# Reads a case from standard input and writes the results to standard output.
PROGRAM = """
#include "ms_deform_attn_kernels.cu"

#include <sys/mman.h>

using namespace ms_deform_attn;

// A buffer of its own size, so that what is read or written beside it is noticed; large ones exist where they are touched.
template <typename T = char>
T* allocate(size_t count, unsigned char fill) {
  const size_t size = count * sizeof(T);
  const bool large = size >> 30;
  void* buffer = large ? mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
                       : malloc(size);
  if (!buffer || buffer == MAP_FAILED) exit(4);
  if (!large) memset(buffer, fill, size);
  return static_cast<T*>(buffer);
}

void* read(size_t size, size_t skipped = 0) {
  char* buffer = allocate(skipped + size, 0);
  if (fread(buffer + skipped, 1, size, stdin) != size) exit(5);
  return buffer;
}

int main() {
  const int* header = static_cast<int*>(read(16 * sizeof(int)));
  const Type type = static_cast<Type>(header[0]);
  const bool fixed = header[1];
  cuda_on_cpu::reversed = header[2];
  const size_t first_token = header[3];  // values before it are 0, and their gradients are not written
  Sizes sizes = {header[4], header[5], header[6], header[7], header[8], header[9], header[10], {}, {}};
  for (int* sides : {sizes.heights, sizes.widths}) {
    const int* given = static_cast<int*>(read(sizes.num_levels * sizeof(int)));
    std::copy(given, given + sizes.num_levels, sides);
  }
  const double* bound = static_cast<double*>(read(sizeof(double)));

  const size_t value_size = type == Type::kDouble ? 8 : type == Type::kFloat ? 4 : 2, size = value_size == 8 ? 8 : 4;
  const size_t row = size_t(sizes.heads) * sizes.channels, count = size_t(sizes.batch) * sizes.tokens * row;
  const size_t skipped = first_token * row, num_outputs = size_t(sizes.batch) * sizes.queries * row;
  const size_t num_points = size_t(sizes.batch) * sizes.queries * sizes.heads * sizes.num_levels * sizes.points;
  const void* value = read((count - skipped) * value_size, skipped * value_size);
  const void* locations = read(2 * num_points * size);
  const Inputs inputs = {value, locations, read(num_points * size)};
  const void* grad_output = read(num_outputs * value_size);

  char* output = allocate(num_outputs * value_size, 0xff);
  char* grad_locations = allocate(2 * num_points * size, 0xff);
  char* grad_weights = allocate(num_points * size, 0xff);
  char* grad_value = allocate(count * size, 0);
  const GradValue sums = {grad_value, fixed ? allocate<int64_t>(count, 0) : nullptr, bound};
  if (launch_forward(type, sizes, inputs, output, nullptr)) return 6;
  if (launch_backward(type, sizes, inputs, grad_output, sums, grad_locations, grad_weights, nullptr)) return 6;
  size_t grad_size = size;
  if (fixed) {
    grad_size = value_size;
    if (launch_from_fixed(type, sums, count, grad_value, nullptr)) return 6;
  }
  fwrite(output, value_size, num_outputs, stdout);
  fwrite(grad_value + skipped * grad_size, grad_size, count - skipped, stdout);
  fwrite(grad_locations, size, 2 * num_points, stdout);
  fwrite(grad_weights, size, num_points, stdout);
  fflush(stdout);
  _Exit(0);  // no report about buffers that were not freed
}
"""

TYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
TOLERANCES = dict(zip(TYPES, (1e-5, 1e-12, 2e-3, 1e-2), strict=True))  # of the largest number in a tensor
DECODER = ((5, 7), (3, 4), (1, 2), (1, 1))
ENCODER = ((9, 13), (3, 17), (1, 1), (2, 1))  # each larger than a tile, or ragged
Results = tuple[Tensor, Tensor, Tensor, Tensor]  # output, gradients of value, locations, weights


@dataclass
class Case:
    shapes: Sequence[tuple[int, int]]
    value: Tensor  # [N, S, M, D]
    locations: Tensor  # [N, Q, M, L, P, 2]
    weights: Tensor  # [N, Q, M, L, P]
    grad_output: Tensor  # [N, Q, M D]

    @property
    def bound(self) -> float:
        """Of the absolute contributions to an element of the value's gradient."""
        largest = self.grad_output.abs().max().double() * self.weights.abs().max().double()
        return largest.item() * self.locations.shape[1] * self.locations.shape[4]


def make_case(
    dtype: torch.dtype = torch.float32,
    channels: int = 32,
    shapes: Sequence[tuple[int, int]] = DECODER,
    points: int = 4,
    queries: int | None = 9,
    batch: int = 2,
    heads: int = 3,
) -> Case:
    """`queries`: None for as many as tokens. A good part of the points lies outside. None is so near to a pixel's
    centre, where the gradient jumps, that rounding might move it across.
    """
    generator = torch.Generator().manual_seed(channels)
    tokens = sum(height * width for height, width in shapes)
    math = torch.float64 if dtype == torch.float64 else torch.float32

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, dtype=torch.float64, generator=generator)

    place = batch, queries or tokens, heads, len(shapes), points
    sides = torch.tensor(shapes, dtype=torch.float64).flip(-1)[:, None]  # [L, 1, 2] width, height
    pixels = torch.floor(uniform(*place, 2) * (sides + 4) - 2.5) + 0.05 + 0.9 * uniform(*place, 2)
    return Case(
        shapes,
        (uniform(batch, tokens, heads, channels) - 0.5).to(dtype),
        ((pixels + 0.5) / sides).to(math),
        (uniform(*place) - 0.2).to(math),
        (uniform(batch, place[1], heads * channels) - 0.5).to(dtype),
    )


def reference(case: Case) -> Results:
    """grid_sample in float64. NaN, infinity and far outside are the same."""
    batch, _, heads, channels = case.value.shape
    value, weights = case.value.double().requires_grad_(), case.weights.double().requires_grad_()
    locations = case.locations.double().nan_to_num(-9, -9, -9).clamp(-9, 9).requires_grad_()
    grids = (2 * locations - 1).transpose(1, 2).flatten(0, 1)  # [N M, Q, L, P, 2]
    output = torch.zeros(())
    start = 0
    for level, (height, width) in enumerate(case.shapes):
        part = value[:, start : start + height * width].permute(0, 2, 3, 1)  # [N, M, D, H W]
        part = part.reshape(batch * heads, channels, height, width)
        sampled = F.grid_sample(part, grids[:, :, level], align_corners=False)  # [N M, D, Q, P]
        weight = weights[:, :, :, level].transpose(1, 2).flatten(0, 1)  # [N M, Q, P]
        output = output + (sampled * weight[:, None]).sum(-1)  # [N M, D, Q]
        start += height * width
    output = output.view(batch, heads * channels, -1).transpose(1, 2)
    return output.detach(), *torch.autograd.grad(
        output, (value, locations, weights), case.grad_output.double()
    )


def run(
    program: Path, case: Case, fixed: bool = False, reverse: bool = False, tokens: int | None = None
) -> Results:
    """`tokens`: of the whole value; those before the given ones are 0."""
    dtype, math = case.value.dtype, case.locations.dtype
    batch, given, heads, channels = case.value.shape
    _, queries, _, levels, points, _ = case.locations.shape
    tokens = tokens or given
    header = [TYPES.index(dtype), fixed, reverse, tokens - given]
    header += [batch, tokens, heads, channels, queries, levels, points]
    numbers = torch.tensor(
        header
        + [0] * (16 - len(header))
        + [side for sides in zip(*case.shapes, strict=True) for side in sides]
    )
    inputs = [numbers.int(), torch.tensor([case.bound], dtype=torch.float64)]
    inputs += [case.value, case.locations, case.weights, case.grad_output]
    data = b''.join(tensor.contiguous().view(torch.uint8).numpy().tobytes() for tensor in inputs)
    result = subprocess.run([program], input=data, capture_output=True)
    assert result.returncode == 0, f'exit status {result.returncode}: {result.stderr.decode()}'
    buffer = bytearray(result.stdout)
    outputs = []
    for like, kind in (
        (case.grad_output, dtype),
        (case.value, dtype if fixed else math),
        (case.locations, math),
        (case.weights, math),
    ):
        size = like.numel() * kind.itemsize
        outputs.append(torch.frombuffer(buffer[:size], dtype=kind).view(like.shape))
        buffer = buffer[size:]
    assert not buffer
    return tuple(outputs)


def assert_equal(case: Case, results: Results) -> None:
    for name, ours, expected in zip(
        ('output', 'grad_value', 'grad_locations', 'grad_weights'), results, reference(case), strict=True
    ):
        tolerance = TOLERANCES[case.value.dtype] * expected.abs().max().item()
        torch.testing.assert_close(
            ours.double(), expected, rtol=0, atol=tolerance, msg=lambda text, name=name: f'{name}: {text}'
        )


def compile_program(folder: Path, *flags: str) -> Path:
    if shutil.which('g++') is None or platform.system() != 'Linux':
        pytest.skip('the kernels run on the CPU where g++ and Linux are')
    for header in ('cuda_runtime.h', 'cuda_fp16.h', 'cuda_bf16.h'):
        (folder / header).touch()  # cuda_on_cpu.h stands for them
    (folder / 'main.cpp').write_text(PROGRAM)
    command = [
        'g++',
        '-std=c++17',
        '-w',
        '-include',
        TESTS / 'cuda_on_cpu.h',
        f'-I{folder}',
        f'-I{SOURCE}',
        *flags,
    ]
    subprocess.run([*command, folder / 'main.cpp', '-o', folder / 'main'], check=True)
    return folder / 'main'


@pytest.fixture(scope='module')
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As for GPUs that add four floats at once."""
    return compile_program(tmp_path_factory.mktemp('plain'), '-O1', '-DVECTOR_ATOMICS=1')


@pytest.fixture(scope='module')
def careful_program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stops at accesses beside a buffer, unaligned ones and undefined arithmetic. As for older GPUs."""
    flags = '-fsanitize=address,undefined', '-fno-sanitize-recover=all', '-DVECTOR_ATOMICS=0'
    return compile_program(tmp_path_factory.mktemp('careful'), '-O0', *flags)


@pytest.mark.parametrize('dtype', TYPES, ids=str)
def test_usual_heads_equal_grid_sample(program: Path, dtype: torch.dtype) -> None:
    case = make_case(dtype)
    assert_equal(case, run(program, case))


@pytest.mark.parametrize('channels', [1, 2, 9, 30, 40, 64, 71, 256, 1025])
def test_any_number_of_channels_equals_grid_sample(program: Path, channels: int) -> None:
    case = make_case(channels=channels, batch=1, heads=2, queries=5)
    assert_equal(case, run(program, case))


@pytest.mark.parametrize('dtype', [torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize('channels', [6, 48, 80])
def test_channels_of_other_types_equal_grid_sample(program: Path, channels: int, dtype: torch.dtype) -> None:
    case = make_case(dtype, channels, batch=1, heads=2, queries=5)
    assert_equal(case, run(program, case))
    assert_equal(case, run(program, case, fixed=True))


@pytest.mark.parametrize(
    'shapes', [DECODER, ((6, 4),), ((2, 3),) * 32], ids=['4 levels', '1 level', '32 levels']
)
@pytest.mark.parametrize('points', [1, 3, 5])
def test_any_number_of_points_equals_grid_sample(
    program: Path, points: int, shapes: Sequence[tuple[int, int]]
) -> None:
    case = make_case(shapes=shapes, points=points, batch=1, heads=2, queries=6)
    assert_equal(case, run(program, case))


@pytest.mark.parametrize('dtype', TYPES, ids=str)
def test_tiles_of_an_encoder_equal_grid_sample(program: Path, dtype: torch.dtype) -> None:
    case = make_case(dtype, shapes=ENCODER, queries=None, batch=1, heads=2)
    assert_equal(case, run(program, case))


def test_tiles_of_odd_channels_equal_grid_sample(program: Path) -> None:
    case = make_case(channels=5, shapes=ENCODER, queries=None, batch=2, heads=1)
    assert_equal(case, run(program, case))


@pytest.mark.parametrize(
    ('dtype', 'channels'), [(torch.float32, 32), (torch.float32, 7), (torch.float16, 40)], ids=str
)
def test_nothing_beside_the_tensors_is_touched(
    careful_program: Path, dtype: torch.dtype, channels: int
) -> None:
    for queries in (9, None):
        case = make_case(dtype, channels, shapes=((3, 5), (2, 1)), queries=queries, heads=2)
        case.locations[0, 1] = torch.tensor([torch.nan, torch.inf])
        case.locations[0, 2] = 1e30
        case.locations[0, 3] = -torch.inf
        assert_equal(case, run(careful_program, case))
        assert_equal(case, run(careful_program, case, fixed=True, reverse=True))


def test_points_outside_contribute_nothing(program: Path) -> None:
    """Whatever the values are; a point half outside reads the pixels inside only."""
    case = make_case(queries=6)
    strange = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e30, -1e30, 7.0])
    case.locations[:] = strange[:, None, None, None, None].expand(case.locations.shape[1:])
    case.value[:] = torch.nan
    for result in run(program, case):
        assert (result == 0).all()

    case = make_case(shapes=((4, 4),), points=1, queries=1, batch=1, heads=1)
    case.locations[:] = torch.tensor([0.05, 0.95])  # half a pixel around the lower left corner
    clean = run(program, case)
    case.value[:, [t for t in range(16) if t != 12]] = torch.nan
    assert all(torch.equal(ours, expected) for ours, expected in zip(run(program, case), clean, strict=True))


def test_a_point_at_minus_one_pixel_is_outside(program: Path) -> None:
    case = make_case(shapes=((4, 8),), points=1, queries=1, batch=1, heads=1)
    case.locations[:] = torch.tensor([-0.5 / 8, 0.5])
    assert all((result == 0).all() for result in run(program, case))


@pytest.mark.parametrize('dtype', TYPES, ids=str)
def test_fixed_point_sums_do_not_depend_on_the_order(program: Path, dtype: torch.dtype) -> None:
    case = make_case(dtype, shapes=((2, 3),), queries=40, batch=1, heads=2)
    results, reverse = (run(program, case, fixed=True, reverse=reverse) for reverse in (False, True))
    assert_equal(case, results)
    assert all(torch.equal(ours, other) for ours, other in zip(results, reverse, strict=True))


def test_float_sums_in_any_order_equal_grid_sample(program: Path) -> None:
    case = make_case(shapes=((2, 3),), queries=40, batch=1, heads=2)
    forwards, backwards = run(program, case), run(program, case, reverse=True)
    assert_equal(case, backwards)
    assert not torch.equal(forwards[1], backwards[1])  # the order did change


@pytest.mark.parametrize(
    ('dtype', 'scale'), [(torch.float32, 1e-30), (torch.float32, 1e30), (torch.float64, 1e-295)]
)
def test_fixed_point_sums_of_any_size(program: Path, dtype: torch.dtype, scale: float) -> None:
    case = make_case(dtype, queries=5, batch=1, heads=1)
    case.grad_output *= scale
    assert_equal(case, run(program, case, fixed=True))


@pytest.mark.parametrize('bad', [torch.nan, torch.inf])
def test_fixed_point_sums_of_what_is_not_finite_are_nan(program: Path, bad: float) -> None:
    case = make_case(queries=5, batch=1, heads=1)
    case.grad_output[0, 0, 0] = bad
    assert run(program, case, fixed=True)[1].isnan().all()
    case.grad_output[:] = 0
    assert (run(program, case, fixed=True)[1] == 0).all()


@pytest.mark.parametrize('channels', [31, 32])
def test_more_than_2_to_the_31_elements(program: Path, channels: int) -> None:
    """Values of 4 GB and gradients of 9, of which only the end exists: no point touches the level before."""
    small = make_case(torch.float16, channels, shapes=((3, 5),), batch=1, heads=1, queries=3)
    shapes = ((2**22, 17), (3, 5))
    locations = torch.cat([torch.full_like(small.locations, -9), small.locations], dim=3)
    weights = torch.cat([small.weights, small.weights], dim=3)
    large = Case(shapes, small.value, locations, weights, small.grad_output)
    output, grad_value, grad_locations, grad_weights = run(program, large, tokens=2**22 * 17 + 15)
    assert_equal(small, (output, grad_value, grad_locations[:, :, :, 1:], grad_weights[:, :, :, 1:]))


needs_nvcc = pytest.mark.skipif(shutil.which('nvcc') is None, reason='there is no nvcc')
OF_32_CHANNELS = 'Li32EEE'  # in the name of a kernel


def compile_kernels(architecture: int, folder: Path) -> tuple[str, str]:
    """The report of the assembler, and the PTX code."""
    command = ['nvcc', '-std=c++17', '-O3', f'-arch=sm_{architecture}', '-cubin', '-Xptxas', '-v']
    command += ['-keep', '-keep-dir', folder, '-o', folder / 'cubin', KERNELS]
    report = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    return report, (folder / f'{KERNELS.stem}.ptx').read_text()


@pytest.fixture(scope='module')
def compiled_90(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return compile_kernels(90, tmp_path_factory.mktemp('sm_90'))


@needs_nvcc
@pytest.mark.parametrize(
    'architecture',
    [pytest.param(80, marks=pytest.mark.exhaustive), 90, pytest.param(100, marks=pytest.mark.exhaustive)],
)
def test_no_kernel_of_32_channels_spills_registers(
    architecture: int, tmp_path: Path, compiled_90: tuple[str, str]
) -> None:
    report, _ = compiled_90 if architecture == 90 else compile_kernels(architecture, tmp_path)
    kernels = re.findall(
        r"entry function '(\w+)'.*\n.*\n *(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads\n"
        r'.*Used (\d+) registers.*?(\d+) bytes smem',
        report,
    )
    usual = [kernel for kernel in kernels if OF_32_CHANNELS in kernel[0]]
    assert len(usual) == 12  # forward, backward and backward in fixed point of four types
    for name, *spilled, registers, shared in usual:
        print(f'sm_{architecture} {name}: {registers} registers, {shared} bytes of shared memory')
        assert spilled == ['0', '0', '0'], name


@needs_nvcc
def test_memory_is_moved_16_bytes_at_a_time(compiled_90: tuple[str, str]) -> None:
    kernels = {text.split('(')[0]: text for text in compiled_90[1].split('.entry ')[1:]}
    for name, text in kernels.items():
        assert not re.search(r'\s(ld|st|atom|red)\.(v\d\.|add\.)?[bfsu]\d', text), (
            f'{name}: memory of an unknown kind'
        )
        if OF_32_CHANNELS in name:
            assert re.search(r'ld\.global(\.nc)?\.(v4\.[bfu]32|v2\.[bf]64)', text), name
        if OF_32_CHANNELS in name and 'Li32EEEfEE' in name:  # sums of floats
            assert re.search(r'(atom|red)\.global\.\S*v4\.f32', text), name
            assert not re.search(r'(atom|red)\.global\.add\.f32', text), name
    assert sum('Li32EEEfEE' in name for name in kernels) == 3
