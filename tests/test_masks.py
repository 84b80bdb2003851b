"""DETR's masks equal the official ones, learn, and go with every family and scheme."""

import json
import re
from argparse import Namespace
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from unittest import mock

import PIL.Image
import pytest
import torch
import torch.nn.functional as F
from pycocotools import mask as coco_mask
from torch import Tensor, nn

from datasets.augmentations import build_augmentation
from datasets.coco_eval import decode_masks, encode_masks
from datasets.shapes import ShapesDetection, export_shapes
from engine import build_optimizer, evaluate
from models import build_model, postprocess
from models.detector import Detector, load_detector
from models.training.criterion import weighted_sum
from models.weights.load import load_checkpoint
from models.weights.read import read_checkpoint
from tests import rule
from tests.models import (
    HEADS,
    MIXED,
    SMALL,
    TRICKS,
    LargestTensor,
    random_targets,
    train_steps,
    with_masks,
)
from tests.parity import (
    Case,
    assert_close,
    assignments,
    check_coefficients,
    check_losses,
    check_norms,
    check_pairs,
    float64,
)
from tests.runs import load, run
from tests.shared_data import SHARED, needs_shared
from tools import predict
from tools.convert_checkpoint import convert
from util.config.settle import settle
from util.nested_tensor import collate_fn

MASKS = ('bbox_attention.', 'mask_head.')


def official(name: str) -> str:
    return name if name.startswith(MASKS) else f'detr.{name}'


class MaskCase(Case):
    images_key = 'pictures'

    @cached_property
    def args(self) -> Namespace:
        return Namespace(**self.record['args'] | {'backbone_weights': 'none'})

    @torch.no_grad()
    def fill(self, model: nn.Module) -> None:
        for name, tensor in model.state_dict(keep_vars=True).items():
            tensor.copy_(torch.from_numpy(rule.parameter(self.salt + official(name), tuple(tensor.shape))))
        for step in self.record['rule']['after_fill']:
            model.get_parameter(step['parameter'].removeprefix('detr.')).mul_(step['multiply_in_place_by'])

    @property
    def targets(self) -> list[dict[str, Tensor]]:
        targets = super().targets
        for index, (target, image) in enumerate(zip(targets, self.images, strict=True)):
            height, width = image.shape[1:]
            packed = torch.from_numpy(self.arrays[f'target_masks_{index}_packed'])
            bits = packed[:, None] >> torch.arange(7, -1, -1, dtype=torch.uint8) & 1
            count = len(target['labels'])
            target['masks'] = bits.flatten()[: count * height * width].view(count, height, width)
        return targets


@pytest.fixture(scope='module')
def case() -> Iterator[MaskCase]:
    with float64():
        yield MaskCase(SHARED / 'parity/detr/r50_masks.json')


@needs_shared
def test_masks_and_detections_equal_official(case: MaskCase) -> None:
    model, _, postprocessors = case.built
    entries = [[official(name), list(tensor.shape)] for name, tensor in model.state_dict().items()]
    assert entries == case.record['state_dict']
    with torch.no_grad():
        outputs = model.eval()(case.samples)
    every = case.record['npz']['masks_every_k_th_query']
    assert_close(outputs['pred_masks'][:, ::every], case.arrays['pred_masks'], 'masks')
    assert_close(
        outputs['pred_masks'].flatten(2).norm(dim=-1), case.arrays['pred_masks_l2_per_query'], 'norms'
    )
    assert_close(outputs['pred_boxes'], case.arrays['pred_boxes'], 'boxes')
    sizes = torch.tensor(case.record['orig_sizes_hw'])
    results = postprocessors['bbox'](outputs, sizes)
    inputs = torch.tensor([image.shape[1:] for image in case.images])
    results = postprocessors['segm'](results, outputs, sizes, inputs)
    for result, shape, areas in zip(
        results, case.record['segm_mask_shape'], case.record['segm_mask_area_per_query'], strict=True
    ):
        assert list(result['masks'].shape) == shape and result['masks'].dtype == torch.uint8
        assert result['masks'].flatten(1).sum(1).tolist() == areas


@pytest.mark.slow
@needs_shared
def test_losses_gradients_and_steps_equal_official(case: MaskCase, exhaustive: bool) -> None:
    """The first step, and the losses after it; with --exhaustive all recorded steps."""
    model, criterion, _ = case.built
    check_coefficients(criterion, case.record['weight_dict'])
    total = check_losses(case.first_pass.losses, criterion.weight_dict, case.record, 'total_loss')
    norms = {official(name): norm for name, norm in case.first_pass.norms.items()}
    check_norms(norms, case.record['grad_l2_norms'])
    steps = case.record['optimizer_steps']
    optimizer = build_optimizer(model, 1e-4, 1e-5, 1e-4)
    assert [len(group['params']) for group in optimizer.param_groups] == steps['group_sizes']
    for index, step in enumerate(steps['steps']):
        if index:
            losses = criterion(model.train()(case.samples, case.targets), case.targets)
            total = weighted_sum(losses, criterion.weight_dict)
        assert_close(total, step['total'], 'total', rtol=1e-5)
        if index and not exhaustive:
            break
        if index:
            optimizer.zero_grad()
            total.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
    case.fill(model)


@needs_shared
def test_assignments_equal_official(case: MaskCase) -> None:
    _, criterion, _ = case.built
    *earlier, last = assignments(criterion, 'one2one', case.outputs['predictions'], case.targets)
    for pairs, call in zip([last, *earlier], case.record['matcher_calls']['calls'], strict=True):
        check_pairs(pairs, call, case.targets)


KINDS = {
    'detr': {},
    'conditional': {'conditional': True, 'hybrid_queries': 24, 'hybrid_k': 2},
    'one level': {'num_feature_levels': 1, 'with_box_refine': True},
    'hybrid': TRICKS | {'hybrid_queries': 24, 'hybrid_k': 2},
    'mixed': TRICKS | MIXED | {'use_aux_ffn': True},
    'co_deformable': TRICKS | HEADS,
    'co_dino': HEADS | {'dino': True, 'dn_number': 4},
    'all': TRICKS | MIXED | HEADS | {'hybrid_queries': 24, 'hybrid_k': 2, 'dn_number': 4, 'group_detr': 2},
}


@pytest.mark.parametrize(
    'kind',
    [
        pytest.param(kind, marks=pytest.mark.slow if kind == 'all' else pytest.mark.exhaustive)
        for kind in KINDS
    ],
)
def test_masks_train_with_every_family_and_scheme(kind: str) -> None:
    """12 steps lower the loss of the masks; boxes of the trained model do not depend on its mask heads."""
    torch.manual_seed(0)
    flags = SMALL | KINDS[kind] | {'masks': True, 'dropout': 0.0}
    model, criterion, postprocessors = build_model(Namespace(**flags))
    images, targets = torch.randn(2, 3, 96, 96), with_masks(random_targets(2, 1), (96, 96))
    first, last = train_steps(model, criterion, images, targets, steps=12, max_norm=0.1)
    assert last['loss_dice'] < first['loss_dice']
    with torch.no_grad():
        outputs = model.eval()(images)
    plain = build_model(Namespace(**flags | {'masks': False}))[0]
    load_checkpoint(plain, model.state_dict())
    with torch.no_grad():
        boxes = plain.eval()(images)
    assert all(torch.equal(boxes[name], outputs[name]) for name in ('pred_logits', 'pred_boxes'))
    sizes = torch.tensor([[48, 80], [100, 40]])
    results = postprocessors['bbox'](outputs, sizes)
    for result, size in zip(
        postprocessors['segm'](results, outputs, sizes, torch.tensor([[96, 96]] * 2)),
        sizes.tolist(),
        strict=True,
    ):
        assert list(result['masks'].shape) == [len(result['scores']), 1, *size] and 'query' not in result


DATA = """--dataset_file shapes --shapes_train 12 --shapes_val 4 --shapes_size 64 --img_size 64 --max_size 64
    --backbone resnet10 --backbone_weights none --backbone_norm batch --hidden_dim 32 --nheads 4
    --enc_layers 1 --dec_layers 2 --dim_feedforward 64 --num_queries 10 --conditional --batch_size 4
    --num_workers 0 --epochs 1 --device cpu --lr 1e-3 --lr_backbone 1e-3"""


@pytest.mark.slow
@pytest.mark.draws
def test_a_run_trains_evaluates_draws_and_predicts_masks(tmp_path: Path) -> None:
    run(tmp_path / 'boxes', flags=DATA)
    file = str(tmp_path / 'boxes/checkpoint.pth')
    with pytest.raises(ValueError, match='--frozen_weights trains the heads of --masks alone'):
        run(tmp_path / 'none', '--frozen_weights', file, flags=DATA)
    run(tmp_path / 'masks', '--masks', '--frozen_weights', file, '--worst_batch_first', flags=DATA)
    before, after = load(tmp_path / 'boxes')['model'], load(tmp_path / 'masks')['model']
    kept = {name for name in before.keys() & after.keys() if not re.search('running|tracked', name)}
    assert kept and all(torch.equal(before[name], after[name]) for name in kept)
    assert any(name.startswith('mask_head.') for name in after)
    with pytest.raises(ValueError, match='must hold the whole detector of boxes, but query_embed'):
        run(tmp_path / 'none', '--masks', '--frozen_weights', file, '--num_queries', '11', flags=DATA)
    record = json.loads((tmp_path / 'masks/log.jsonl').read_text().splitlines()[-1])
    assert len(record['test_coco_eval_masks']) == 12 and 'train_loss_dice' in record
    assert 'test_segm_AP' in (tmp_path / 'masks/metrics.csv').read_text().splitlines()[0]
    evaluated = (
        '--dataset_file shapes --shapes_val 4 --shapes_size 64 --img_size 64 --device cpu --num_workers 0'
    )
    masks = str(tmp_path / 'masks/checkpoint.pth')
    run(tmp_path / 'eval', '--eval', '--resume', masks, flags=evaluated)
    found = json.loads((tmp_path / 'eval/eval.json').read_text())
    assert found['test_coco_eval_masks'] == record['test_coco_eval_masks']
    convert(masks, tmp_path / 'stripped.pth', stripped=True, to='ours')
    run(tmp_path / 'eval', '--eval', '--resume', str(tmp_path / 'stripped.pth'), flags=evaluated)
    assert (
        json.loads((tmp_path / 'eval/eval.json').read_text())['test_coco_eval_masks']
        == record['test_coco_eval_masks']
    )
    image = tmp_path / 'image.png'
    PIL.Image.fromarray(ShapesDetection(1, image_size=80)[0][0].permute(1, 2, 0).numpy()[:60]).save(image)
    words = [
        '--checkpoint',
        masks,
        '--source',
        str(image),
        '--output_dir',
        str(tmp_path / 'out'),
        '--device',
        'cpu',
    ]
    predict.main(predict.get_args_parser().parse_args(words))
    rows = json.loads((tmp_path / 'out/predictions.json').read_text())
    assert coco_mask.decode(rows[0]['segmentation']).shape == tuple(rows[0]['segmentation']['size'])
    objects = load_detector(weights=masks)(image, score_threshold=0.0)
    assert objects[0]['mask'].shape == tuple(rows[0]['segmentation']['size'])
    run(tmp_path / 'tuned', '--masks', '--pretrained', file, '--aug', 'lsj', '--img_size', '64', flags=DATA)


@pytest.mark.slow
def test_masks_need_segmentations(tmp_path: Path) -> None:
    for split in ('train', 'val'):
        export_shapes(tmp_path, ShapesDetection(4, split, image_size=64))
    path = tmp_path / 'annotations/instances_train2017.json'
    data = json.loads(path.read_text())
    del data['annotations'][0]['segmentation']
    path.write_text(json.dumps(data))
    flags = DATA.replace('--dataset_file shapes', f'--coco_path {tmp_path}')
    with pytest.raises(ValueError, match='segmentation'):
        run(tmp_path / 'out', '--masks', flags=flags)


def test_panoptic_files_give_boxes_and_masks_of_things(tmp_path: Path) -> None:
    """Their 250 classes are COCO's ids and, above them, stuff, which is not detected."""
    model = build_model(Namespace(**SMALL | {'masks': True, 'num_classes': 250}))[0]
    nn.init.zeros_(model.class_embed.weight)
    nn.init.zeros_(model.class_embed.bias)
    model.class_embed.bias.data[[17, 200]] = torch.tensor([9.0, 8.0])
    args = {name: value for name, value in SMALL.items() if name != 'num_classes'} | {
        'masks': True,
        'img_size': 64,
    }
    state = {official(name): value for name, value in model.state_dict().items()}
    torch.save({'model': state, 'args': Namespace(**args)}, tmp_path / 'panoptic.pth')
    detector = load_detector(weights=tmp_path / 'panoptic.pth')
    assert detector.class_map.num_classes == 250 and detector.class_map.names[200] is None
    found = detector(torch.randint(0, 256, (3, 48, 64), dtype=torch.uint8))
    assert {each['name'] for each in found} == {'cat'} and found[0]['mask'].shape == (48, 64)
    for split in ('train', 'val'):
        export_shapes(tmp_path, ShapesDetection(2, split, image_size=64))
    for split in ('train', 'val'):
        path = tmp_path / f'annotations/instances_{split}2017.json'
        data = json.loads(path.read_text())
        data['categories'] = [{'id': 17, 'name': 'cat'}]
        for annotation in data['annotations']:
            annotation['category_id'] = 17
        path.write_text(json.dumps(data))
    flags = f'--coco_path {tmp_path} --img_size 64 --device cpu --num_workers 0'
    run(tmp_path / 'eval', '--eval', '--resume', str(tmp_path / 'panoptic.pth'), flags=flags)
    assert 'test_coco_eval_masks' in json.loads((tmp_path / 'eval/eval.json').read_text())


def test_official_files_wrap_the_detector(tmp_path: Path) -> None:
    flags = SMALL | {'masks': True}
    model = build_model(Namespace(**flags))[0]
    torch.save({'model': model.state_dict()}, tmp_path / 'ours.pth')
    convert(str(tmp_path / 'ours.pth'), tmp_path / 'theirs.pth', stripped=False, to='official')
    state = read_checkpoint(tmp_path / 'theirs.pth')['model']
    assert all(name.startswith(('detr.', *MASKS)) for name in state)
    other = build_model(Namespace(**flags))[0]
    load_checkpoint(other, tmp_path / 'theirs.pth')
    assert all(torch.equal(x, model.state_dict()[name]) for name, x in other.state_dict().items())
    boxes = build_model(Namespace(**SMALL))[0]
    load_checkpoint(boxes, tmp_path / 'theirs.pth')  # without the masks
    with pytest.raises(ValueError, match=r'missing: \d+, such as bbox_attention'):
        load_checkpoint(other, boxes.state_dict())
    assert 'mask_head.lay1.weight' in load_checkpoint(other, boxes.state_dict(), resize=True).reinitialised


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        ({'backbone': 'vit_mini', 'dino': True, 'num_feature_levels': 5}, 'vit_mini has one'),
        (TRICKS | HEADS | {'eval_module': 'atss'}, 'leave --eval_module atss out'),
    ],
)
def test_impossible_masks_are_refused(flags: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settle(Namespace(**{'masks': True, 'backbone_weights': 'none'} | flags))


def all_at_once(masks: Tensor, size: list[int], seen: list[int], canvas: tuple[int, int]) -> Tensor:
    """DETR's masks [N, 1, H, W] uint8 as the official program makes them."""
    x = F.interpolate(masks[:, None], size=canvas, mode='bilinear', align_corners=False)
    seen_part = (x[..., : seen[0], : seen[1]].sigmoid() > 0.5).float()
    return F.interpolate(seen_part, size=size, mode='nearest').byte()


@pytest.mark.parametrize('kind', ['queries', 'regions'])
def test_masks_are_made_a_few_at_a_time(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits as all at once, and no tensor as large as these; run lengths if they are asked for."""
    torch.manual_seed(0)
    number, size, seen, canvas = 40, [150, 201], [61, 83], (64, 96)
    boxes = torch.rand(number, 4) * 60 + torch.tensor([0, 0, 60, 60])
    one = {'boxes': boxes, 'scores': torch.rand(number), 'labels': torch.arange(number) % 6}
    low = torch.randn(number, 16, 24)
    if kind == 'queries':
        make, query = postprocess.MaskPostProcess(), torch.randperm(number)
        expected = all_at_once(low[query], size, seen, canvas)
        one, outputs = one | {'query': query}, {'pred_masks': low[None]}
    else:
        make, quality = postprocess.RegionMaskPostProcess(), torch.rand(number)
        expected = (postprocess.paste_masks(low.sigmoid(), boxes, *size) >= 0.5)[:, None].byte()
        outputs = {'region_masks': [(low.sigmoid(), quality)]}
    arguments = outputs, torch.tensor([size]), torch.tensor([seen]), canvas
    pixels = 2 * size[0] * size[1]
    monkeypatch.setattr(postprocess, 'PIXELS_AT_A_TIME', pixels)
    with LargestTensor() as largest:
        (encoded,) = make([one], *arguments, encode_masks)
    assert largest.bytes <= 2 * low.element_size() * pixels, 'a grid has two numbers a pixel'
    (plain,) = make([one], *arguments)
    assert torch.equal(plain.pop('masks'), expected) and 'segmentation' not in plain
    assert torch.equal(torch.stack([*decode_masks(encoded.pop('segmentation'))]), expected[:, 0])
    assert encoded.keys() == plain.keys() and all(
        torch.equal(value, plain[key]) for key, value in encoded.items()
    )
    nothing = {key: value[:0] for key, value in one.items()}
    if kind == 'regions':
        outputs['region_masks'] = [(low[:0], quality[:0])]
    assert make([nothing], *arguments)[0]['masks'].shape == (0, 1, *size)
    assert make([nothing], *arguments, encode_masks)[0]['segmentation'] == []


def test_masks_of_a_photograph_do_not_fill_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In evaluation and in predict, from small network inputs: a mask of the photograph at a time."""
    torch.manual_seed(0)
    model, _, postprocessors = build_model(Namespace(**SMALL | {'masks': True, 'num_queries': 20}))
    image, seen = torch.randint(0, 256, (3, 600, 800), dtype=torch.uint8), []
    class_map = ShapesDetection(1).class_map
    args = Namespace(img_size=48, max_size=64)
    sample = build_augmentation(args).transforms('val')(
        image, {'orig_size': torch.tensor([600, 800]), 'image_id': torch.tensor(7)}
    )
    evaluator = mock.Mock(update=seen.append)
    monkeypatch.setattr(postprocess, 'PIXELS_AT_A_TIME', 600 * 800)
    with LargestTensor() as largest:
        evaluate(model, postprocessors, [collate_fn([sample])], evaluator)
    number = torch.get_default_dtype().itemsize
    assert largest.bytes <= 2 * number * 600 * 800, 'twenty at once take ten times as much'
    detector = Detector(model, postprocessors, class_map, args)
    masks = detector.detect(image)['masks']
    assert encode_masks(masks) == seen[0][7]['segmentation'] and len(masks) == 20
    monkeypatch.setattr(predict, 'load_from_flags', lambda args: detector)
    predict.write_png(image, tmp_path / '7.png')
    words = [
        '--model',
        'x',
        '--source',
        str(tmp_path / '7.png'),
        '--output_dir',
        str(tmp_path / 'out'),
        '--score_thr',
        '0',
    ]
    with LargestTensor() as largest:
        predict.main(predict.get_args_parser().parse_args(words))
    assert largest.bytes <= 3 * number * 600 * 800, 'the drawing'
    rows = json.loads((tmp_path / 'out/predictions.json').read_text())
    assert [row['segmentation'] for row in rows] == seen[0][7]['segmentation']
