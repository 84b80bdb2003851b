"""
Deformable DETR and MS-DETR equal the official implementations: outputs, losses, assignments, gradients,
optimizer steps.
"""

import re
from argparse import Namespace
from collections.abc import Iterator
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from main import get_args_parser
from models import build_model
from models.training.criterion import weighted_sum
from tests import rule
from tests.conftest import REASON
from tests.models import TWO_STAGE
from tests.parity import (
    Case,
    assert_close,
    assignments,
    case_params,
    check_coefficients,
    check_losses,
    check_pairs,
    float64,
    optimizer_of,
    to_targets,
)
from tests.shared_data import SHARED, needs_shared, read_shared
from util.config.settle import settle

STEPPED = ('r50', 'r50_box_refine_two_stage', 'ms_detr_pp_300')  # cases whose first step is always compared
# Sets of objects whose gradient is always compared; of other cases those with a norm for each parameter.
GRADIENTS = {
    'r50': ('normal',),
    'r50_box_refine_two_stage': ('normal', 'none'),
    'ms_detr_a_300': ('near_predictions',),
    'ms_detr_pp_300': ('near_predictions',),
}
CASES = sorted(
    [*SHARED.glob('parity/deformable_detr/r50*.json'), *SHARED.glob('parity/ms_detr/ms_detr_*.json')]
)
# Further names that the official state dicts have for the same tensors.
HEAD_ALIASES = ('transformer.decoder.bbox_embed.', 'transformer.decoder.class_embed.', 'bbox_embed_o2m.')


class DeformableCase(Case):
    @cached_property
    def first_names(self) -> dict[str, str]:
        """Our names -> the official names of the recorded values."""
        return {name: first for name, _, first in self.record['state_dict']}

    @cached_property
    def args(self) -> Namespace:
        # The official variants are two programs with the same flags.
        variant = {'ms_variant': 'a'} if self.record['case'].startswith('ms_detr_a') else {}
        return settle(Namespace(**self.record['arguments'], **variant, backbone_weights='none'))

    @torch.no_grad()
    def fill(self, model: nn.Module) -> None:
        for name, tensor in model.state_dict(keep_vars=True).items():
            if tensor.is_floating_point() and tensor.ndim:
                value = rule.parameter(self.salt + self.first_names[name], tuple(tensor.shape))
                tensor.copy_(torch.from_numpy(value))

    @property
    def tolerance(self) -> dict[str, float]:
        """Of outputs. Proposals are float32 logarithms, whose last bit depends on the processor."""
        return {'rtol': 1e-6, 'atol': 1e-6} if self.args.two_stage else {'rtol': 1e-8, 'atol': 1e-9}

    def target_set(self, name: str) -> list[dict[str, Tensor]]:
        return to_targets(self.record['target_sets'][name]['targets'])

    def official_names(self, model: nn.Module) -> dict[str, nn.Parameter]:
        return {self.first_names[name]: p for name, p in model.named_parameters()}


QUICK = ('r50_box_refine_two_stage',)
EXHAUSTIVE = ('r50_single_scale', 'ms_detr_300', 'ms_detr_pp_900')


@pytest.fixture(scope='module', params=case_params(CASES, QUICK, EXHAUSTIVE))
def case(request: pytest.FixtureRequest) -> DeformableCase:
    return DeformableCase(request.param)


@pytest.fixture(autouse=True)
def precision(request: pytest.FixtureRequest) -> Iterator[None]:
    with float64() if 'case' in request.fixturenames else nullcontext():
        yield


def trained(case: DeformableCase) -> DeformableCase:
    if 'target_sets' not in case.record:
        pytest.skip('this case was recorded in evaluation only')
    return case


@needs_shared
def test_parameters_have_official_names_shapes_and_order(case: DeformableCase) -> None:
    model, criterion, _ = case.built
    entries = [[name, list(tensor.shape)] for name, tensor in model.state_dict().items()]
    assert entries == [
        [name, shape] for name, shape, _ in case.record['state_dict'] if not name.startswith(HEAD_ALIASES)
    ]
    trainable = {name for name, p in case.official_names(model).items() if p.requires_grad}
    assert trainable == set(case.record['trainable'])
    assert sum(p.numel() for p in model.parameters()) == case.record['num_params_total']
    if 'weight_dict' in case.record:
        check_coefficients(criterion, case.record['weight_dict'])


@needs_shared
def test_evaluation_equals_official(case: DeformableCase) -> None:
    model, _, postprocessors = case.built
    with torch.no_grad():
        outputs = model.eval()(case.samples)
    assert set(outputs) == {'pred_logits', 'pred_boxes'}
    every = case.record['npz']['pred_logits_every_kth_query']
    assert_close(outputs['pred_logits'][:, ::every], case.arrays['pred_logits'], 'logits', **case.tolerance)
    assert_close(outputs['pred_boxes'], case.arrays['pred_boxes'], 'boxes', **case.tolerance)
    results = postprocessors['bbox'](outputs, torch.tensor(case.record['original_sizes_hw']))
    for index, result in enumerate(results):
        for key in ('scores', 'labels', 'boxes'):
            assert_close(result[key], case.arrays[f'det{index}_{key}'], key, **case.tolerance)


@needs_shared
def test_training_outputs_equal_official(case: DeformableCase) -> None:
    """Dropout is 0, so that the layers of a training pass are those that were recorded in evaluation."""
    steps = trained(case).record['npz']
    predictions = case.outputs['predictions']
    for kind, prefix in (('one2one', 'aux'), ('o2m', 'o2m_aux')):
        if kind not in predictions or len(predictions[kind].logits) == 1:
            assert f'{prefix}_pred_logits' not in case.arrays
            continue
        logits = predictions[kind].logits[:-1, :, :: steps['aux_pred_logits_every_kth_query']]
        boxes = predictions[kind].boxes[:-1, :, :: steps['aux_pred_boxes_every_kth_query']]
        assert_close(
            logits,
            case.arrays[f'{prefix}_pred_logits'],
            f'logits of earlier layers, {kind}',
            **case.tolerance,
        )
        assert_close(
            boxes, case.arrays[f'{prefix}_pred_boxes'], f'boxes of earlier layers, {kind}', **case.tolerance
        )
    if 'o2m' in predictions:
        logits = predictions['o2m'].logits[-1][:, :: steps['o2m_pred_logits_every_kth_query']]
        boxes = predictions['o2m'].boxes[-1][:, :: steps['o2m_pred_boxes_every_kth_query']]
        assert_close(logits, case.arrays['o2m_pred_logits'], 'second logits', **case.tolerance)
        assert_close(boxes, case.arrays['o2m_pred_boxes'], 'second boxes', **case.tolerance)
    if 'enc' in predictions:
        scores = predictions['enc'].logits[-1][:, :: steps['enc_class0_logit_every_kth_token'], 0]
        assert_close(scores, case.arrays['enc_class0_logit'], 'proposal scores', **case.tolerance)
        boxes = predictions['enc'].boxes[-1][:, :: steps['enc_pred_boxes_every_kth_token']]
        assert_close(boxes, case.arrays['enc_pred_boxes'], 'proposal boxes', **case.tolerance)


@needs_shared
@pytest.mark.parametrize(
    'target_set',
    [
        'normal',
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ('crowded', 'tiny_and_none', 'none', 'near_predictions')
        ),
    ],
)
def test_training_equals_official(case: DeformableCase, target_set: str, exhaustive: bool) -> None:
    """Losses and assignments of each set of objects, gradients of those in GRADIENTS."""
    if target_set not in trained(case).record['target_sets']:
        pytest.skip('this case has no such objects')
    recorded = case.record['target_sets'][target_set]
    model, criterion, _ = case.built
    model.zero_grad()
    targets = case.target_set(target_set)
    losses = criterion(case.outputs, targets)
    total = check_losses(losses, criterion.weight_dict, recorded)
    check_assignments(criterion, case.outputs['predictions'], targets, recorded)
    compared = GRADIENTS.get(case.path.stem, (target_set,) if 'grad_norms' in recorded else ())
    if not exhaustive and target_set not in compared:
        return
    total.backward(retain_graph=True)
    gradients = {name: p.grad for name, p in case.official_names(model).items() if p.grad is not None}
    for name, value in recorded.get('grad_norms', {}).items():
        assert_close(gradients[name].norm(), value, f'gradient of {name}', atol=1e-7)
    norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    assert_close(norm, recorded['grad_norm_total'], 'norm of all gradients')
    missing = {name for name, p in case.official_names(model).items() if p.requires_grad} - set(gradients)
    assert missing == set(recorded.get('parameters_without_gradient', []))


def check_assignments(criterion: nn.Module, predictions: dict, targets: list[dict], recorded: dict) -> None:
    """Matcher calls were recorded kind by kind, of each the last layer, then the earlier ones."""
    found = []
    for kind in ('one2one', 'o2m', 'enc'):
        if kind in predictions:
            *earlier, last = assignments(criterion, kind, predictions, targets)
            found += [last, *earlier]
    for pairs, call in zip(found, recorded['matches'], strict=True):
        check_pairs(pairs, call['indices'], targets)


@pytest.mark.slow
@needs_shared
def test_optimizer_steps_equal_official(case: DeformableCase, exhaustive: bool) -> None:
    if not exhaustive and case.path.stem not in STEPPED:
        pytest.skip(REASON)
    recorded = trained(case).record.get('optimizer')
    if not recorded:
        pytest.skip('no optimizer steps were recorded for this case')
    model, criterion, _ = case.built
    optimizer = optimizer_of(model, case.args)
    groups = [
        [len(group['params']), sum(p.numel() for p in group['params']), group['lr']]
        for group in optimizer.param_groups
    ]
    np.testing.assert_allclose(groups, recorded['groups_tensors_elements_lr'])
    before = {name: p.detach().clone() for name, p in case.official_names(model).items()}
    targets = case.target_set(recorded['on_target_set'])
    most = len(recorded['steps']) - 1 if exhaustive else 1
    for step, entry in enumerate(recorded['steps'][: most + 1]):
        outputs = model.train()(case.samples, targets) if step else case.outputs
        losses = criterion(outputs, targets)
        for name, value in entry['losses'].items():
            assert_close(losses[name], value, name, rtol=1e-5)
        if step < most:
            optimizer.zero_grad()
            weighted_sum(losses, criterion.weight_dict).backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), recorded['clip_max_norm'])
            assert_close(norm, entry['grad_norm_before_clip'], 'gradient norm', rtol=1e-5)
            optimizer.step()
    if exhaustive:
        change = {name: (p - before[name]).norm() for name, p in case.official_names(model).items()}
        for name, value in recorded['l2_of_parameter_change_after_three_steps'].items():
            assert_close(change[name], value, name, rtol=1e-5)
    case.fill(model)
    del case.outputs  # nothing can be learned from them again


INITIAL = {
    name: entry
    for system in ('deformable_detr', 'ms_detr')
    for name, entry in read_shared(f'parity/{system}/initial_values.json').get('models', {}).items()
}


@needs_shared
@pytest.mark.parametrize('name', INITIAL)
def test_initial_values_equal_official(name: str) -> None:
    """Drawn in the official order from the same seed: every parameter is the same."""
    flags = [*INITIAL[name]['command_line'].split(), '--deformable', '--backbone_weights', 'none']
    args = get_args_parser().parse_args(flags)
    torch.manual_seed(42)
    model = build_model(args)[0]
    ours = dict(model.state_dict(keep_vars=True))
    for entry, shape, *numbers in INITIAL[name]['parameters']:
        for alias in HEAD_ALIASES[:2]:
            entry = entry.replace(alias, alias.split('.')[2] + '.')
        x = ours[entry].detach().double()
        assert list(x.shape) == shape
        found = [x.sum(), x.norm(), x.min(), x.max(), x.flatten()[0]]
        assert_close(torch.stack(found), numbers, entry, atol=1e-7)


class RecordedCase(DeformableCase):
    args = Namespace(**TWO_STAGE, dropout=0.0, backbone_weights='none')

    @cached_property
    def first_names(self) -> dict[str, str]:
        ours = build_model(self.args)[0].state_dict()
        return {name: re.sub(r'^(class|bbox)_embed', r'transformer.decoder.\1_embed', name) for name in ours}


def test_recorded_numbers_equal_official(exhaustive: bool) -> None:
    """Losses and gradient of a training step, from numbers in this repository. Those of shared/ are more."""
    if SHARED.is_dir() and not exhaustive:
        pytest.skip(REASON)
    with float64():
        case = RecordedCase(Path(__file__).parent / 'recorded/deformable_detr_r50_two_stage.json')
        model, criterion, _ = case.built
        losses = criterion(model.train()(case.samples, case.targets), case.targets)
        check_losses(losses, criterion.weight_dict, case.record).backward()
        norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
        assert_close(norm, case.record['grad_norm_total'], 'norm of all gradients')
