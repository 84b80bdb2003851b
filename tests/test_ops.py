"""Deformable attention: every implementation equals the official numbers, and behaves where numbers are odd."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from models.ops import functions as module
from models.ops.functions import available, ms_deform_attn, use_implementation
from models.ops.modules import MSDeformAttn
from tests import ops_check, rule
from tests.conftest import REASON
from tests.models import TWO_STAGE
from tests.shared_data import SHARED, needs_shared

ROOT = Path(__file__).resolve().parents[1]
FOLDER = SHARED / 'parity/ms_deform_attn'
CASES = sorted(FOLDER.glob('*.json'))
IMPLEMENTATIONS = ['pytorch', 'cpp']
implementations = pytest.mark.parametrize('name', IMPLEMENTATIONS)


@pytest.fixture(autouse=True)
def chosen(request: pytest.FixtureRequest) -> object:
    """Tests with a parameter `name` run with that implementation."""
    name = request.node.callspec.params.get('name') if hasattr(request.node, 'callspec') else None
    if name is None:
        yield
        return
    if name not in available('cpu'):
        pytest.skip(f'{name} is not here: {module.problems.get(name)}')
    with use_implementation(name):
        yield


def close(ours: Tensor, official: np.ndarray, what: str) -> None:
    np.testing.assert_allclose(ours.detach().numpy(), official, rtol=1e-12, atol=1e-12, err_msg=what)


def inputs_of(record: dict, arrays: dict[str, np.ndarray], shapes: dict[str, tuple]) -> dict[str, Tensor]:
    """By rule or stored, as the case says."""
    given = {name: torch.from_numpy(arrays[name]) for name in record['inputs_stored']}
    for name in record['inputs_by_rule']:
        given[name] = torch.from_numpy(rule.uniform(f'op/{record["case"]}/{name}', shapes[name]))
    return given


def read_case(path: Path) -> tuple[dict, dict[str, np.ndarray]]:
    with np.load(path.with_suffix('.npz')) as archive:
        return json.loads(path.read_text()), dict(archive)


@needs_shared
@implementations
@pytest.mark.parametrize('path', CASES, ids=lambda path: path.stem)
def test_equals_official(path: Path, name: str) -> None:
    """Values and gradients within 1e-12."""
    record, arrays = read_case(path)
    check = check_operator if record['kind'] == 'operator' else check_module
    check(record, arrays)


def check_operator(record: dict, arrays: dict[str, np.ndarray]) -> None:
    n, s, m, d, q = (record[letter] for letter in ('N', 'S', 'M', 'D', 'Lq'))
    given = inputs_of(record, arrays, {'value': (n, s, m, d), 'grad_output': (n, q, m * d)})
    names = 'value', 'sampling_locations', 'attention_weights'
    value, locations, weights = (given[name].requires_grad_() for name in names)
    output = ms_deform_attn(value, given['spatial_shapes'].tolist(), locations, weights)
    output.backward(given['grad_output'])
    close(output, arrays['output'], 'output')
    for name in names:
        close(given[name].grad, arrays[f'grad_{name}'], name)


def check_module(record: dict, arrays: dict[str, np.ndarray]) -> None:
    sizes = [record[key] for key in ('d_model', 'n_levels', 'n_heads', 'n_points')]
    attention = MSDeformAttn(*sizes).double()
    with torch.no_grad():
        for name, parameter in attention.named_parameters():
            value = rule.parameter(f'{record["case"]}/{name}', tuple(parameter.shape))
            parameter.copy_(torch.from_numpy(value))
    shapes = {key: tuple(shape) for key, shape in record['shapes'].items()}
    given = inputs_of(record, arrays, shapes | {'grad_output': shapes['query']})
    names = 'query', 'reference_points', 'input_flatten'
    query, reference, memory = (given[name].requires_grad_() for name in names)
    mask = given.get('padding_mask')
    output = attention(
        query,
        reference,
        memory,
        given['spatial_shapes'].tolist(),
        None if mask is None else mask.bool(),
    )
    output.backward(given['grad_output'])
    close(output, arrays['output'], 'output')
    for name in names:
        close(given[name].grad, arrays[f'grad_{name}'], name)
    for name, norm in record['parameter_grad_norms'].items():
        assert attention.get_parameter(name).grad.norm().item() == pytest.approx(norm, rel=1e-10)


@needs_shared
def test_initial_values_equal_official() -> None:
    for entry in json.loads((FOLDER / 'module_2d.json').read_text())['initial_values']:
        sizes = [entry[key] for key in ('d_model', 'n_levels', 'n_heads', 'n_points')]
        attention = MSDeformAttn(*sizes)
        expected = torch.tensor(entry['sampling_offsets_bias'])
        torch.testing.assert_close(attention.sampling_offsets.bias.detach(), expected, rtol=0, atol=1e-6)
        assert not attention.sampling_offsets.weight.any() and not attention.attention_weights.weight.any()


def test_module_says_what_it_cannot_do() -> None:
    with pytest.raises(ValueError, match='d_model 50 is not a multiple of n_heads 8'):
        MSDeformAttn(50)
    with pytest.warns(UserWarning, match='power of two'):
        MSDeformAttn(48, n_heads=2)
    attention, (query, _, memory, shapes) = ops_check.module_inputs('cpu')
    with pytest.raises(ValueError, match='2 or 4 coordinates, not 3'):
        attention(query, torch.rand(2, 7, 2, 3), memory, shapes)


@pytest.mark.parametrize('dtype', ops_check.TOLERANCES, ids=str)
@pytest.mark.parametrize('size', [size for size in ops_check.SIZES if size != 'gradcheck'])
@implementations
def test_equals_pytorch_in_float64(name: str, size: str, dtype: torch.dtype) -> None:
    if dtype in ops_check.dtypes(name):
        assert max(ops_check.relative_errors(name, size, 'cpu', dtype)) <= ops_check.TOLERANCES[dtype]


@pytest.mark.parametrize('channels', [30, *(pytest.param(n, marks=pytest.mark.slow) for n in (32, 64, 71))])
@implementations
def test_numerical_gradients(name: str, channels: int, exhaustive: bool) -> None:
    """The kernels have a way of their own for some numbers of channels, which PyTorch's operators have not."""
    if name == 'pytorch' and channels != 30 and not exhaustive:
        pytest.skip(REASON)
    assert ops_check.numerical_gradients_agree(name, channels, 'cpu')


@pytest.mark.slow
@implementations
def test_compiles_without_a_graph_break(name: str) -> None:
    assert ops_check.compiled_equals_eager(name, 'cpu')


@pytest.mark.parametrize(('tolerance', 'status'), [(1e-5, 0), (0.0, 1)])
def test_the_program_of_checks_tells_what_fails(
    tolerance: float, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ops_check, 'SIZES', {'odd': ops_check.SIZES['odd']})
    monkeypatch.setitem(ops_check.TOLERANCES, torch.float32, tolerance)
    words = ['--device', 'cpu', '--only', 'pytorch', '--brief']
    assert ops_check.main(ops_check.get_args_parser().parse_args(words)) == status
    printed = capsys.readouterr().out
    assert ('FAIL cpu pytorch float32 fixed' in printed) == bool(
        status
    ) and 'ok   cpu pytorch float64' in printed


exports = pytest.mark.skipif(
    not hasattr(torch.compiler, 'is_exporting'), reason='exporting without the operator needs PyTorch 2.7'
)


@exports
def test_exports_without_the_operator() -> None:
    assert ops_check.exported_equals_eager('cpu')


def test_the_operator_is_registered_as_pytorch_wants_it() -> None:
    """Schema, fake kernel, autograd and dynamic shapes, by PyTorch's own checks."""
    _, (value, shapes, locations, weights) = ops_check.make_inputs('odd', 'cpu', torch.float32)
    inputs = [x.requires_grad_() for x in (value, locations, weights)]
    torch.library.opcheck(torch.ops.detr.ms_deform_attn.default, (inputs[0], shapes, *inputs[1:]))


def odd_places(name: str, places: list[float]) -> tuple[Tensor, list[Tensor]]:
    """Output and gradients with every point at each of the places in turn, one-pixel level included."""
    shapes = [(3, 5), (1, 1)]
    value = torch.randn(1, 16, 2, 32, dtype=torch.float64, requires_grad=True)
    locations = torch.tensor(places, dtype=torch.float64)[None, :, None, None, None, None]
    locations = locations.expand(1, len(places), 2, 2, 3, 2).clone().requires_grad_()
    weights = torch.rand(1, len(places), 2, 2, 3, dtype=torch.float64, requires_grad=True)
    with use_implementation(name):
        output = ms_deform_attn(value, shapes, locations, weights)
        output.sum().backward()
    return output, [value.grad, locations.grad, weights.grad]


def test_points_outside_count_as_zero(name: str = 'cpp') -> None:
    if name not in available('cpu'):
        pytest.skip(f'{name} is not here: {module.problems.get(name)}')
    for far in ([float('nan')], [float('inf')], [-float('inf')], [1e30], [-1e30], [-7.0], [2.6]):
        output, grads = odd_places(name, far)
        assert not output.any() and not any(grad.any() for grad in grads), far
    places = [-0.31, -0.05, 0.02, 0.43, 0.71, 0.97, 1.04, 1.4]
    torch.manual_seed(0)
    ours = odd_places(name, places)
    torch.manual_seed(0)
    expected = odd_places('pytorch', places)
    torch.testing.assert_close(ours[0], expected[0])
    for grad, other in zip(ours[1], expected[1], strict=True):
        torch.testing.assert_close(grad, other)


@implementations
def test_nothing_in_nothing_out(name: str) -> None:
    shapes = [(2, 3)]
    for batch, queries in ((0, 4), (2, 0)):
        value = torch.randn(batch, 6, 2, 4, requires_grad=True)
        locations = torch.rand(batch, queries, 2, 1, 3, 2, requires_grad=True)
        output = ms_deform_attn(value, shapes, locations, torch.rand(batch, queries, 2, 1, 3))
        assert output.shape == (batch, queries, 8)
        output.sum().backward()
        assert value.grad.shape == value.shape and not value.grad.any()


@pytest.mark.exhaustive
def test_more_than_2_to_the_31_numbers() -> None:
    """The last pixel of the last head lies beyond what 32 bits can count; memory is touched only where it is read."""
    if 'cpp' not in available('cpu'):
        pytest.skip(f'cpp is not here: {module.problems.get("cpp")}')
    try:
        value = torch.zeros(1, 1 << 20, 8, 320)
    except RuntimeError:
        pytest.skip('needs 11 GB of address space')
    assert value.numel() > 2**31
    value[0, -1, -1] = torch.arange(320.0)
    middle_of_last = torch.full((1, 1, 8, 1, 1, 2), 1 - 0.5 / 1024)
    output = torch.ops.detr.ms_deform_attn(
        value, [1024, 1024], middle_of_last, torch.full((1, 1, 8, 1, 1), 0.5)
    )
    torch.testing.assert_close(output[0, 0, -320:], 0.5 * torch.arange(320.0))
    assert not output[0, 0, :-320].any()


def test_any_number_of_threads_gives_the_same_bits() -> None:
    """Backward too: nothing is summed in the order in which threads arrive."""
    if 'cpp' not in available('cpu'):
        pytest.skip(f'cpp is not here: {module.problems.get("cpp")}')
    grad, inputs = ops_check.make_inputs('encoder order', 'cpu', torch.float32)
    forward, backward = module.KERNELS['cpp']
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 9):
            torch.set_num_threads(threads)
            results.append([forward(*inputs), *backward(grad, *inputs)])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@implementations
def test_autocast_keeps_places_in_float32(name: str) -> None:
    attention, (query, *rest) = ops_check.module_inputs('cpu')
    expected = attention(query, *rest)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        output = attention(query, *rest)
        value = torch.randn(1, 6, 2, 4, dtype=torch.bfloat16)
        places = torch.rand(1, 3, 2, 1, 2, 2, dtype=torch.bfloat16), torch.rand(1, 3, 2, 1, 2)
        assert torch.ops.detr.ms_deform_attn(value, [2, 3], *places).dtype == torch.bfloat16
    assert output.dtype == torch.bfloat16
    assert (output - expected).abs().max() < 0.05 * expected.abs().max()


def test_flops_are_counted() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    _, (value, shapes, locations, weights) = ops_check.make_inputs('official', 'cpu', torch.float32, batch=1)
    with FlopCounterMode(display=False) as counter:
        torch.ops.detr.ms_deform_attn(value, shapes, locations, weights)
    assert counter.get_total_flops() == 8 * 2 * (2 * 2 * 2 * 2)  # 8 a channel and point


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda v, s, x, w: (v, [6, 4], x, w), '2 levels'),
        (lambda v, s, x, w: (v, [6, 4, 3, 3], x, w), '33 tokens, value has 30'),
        (lambda v, s, x, w: (v, [30, 1, 0, 5], x, w), 'level 1 is empty'),
        (lambda v, s, x, w: (v, s, x[..., 0], w), r'must be \[N, Q, M, L, P, 2\]'),
        (lambda v, s, x, w: (v, s, x, w[..., :1]), 'attention_weights must be'),
        (lambda v, s, x, w: (v[:1], s, x, w), 'differ in images or heads'),
        (lambda v, s, x, w: (v[0], s, x, w), r'value must be \[N, S, M, D\]'),
    ],
)
def test_shapes_that_do_not_fit_are_named(change: object, message: str) -> None:
    if 'cpp' not in available('cpu'):
        pytest.skip(f'cpp is not here: {module.problems.get("cpp")}')
    _, inputs = ops_check.make_inputs('official', 'cpu', torch.float32)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.detr.ms_deform_attn(*change(*inputs))


@pytest.mark.slow
def test_a_library_that_does_not_load_is_passed_over(tmp_path: Path) -> None:
    """Another process, in which the built file is broken: training goes on in plain PyTorch, and says why."""
    broken = tmp_path / 'broken.so'
    broken.write_bytes(b'not a library')
    code = f"""
import pathlib, sys
pathlib.Path.is_file = lambda self, original=pathlib.Path.is_file: True if self.name.startswith('_C_') else original(self)
import torch
load = torch.ops.load_library
torch.ops.load_library = lambda path: load({str(broken)!r} if '_C_torch' in str(path) else path)
from models.ops.functions import describe, implementation
assert implementation('cpu') == 'pytorch'
print(describe('cpu'))
"""
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert 'does not load' in done.stdout and 'build_ops.sh' in done.stdout


def test_an_implementation_that_disagrees_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """One wrong number, a NaN in the last gradient, or an exception, and plain PyTorch is used; the reason is kept."""
    forward, backward = module.KERNELS['pytorch']

    def nan_at_last(*inputs: object) -> tuple[Tensor, ...]:
        *good, last = backward(*inputs)
        return *good, torch.full_like(last, torch.nan)

    for kernels, reason in (
        ((lambda *inputs: 1.01 * forward(*inputs), backward), 'differs from PyTorch'),
        ((forward, nan_at_last), 'differs from PyTorch by nan'),
        ((lambda *inputs: 1 / 0, backward), 'failed'),
    ):
        monkeypatch.setattr(module, 'problems', {})
        monkeypatch.setattr(module, 'chosen', {})
        monkeypatch.setitem(module.KERNELS, 'cpp', kernels)
        assert module.implementation('cpu') == 'pytorch'
        assert reason in module.describe('cpu')


class Detector(nn.Module):
    """A detector with its outputs in order, as exporters want them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        outputs = self.model(images)
        return outputs['pred_logits'], outputs['pred_boxes']


def small_detector() -> nn.Module:
    from argparse import Namespace

    from models import build_model

    torch.manual_seed(0)
    flags = TWO_STAGE | {'backbone': 'resnet10', 'backbone_weights': 'none'}
    sizes = {'hidden_dim': 32, 'nheads': 4, 'enc_layers': 1, 'dec_layers': 2, 'dim_feedforward': 64}
    model = build_model(Namespace(**flags, **sizes, num_queries=20, num_classes=6))[0].eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and 'backbone' not in name:
            nn.init.normal_(parameter, std=0.1)
    return Detector(model)


IMAGES = [(1, 160, 192), (2, 224, 160), (2, 128, 288)]


@exports
@pytest.mark.slow
@pytest.mark.exhaustive  # tests/test_export.py compares detectors too
def test_exported_detector_equals_eager_at_any_size(tmp_path: Path, exhaustive: bool) -> None:
    """torch.export and, with --exhaustive, ONNX from the same program, with dynamic batch, height and width."""
    detector, dynamic = small_detector(), torch.export.Dim.DYNAMIC
    program = torch.export.export(
        detector, (torch.randn(2, 3, 160, 192),), dynamic_shapes=({0: dynamic, 2: dynamic, 3: dynamic},)
    )
    runners = {'torch.export': program.module()}
    if exhaustive and all(importable(name) for name in ('onnxscript', 'onnxruntime')):
        import onnxruntime

        torch.onnx.export(program, dynamo=True, opset_version=20).save(tmp_path / 'detector.onnx')
        session = onnxruntime.InferenceSession(tmp_path / 'detector.onnx', providers=['CPUExecutionProvider'])
        runners['ONNX'] = lambda x: [
            torch.from_numpy(y) for y in session.run(None, {session.get_inputs()[0].name: x.numpy()})
        ]
    for batch, height, width in IMAGES:
        images = torch.randn(batch, 3, height, width)
        with torch.no_grad():
            expected = detector(images)
            for what, run in runners.items():
                for ours, other in zip(expected, run(images), strict=True):
                    torch.testing.assert_close(other, ours, rtol=1e-4, atol=1e-4, msg=what)


def importable(name: str) -> bool:
    from importlib.util import find_spec

    return find_spec(name) is not None


@pytest.mark.slow
@pytest.mark.exhaustive  # tests/test_units.py compiles the layers, as --compile does
def test_transformer_compiles_in_one_graph() -> None:
    """Encoder, proposals and decoder without a graph break, forward and backward."""
    model = small_detector().model
    with torch.no_grad():
        samples = nested(torch.randn(2, 3, 128, 160))
        srcs, masks, pos = model.levels(samples, *model.backbone(samples))

    def transform(*srcs: Tensor) -> Tensor:
        memory = model.transformer.encode(list(srcs), masks, pos)
        groups, _ = model.queries(memory)
        return model.transformer.decoder(groups, memory, model.bbox_embed)[-1].hs

    torch.compiler.reset()
    compiled = torch.compile(transform, fullgraph=True, backend='aot_eager')
    for name in available('cpu'):
        torch.compiler.reset()
        with use_implementation(name):
            x = [src.clone().requires_grad_() for src in srcs]
            y = [src.clone().requires_grad_() for src in srcs]
            expected, output = transform(*x), compiled(*y)
            torch.testing.assert_close(output, expected)
            expected.square().sum().backward()
            output.square().sum().backward()
            for ours, other in zip(x, y, strict=True):
                torch.testing.assert_close(other.grad, ours.grad, rtol=1e-4, atol=1e-5)


def nested(images: Tensor) -> object:
    from util.nested_tensor import nested_tensor_from_tensor_list

    return nested_tensor_from_tensor_list(images)


ODD_PLACES = """
import torch, sys
from models.ops import test as t
from models.ops.functions import available
from models.ops.functions import KERNELS
torch.set_num_threads(2)
assert 'cpp' in available('cpu')
forward, backward = KERNELS['cpp']
for size in t.SIZES:
    for dtype in (torch.float32, torch.float64):
        grad, (value, shapes, locations, weights) = t.make_inputs(size, 'cpu', dtype)
        for shift in (0, 0.5, -1, 1e9, -1e30, float('inf'), float('nan')):
            inputs = value, shapes, locations + shift, weights
            forward(*inputs), backward(grad, *inputs)
print('clean')
"""


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which('g++') or os.uname().sysname != 'Linux', reason='needs g++ on Linux')
@pytest.mark.exhaustive
def test_address_sanitizer_finds_nothing(tmp_path: Path) -> None:
    """The CPU kernels built with AddressSanitizer, on points inside, at edges, far outside, infinite and NaN."""
    runtime = subprocess.run(
        ['g++', '-print-file-name=libasan.so'], capture_output=True, text=True, check=True
    ).stdout.strip()
    if not Path(runtime).is_absolute():
        pytest.skip('the compiler has no AddressSanitizer')
    copy = tmp_path / 'work'
    shutil.copytree(
        ROOT / 'models', copy / 'models', ignore=shutil.ignore_patterns('*.so', 'build', '__pycache__')
    )
    shutil.copytree(ROOT / 'util', copy / 'util', ignore=shutil.ignore_patterns('__pycache__'))
    environment = os.environ | {'CFLAGS': '-fsanitize=address -g -O1', 'LDFLAGS': '-fsanitize=address'}
    environment.pop('TORCH_CUDA_ARCH_LIST', None)
    subprocess.run(
        [sys.executable, 'setup.py', 'build_ext', '--inplace'],
        cwd=copy / 'models/ops',
        env=environment,
        capture_output=True,
        check=True,
    )
    done = subprocess.run(
        [sys.executable, '-c', ODD_PLACES],
        cwd=copy,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {'LD_PRELOAD': runtime, 'ASAN_OPTIONS': 'detect_leaks=0'},
    )
    assert done.stdout.endswith('clean\n') and 'AddressSanitizer' not in done.stderr, done.stderr[-3000:]
