"""What only a GPU can show: the same numbers as on the CPU, in every scheme and precision, with every way of running."""

import socket
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import main
from engine import build_optimizer, train_one_epoch
from models import build_model
from models.ops.functions import KERNELS, available
from models.structures import Prediction
from models.training.criterion import weighted_sum
from models.units import all_units, compile_units
from tests.models import SCHEMES, SMALLER, batch, no_chance
from tests.ops_check import make_inputs
from tests.runs import TINY, assert_same, load, parse
from util.distributed.parallel import gather, replicate, shard
from util.nested_tensor import nested_tensor_from_tensor_list
from util.precision import Precision, set_tf32

pytestmark = pytest.mark.gpu
CUDA = torch.device('cuda')
schemes = pytest.mark.parametrize('scheme', SCHEMES)


@pytest.fixture(autouse=True)
def exact_float32() -> Iterator[None]:
    set_tf32(False)
    yield
    torch.set_default_dtype(torch.float32)


def build(scheme: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module]:
    torch.set_default_dtype(dtype)
    torch.manual_seed(0)
    model, criterion, _ = build_model(Namespace(**SMALLER | SCHEMES[scheme]))
    return model.train(), criterion


def train_step(
    model: nn.Module, criterion: nn.Module, precision: Precision, number: int = 0
) -> dict[str, Tensor]:
    """Losses, the total and gradients by name, on the CPU; draws follow from what they are drawn for."""
    device = next(model.parameters()).device
    images, targets = batch(number, [3, 1])
    images = images.to(device, torch.get_default_dtype())
    targets = [{key: value.to(device) for key, value in target.items()} for target in targets]
    for target in targets:
        target['boxes'] = target['boxes'].to(images.dtype)
    model.zero_grad(set_to_none=True)
    with no_chance():
        with precision.autocast():
            outputs = model(images, targets)
        losses = criterion(outputs, targets)
    total = weighted_sum(losses, criterion.weight_dict)
    total.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: value.detach().cpu() for name, value in (losses | {'total': total} | gradients).items()}


@schemes
def test_a_training_step_equals_that_of_the_cpu(scheme: str) -> None:
    """In float64: losses and gradients; positional encodings are float32, whose sines differ in the last bits."""
    model, criterion = build(scheme, torch.float64)
    expected = train_step(model, criterion, Precision('off', torch.device('cpu')))
    found = train_step(model.to(CUDA), criterion, Precision('off', CUDA))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=1e-5, atol=1e-6, msg=lambda text, n=name: f'{n}: {text}'
        )


@schemes
@pytest.mark.parametrize('mode', ['tf32', 'bf16', 'fp16'])
def test_fewer_bits_train_too(scheme: str, mode: str) -> None:
    model, criterion = build(scheme)
    model.to(CUDA)
    exact = train_step(model, criterion, Precision('off', CUDA))
    set_tf32(mode == 'tf32')
    found = train_step(model, criterion, Precision('off' if mode == 'tf32' else mode, CUDA))
    assert all(value.isfinite().all() for name, value in found.items() if mode != 'fp16' or 'loss' in name)
    torch.testing.assert_close(found['total'], exact['total'], rtol=0.05, atol=0)


@pytest.mark.parametrize(('scheme', 'mode'), [('detr', 'off'), ('co_dino', 'bf16')])
def test_compiled_parts_compute_the_same(scheme: str, mode: str) -> None:
    precision = Precision(mode, CUDA)
    model, criterion = build(scheme)
    expected = train_step(model.to(CUDA), criterion, precision)
    compile_units(model)
    found = train_step(model, criterion, precision)
    close = 1e-3 if mode == 'off' else 0.05
    for name in criterion.weight_dict.keys() & expected.keys():
        torch.testing.assert_close(
            found[name], expected[name], rtol=close, atol=close, msg=lambda t, n=name: f'{n}: {t}'
        )


@pytest.fixture
def nccl() -> Iterator[None]:
    """A group of one process."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    dist.init_process_group('nccl', init_method=f'tcp://127.0.0.1:{port}', rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize('scheme', ['detr', 'mixed', 'co_dino'])
@pytest.mark.parametrize('wrap', ['ddp', 'fsdp'])
def test_wrapped_for_nccl_it_trains_the_same(scheme: str, wrap: str, nccl: None) -> None:
    """In float64: AdamW makes large steps of small gradients, whatever rounds them."""
    weights = []
    for wrapped in (False, True):
        model, criterion = build(scheme, torch.float64)
        bare = model.to(CUDA)
        if wrapped and wrap == 'fsdp':
            shard(model, all_units(model), [Prediction])
        optimizer = build_optimizer(model, 1e-3, 1e-3, 1e-4)
        if wrapped and wrap == 'ddp':
            model = replicate(model, [Prediction])
        batches = [(nested_tensor_from_tensor_list(x), y) for x, y in (batch(n, [3, 1]) for n in range(3))]
        with no_chance():
            train_one_epoch(model, criterion, batches, optimizer, max_norm=0.1)
        weights.append({name: value.cpu() for name, value in gather(bare.state_dict()).items()})
    for name, value in weights[0].items():
        torch.testing.assert_close(
            weights[1][name], value, rtol=1e-5, atol=1e-7, msg=lambda t, n=name: f'{n}: {t}'
        )


@pytest.mark.draws
@pytest.mark.parametrize('mode', ['off', 'bf16', 'fp16'])
def test_a_run_of_main_resumes(mode: str, tmp_path: Path) -> None:
    """Trained, evaluated, drawn, with loader workers and pinned memory; the second half in a run of its own."""
    flags = ['--device', 'cuda', '--amp', mode, '--epochs', '2', '--num_workers', '2', '--ema', '0.9']
    main.main(parse(tmp_path, *flags[:4], '--epochs', '1', *flags[6:]))
    main.main(parse(tmp_path, *flags, '--resume', 'auto'))
    assert load(tmp_path)['epoch'] == 1
    assert all(value.isfinite().all() for value in load(tmp_path)['model'].values())
    for name in ('predictions.png', 'curves.png', 'metrics.csv'):
        assert (tmp_path / name).is_file()


def test_a_deterministic_run_repeats_its_bits(tmp_path: Path) -> None:
    flags = [
        '--device',
        'cuda',
        '--epochs',
        '1',
        '--two_stage',
        '--with_box_refine',
        '--num_feature_levels',
        '2',
    ]
    argv = [flag for flag in TINY.split() if flag != '--conditional']
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        for name in ('a', 'b'):
            more = ['--output_dir', str(tmp_path / name), *flags]
            main.main(main.get_args_parser().parse_args([*argv, *more]))
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same(load(tmp_path / 'a')['model'], load(tmp_path / 'b')['model'])


def operator_call(device: str) -> list[Tensor]:
    """Output and gradients of the operator, on this device."""
    grad, (value, shapes, locations, weights) = make_inputs('detector', device, torch.float32)
    inputs = [x.requires_grad_() for x in (value, locations, weights)]
    output = torch.ops.detr.ms_deform_attn(inputs[0], shapes, *inputs[1:])
    return [output.detach(), *torch.autograd.grad(output, inputs, grad)]


def test_the_operator_runs_on_the_current_stream() -> None:
    """Behind what keeps that stream busy, and not before."""
    expected, stream = operator_call('cuda'), torch.cuda.Stream()
    grad, (value, shapes, locations, weights) = make_inputs('detector', 'cuda', torch.float32)
    late = torch.zeros_like(value)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        late.copy_(value)
        output = torch.ops.detr.ms_deform_attn(late, shapes, locations, weights)
        grads = torch.ops.detr.ms_deform_attn_backward(grad, late, shapes, locations, weights)
    stream.synchronize()
    for found, value in zip((output, *grads), expected, strict=True):
        torch.testing.assert_close(found, value, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason='needs two NVIDIA GPUs')
def test_the_operator_runs_on_the_device_of_its_tensors() -> None:
    for found, value in zip(operator_call('cuda:1'), operator_call('cuda:0'), strict=True):
        torch.testing.assert_close(found.cpu(), value.cpu(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('name', ['cuda', 'triton'])
def test_the_operator_can_be_recorded_with_its_gradients(name: str) -> None:
    """As a CUDA graph that is replayed on other values."""
    if name not in available('cuda'):
        pytest.skip(f'{name} cannot run here')
    grad, (value, shapes, locations, weights) = make_inputs('detector', 'cuda', torch.float32)
    forward, backward = KERNELS[name]

    def call() -> tuple[Tensor, ...]:
        return (
            forward(value, shapes, locations, weights),
            *backward(grad, value, shapes, locations, weights),
        )

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = call()
    value.copy_(torch.rand_like(value))
    graph.replay()
    for found, expected in zip(recorded, call(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
