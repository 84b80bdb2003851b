"""H-Deformable-DETR equals the official implementation, and detrex's port with that port's numerics."""

import json
import re
from argparse import Namespace
from collections.abc import Iterator
from functools import cached_property

import pytest
import torch
from torch import Tensor, nn

import models.deformable_transformer
import models.heads
import models.training.losses
import models.training.matcher
from main import get_args_parser
from models import build_model
from models.training.criterion import weighted_sum
from models.weights.load import load_checkpoint
from tests import rule
from tests.conftest import REASON
from tests.parity import (
    Case,
    assert_close,
    assignments,
    case_params,
    check_coefficients,
    check_losses,
    check_norms,
    check_pairs,
    float64,
    optimizer_of,
)
from tests.shared_data import SHARED, needs_shared
from util.box_ops import box_iou
from util.config.settle import settle
from util.nested_tensor import NestedTensor

STEPPED = ('r50_onestage_hybrid',)  # cases whose optimizer steps are always compared
CASES = [
    path
    for name in ('r50', 'swin_t')
    for path in sorted(SHARED.glob(f'parity/h_deformable_detr/{name}_*.json'))
]
EXHAUSTIVE = ('r50_hybrid_300_1500_k6', 'r50_dpp_300', 'swin_t_900_1500_topk300')
DETREX = SHARED / 'parity/h_deformable_detr/detrex_r50_60_120_k3.json'
DETREX_FLAGS = """--with_box_refine --two_stage --dim_feedforward 2048 --dropout 0.0 --mixed_selection
    --look_forward_twice --num_queries 60 --hybrid_queries 120 --hybrid_k 3 --hybrid_lambda 0.5 --topk 300"""
# Proposals are float32 logarithms, whose last bit depends on the processor.
CLOSE = {'rtol': 1e-6, 'atol': 1e-6}


class HybridCase(Case):
    """Our model is built from the official command line."""

    name_key = 'rule_name'

    @cached_property
    def args(self) -> Namespace:
        argv = self.record.get('argv', DETREX_FLAGS.split())
        args = settle(get_args_parser().parse_args([*argv, '--backbone_weights', 'none']))
        return args if 'argv' in self.record else args.but(num_classes=80)

    def first_name(self, name: str) -> str:
        """The name under which the value of a tensor with several official names is recorded."""
        return self.record['aliases'].get(name, name)

    def fill(self, model: nn.Module) -> None:
        """Values by official names; of detrex by its own, through the loader. Whole numbers keep theirs."""
        kept, state = model.state_dict(), {}
        for name, shape, *dtype in self.record['state_dict']:
            ruled = rule.parameter(self.first_name(name), tuple(shape))
            state[name] = kept[name] if dtype else torch.from_numpy(ruled)
        load_checkpoint(model, state)

    @property
    def unpadded_samples(self) -> NestedTensor:
        """As if the images filled the batch."""
        samples = self.samples
        return NestedTensor(samples.tensors, torch.zeros_like(samples.mask))


@pytest.fixture(autouse=True)
def precision() -> Iterator[None]:
    with float64():
        yield


QUICK = ('r50_onestage_hybrid', 'r50_hybrid_notricks_overflow')


@pytest.fixture(scope='module', params=case_params(CASES, QUICK, EXHAUSTIVE))
def case(request: pytest.FixtureRequest) -> HybridCase:
    return HybridCase(request.param)


def check_assignments(case: HybridCase, criterion: nn.Module, predictions: dict) -> None:
    targets = case.targets
    found = {kind: assignments(criterion, kind, predictions, targets) for kind in predictions}
    for name, recorded in case.record['matcher_indices'].items():
        kind, layer = name.split('_')
        kind = 'enc' if layer == 'enc' else kind
        layer = int(layer[3:]) if layer.startswith('aux') else -1
        # Objects are repeated as a block, and ours are counted once.
        recorded = [
            (query, [index % len(target['labels']) for index in block])
            for (query, block), target in zip(recorded, targets, strict=True)
        ]
        check_pairs(found[kind][layer], recorded, targets, name)


@needs_shared
def test_the_command_line_builds_the_official_model(case: HybridCase) -> None:
    model, criterion, _ = case.built
    record = case.record
    official = {name: shape for name, shape, *_ in record['state_dict']}
    aliases = ('transformer.decoder.bbox_embed.', 'transformer.decoder.class_embed.')
    assert {name: list(x.shape) for name, x in model.state_dict().items()} == {
        name: shape for name, shape in official.items() if not name.startswith(aliases)
    }
    parameters = list(model.parameters())
    assert sum(p.numel() for p in parameters) == record['n_parameters_total']
    assert sum(p.numel() for p in parameters if p.requires_grad) == record['n_parameters_trainable']
    check_coefficients(criterion, record['weight_dict'])
    groups = optimizer_of(model, case.args).param_groups
    for ours, theirs in zip(groups, record['optimizer_groups'], strict=True):
        assert ours['lr'] == pytest.approx(theirs['lr']) and ours['weight_decay'] == theirs['weight_decay']
        assert len(ours['params']) == theirs['n_tensors']
        assert sum(p.numel() for p in ours['params']) == theirs['n_parameters']


@needs_shared
def test_evaluation_equals_official(case: HybridCase) -> None:
    model, _, postprocessors = case.built
    with torch.no_grad():
        outputs = model.eval()(case.samples)
    logits = outputs['pred_logits'][:, :: case.record['eval']['pred_logits_query_stride']]
    assert_close(logits, case.arrays['eval_pred_logits'], 'logits', **CLOSE)
    assert_close(outputs['pred_boxes'], case.arrays['eval_pred_boxes'], 'boxes', **CLOSE)
    results = postprocessors['bbox'](outputs, torch.tensor(case.record['orig_sizes_hw']))
    for index, result in enumerate(results):
        side = max(case.record['orig_sizes_hw'][index])  # boxes are compared in units of it
        for key, unit in (('scores', 1), ('labels', 1), ('boxes', side)):
            assert_close(result[key] / unit, case.arrays[f'post{index}_{key}'] / unit, key, **CLOSE)


@needs_shared
def test_training_equals_official(case: HybridCase) -> None:
    model, criterion, _ = case.built
    recorded, outputs = case.record['train'], case.outputs
    strides = {kind: recorded[f'{kind}_query_stride'] for kind in ('one2one', 'one2many')}
    last = {kind: prediction.boxes[-1] for kind, prediction in outputs['predictions'].items()}
    assert_close(last['one2one'][:, :: strides['one2one']], case.arrays['train_pred_boxes'], 'boxes', **CLOSE)
    if 'one2many' in last:
        boxes = last['one2many'][:, :: strides['one2many']]
        assert_close(boxes, case.arrays['train_pred_boxes_one2many'], 'one-to-many boxes', **CLOSE)
    check_losses(case.first_pass.losses, criterion.weight_dict, recorded)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert set(case.first_pass.norms) == trainable
    norms = {case.first_name(name): norm for name, norm in case.first_pass.norms.items()}
    check_norms(norms, case.record['grad_norms'], atol=1e-7)
    check_assignments(case, criterion, outputs['predictions'])


@pytest.mark.slow
@needs_shared
def test_optimizer_steps_equal_official(case: HybridCase, exhaustive: bool) -> None:
    """The first goes on from the pass that the test above looks at."""
    if not exhaustive and case.path.stem not in STEPPED:
        pytest.skip(REASON)
    model, criterion, _ = case.built
    optimizer = optimizer_of(model, case.args)
    losses = case.first_pass.losses
    total = weighted_sum(losses, criterion.weight_dict)
    for index, entry in enumerate(case.record['optimizer_steps']['steps']):
        if index:
            losses = criterion(model.train()(case.samples, case.targets), case.targets)
            total = weighted_sum(losses, criterion.weight_dict)
            optimizer.zero_grad()
            total.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        found = losses | {'total': total, 'grad_norm_before_clip': norm}
        for name, value in entry.items():
            assert_close(found[name], value, name, rtol=1e-5)
        optimizer.step()
    lengths = [
        torch.cat([p.detach().flatten() for p in group['params']]).norm() for group in optimizer.param_groups
    ]
    assert_close(torch.stack(lengths), case.record['params_after_steps_l2'], 'parameters', rtol=1e-5)
    case.fill(model)


@pytest.mark.slow
@needs_shared
def test_detrex_port_loads_by_its_own_names_and_gives_its_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has another epsilon in two places, ignores padding at evaluation, and freezes the stem alone."""

    def iou(boxes1: Tensor, boxes2: Tensor) -> tuple[Tensor, Tensor]:
        _, union = box_iou(boxes1, boxes2)
        inter = box_iou(boxes1, boxes2)[0] * union
        return inter / (union + 1e-6), union

    def giou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
        overlap, union = iou(boxes1, boxes2)
        low = torch.minimum(boxes1[..., :2], boxes2[..., :2])
        high = torch.maximum(boxes1[..., 2:], boxes2[..., 2:])
        hull = (high - low).prod(-1)
        return overlap - (hull - union) / (hull + 1e-6)

    code = models.heads.LogitBoxes(eps=1e-3)
    monkeypatch.setattr(models.deformable_transformer.DeformableDecoder, 'box_code', code)
    for module in (models.training.matcher, models.training.losses):
        monkeypatch.setattr(module, 'generalized_box_iou', giou)
    case = HybridCase(DETREX)
    model, criterion, _ = case.built
    model.backbone[0].body.layer1.requires_grad_(True)
    with torch.no_grad():
        outputs = model.eval()(case.unpadded_samples)
    assert_close(outputs['pred_logits'][:, ::2], case.arrays['eval_pred_logits'], 'logits', **CLOSE)
    assert_close(outputs['pred_boxes'], case.arrays['eval_pred_boxes'], 'boxes', **CLOSE)
    outputs = model.train()(case.samples, case.targets)
    losses = criterion(outputs, case.targets)
    for name, value in case.record['train']['weighted_losses'].items():
        name = name.replace('loss_class', 'loss_ce')
        assert_close(losses[name] * criterion.weight_dict[name], value, name)
    total = weighted_sum(losses, criterion.weight_dict)
    assert_close(total, case.record['train']['total'], 'total')
    total.backward()
    gradients = [p.grad.norm() for p in model.parameters() if p.grad is not None]
    assert len(gradients) == len(case.record['grad_norms'])
    assert_close(
        torch.stack(gradients).sort().values,
        sorted(case.record['grad_norms'].values()),
        'gradients',
        atol=1e-7,
    )
    check_assignments(case, criterion, outputs['predictions'])


@pytest.mark.slow
@needs_shared
def test_detrex_classes_go_to_their_coco_ids() -> None:
    """80 rows without gaps become 91; the proposals' head keeps its rows, since its first means 'object'."""
    record = json.loads(DETREX.read_text())
    state = {name: torch.randn(shape) for name, shape in record['state_dict']}
    flags = get_args_parser().parse_args([*DETREX_FLAGS.split(), '--backbone_weights', 'none'])
    with rule.Unfilled():
        model = build_model(flags)[0]
    load_checkpoint(model, state)
    head, theirs = model.class_embed[2], state['class_embed.2.weight']
    assert torch.equal(head.weight[1], theirs[0]) and torch.equal(head.weight[90], theirs[79])
    assert not head.weight[12].any() and head.bias[12].sigmoid() < 1e-9
    assert torch.equal(model.class_embed[6].weight[:80], state['class_embed.6.weight'])
    assert re.search('detrex', str(load_checkpoint(model, state)))
