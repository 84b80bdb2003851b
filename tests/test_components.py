"""Small shared pieces equal the official ones: encodings, boxes, focal loss, matching, masks at feature
resolution.
"""

import numpy as np
import pytest
import torch
from torch import Tensor

from models.heads import LogitBoxes, inverse_sigmoid
from models.position_encoding import PositionEmbeddingLearned, PositionEmbeddingSine
from models.structures import Prediction
from models.training.losses import FocalLoss, MatchedPredictions
from models.training.matcher import HungarianMatcher, OneToManyMatcher, focal_cost, match, softmax_cost
from tests import rule
from tests.shared_data import needs_shared, read_shared
from util.box_ops import box_cxcywh_to_xyxy, box_iou, generalized_box_iou
from util.nested_tensor import nested_tensor_from_tensor_list, resize_mask

RECORDED = read_shared('parity/detr/components.json')


def u(name: str, *shape: int) -> Tensor:
    return torch.from_numpy(rule.uniform(name, shape))


def boxes(name: str, *shape: int) -> Tensor:
    return torch.cat([(u(f'{name}c', *shape, 2) + 1) / 2, (u(f'{name}s', *shape, 2) + 1) / 4 + 0.01], dim=-1)


def padded_mask() -> Tensor:
    """Images of 5 x 7 and 6 x 4 cells."""
    return nested_tensor_from_tensor_list([torch.zeros(3, 5, 7), torch.zeros(3, 6, 4)]).mask


@needs_shared
def test_sine_encoding_equals_official() -> None:
    recorded = RECORDED['position_sine']
    encoding = PositionEmbeddingSine(128)(padded_mask())
    assert list(encoding.shape) == recorded['shape']
    assert encoding.double().sum().item() == pytest.approx(recorded['sum'], rel=1e-6)
    for place, value in recorded['values_[b,c,y,x]'].items():
        assert encoding[tuple(map(int, place.split(',')))].item() == pytest.approx(value, abs=1e-6)


@needs_shared
def test_learned_encoding_equals_official() -> None:
    encoding = rule.fill(PositionEmbeddingLearned(8).double())(padded_mask())
    np.testing.assert_allclose(
        encoding[0, :, 2, 5].detach(), RECORDED['position_learned']['values_at_[0,:,2,5]']
    )


def test_learned_encoding_says_when_the_map_is_too_large() -> None:
    with pytest.raises(ValueError, match='50 x 50'):
        PositionEmbeddingLearned(8)(torch.zeros(1, 51, 10, dtype=torch.bool))


@needs_shared
def test_box_functions_equal_official() -> None:
    recorded = RECORDED['boxes']
    first, second = (box_cxcywh_to_xyxy(boxes(name, num)) for name, num in (('b1', 6), ('b2', 4)))
    np.testing.assert_allclose(first, recorded['b1_xyxy'], atol=1e-12)
    iou, union = box_iou(first[:, None], second[None])
    np.testing.assert_allclose(iou, recorded['iou'], atol=1e-12)
    np.testing.assert_allclose(union, recorded['union'], atol=1e-12)
    np.testing.assert_allclose(
        generalized_box_iou(first[:, None], second[None]), recorded['giou'], atol=1e-12
    )


@needs_shared
def test_focal_loss_equals_official() -> None:
    """Each of 5 x 40 logits is a query with one class; official: mean over queries, sum over the rest."""
    logits = 3 * u('fl/logits', 5, 40)
    positive = (u('fl/targets', 5, 40) > 0.3).nonzero(as_tuple=True)
    num = len(positive[0])
    none = torch.zeros(num, dtype=torch.int64)
    index, boxes = (none, *positive), torch.zeros(1, 5, 40, 4)
    matched = MatchedPredictions(
        logits[None, ..., None], boxes, index, none, torch.zeros(num, 4), [num], [num]
    )
    recorded = RECORDED['sigmoid_focal_loss']
    for alpha, gamma, key in (
        (0.25, 2, 'alpha_.25_gamma_2'),
        (0.4, 1, 'alpha_.4_gamma_1'),
        (-1, 2, 'alpha_-1'),
    ):
        loss = FocalLoss(alpha, gamma)(matched) / 40 / 4
        assert loss.item() == pytest.approx(recorded[key], rel=1e-9)


def matcher_targets() -> dict[str, list[dict[str, Tensor]]]:
    b1, b2 = boxes('b1', 6), boxes('b2', 4)
    first = {'labels': torch.tensor([0, 3, 3]), 'boxes': b2[:3]}
    second = {'labels': torch.tensor([1, 2, 4, 0]), 'boxes': b2[[1, 0, 3, 2]]}
    empty = {'labels': torch.zeros(0, dtype=torch.int64), 'boxes': torch.zeros(0, 4, dtype=torch.float64)}
    many = {
        'labels': torch.tensor([0, 1, 2, 3, 4] * 3),
        'boxes': torch.cat([b1, 0.9 * b1.flip(0), 0.5 * b1[:3]]),
    }
    return {'A': [first, second], 'B': [first, empty], 'C': [many, second]}


@needs_shared
@pytest.mark.parametrize('name', ['detr_softmax_cost_1_5_2', 'conditional_detr_focal_cost_2_5_2'])
@pytest.mark.parametrize('case', ['A', 'B', 'C'])
def test_matcher_equals_official(name: str, case: str) -> None:
    costs = (1, 5, 2, softmax_cost) if name.startswith('detr') else (2, 5, 2, focal_cost)
    prediction = Prediction(2 * u('m/logits', 2, 12, 6)[None], boxes('m/', 2, 12)[None])
    targets = matcher_targets()[case]
    (pairs,) = match(HungarianMatcher(*costs), prediction, targets)
    offsets = [0, len(targets[0]['labels'])]
    for image, (query, target) in enumerate(RECORDED['matcher'][name][case]):
        here = pairs.batch == image
        assert pairs.query[here].tolist() == query
        assert (pairs.target[here] - offsets[image]).tolist() == target


@pytest.mark.parametrize('matcher', [HungarianMatcher(1, 5, 2), OneToManyMatcher(3)], ids=['one', 'many'])
def test_predictions_that_are_not_finite_get_pairs_like_others(
    matcher: HungarianMatcher | OneToManyMatcher,
) -> None:
    """Of the image without bad predictions the same pairs."""
    good = Prediction(torch.randn(1, 2, 12, 6), torch.rand(1, 2, 12, 4))
    bad = Prediction(good.logits, good.boxes.clone())
    bad.boxes[0, 1, :, 2] = float('nan')
    target = {'labels': torch.tensor([1]), 'boxes': torch.full((1, 4), 0.3)}
    (expected,), (found,) = (match(matcher, each, [target, target]) for each in (good, bad))
    assert found.query[found.batch == 0].tolist() == expected.query[expected.batch == 0].tolist()
    assert 1 in found.batch


@needs_shared
def test_batches_are_padded_as_official() -> None:
    recorded = read_shared('parity/transforms/transforms.json')['nested_tensor']
    images = [rule.image(p['name'], *p['hw']) for p in recorded['pictures']]
    batch = nested_tensor_from_tensor_list(images)
    assert list(batch.tensors.shape) == recorded['tensor_shape']
    assert batch.mask.flatten(1).sum(1).tolist() == recorded['mask_true_count']
    for size, masks in recorded['feature_masks_nearest_true_is_padding'].items():
        height, width = map(int, size.split('x'))
        assert resize_mask(batch.mask, (height, width)).int().tolist() == masks


def test_reference_points_are_added_in_logit_space() -> None:
    delta, point = torch.randn(5, 4), torch.rand(5, 2)
    expected = delta.clone()
    expected[:, :2] += inverse_sigmoid(point)
    torch.testing.assert_close(LogitBoxes().decode(delta, LogitBoxes().encode(point)), expected.sigmoid())
    torch.testing.assert_close(LogitBoxes().decode(delta), delta.sigmoid())
    assert inverse_sigmoid(torch.tensor([0.0, 1.0, 2.0])).isfinite().all()
