"""Frozen norms inside their convolutions: the same network, the same state dict."""

import copy
from collections.abc import Callable

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.ops.misc import FrozenBatchNorm2d

from models import frozen_norm
from models.backbone import FEATURE_STAGES, build_backbone
from models.frozen_norm import FoldedConvolution, FoldedNorm
from tests import rule
from tests.parity import float64
from util.distributed import parallel
from util.optim import WeightAverage

NAMES = ('resnet18', 'resnet50', 'mobilenet_v2')
STAGES = range(2, 5)
named = pytest.mark.parametrize('name', NAMES)


def unfolded(name: str, dilation: bool = False) -> nn.Module:
    """torchvision's network as it is."""
    options = {'replace_stride_with_dilation': [False, False, True]} if dilation else {}
    network = torchvision.models.get_model(name, weights=None, norm_layer=FrozenBatchNorm2d, **options)
    if name == 'mobilenet_v2':
        layers = {FEATURE_STAGES[name][stage - 1]: str(stage) for stage in STAGES}
        return IntermediateLayerGetter(network.features, layers)
    return IntermediateLayerGetter(network, {f'layer{stage}': str(stage) for stage in STAGES})


def both(name: str, dilation: bool = False) -> tuple[nn.Module, nn.Module]:
    """The backbone's body, and the plain network with the same weights; every parameter trains."""
    ours, plain = (
        build_backbone(name, 'none', dilation, 'frozen', STAGES, True).body,
        unfolded(name, dilation),
    )
    rule.fill(plain)
    ours.load_state_dict(plain.state_dict())
    return ours.requires_grad_(True), plain


def results(body: nn.Module, images: Tensor) -> list[Tensor]:
    """Maps, and the gradients of all parameters and of the images."""
    images = images.clone().requires_grad_()
    maps = list(body(images).values())
    sum(x.square().mean() for x in maps).backward()
    return [*maps, images.grad, *(p.grad for p in body.parameters())]


@pytest.mark.parametrize(
    ('name', 'dilation'),
    [('resnet18', False), pytest.param('resnet50', True, marks=pytest.mark.slow), ('mobilenet_v2', False)],
)
def test_equals_the_unfolded_network(name: str, dilation: bool) -> None:
    """In the sense of whole tensors: a sum of thousands of float32 products has no better digits. Gradients in float64: where
    rounding decides on which side of a ReLU a number lies, one comes or not.
    """
    torch.manual_seed(0)
    with float64():
        ours, plain = both(name, dilation)
        images = torch.randn(2, 3, 64, 96)
    for first, second in zip(results(ours, images), results(plain, images), strict=True):
        assert first.shape == second.shape
        assert (first - second).norm() <= 1e-12 * second.norm()
    maps = [body.float()(images.float()).values() for body in (ours, plain)]
    for first, second in zip(*maps, strict=True):
        assert first.dtype == torch.float32
        assert (first - second).norm() <= 1e-5 * second.norm()


@named
def test_names_and_places_of_all_tensors_stay(name: str) -> None:
    ours, plain = both(name)
    for what in ('state_dict', 'named_parameters', 'named_buffers'):
        first, second = (dict(getattr(body, what)()) for body in (ours, plain))
        assert list(first) == list(second)
        assert all(torch.equal(value, second[key]) for key, value in first.items())
    kinds = [type(module) for module in ours.modules()]
    assert kinds.count(FoldedConvolution) == kinds.count(FoldedNorm) > 15
    assert nn.Conv2d not in kinds and FrozenBatchNorm2d not in kinds


def test_norms_that_train_are_left_alone() -> None:
    for norm in ('batch', 'group'):
        body = build_backbone('resnet18', 'none', False, norm, STAGES, True).body
        assert not any(isinstance(module, FoldedConvolution) for module in body.modules())


def test_a_copy_has_its_own_norms() -> None:
    body, _ = both('resnet18')
    images = torch.randn(1, 3, 64, 64)
    expected = body(images)['4']
    other = copy.deepcopy(body)
    with torch.no_grad():
        for module in other.modules():
            if isinstance(module, FoldedNorm):
                module.weight.zero_()
                module.bias.zero_()
    assert not other(images)['4'].any()
    torch.testing.assert_close(body(images)['4'], expected, rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['resnet18', pytest.param('mobilenet_v2', marks=pytest.mark.exhaustive)])
@torch.no_grad()
def test_exports_and_compiles(name: str) -> None:
    """Buffers are the program's own, and may change behind a compiled network."""
    body, _ = both(name)
    images, expected = torch.randn(1, 3, 64, 96), []
    compiled = torch.compile(body.eval(), fullgraph=True, backend='eager')
    for _ in range(2):
        expected.append(body(images)['4'])
        torch.testing.assert_close(compiled(images)['4'], expected[-1])
        body.get_buffer(next(key for key, _ in body.named_buffers() if key.endswith('bias'))).add_(0.5)
    assert not torch.allclose(*expected)
    program = torch.export.export(body, (images,))
    torch.testing.assert_close(program.module()(images)['4'], body(images)['4'])
    assert set(program.state_dict) == set(body.state_dict())


def test_16_bit_maps_stay_16_bit() -> None:
    """An unfolded norm with float32 buffers would make them float32 again."""
    body, _ = both('resnet18')
    with torch.autocast('cpu', torch.bfloat16):
        assert all(x.dtype == torch.bfloat16 for x in body(torch.randn(1, 3, 64, 64)).values())


class Calls(TorchDispatchMode):
    """Names of the ATen operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: object, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_factors_are_computed_once() -> None:
    """Five operators for each of the 53 norms of ResNet-50, in training and in evaluation."""
    body = build_backbone('resnet50', 'none', False, 'frozen', STAGES, True).body
    body.load_state_dict(body.state_dict())  # written: the factors are due
    images, numbers = torch.randn(1, 3, 32, 32), []
    for train in (True, True, False):
        with torch.set_grad_enabled(train), Calls() as calls:
            body.train(train)(images)
        numbers.append(len(calls.names))
        assert ('aten.rsqrt.default' in calls.names) == (len(numbers) == 1)
    assert numbers[0] - numbers[1] == 5 * 53
    assert numbers[2] == 53 * 3 + 49 + 16 + 1, 'convolution, product and view; ReLU, sum, pooling'


def replaced(body: nn.Module) -> dict[str, Tensor]:
    return {name: 0.5 + 0.9 * value.flip(0) for name, value in body.state_dict().items()}


@torch.no_grad()
def add_in_place(body: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    for buffer in body.buffers():
        buffer.add_(0.5)


def add_in_inference_mode(body: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.inference_mode():
        add_in_place(body, monkeypatch)


def receive(body: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """As from another process, which the version of a tensor does not count."""
    monkeypatch.setattr(parallel, 'get_world_size', lambda: 2)
    monkeypatch.setattr(parallel.dist, 'broadcast', lambda x, source: x.data.add_(0.5))
    parallel.broadcast_from_main(body.buffers())


def average(body: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    other = copy.deepcopy(body)
    add_in_place(other, monkeypatch)
    mean = WeightAverage(body, 0.5)
    mean.module = body
    mean.update(other)


CHANGES = {
    'load_state_dict': lambda body, patch: body.load_state_dict(replaced(body)),
    'assign': lambda body, patch: body.load_state_dict(replaced(body), assign=True),
    'in place': add_in_place,
    'in inference mode': add_in_inference_mode,
    'another type': lambda body, patch: body.double(),
    'received': receive,
    'average': average,
}


@pytest.mark.parametrize('change', CHANGES.values(), ids=CHANGES)
def test_factors_follow_the_buffers(change: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    body, _ = both('resnet18')
    images = torch.randn(1, 3, 32, 32)
    other = copy.deepcopy(body)
    before, _ = (network(images)['4'] for network in (body, other))  # both keep their factors
    change(other, monkeypatch)
    found = other(images.to(next(other.parameters())))['4']
    monkeypatch.setattr(frozen_norm, 'may_cache', lambda buffers: False)
    assert torch.equal(found, other(images.to(next(other.parameters())))['4'])
    assert not torch.equal(found, before)
    assert torch.equal(body(images)['4'], before)


def test_factors_of_an_inference_train() -> None:
    """Inference mode makes tensors that no backward pass can use."""
    body, _ = both('resnet18')
    images = torch.randn(1, 3, 32, 32)
    for mode in (True, False):  # the network itself made there, or outside
        with torch.inference_mode(mode):
            network = copy.deepcopy(body)
        with torch.inference_mode():
            expected = network(images)['4']
        found = network(images)['4']
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    found.sum().backward()


def test_buffers_that_train_get_gradients() -> None:
    body, _ = both('resnet18')
    images = torch.randn(1, 3, 32, 32)
    body(images)
    for buffer in body.buffers():
        buffer.requires_grad_()
    for _ in range(2):
        body(images)['4'].square().mean().backward()
    assert all(buffer.grad is not None for buffer in body.buffers())
