"""Masks of detections from RoI features (Co-DETR's ViT models) equal the official ones, train and detect."""

import json
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.ops import roi_align

from models import build_model
from models.postprocess import paste_masks, postprocess_batch
from models.refine_masks import MaskIoUHead, RefineMaskHead, boundary, refined, roi_features
from models.training.criterion import weighted_sum
from models.training.masks import MaskBranch, iou_loss, iou_targets, mask_targets, refine_loss
from models.weights.layouts import to_mmdetection, translate
from models.weights.load import load_checkpoint
from tests import rule
from tests.models import HEADS, SMALL, TRICKS, build, random_targets, train_steps, with_masks
from tests.parity import assert_close
from tests.runs import run
from tests.shared_data import SHARED, needs_shared
from util.config.settle import settle
from util.nested_tensor import NestedTensor


@needs_shared
def test_heads_targets_and_losses_equal_official() -> None:
    path = SHARED / 'parity/co_dino/mask_heads.json'
    record = json.loads(path.read_text())
    height, width = record['picture']
    heads = nn.ModuleDict(
        {'mask_head': RefineMaskHead(32, 6), 'mask_iou_head': MaskIoUHead(32, 6, 64)}
    ).double()
    assert list(heads.state_dict()) == [name for name, _ in record['state_dict']]
    rule.fill(heads)
    strides = [4, 8, 16, 32, 64]
    maps = [
        torch.from_numpy(
            rule.uniform(f'mask/feat{level}', (2, 32, -(-height // s), -(-width // s)))
        ).requires_grad_()
        for level, s in enumerate(strides)
    ]
    regions = [torch.tensor(boxes, dtype=torch.float64) for boxes in record['rois']]
    labels, boxes = (
        torch.tensor([label for labels in record['labels'] for label in labels]),
        torch.cat(regions),
    )
    masks = torch.zeros(len(labels), height, width)
    objects = [(number, box) for image in record['gt_boxes'] for number, box in enumerate(image)]
    for mask, (number, (x0, y0, x1, y1)) in zip(masks, objects, strict=True):
        mask[y0:y1, x0:x1] = 1
        if number % 2:
            mask[(3 * y0 + y1) // 4 : (y0 + 3 * y1) // 4, (3 * x0 + x1) // 4 : (x0 + 3 * x1) // 4] = 0
    image = torch.cat([torch.full((len(x), 1), float(i), dtype=torch.float64) for i, x in enumerate(regions)])
    features = roi_features(maps, strides, regions, 14, 56)
    logits = heads['mask_head'](features, maps[0], torch.cat([image, boxes], dim=1), labels)
    with np.load(path.with_suffix('.npz')) as arrays:
        assert_close(logits[0][:, None], arrays['pred_stage0'], 'stage 0')
        assert_close(logits[3][:, None, ::4, ::4], arrays['pred_stage3_every4'], 'stage 3')
        targets = mask_targets(masks, boxes)
        assert np.array_equal(targets[0].numpy(), arrays['targets14'])
    assert [x.sum().item() for x in targets] == [x['sum'] for x in record['targets']]
    loss = record['arguments']['mask_head']['loss_weight'] * refine_loss(logits, targets)
    assert_close(loss, record['loss_mask'], 'loss_mask')
    quality = heads['mask_iou_head'](features, logits[1], labels)
    assert_close(quality, record['mask_iou_pred'], 'IoU')
    wanted = iou_targets(logits[1].detach(), targets[1], masks, boxes)
    assert_close(wanted, record['mask_iou_targets'], 'IoU targets')
    iou = 6 * iou_loss(quality, wanted)
    assert_close(iou, record['loss_mask_iou'], 'loss_mask_iou')
    (loss + iou).backward()
    for name, parameter in heads.named_parameters():
        assert_close(parameter.grad.norm(), record['grad_norm'][name], name)
    norms = [0.0 if x.grad is None else x.grad.norm() for x in maps]
    assert_close(torch.tensor(norms, dtype=torch.float64), record['grad_norm_feats'], 'maps')


@pytest.mark.parametrize('pixels', ['no', 'few'])
def test_objects_of_no_or_few_pixels_have_finite_losses(pixels: str) -> None:
    """A crop can remove a whole mask, and a thin object is in no cell of the target."""
    model, criterion, _ = build(TRICKS | {'co_masks': True})
    images, targets = torch.randn(2, 3, 96, 96), with_masks(random_targets(2, 1), (96, 96))
    targets[0]['boxes'][:] = torch.tensor([0.5, 0.5, 1.0, 1.0])
    targets[0]['masks'].zero_()
    if pixels == 'few':
        targets[0]['masks'][:, 48] = 1
    for head in model.modules():
        if isinstance(head, RefineMaskHead):
            for layer in head.stage_instance_logits:
                nn.init.constant_(layer.bias, -50.0)
    losses = criterion(model.train()(images, targets), targets)
    weighted_sum(losses, criterion.weight_dict).backward()
    assert all(value.isfinite() for value in losses.values()), losses
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_iou_targets_without_pixels() -> None:
    """Regions without an object and without a prediction have no overlap, and the loss leaves them out."""
    masks, rois = torch.zeros(3, 100, 300), torch.tensor([[0.0, 0.0, 300.0, 100.0]]).repeat(3, 1)
    masks[1, 50] = 1
    masks[2, 20:60, 100:200] = 1
    targets = mask_targets(masks, rois)[1]
    logits = torch.full((3, 28, 28), -1.0)
    assert iou_targets(logits, targets, masks, rois).tolist() == [0, 0, 0] and not targets[1].any()
    logits[2] = torch.where(targets[2], 1.0, -1.0)
    found = iou_targets(logits, targets, masks, rois)
    assert found[:2].tolist() == [0, 0] and found[2] == pytest.approx(1)
    quality = torch.full((3,), 0.25, requires_grad=True)
    iou_loss(quality, found).backward()
    assert quality.grad.tolist() == pytest.approx([0, 0, -1.5])


def test_boundaries_have_the_official_widths() -> None:
    """Width 1 needs one neighbour of another value, width 2 three; outside the map is background."""
    mask = torch.zeros(1, 9, 9, dtype=torch.bool)
    mask[0, 4, 4] = True
    assert boundary(mask, 1).sum() == 9 and boundary(mask, 2).sum() == 1
    mask[0, 4, 3:6] = True
    assert boundary(mask, 2)[0, 4, 4] and not boundary(mask, 2)[0, 2, 1]
    full = torch.ones(1, 9, 9, dtype=torch.bool)
    assert boundary(full, 1)[0, 0, 4] and not boundary(full, 1)[0, 4, 4]


def test_finer_stages_redraw_boundaries_only() -> None:
    coarse = torch.full((1, 28, 28), -6.0)
    coarse[0, 7:21, 7:21] = 6.0
    finer = [
        torch.full((1, 14, 14), 0.0),
        coarse,
        torch.full((1, 56, 56), 6.0),
        torch.full((1, 112, 112), 6.0),
    ]
    merged = refined(finer)
    assert merged.shape == (1, 112, 112) and merged[0, 2, 2] < 0.1 and merged[0, 56, 56] > 0.9


def test_masks_are_pasted_into_their_boxes() -> None:
    masks = torch.ones(2, 28, 28)
    masks[1, :14] = 0
    drawn = paste_masks(masks, torch.tensor([[2.0, 3.0, 12.0, 9.0], [0.0, 0.0, 20.0, 10.0]]), 10, 20) >= 0.5
    assert drawn[0, 3:9, 2:12].all() and drawn[0].sum() == 60
    assert not drawn[1, :5].any() and drawn[1, 5:10].all()


KINDS = {
    'two stages': TRICKS,
    'co_dino': HEADS | {'dino': True, 'dn_number': 4, 'num_feature_levels': 5},
    'all': TRICKS | HEADS | {'use_ms_detr': True, 'hybrid_queries': 24, 'hybrid_k': 2, 'dn_number': 4},
    'vit': {
        'backbone': 'vit_mini',
        'dino': True,
        'num_feature_levels': 5,
        'drop_path_rate': 0.0,
        'backbone_stages': 4,
    },
}


@pytest.mark.parametrize(
    'kind',
    [
        pytest.param(k, marks=pytest.mark.slow if k in ('co_dino', 'vit') else pytest.mark.exhaustive)
        for k in KINDS
    ],
)
def test_masks_train_and_boxes_stay(kind: str) -> None:
    torch.manual_seed(0)
    flags = SMALL | KINDS[kind] | {'co_masks': True, 'dropout': 0.0}
    model, criterion, postprocessors = build_model(Namespace(**flags))
    images, targets = torch.randn(2, 3, 96, 96), with_masks(random_targets(2, 1), (96, 96))
    first, last = train_steps(model, criterion, images, targets, steps=10)
    assert last['loss_comask'] < 0.5 * first['loss_comask'] and 'loss_comask_iou' in last
    nothing = with_masks(random_targets(0, 0), (96, 96))
    empty = criterion(model(images, nothing), nothing)
    assert empty['loss_comask'] == 0 and empty['loss_comask'].requires_grad
    with torch.no_grad():
        outputs = model.eval()(images)
    plain = build_model(Namespace(**flags | {'co_masks': False}))[0]
    load_checkpoint(plain, model.state_dict())
    with torch.no_grad():
        boxes = plain.eval()(images)
    assert all(torch.equal(value, outputs[name]) for name, value in boxes.items())
    for result, size in masks_in_two_sizes(model, postprocessors, outputs):
        assert list(result['masks'].shape) == [len(result['scores']), 1, *size]
        assert (result['mask_scores'] <= result['scores']).all()


def masks_in_two_sizes(model: nn.Module, postprocessors: dict, outputs: dict) -> list[tuple[dict, list[int]]]:
    """Detections of two images of 96 pixels that were half and twice as large, with these sizes."""
    sizes, seen = torch.tensor([[48, 48], [192, 192]]), torch.tensor([96, 96])
    targets = [{'orig_size': size, 'size': seen} for size in sizes]
    samples = NestedTensor(torch.zeros(2, 3, 96, 96), torch.zeros(2, 96, 96, dtype=torch.bool))
    results = postprocess_batch(model, postprocessors, outputs, targets, samples)
    return list(zip(results, sizes.tolist(), strict=True))


def test_official_names_of_the_heads() -> None:
    flags = SMALL | HEADS | {'dino': True, 'num_feature_levels': 5, 'co_masks': True}
    model = build_model(Namespace(**flags))[0]
    theirs = to_mmdetection(model.state_dict())
    for name in ('mask_head.stages.1.fuse_conv.1.merge_conv.conv.bias', 'mask_iou_head.fc_mask_iou.weight'):
        assert name in theirs
    assert translate(theirs)[1].keys() == model.state_dict().keys()


@pytest.mark.slow
@pytest.mark.draws
def test_a_run_evaluates_masks_by_their_own_scores(tmp_path: Path) -> None:
    flags = """--dataset_file shapes --shapes_train 4 --shapes_val 2 --shapes_size 128 --img_size 128
        --max_size 128 --backbone resnet10 --backbone_weights none --backbone_norm batch --hidden_dim 32
        --nheads 4 --enc_layers 1 --dec_layers 2 --num_queries 10 --dim_feedforward 64 --dino
        --num_feature_levels 5 --batch_size 4 --num_workers 0 --epochs 1 --device cpu"""
    run(tmp_path / 'out', '--co_masks', '--worst_batch_first', flags=flags)
    record = json.loads((tmp_path / 'out/log.jsonl').read_text().splitlines()[-1])
    assert len(record['test_coco_eval_masks']) == 12 and 'train_loss_comask' in record
    assert (tmp_path / 'out/predictions.png').is_file()


@pytest.mark.parametrize(
    ('flags', 'message'),
    [({'masks': True, 'deformable': True}, 'give one of them'), ({}, '--co_masks is for Deformable DETR')],
)
def test_impossible_flags(flags: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settle(Namespace(**{'co_masks': True, 'backbone_weights': 'none'} | flags))


RCNN_MASKS = TRICKS | HEADS | {'co_rcnn_masks': True}


def test_the_mask_branch_of_mask_rcnn_equals_its_formula() -> None:
    """One loss over all pixels of the positives' own classes, with targets of RoIAlign."""
    torch.manual_seed(0)
    branch = MaskBranch(32, 6, [8, 16]).double()
    maps = [torch.randn(2, 32, 12, 12, dtype=torch.float64), torch.randn(2, 32, 6, 6, dtype=torch.float64)]
    regions = [
        torch.tensor([[8.0, 16.0, 64.0, 80.0]]).double(),
        torch.tensor([[0.0, 0.0, 90.0, 90.0], [5.5, 9.0, 40.0, 30.0]]).double(),
    ]
    labels = torch.tensor([4, 0, 2])
    masks = [torch.zeros(len(x), 96, 96, dtype=torch.uint8) for x in regions]
    masks[0][0, 16:48, 8:64] = 1  # the upper half of its region
    masks[1][0] = 1
    logits = branch(maps, regions, labels)
    wanted = torch.zeros(3, 28, 28, dtype=torch.float64)
    wanted[0, :14], wanted[1] = 1, 1
    each = torch.where(wanted > 0, -logits.sigmoid().log(), -(1 - logits.sigmoid()).log())
    assert_close(branch.loss(maps, regions, labels, masks), each.mean().detach(), 'loss')
    # A region alone: RoIAlign of 14 x 14, four convolutions, and a map for each class.
    features = roi_align(maps[0], [regions[0], regions[1][:0]], 14, 1 / 8, aligned=True)
    for convolution in branch.convs:
        features = convolution.conv(features).relu()
    assert_close(logits[0], branch.conv_logits(branch.upsample(features).relu())[0, 4].detach(), 'logits')
    assert list(branch.state_dict())[:2] == ['convs.0.conv.weight', 'convs.0.conv.bias']


@pytest.mark.slow
def test_roi_masks_train_and_the_rcnn_head_predicts_them() -> None:
    torch.manual_seed(0)
    flags = SMALL | RCNN_MASKS | {'dropout': 0.0}
    model, criterion, _ = build_model(Namespace(**flags))
    assert criterion.weight_dict['loss_rcnn_mask'] == 2 * flags['dec_layers']  # 12 with six layers
    images, targets = torch.randn(2, 3, 96, 96), with_masks(random_targets(2, 1), (96, 96))
    first, last = train_steps(model, criterion, images, targets, steps=10)
    assert last['loss_rcnn_mask'] < 0.7 * first['loss_rcnn_mask']
    nothing = with_masks(random_targets(0, 0), (96, 96))
    empty = criterion(model(images, nothing), nothing)
    assert empty['loss_rcnn_mask'] == 0 and empty['loss_rcnn_mask'].requires_grad
    # The decoder gives the same boxes with and without; the RoI head gives masks.
    detector, _, postprocessors = build_model(Namespace(**flags | {'eval_module': 'faster_rcnn'}))
    load_checkpoint(detector, model.state_dict())
    with torch.no_grad():
        outputs = detector.eval()(images)
    for result, size in masks_in_two_sizes(detector, postprocessors, outputs):
        assert list(result['masks'].shape) == [len(result['scores']), 1, *size] and len(result['scores'])
        assert torch.equal(result['mask_scores'], result['scores'])
    assert 'segm' not in build_model(Namespace(**flags))[2]
    theirs = to_mmdetection(model.state_dict())
    assert {'roi_head.0.mask_head.convs.3.conv.weight', 'roi_head.0.mask_head.upsample.bias'} < theirs.keys()
    assert translate(theirs)[1].keys() == model.state_dict().keys()
    with pytest.raises(ValueError, match='add it to --co_aux_heads'):
        settle(Namespace(**flags | {'co_aux_heads': ['atss']}))
