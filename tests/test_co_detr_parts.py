"""The pieces of Co-DETR, each against recorded numbers of the official code, and what it starts with."""

import math
from argparse import Namespace

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.ops import batched_nms

from models import build_model
from models.position_encoding import PositionEmbeddingSine, sine_embedding
from models.postprocess import SoftNMSPostProcess, soft_suppression
from models.training.atss import ANCHOR_STRIDES, assign_adaptively
from models.training.collaborative import MIN_QUERIES, choose_samples
from models.training.dense_heads import (
    BACKGROUND,
    assign_by_iou,
    clip_boxes,
    decode_boxes,
    encode_boxes,
    level_anchors,
    sample,
    undo_rounding,
    valid_anchors,
)
from models.training.faster_rcnn import RATIOS, SCALES, RoIHead
from models.training.losses import FocalLoss, MatchedPredictions, QualityFocalLoss
from models.weights.layouts import from_mmdetection
from tests import rule
from tests.models import HEADS, TRICKS
from tests.parity import assert_close, float64
from tests.shared_data import needs_shared, read_shared
from util.box_ops import box_cxcywh_to_xyxy, box_iou, box_xyxy_to_cxcywh

PARTS = read_shared('parity/co_deformable_detr/components.json')


@pytest.fixture(autouse=True)
def precision() -> None:
    with float64():
        yield


def unit(name: str, *shape: int) -> Tensor:
    """Numbers of the rule in [0, 2)."""
    return torch.from_numpy(rule.uniform(f'comp/{name}', shape)) + 1


def boxes_of(name: str, num: int, place: float, least: float, more: float) -> Tensor:
    u = unit(name, num, 4)
    return torch.cat([place * u[:, :2], place * u[:, :2] + least + more * u[:, 2:]], dim=1)


@needs_shared
@pytest.mark.parametrize('name', ['rpn', 'atss'])
def test_anchors_equal_official(name: str) -> None:
    recorded = PARTS[f'anchors_{name}']
    scales, ratios = (SCALES, RATIOS) if name == 'rpn' else ([ANCHOR_STRIDES], [1.0])
    for index, stride in enumerate(recorded['strides']):
        (base,) = level_anchors([torch.empty(1, 1, 1, 1)], [stride], scales, ratios)
        assert_close(base, recorded['base'][index], 'base', rtol=1e-7)
        (grid,) = level_anchors([torch.empty(1, 1, 2, 3)], [stride], scales, ratios)
        assert_close(grid.flatten(), np.ravel(recorded['grid_2x3'][index]), 'grid', rtol=1e-7)
        level, cells = torch.empty(1, 1, 4, 5), torch.zeros(20, dtype=torch.int64)
        cells[valid_anchors([18.0, 13.0], [stride], [level])[0]] = 1
        assert cells.view(4, 5).tolist() == recorded['owned_cells_of_4x5_for_13x18'][index]
        every = torch.arange(20 * len(base)).view(4, 5, -1)[cells.view(4, 5) > 0].flatten()
        _, second = valid_anchors([18.0, 13.0], [stride] * 2, [level] * 2, len(base))
        assert torch.equal(second, 20 * len(base) + every)


@needs_shared
def test_box_code_equals_official() -> None:
    rois = boxes_of('rois', 6, 50, 5, 50)
    boxes = rois + 2 * (unit('gt', 6, 4) - 1)
    deltas = (unit('deltas', 6, 4) - 1) * torch.tensor([3.0, 3, 30, 30])
    for row in PARTS['box_coder']['rows']:
        decoded = decode_boxes(rois, deltas, row['stds'])
        assert_close(encode_boxes(rois, boxes, row['stds']), row['encode'], 'encode', rtol=1e-10)
        assert_close(decoded, row['decode'], 'decode', rtol=1e-10)
        clipped = clip_boxes(decoded, torch.tensor([120.0, 90.0]))
        assert_close(clipped, row['decode_clipped_to_h90_w120'], 'clipped', rtol=1e-10)


@needs_shared
def test_assignment_by_overlap_equals_official() -> None:
    boxes = boxes_of('boxes', 40, 40, 8, 20)
    objects = boxes[[3, 17, 29]] + 4 * (unit('shift', 3, 4) - 1)
    for name, thresholds in (('rpn', (0.7, 0.3, True)), ('rcnn', (0.5, 0.5, False))):
        assert (assign_by_iou(boxes, objects, *thresholds) + 1).tolist() == PARTS['max_iou'][name]


@needs_shared
def test_adaptive_assignment_equals_official() -> None:
    recorded = PARTS['atss']
    maps = [torch.empty(1, 1, *size) for size in recorded['maps']]
    anchors = level_anchors(maps, recorded['strides'], [ANCHOR_STRIDES], [1.0])
    found = assign_adaptively(anchors, torch.tensor(recorded['gt']))
    places = (found != BACKGROUND).nonzero()[:, 0]
    assert places.tolist() == recorded['positive_anchor_index']
    assert found[places].tolist() == recorded['target']


def test_adaptive_thresholds_are_the_mean_plus_the_sample_deviation() -> None:
    torch.manual_seed(0)
    maps = [torch.empty(1, 1, 16, 16), torch.empty(1, 1, 8, 8)]
    levels = level_anchors(maps, [8, 16], [ANCHOR_STRIDES], [1.0])
    anchors, start = torch.cat(levels), torch.tensor([0, len(levels[0])])
    for corner, side in zip(20 + 40 * torch.rand(300, 2), 20 + 40 * torch.rand(300, 2), strict=True):
        box = torch.cat([corner, corner + side])[None]
        far = [((x[:, :2] + x[:, 2:] - box[:, :2] - box[:, 2:]) / 2).norm(dim=1) for x in levels]
        candidates = torch.cat([x.argsort()[:9] + first for x, first in zip(far, start, strict=True)])
        overlap, _ = box_iou(anchors[candidates], box)
        center = (anchors[candidates, :2] + anchors[candidates, 2:]) / 2
        inside = ((center > box[:, :2] + 0.01) & (center < box[:, 2:] - 0.01)).all(1)
        expected = candidates[inside & (overlap >= overlap.mean() + np.std(overlap.tolist(), ddof=1))]
        assert set((assign_adaptively(levels, box) >= 0).nonzero()[:, 0].tolist()) == set(expected.tolist())


def boxes_with_iou(quality: Tensor) -> tuple[Tensor, Tensor]:
    """Pairs of boxes cxcywh whose IoU is `quality` (above 0)."""
    target = torch.tensor([[0.5, 0.5, 0.4, 0.4]]).repeat(len(quality), 1)
    boxes = target.clone()
    boxes[:, 2] *= quality
    return boxes, target


@needs_shared
def test_losses_equal_official() -> None:
    recorded = PARTS['losses']
    logits, labels = 3 * (unit('logits', 5, 4) - 1), torch.tensor(recorded['labels'])
    query = (labels != recorded['background']).nonzero()[:, 0]
    boxes = torch.full((1, 1, 5, 4), 0.5)
    quality = torch.tensor(recorded['quality'])[query]
    far = quality == 0
    boxes[0, 0, query], target = boxes_with_iou(quality.clamp(min=0.1))
    target[far, 0] = 5.0
    place = torch.zeros_like(query)
    matched = MatchedPredictions(
        logits[None, None], boxes, (place, place, query), labels[query], target, [len(query)], [len(query)]
    )
    assert_close(FocalLoss()(matched)[0] / 3, recorded['focal'], 'focal', rtol=1e-6)
    assert_close(QualityFocalLoss()(matched)[0] / 3, recorded['quality_focal'], 'quality', rtol=1e-6)


@needs_shared
def test_suppression_equals_official() -> None:
    recorded = PARTS['nms']
    boxes = boxes_of('nms', 60, 15, 10, 5)
    scores = unit('nms_scores', 60) / 2
    labels = (unit('nms_labels', 60) / 2 * 3).long()
    hard = batched_nms(boxes, scores, labels, 0.5)
    assert hard.tolist() == recorded['nms_05']['keep']
    scores = torch.where(scores > 0.5, 1.01 * scores, 0.01 * scores)
    overlap, _ = box_iou(boxes[:, None], boxes[None])
    factor = torch.where((overlap >= 0.4) & (labels[:, None] == labels), 1 - overlap, 1)
    order, kept = soft_suppression(scores.numpy(), factor.numpy(), 1e-3)
    assert order.tolist() == recorded['soft_nms_04']['keep']
    assert_close(kept, recorded['soft_nms_04']['scores'], 'scores', rtol=1e-9)


def test_soft_suppression_of_16_bit_outputs() -> None:
    """Scores and overlaps are compared in 32 bit."""
    torch.manual_seed(0)
    outputs = {'pred_logits': torch.randn(1, 20, 5), 'pred_boxes': 0.2 + 0.5 * torch.rand(1, 20, 4)}
    outputs = {name: value.bfloat16() for name, value in outputs.items()}
    (found,) = SoftNMSPostProcess(10, 0.5, 20)(outputs, torch.tensor([[100, 200]]))
    assert found['scores'].dtype == torch.float32 and len(found['boxes']) == 10
    assert found['scores'].diff().max() <= 0


@needs_shared
def test_encodings_equal_official() -> None:
    mask = torch.zeros(1, 5, 7, dtype=torch.bool)
    mask[:, 4:] = mask[:, :, 5:] = True
    for name, options in (
        ('co_deformable', {'offset': -0.5}),
        ('co_dino', {'temperature': 20}),
    ):
        recorded = PARTS[f'sine_{name}']
        found = PositionEmbeddingSine(128, **options)(mask)[0, recorded['channels']]
        assert_close(found, recorded['values_float32'], name, atol=1e-5)
    logits = 2 * (unit('coords', 1, 3, 4) - 1)
    found = sine_embedding(logits.sigmoid(), 128)[0, :, ::37]
    assert_close(found, PARTS['proposal_embedding']['every_37th'], 'proposals', atol=1e-6)
    boxes = unit('refs', 1, 3, 4) / 2
    found = sine_embedding(boxes[..., [1, 0, 2, 3]], 128)[0, :, ::37]
    assert_close(found, PARTS['dino_embedding']['every_37th'], 'DINO', atol=1e-6)


@needs_shared
def test_roi_features_equal_official() -> None:
    recorded = PARTS['roi']
    maps = [
        torch.from_numpy(
            rule.uniform(f'comp/map{level}', (1, 2, math.ceil(96 / stride), math.ceil(128 / stride)))
        )
        for level, stride in enumerate(recorded['strides'])
    ]
    rois = torch.tensor(recorded['rois'])[:, 1:]
    found, _, _ = RoIHead(2, 3, recorded['strides'])(maps, [rois])
    assert_close(found[:, 0, 3], recorded['features_channel0_row3'], 'features', rtol=1e-9)


def test_boxes_of_annotations_survive_normalising() -> None:
    """Multiples of 1/8 and 1/24 of a pixel, divided by an image's size and multiplied by it again."""
    torch.manual_seed(0)
    for dtype, close in ((torch.float32, 2e-4), (torch.float64, 1e-8)):
        start = torch.randint(0, 700 * 8, (1000, 2)).to(dtype) / 8
        eighths = torch.cat([start, start + torch.randint(1, 600 * 8, (1000, 2)) / 8], dim=1)
        size = torch.tensor([1333.0, 1299, 1333, 1299], dtype=dtype)

        def there_and_back(boxes: Tensor, size: Tensor = size) -> Tensor:
            return undo_rounding(box_cxcywh_to_xyxy(box_xyxy_to_cxcywh(boxes) / size) * size)

        assert torch.equal(there_and_back(eighths), eighths)
        torch.testing.assert_close(there_and_back(eighths / 3), eighths / 3, rtol=0, atol=close)


def test_samples_become_queries_positives_first() -> None:
    torch.manual_seed(0)
    target = torch.full((2, 40), BACKGROUND)
    target[0, [3, 7, 30]] = torch.tensor([1, 0, 1])
    chosen = choose_samples(target, 300)
    assert chosen.shape == (2, MIN_QUERIES) and chosen[0, :3].tolist() == [3, 7, 30]
    assert (target.gather(1, chosen)[0, 3:] == BACKGROUND).all()
    assert all(len(set(row)) == MIN_QUERIES for row in chosen.tolist()), 'no place twice'
    target[1] = 2
    chosen = choose_samples(target, 12)
    assert chosen.shape == (2, 12) and (target.gather(1, chosen)[1] == 2).all()
    assert choose_samples(target[:, :4], 300).shape == (2, 4), 'no more queries than places'


def test_draws_of_samples_are_the_official_ones() -> None:
    """A permutation of positives, then one of negatives, each only where some are left out."""
    assigned = torch.randint(-2, 3, (2, 60))
    positives, negatives = (
        (found.nonzero()[:, 0]) for found in (assigned[0] >= 0, assigned[0] == BACKGROUND)
    )
    torch.manual_seed(0)
    expected = [index[torch.randperm(len(index))[:5]].sort().values for index in (positives, negatives)]
    after = torch.get_rng_state()
    torch.manual_seed(0)
    found = sample(assigned[0], 10, 0.5)
    assert all(map(torch.equal, found, expected)) and torch.equal(torch.get_rng_state(), after)
    target = assigned.clamp(min=BACKGROUND)
    target[1, 6:] = BACKGROUND
    target[1, :6] = 1
    many, few, rest = target[0].ne(BACKGROUND).nonzero()[:, 0], torch.arange(6), torch.arange(6, 60)
    torch.manual_seed(1)
    rows = [many[torch.randperm(len(many))[:12]], torch.cat([few, rest[torch.randperm(54)[:6]]])]
    after = torch.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(choose_samples(target, 12), torch.stack(rows))
    assert torch.equal(torch.get_rng_state(), after)


INITIAL = {
    'co_deformable_detr': TRICKS | HEADS,
    'co_dino': HEADS | {'dino': True, 'num_feature_levels': 5, 'dn_number': 100},
}


@pytest.mark.slow
@needs_shared
@pytest.mark.parametrize('system', INITIAL)
def test_initial_values_equal_official(system: str) -> None:
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    record = read_shared(f'parity/{system}/initial_values.json')
    model, _, _ = build_model(Namespace(**INITIAL[system], num_classes=80, backbone_weights='none'))
    state = model.state_dict()
    expected = {name: torch.tensor(0.0) for name in record['parameters']}
    renamed = dict(zip(record['parameters'], from_mmdetection(expected), strict=True))
    for name, (kind, *numbers) in record['parameters'].items():
        found = state[renamed[name]].double()
        if kind in ('const', 'scalar'):
            assert_close(found, torch.full_like(found, numbers[0]), name)
            continue
        if found.numel() < 3:  # uniform (Xavier), too few for statistics
            assert found.abs().max() < math.sqrt(2), name
            continue
        mean, std, low, high = numbers
        spread = 5 * std / math.sqrt(found.numel())
        assert abs(found.mean() - mean) < 2 * spread + 1e-6, name
        assert abs(found.std() - std) < max(0.2 * std if found.numel() < 3000 else 0.05 * std, 2 * spread), (
            name
        )
        assert found.min() > 1.6 * low and found.max() < 1.6 * high, name
    bias = state['transformer.encoder.layers.0.self_attn.sampling_offsets.bias'][:8]
    assert_close(bias, next(iter(record['sampling_offsets_bias_first8'].values())), 'offsets')
