"""Mixed precision: what stays float32 under autocast, and steps whose gradients are scaled."""

import copy

import pytest
import torch
from torch import Tensor, nn

from engine import build_optimizer
from models.ops import modules
from models.ops.modules import MSDeformAttn
from models.swin import SWIN_SIZES, SwinSize
from models.training.criterion import weighted_sum
from tests.models import FAMILIES, HEADS, TWO_STAGE, GivenFeatures, build, random_targets
from util.precision import Precision, set_tf32

CPU = torch.device('cpu')
SWIN = SwinSize(32, (1, 1, 2, 1), (1, 2, 4, 8), 4)
CO_HEADS = HEADS | {'dn_number': 10}
EVERY = FAMILIES | {
    'denoising': TWO_STAGE | {'dn_number': 10},
    'co-deformable': TWO_STAGE | CO_HEADS,
    'co-dino': {'dino': True} | CO_HEADS,
    'groups': TWO_STAGE | {'group_detr': 2},
    'swin': TWO_STAGE | {'backbone': 'swin_tiny', 'drop_path_rate': 0.0},
    'batch norms': {'backbone_norm': 'batch'},
    'pre-norm': {'pre_norm': True},
}
QUICK = ('detr', 'conditional', 'two stages', 'co-dino')
# What is new in each is in another: 'mixed, variant a, one stage', 'co-deformable', 'co-dino', 'all, conditional'.
REPEATED = ('deformable', 'two stages with tricks', 'dino', 'denoising', 'groups')
every = pytest.mark.parametrize(
    'flags',
    [
        pytest.param(
            flags,
            id=name,
            marks=() if name in QUICK else pytest.mark.exhaustive if name in REPEATED else pytest.mark.slow,
        )
        for name, flags in EVERY.items()
    ],
)
sampling = pytest.mark.parametrize(
    'flags',
    [
        {'deformable': True},
        {'with_box_refine': True, 'dec_n_points': 3},
        TWO_STAGE | {'use_ms_detr': True},
        {'dino': True},
    ],
    ids=['one stage', 'box refinement, 3 points', 'two stages, mixed', 'dino'],
)


@pytest.fixture(autouse=True)
def small_swin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SWIN_SIZES, 'swin_tiny', SWIN)


def training_pass(flags: dict, mode: str) -> tuple[nn.Module, dict, Tensor]:
    """A freshly built model, its outputs and its loss; the same images and objects every time."""
    # As deep as what the tolerances below were chosen for.
    model, criterion, _ = build({'backbone': 'resnet18', 'backbone_stages': 4} | flags | {'dropout': 0.0})
    torch.manual_seed(1)
    targets = random_targets(3, 2)
    with Precision(mode, CPU).autocast():
        outputs = model.train()([torch.randn(3, 64, 64), torch.randn(3, 64, 96)], targets)
    return model, outputs, weighted_sum(criterion(outputs, targets), criterion.weight_dict)


@every
def test_bf16_trains(flags: dict) -> None:
    model, outputs, loss = training_pass(flags, 'bf16')
    loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    for kind, prediction in outputs['predictions'].items():
        for name in ('logits', 'boxes', 'anchors'):
            value = getattr(prediction, name)
            assert value is None or value.dtype == torch.float32, (kind, name)
    assert outputs['pred_boxes'].dtype == outputs['pred_logits'].dtype == torch.float32
    boxes = outputs['pred_boxes']
    assert (boxes - boxes.bfloat16()).abs().max() > 1e-4, 'they have float32 numbers, not only the type'
    # Numbers of 8 bits err by 0.2 % each, mostly to both sides; other proposals and pairs may be chosen for
    # that.
    torch.testing.assert_close(loss, training_pass(flags, 'off')[2], rtol=0.02, atol=0)


def calls_of_the_operator(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """Filled as the model runs: `offsets` and `references` as the module has them, `places` and `weights` as
    the operator gets them.
    """
    calls: list[dict] = []
    original = modules.ms_deform_attn

    def spy(value: Tensor, shapes: object, places: Tensor, weights: Tensor) -> Tensor:
        calls[-1] |= {'places': places.detach(), 'weights': weights.detach(), 'shapes': shapes}
        return original(value, shapes, places, weights)

    monkeypatch.setattr(modules, 'ms_deform_attn', spy)
    for module in model.modules():
        if isinstance(module, MSDeformAttn):
            module.register_forward_pre_hook(
                lambda module, args: calls.append({'module': module, 'references': args[1].detach()})
            )
            module.sampling_offsets.register_forward_hook(
                lambda _, args, output: calls[-1].update(offsets=output.detach())
            )
    return calls


@sampling
def test_points_are_placed_in_float32(flags: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """The operator gets what float64 arithmetic makes of the same 16-bit offsets, to 1e-6 of a side."""
    model, _, _ = build(flags)
    calls = calls_of_the_operator(model, monkeypatch)
    for module in model.modules():
        if isinstance(module, MSDeformAttn):
            nn.init.normal_(module.sampling_offsets.weight, std=0.1)
            nn.init.normal_(module.attention_weights.weight, std=0.3)
    with Precision('bf16', CPU).autocast():
        model.train()(torch.randn(2, 3, 160, 224), random_targets(3, 2))
    assert len(calls) == 5
    for call in calls:
        module, places, references = call['module'], call['places'], call['references'].double()
        assert call['offsets'].dtype == torch.bfloat16 and references.shape[-1] in (2, 4)
        assert call['references'].dtype == places.dtype == call['weights'].dtype == torch.float32
        assert (references - references.bfloat16()).abs().max() > 5e-4, 'float32 numbers'
        offsets = call['offsets'].double().unflatten(-1, (module.n_heads, module.n_levels, -1, 2))
        references = references[:, :, None, :, None]
        if references.shape[-1] == 2:
            steps = offsets / torch.tensor(call['shapes']).flip(-1)[:, None]
        else:
            steps = offsets / module.n_points * references[..., 2:] / 2
        torch.testing.assert_close(places.double(), references[..., :2] + steps, rtol=0, atol=1e-6)
        totals = call['weights'].flatten(3).sum(-1)
        torch.testing.assert_close(totals, torch.ones_like(totals), rtol=0, atol=1e-6)


def test_losses_do_not_depend_on_autocast() -> None:
    """Outputs are given: what the criterion makes of them has the same bits inside."""
    model, criterion, _ = build(TWO_STAGE | CO_HEADS)
    targets = random_targets(3, 2)
    outputs = model.train()(torch.randn(2, 3, 64, 64), targets)
    expected = criterion(outputs, targets)
    with Precision('bf16', CPU).autocast():
        losses = criterion(outputs, targets)
        total = weighted_sum(losses, criterion.weight_dict)
    assert all(torch.equal(losses[name], value) for name, value in expected.items())
    assert torch.equal(total, weighted_sum(expected, criterion.weight_dict))


@pytest.mark.parametrize('flags', [{}, {'conditional': True}, TWO_STAGE, {'dino': True}])
def test_bf16_detects_nearly_the_same(flags: dict) -> None:
    """At evaluation; with decoders that choose proposals only their best boxes can be compared."""
    model, _, _ = build(flags)
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        expected = model.eval()(images)
        with Precision('bf16', CPU).autocast():
            outputs = model(images)
    for name, value in outputs.items():
        assert value.dtype == torch.float32
        if not (flags.get('two_stage') or flags.get('dino')):
            torch.testing.assert_close(value, expected[name], rtol=0.05, atol=0.05)


class Tiny(nn.Module):
    """A two-stage detector without a backbone, small enough for hundreds of steps in fp16 on a CPU."""

    def __init__(self) -> None:
        super().__init__()
        flags = {'num_feature_levels': 1, 'enc_layers': 1, 'dec_layers': 2, 'num_queries': 8, 'dropout': 0.0}
        self.detector, self.criterion, _ = build(TWO_STAGE | flags | {'dim_feedforward': 32})
        self.detector.backbone = GivenFeatures(32, 32, -0.5)
        self.detector.input_proj[0][0] = nn.Conv2d(32, 32, 1)
        self.maps, self.targets = torch.randn(2, 32, 4, 6), random_targets(3, 2)

    def train_for(self, steps: int, precision: Precision, lr: float = 1e-3) -> list[float]:
        optimizer = build_optimizer(self.detector, lr, lr, 1e-4)
        losses = []
        for _ in range(steps):
            with precision.autocast():
                outputs = self.detector.train()(self.maps, self.targets)
            terms = self.criterion(outputs, self.targets)
            loss = weighted_sum(terms, self.criterion.weight_dict)
            optimizer.zero_grad(set_to_none=True)
            precision.backward(loss)
            precision.step(optimizer, self.detector.parameters(), max_norm=0.1)
            losses.append(loss.item())
        return losses


@pytest.mark.parametrize('steps', [20, pytest.param(500, marks=pytest.mark.exhaustive)])
def test_fp16_trains(steps: int) -> None:
    tiny, precision = Tiny(), Precision('fp16', CPU)
    losses = tiny.train_for(steps, precision)
    assert torch.tensor(losses).isfinite().all()
    assert all(p.isfinite().all() for p in tiny.detector.parameters())
    assert sum(losses[-5:]) < sum(losses[:5])
    assert precision.scaler.get_scale() > 1
    if steps == 500:
        assert losses[-1] < losses[0] / 2


@pytest.mark.slow
@pytest.mark.parametrize(
    'flags',
    [
        {},
        *(pytest.param(f, marks=pytest.mark.exhaustive) for f in ({'conditional': True}, {'dino': True})),
        TWO_STAGE | CO_HEADS,
    ],
)
def test_fp16_steps_of_whole_models(flags: dict) -> None:
    """From images on; the scale finds its size within a few steps, each of which halves it."""
    model, criterion, _ = build(flags)
    optimizer, precision = build_optimizer(model, 1e-4, 1e-5, 1e-4), Precision('fp16', CPU)
    images, targets = torch.randn(2, 3, 64, 64), random_targets(3, 2)
    made: list[bool] = []
    while not any(made) and len(made) < 10:
        with precision.autocast():
            outputs = model.train()(images, targets)
        loss = weighted_sum(criterion(outputs, targets), criterion.weight_dict)
        optimizer.zero_grad(set_to_none=True)
        precision.backward(loss)
        made.append(precision.step(optimizer, model.parameters(), max_norm=0.1)[0])
        assert loss.isfinite()
    assert all(p.isfinite().all() for p in model.parameters())
    assert optimizer.state and made[-1], 'some step was taken'
    assert precision.scaler.get_scale() == 2.0 ** (17 - len(made))


def test_a_step_that_overflows_is_left_out() -> None:
    layer = nn.Linear(2, 1)
    optimizer, precision = build_optimizer(layer, 0.1, 0.1, 0.0), Precision('fp16', CPU)
    scales, weights, results = [], [], []
    for factor in (1.0, 1e36, 1.0, float('nan')):
        optimizer.zero_grad()
        loss = factor * layer(torch.ones(1, 2)).sum()
        precision.backward(loss)
        results.append(precision.step(optimizer, layer.parameters(), max_norm=1.0, losses=[loss]))
        scales.append(precision.scaler.get_scale())
        weights.append(layer.weight.detach().clone())
    assert scales == [2.0**16, 2.0**15, 2.0**15, 2.0**14]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[1], weights[2])
    assert torch.equal(weights[2], weights[3])
    assert results == [(True, True), (False, True), (True, True), (False, False)], 'made, finite'
    assert layer.weight.isfinite().all()


def test_gradients_are_clipped_as_if_unscaled() -> None:
    results = []
    for mode in ('off', 'fp16'):
        torch.manual_seed(0)
        layer = nn.Linear(4, 4)
        precision = Precision(mode, CPU)
        precision.backward(layer(torch.ones(1, 4)).square().sum())
        precision.step(torch.optim.SGD(layer.parameters(), lr=1.0), layer.parameters(), max_norm=0.1)
        assert layer.weight.grad.norm() < 0.1001
        results.append(layer.weight.detach())
    torch.testing.assert_close(*results)


def test_the_scale_goes_on_from_a_checkpoint() -> None:
    first = Precision('fp16', CPU)
    first.backward(torch.zeros((), requires_grad=True))
    first.scaler.update(512.0)
    again = Precision('fp16', CPU)
    again.load_state_dict(copy.deepcopy(first.state_dict()))
    assert again.scaler.get_scale() == 512.0 and again.state_dict() == first.state_dict()
    again.load_state_dict({})  # of a run without a scaler
    for mode in ('off', 'bf16'):
        precision = Precision(mode, CPU)
        precision.load_state_dict(first.state_dict())
        assert precision.state_dict() == {}


@pytest.mark.parametrize(
    ('mode', 'device', 'message'),
    [
        ('fp8', 'cpu', 'choose of off, bf16, fp16'),
        ('bf16', 'meta', 'turn it off'),
        ('fp16', 'mps', 'use bf16'),
        ('bf16', 'cuda', 'use fp16'),
    ],
)
def test_what_a_device_cannot_do_is_refused(
    mode: str, device: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda including_emulation: False)
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device: 'An old card')
    with pytest.raises(ValueError, match=message) as error:
        Precision(mode, torch.device(device))
    assert '\n' not in str(error.value)


@pytest.mark.filterwarnings('error')
def test_tf32_is_left_alone_unless_asked_for() -> None:
    def now() -> tuple[str, bool]:
        return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32

    before = now()
    try:
        set_tf32(None)
        assert now() == before
        states = []
        for allowed in (True, False):
            set_tf32(allowed)
            states.append(now())
        assert states == [('high', True), ('highest', False)]
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]
