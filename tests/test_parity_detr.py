"""DETR and Conditional DETR equal the official implementations: outputs, losses, assignments, gradients,
optimizer steps.
"""

from argparse import Namespace
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from engine import build_optimizer
from models.training.criterion import weighted_sum
from models.training.matcher import Targets
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
)
from tests.shared_data import SHARED, needs_shared

FLAGS = {'detr': {}, 'conditional_detr': {'conditional': True}}
CASES = [
    path
    for system in FLAGS
    for path in sorted((SHARED / 'parity' / system).glob('*.json'))
    if path.stem not in ('components', 'r50_masks')
]
QUICK = ('detr-r50', 'conditional_detr-r50')
STEPPED = {'detr-r50': 3, 'conditional_detr-r50': 1}  # optimizer steps that are always compared
# Dilation, and images without objects, are those of DETR's cases; the latter are also in recorded/.
EXHAUSTIVE = ('conditional_detr-r50_dc5', 'conditional_detr-r50_empty', 'detr-r50_empty')


class DenseCase(Case):
    images_key = 'pictures'

    def __init__(self, path: Path, system: str) -> None:
        super().__init__(path)
        self.system = system

    @cached_property
    def args(self) -> Namespace:
        return Namespace(**self.record['args'] | {'backbone_weights': 'none'} | FLAGS[self.system])

    @torch.no_grad()
    def fill(self, model: nn.Module) -> None:
        rule.fill(model, self.salt)
        parameters = dict(model.named_parameters())
        for step in self.record['rule']['after_fill']:
            parameters[step['parameter']] *= step['multiply_in_place_by']

    def train_losses(self) -> tuple[dict[str, Tensor], Tensor]:
        """Loss terms and total of a training pass."""
        model, criterion, _ = self.built
        losses = criterion(model.train()(self.samples, self.targets), self.targets)
        return losses, weighted_sum(losses, criterion.weight_dict)


@pytest.fixture(scope='module', params=case_params(CASES, QUICK, EXHAUSTIVE, folder=True))
def case(request: pytest.FixtureRequest) -> Iterator[DenseCase]:
    with float64():
        yield DenseCase(request.param, request.param.parent.name)


@needs_shared
def test_parameters_have_official_names_shapes_and_order(case: DenseCase) -> None:
    model, criterion, _ = case.built
    entries = [[name, list(tensor.shape)] for name, tensor in model.state_dict().items()]
    assert entries == case.record['state_dict']
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert frozen == case.record['not_trainable']
    check_coefficients(criterion, case.record['weight_dict'])


@needs_shared
def test_evaluation_equals_official(case: DenseCase) -> None:
    model, _, postprocessors = case.built
    with torch.no_grad():
        outputs = model.eval()(case.samples)
    assert set(outputs) == {'pred_logits', 'pred_boxes'}
    every = case.record['npz']['logits_every_k_th_query']
    assert_close(outputs['pred_logits'][:, ::every], case.arrays['pred_logits'], 'logits')
    assert_close(outputs['pred_logits'].norm(dim=-1), case.arrays['pred_logits_l2_per_query'], 'logit norms')
    assert_close(outputs['pred_boxes'], case.arrays['pred_boxes'], 'boxes')
    results = postprocessors['bbox'](outputs, torch.tensor(case.record['orig_sizes_hw']))
    for key in ('scores', 'labels', 'boxes'):
        assert_close(torch.stack([result[key] for result in results]), case.arrays[f'post_{key}'], key)


@needs_shared
def test_training_equals_official(case: DenseCase) -> None:
    _, criterion, _ = case.built
    check_losses(case.first_pass.losses, criterion.weight_dict, case.record, 'total_loss')
    check_norms(case.first_pass.norms, case.record['grad_l2_norms'])
    if 'aux_pred_boxes' in case.arrays:
        every = case.record['npz']['aux_boxes_every_k_th_query']
        aux = torch.stack([layer['pred_boxes'][:, ::every] for layer in case.outputs['aux_outputs']])
        assert_close(aux, case.arrays['aux_pred_boxes'], 'boxes of earlier layers')


@needs_shared
def test_assignments_equal_official(case: DenseCase) -> None:
    _, criterion, _ = case.built
    *earlier, last = assignments(criterion, 'one2one', case.outputs['predictions'], case.targets)
    for pairs, call in zip([last, *earlier], case.record['matcher_calls']['calls'], strict=True):
        check_pairs(pairs, call, case.targets)


@pytest.mark.slow
@needs_shared
def test_optimizer_steps_equal_official(case: DenseCase, exhaustive: bool) -> None:
    most = None if exhaustive else STEPPED.get(f'{case.system}-{case.path.stem}', 0)
    if most == 0:
        pytest.skip(REASON)
    recorded = case.record.get('optimizer_steps')
    if not recorded:
        pytest.skip('no optimizer steps were recorded for this case')
    model, criterion, _ = case.built
    total = weighted_sum(case.first_pass.losses, criterion.weight_dict)
    optimizer = build_optimizer(model, lr=1e-4, lr_backbone=1e-5, weight_decay=1e-4)
    assert [len(group['params']) for group in optimizer.param_groups] == recorded['group_sizes']
    for index, step in enumerate(recorded['steps']):
        if index:
            _, total = case.train_losses()
        assert_close(total, step['total'], 'total', rtol=1e-5)
        if index == most:
            break
        if index:
            optimizer.zero_grad()
            total.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        assert_close(norm, step['grad_norm_before_clip'], 'gradient norm', rtol=1e-5)
        optimizer.step()
    else:
        total = case.train_losses()[1]
        assert_close(total, recorded['total_after_last_step'], 'total after the last step', rtol=1e-5)
        parameters = dict(model.named_parameters())
        for name, value in recorded['param_l2_after_last_step'].items():
            assert_close(parameters[name].norm(), value, name, rtol=1e-5)
    case.fill(model)


@pytest.mark.parametrize('system', ['detr', pytest.param('conditional_detr', marks=pytest.mark.slow)])
def test_recorded_numbers_equal_official(system: str) -> None:
    """Some of the same, from numbers in this repository."""
    with float64():
        case = DenseCase(Path(__file__).parent / f'recorded/{system}_r50_empty.json', system)
        model = case.built[0]
        with torch.no_grad():
            outputs = model.eval()(case.samples)
        for key, recorded in case.record['eval_outputs_summary'].items():
            assert_close(
                [outputs[key].sum(), outputs[key].abs().sum()], [recorded['sum'], recorded['abs_sum']], key
            )
        losses, total = case.train_losses()
        for name, value in case.record['losses'].items():
            assert_close(losses[name], value, name)
        assert_close(total, case.record['total_loss'], 'total')
        total.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        for name, value in case.record['grad_l2_norms'].items():
            assert_close(gradients[name].norm(), value, f'gradient of {name}')
        norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
        assert_close(norm, case.record['grad_l2_total'], 'norm of all gradients')


def test_padding_columns_do_not_enter_the_matching() -> None:
    few = {'labels': torch.tensor([1]), 'boxes': torch.full((1, 4), 0.5)}
    many = {'labels': torch.zeros(7, dtype=torch.int64), 'boxes': torch.rand(7, 4) * 0.2 + 0.3}
    packed = Targets.pack([few, many])
    assert packed.padded_boxes.shape == (2, 7, 4)
    assert packed.sizes == [1, 7]
