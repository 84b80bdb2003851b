"""DETR and Conditional DETR equal the official implementations: outputs, losses, assignments, gradients,
optimizer steps.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from engine import build_optimizer
from models.training.criterion import weighted_sum
from models.training.structures import Targets
from tests.parity import Case, assert_close, float64
from tests.shared_data import SHARED, needs_shared

FLAGS = {'detr': {}, 'conditional_detr': {'conditional': True}}
CASES = [
    path
    for system in FLAGS
    for path in sorted((SHARED / 'parity' / system).glob('*.json'))
    if path.stem not in ('components', 'r50_masks')
]


@pytest.fixture(
    scope='module',
    params=[
        pytest.param(
            path, id=f'{path.parent.name}-{path.stem}', marks=() if path.stem == 'r50' else pytest.mark.slow
        )
        for path in CASES
    ],
)
def case(request: pytest.FixtureRequest) -> Iterator[Case]:
    with float64():
        yield Case(request.param, FLAGS[request.param.parent.name])


@needs_shared
def test_parameters_have_official_names_shapes_and_order(case: Case) -> None:
    model, criterion, _ = case.built
    entries = [[name, list(tensor.shape)] for name, tensor in model.state_dict().items()]
    assert entries == case.record['state_dict']
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert frozen == case.record['not_trainable']
    assert criterion.weight_dict == case.record['weight_dict']


@needs_shared
def test_evaluation_equals_official(case: Case) -> None:
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
def test_training_equals_official(case: Case) -> None:
    model, criterion, _ = case.built
    model.train().zero_grad()
    outputs = model(case.samples, case.targets)
    losses = criterion(outputs, case.targets)
    assert set(losses) == set(case.record['losses'])
    for name, value in case.record['losses'].items():
        assert_close(losses[name], value, name)
    total = weighted_sum(losses, criterion.weight_dict)
    assert_close(total, case.record['total_loss'], 'total')
    total.backward()
    norms = {name: p.grad.norm().item() for name, p in model.named_parameters() if p.grad is not None}
    assert set(norms) == set(case.record['grad_l2_norms'])
    for name, value in case.record['grad_l2_norms'].items():
        assert_close(norms[name], value, f'gradient of {name}')
    if 'aux_pred_boxes' in case.arrays:
        every = case.record['npz']['aux_boxes_every_k_th_query']
        aux = torch.stack([p.boxes[:, ::every] for p in outputs['predictions'] if p.layer is not None])
        assert_close(aux, case.arrays['aux_pred_boxes'], 'boxes of earlier layers')


@needs_shared
def test_assignments_equal_official(case: Case) -> None:
    model, criterion, _ = case.built
    with torch.no_grad():
        predictions = model.train()(case.samples, case.targets)['predictions']
    by_call = sorted(predictions, key=lambda p: -1 if p.layer is None else p.layer)
    offsets = np.cumsum([0] + [len(target['labels']) for target in case.targets])
    for prediction, call in zip(by_call, case.record['matcher_calls']['calls'], strict=True):
        pairs = criterion.table['one2one'].matcher(prediction, case.targets)
        for image, (query, target) in enumerate(call):
            here = pairs.batch == image
            assert pairs.query[here].tolist() == query
            assert (pairs.target[here] - offsets[image]).tolist() == target


@pytest.mark.slow
@needs_shared
def test_optimizer_steps_equal_official(case: Case) -> None:
    recorded = case.record.get('optimizer_steps')
    if not recorded:
        pytest.skip('no optimizer steps were recorded for this case')
    model = case.built[0]
    case.fill(model)
    optimizer = build_optimizer(model, lr=1e-4, lr_backbone=1e-5, weight_decay=1e-4)
    assert [len(group['params']) for group in optimizer.param_groups] == recorded['group_sizes']
    for step in recorded['steps']:
        _, total = case.train_losses()
        assert_close(total, step['total'], 'total', rtol=1e-5)
        optimizer.zero_grad()
        total.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        assert_close(norm, step['grad_norm_before_clip'], 'gradient norm', rtol=1e-5)
        optimizer.step()
    assert_close(
        case.train_losses()[1], recorded['total_after_last_step'], 'total after the last step', rtol=1e-5
    )
    parameters = dict(model.named_parameters())
    for name, value in recorded['param_l2_after_last_step'].items():
        assert_close(parameters[name].norm(), value, name, rtol=1e-5)
    case.fill(model)


@pytest.mark.parametrize('system', FLAGS)
def test_recorded_numbers_equal_official(system: str) -> None:
    """A part of the same, from numbers that lie in this repository."""
    with float64():
        case = Case(Path(__file__).parent / f'recorded/{system}_r50_empty.json', FLAGS[system])
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
