"""H-Deformable-DETR equals the official implementation, and detrex's port with that port's numerics."""

import json
import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import models.deformable_transformer
import models.training.losses
import models.training.matcher
from engine import build_optimizer
from main import get_args_parser
from models import build_model
from models.training.criterion import weighted_sum
from models.training.flags import resolve_all
from tests import rule
from tests.parity import assert_close, check_losses, float64, to_targets
from tests.shared_data import SHARED, needs_shared
from util.box_ops import box_iou
from util.checkpoint import load_checkpoint
from util.nested_tensor import NestedTensor, nested_tensor_from_tensor_list

CASES = [
    path
    for name in ('r50', 'swin_t')
    for path in sorted(SHARED.glob(f'parity/h_deformable_detr/{name}_*.json'))
]
DETREX = SHARED / 'parity/h_deformable_detr/detrex_r50_60_120_k3.json'
TRICKS = '--with_box_refine --two_stage --dim_feedforward 2048 --dropout 0.0 --mixed_selection --look_forward_twice'
DETREX_FLAGS = f'{TRICKS} --num_queries 60 --hybrid_queries 120 --hybrid_k 3 --hybrid_lambda 0.5 --topk 300'
CLOSE = {
    'rtol': 1e-6,
    'atol': 1e-6,
}  # proposals are float32 logarithms, whose last bit depends on the processor


class Case:
    """A recorded case, and our model built from its command line. Use under `float64()`."""

    def __init__(self, path: Path) -> None:
        self.record = json.loads(path.read_text())
        with np.load(path.with_suffix('.npz')) as archive:
            self.arrays = dict(archive)
        self.args = resolve_all(
            get_args_parser().parse_args(
                [*self.record.get('argv', DETREX_FLAGS.split()), '--backbone_weights', 'none']
            )
        )
        if 'argv' not in self.record:
            self.args.num_classes = 80

    @cached_property
    def built(self) -> tuple[nn.Module, nn.Module, dict]:
        model, criterion, postprocessors = build_model(self.args)
        self.fill(model)
        return model, criterion, postprocessors

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

    def samples(self, padding: bool = True) -> NestedTensor:
        samples = nested_tensor_from_tensor_list(
            [rule.image(p['rule_name'], p['height'], p['width']) for p in self.record['images']]
        )
        return samples if padding else NestedTensor(samples.tensors, torch.zeros_like(samples.mask))

    @property
    def targets(self) -> list[dict[str, Tensor]]:
        return to_targets(self.record['targets'])


@pytest.fixture(autouse=True)
def precision() -> Iterator[None]:
    with float64():
        yield


QUICK = ('r50_onestage_hybrid', 'r50_hybrid_notricks_overflow')


@pytest.fixture(
    scope='module',
    params=[
        pytest.param(path, id=path.stem, marks=() if path.stem in QUICK else pytest.mark.slow)
        for path in CASES
    ],
)
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


def check_assignments(case: Case, criterion: nn.Module, predictions: list) -> None:
    targets = case.targets
    offsets = np.cumsum([0] + [len(target['labels']) for target in targets])
    for name, recorded in case.record['matcher_indices'].items():
        kind, layer = name.split('_')
        kind = 'enc' if layer == 'enc' else kind
        layer = int(layer[3:]) if layer.startswith('aux') else None
        (prediction,) = (p for p in predictions if (p.kind, p.layer) == (kind, layer))
        agnostic = [target | {'labels': torch.zeros_like(target['labels'])} for target in targets]
        pairs = criterion.table[kind].matcher(prediction, agnostic if kind == 'enc' else targets)
        for image, (query, target) in enumerate(recorded):
            here = pairs.batch == image
            assert pairs.query[here].tolist() == query, name
            # Objects are repeated as a block, and ours are counted once.
            assert (pairs.target[here] - offsets[image]).tolist() == [
                t % len(targets[image]['labels']) for t in target
            ], name


@needs_shared
def test_the_command_line_builds_the_official_model(case: Case) -> None:
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
    assert criterion.weight_dict == record['weight_dict']
    args = case.args
    names = args.lr_backbone_names, args.lr_linear_proj_names, args.lr_linear_proj_mult
    groups = build_optimizer(model, args.lr, args.lr_backbone, args.weight_decay, *names).param_groups
    for ours, theirs in zip(groups, record['optimizer_groups'], strict=True):
        assert ours['lr'] == pytest.approx(theirs['lr']) and ours['weight_decay'] == theirs['weight_decay']
        assert len(ours['params']) == theirs['n_tensors']
        assert sum(p.numel() for p in ours['params']) == theirs['n_parameters']


@needs_shared
def test_evaluation_equals_official(case: Case) -> None:
    model, _, postprocessors = case.built
    with torch.no_grad():
        outputs = model.eval()(case.samples())
    logits = outputs['pred_logits'][:, :: case.record['eval']['pred_logits_query_stride']]
    assert_close(logits, case.arrays['eval_pred_logits'], 'logits', **CLOSE)
    assert_close(outputs['pred_boxes'], case.arrays['eval_pred_boxes'], 'boxes', **CLOSE)
    results = postprocessors['bbox'](outputs, torch.tensor(case.record['orig_sizes_hw']))
    for index, result in enumerate(results):
        side = max(case.record['orig_sizes_hw'][index])  # boxes are compared in units of it
        for key, unit in (('scores', 1), ('labels', 1), ('boxes', side)):
            assert_close(result[key] / unit, case.arrays[f'post{index}_{key}'] / unit, key, **CLOSE)


@needs_shared
def test_training_equals_official(case: Case) -> None:
    model, criterion, _ = case.built
    recorded, targets = case.record['train'], case.targets
    model.train().zero_grad()
    outputs = model(case.samples(), targets)
    strides = {kind: recorded[f'{kind}_query_stride'] for kind in ('one2one', 'one2many')}
    last = {p.kind: p for p in outputs['predictions'] if p.layer is None}
    assert_close(
        last['one2one'].boxes[:, :: strides['one2one']], case.arrays['train_pred_boxes'], 'boxes', **CLOSE
    )
    if 'one2many' in last:
        boxes = last['one2many'].boxes[:, :: strides['one2many']]
        assert_close(boxes, case.arrays['train_pred_boxes_one2many'], 'one-to-many boxes', **CLOSE)
    losses = criterion(outputs, targets)
    check_losses(losses, criterion.weight_dict, recorded).backward()
    gradients = {case.first_name(name): p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert set(gradients) == set(case.record['grad_norms'])
    for name, value in case.record['grad_norms'].items():
        assert_close(gradients[name].norm(), value, f'gradient of {name}', atol=1e-7)
    check_assignments(case, criterion, outputs['predictions'])


@pytest.mark.slow
@needs_shared
def test_optimizer_steps_equal_official(case: Case) -> None:
    model, criterion, _ = case.built
    case.fill(model)
    args, recorded = case.args, case.record['optimizer_steps']['steps']
    names = args.lr_backbone_names, args.lr_linear_proj_names, args.lr_linear_proj_mult
    optimizer = build_optimizer(model, args.lr, args.lr_backbone, args.weight_decay, *names)
    model.train()
    for entry in recorded:
        losses = criterion(model(case.samples(), case.targets), case.targets)
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
    """Its numerics: another epsilon in two places, padding ignored at evaluation, and a stem that alone is frozen."""

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

    monkeypatch.setattr(models.deformable_transformer.DeformableDecoder, 'eps', 1e-3)
    for module in (models.training.matcher, models.training.losses):
        monkeypatch.setattr(module, 'generalized_box_iou', giou)
    case = Case(DETREX)
    model, criterion, _ = case.built
    model.backbone[0].body.layer1.requires_grad_(True)
    with torch.no_grad():
        outputs = model.eval()(case.samples(padding=False))
    assert_close(outputs['pred_logits'][:, ::2], case.arrays['eval_pred_logits'], 'logits', **CLOSE)
    assert_close(outputs['pred_boxes'], case.arrays['eval_pred_boxes'], 'boxes', **CLOSE)
    outputs = model.train()(case.samples(), case.targets)
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


@needs_shared
def test_detrex_classes_go_to_their_coco_ids() -> None:
    """80 rows without gaps become 91; the proposals' head keeps its rows, since its first means 'object'."""
    record = json.loads(DETREX.read_text())
    state = {name: torch.randn(shape) for name, shape in record['state_dict']}
    model = build_model(get_args_parser().parse_args([*DETREX_FLAGS.split(), '--backbone_weights', 'none']))[
        0
    ]
    load_checkpoint(model, state)
    head, theirs = model.class_embed[2], state['class_embed.2.weight']
    assert torch.equal(head.weight[1], theirs[0]) and torch.equal(head.weight[90], theirs[79])
    assert not head.weight[12].any() and head.bias[12].sigmoid() < 1e-9
    assert torch.equal(model.class_embed[6].weight[:80], state['class_embed.6.weight'])
    assert re.search('detrex', str(load_checkpoint(model, state)))
