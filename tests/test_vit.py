"""ViT with its feature pyramid equals the official one, and trains in Co-DINO."""

import json
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from engine import build_optimizer
from main import get_args_parser
from models import build_model
from models.training.criterion import weighted_sum
from models.training.faster_rcnn import FasterRCNN
from models.vit import VIT_SIZES, VisionTransformer, ViTSize, build_feature_pyramid
from models.weights.backbones import load_backbone
from models.weights.layouts import to_mmdetection, translate
from models.weights.load import load_checkpoint
from tests import rule
from tests.models import HEADS, random_targets
from tests.parity import assert_close
from tests.shared_data import SHARED, needs_shared
from util.config.settle import settle
from util.nested_tensor import as_batch, nested_tensor_from_tensor_list

CASES = ('vit_sfp_small', 'vit_sfp_lsj_small')
MINI = {
    'backbone': 'vit_mini',
    'backbone_weights': 'none',
    'hidden_dim': 32,
    'nheads': 4,
    'enc_layers': 1,
    'dec_layers': 2,
    'dim_feedforward': 64,
    'num_queries': 12,
    'num_classes': 6,
    'num_feature_levels': 5,
    'dino': True,
    'drop_path_rate': 0.0,
}


def recorded(case: str) -> tuple[nn.ModuleDict, dict, dict]:
    """Our backbone and pyramid with the recorded weights, the record and its arrays."""
    path = SHARED / f'parity/co_dino/{case}.json'
    record = json.loads(path.read_text())
    flags = record['arguments']['backbone']
    grid = flags['img_size'] // 16 if flags['use_lsj'] else None
    size = ViTSize(
        flags['embed_dim'],
        flags['depth'],
        flags['num_heads'],
        flags['pretrain_img_size'] // 16,
        flags['window_size'],
        (1, 3),
        grid,
    )
    neck = build_feature_pyramid(flags['embed_dim'], record['arguments']['neck']['out_channels'])
    levels = nn.ModuleDict({f'p{index}': level for index, level in enumerate(neck, start=2)})
    model = nn.ModuleDict({'backbone': VisionTransformer(size), 'neck': levels}).double()
    with np.load(path.with_suffix('.npz')) as archive:
        return rule.fill(model), record, dict(archive)


@needs_shared
@pytest.mark.parametrize('case', CASES)
def test_maps_and_gradients_equal_official(case: str) -> None:
    model, record, arrays = recorded(case)
    names = [name for name, _ in record['state_dict'] if 'rope' not in name]
    assert list(model.state_dict()) == names
    for number in range(2):
        if (call := record.get(f'input{number}')) is None:
            continue
        images = torch.stack([rule.image(name, *call['size']) for name in call['names']])
        model.zero_grad()
        features = model['backbone'](images)['3']
        maps = [level(features) for level in model['neck'].values()]
        assert_close(features[:, ::4], arrays[f'backbone{number}'], 'backbone')
        assert_close(maps[3], arrays[f'p5_{number}'], 'p5')
        assert_close(maps[0][:, ::16], arrays[f'p2_{number}_every16th_channel'], 'p2')
        for x, expected in zip([features, *maps], call['backbone'] + call['outputs'], strict=True):
            assert list(x.shape) == expected['shape']
            assert_close(x.mean(), expected['mean'], 'mean')
            assert_close(x.flatten()[:6], expected['first'], 'first')
        weights = [
            rule.uniform(f'cot/{case}/{number}/{level}', tuple(x.shape)) for level, x in enumerate(maps)
        ]
        loss = sum((x * torch.from_numpy(weight)).mean() for x, weight in zip(maps, weights, strict=True))
        assert_close(loss, call['loss'], 'loss')
        loss.backward()
        for name, parameter in model.named_parameters():
            assert (parameter.grad is not None) == (name in call['grad_norm']), name
            if parameter.grad is not None:
                assert_close(parameter.grad.norm(), call['grad_norm'][name], name)


@needs_shared
def test_groups_of_learning_rates_equal_official() -> None:
    model, record, _ = recorded('vit_sfp_small')
    official = record['layer_decay']
    whole = nn.Module()
    whole.backbone, whole.neck = nn.ModuleList([nn.Module()]), model['neck']
    whole.backbone[0].body = model['backbone']
    optimizer = build_optimizer(
        whole, official['base_lr'], 0.0, official['weight_decay'], layer_decay=official['layer_decay_rate']
    )
    names = {id(p): name.replace('backbone.0.body', 'backbone') for name, p in whole.named_parameters()}
    ours = {
        (round(group['lr'], 12), group['weight_decay'], frozenset(names[id(p)] for p in group['params']))
        for group in optimizer.param_groups
    }
    theirs = {
        (round(group['lr'], 12), group['weight_decay'], frozenset(group['params']))
        for group in official['groups']
    }
    assert ours == theirs
    first, second = optimizer.param_groups[:2]
    assert first['lr'] == official['base_lr'] and second['lr'] == pytest.approx(0.8 * first['lr'])


def test_the_large_network_has_the_published_size() -> None:
    with torch.device('meta'):
        networks = {name: VisionTransformer(VIT_SIZES[name]) for name in ('vit_large', 'vit_large_lsj')}
    for network in networks.values():
        assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(304, abs=0.5)
    windows = [
        [i for i, block in enumerate(n.blocks) if block.attn.window_size is None] for n in networks.values()
    ]
    assert windows == [[3, 7, 11, 15, 19, 23], [2, 5, 8, 11, 14, 17, 20, 23]]
    with pytest.raises(ValueError, match='this ViT is for images of 1536 x 1536 pixels, not 512 x 512'):
        networks['vit_large_lsj'](torch.zeros(1, 3, 512, 512, device='meta'))


def test_batches_are_padded_to_whole_patches() -> None:
    batch = as_batch([torch.ones(3, 40, 70), torch.ones(3, 33, 33)], 32)
    assert batch.tensors.shape == (2, 3, 64, 96)
    plain = nested_tensor_from_tensor_list([torch.ones(3, 40, 70), torch.ones(3, 33, 33)])
    assert torch.equal(batch.tensors[..., :40, :70], plain.tensors) and not batch.tensors[..., 40:, :].any()
    assert torch.equal(batch.mask[..., :40, :70], plain.mask) and batch.mask[..., 40:, :].all()
    assert as_batch(plain) is plain


@pytest.mark.parametrize(
    'flags', [{}, {'num_feature_levels': 1, 'dino': False, 'with_box_refine': True}, {'use_checkpoint': True}]
)
def test_a_small_detector_trains(flags: dict) -> None:
    torch.manual_seed(0)
    model, criterion, _ = build_model(Namespace(**MINI | flags))
    targets = random_targets(3, 1)
    images = [torch.randn(3, 70, 90), torch.randn(3, 96, 64)]
    losses = criterion(model(images, targets), targets)
    weighted_sum(losses, criterion.weight_dict).backward()
    without = {name for name, p in model.named_parameters() if p.grad is None}
    assert without <= {'backbone.0.body.pos_embed'} or not without
    detections = model.eval()(images)
    assert detections['pred_boxes'].shape == (2, 12, 4)


def test_co_dino_with_its_own_heads_trains_and_keeps_its_names() -> None:
    flags = MINI | HEADS | {'dn_number': 8, 'co_rcnn_head': '4conv1fc', 'num_classes': 6}
    torch.manual_seed(0)
    model, criterion, _ = build_model(Namespace(**flags))
    targets = random_targets(2, 0)
    losses = criterion(model([torch.randn(3, 96, 96)] * 2, targets), targets)
    weighted_sum(losses, criterion.weight_dict).backward()
    head = model.query_sources['collaborative'].heads['faster_rcnn'].roi
    assert (
        all(layer.conv.weight.grad is not None for layer in head.shared_convs)
        and head.fc_reg.out_features == 4
    )
    theirs = to_mmdetection(model.state_dict())
    for name in (
        'neck.p2.11.weight',
        'neck.p6.7.weight',
        'backbone.blocks.3.attn.q_bias',
        'backbone.out_norm.weight',
        'roi_head.0.bbox_head.shared_convs.3.gn.bias',
    ):
        assert name in theirs
    tables = {
        'backbone.rope_win.freqs_cos': torch.ones(2),
        'backbone.blocks.0.attn.rope.freqs_sin': torch.ones(2),
    }
    layout, state = translate(theirs | tables)
    assert layout == 'mmdetection' and state.keys() == model.state_dict().keys()
    other = build_model(Namespace(**flags))[0]
    load_checkpoint(other, {'state_dict': theirs | tables, 'meta': {}})
    assert torch.equal(other.input_proj[4][7].weight, model.input_proj[4][7].weight)


def test_one_box_for_all_classes() -> None:
    """The head's boxes belong to the region whatever its class, in losses and detections."""
    torch.manual_seed(0)
    head = FasterRCNN(32, 5, [4, 8, 16, 32, 64, 128], '4conv1fc')
    maps = [torch.randn(1, 32, 64 // 2**level, 64 // 2**level) for level in range(6)]
    found = head.detect(maps, torch.tensor([[256.0, 256.0]]))[0]
    boxes = found['boxes'].unflatten(0, (-1, 5))
    assert torch.equal(boxes, boxes[:, :1].expand_as(boxes)) and found['labels'][:5].tolist() == [
        0,
        1,
        2,
        3,
        4,
    ]
    assert head.roi.stds == (0.05, 0.05, 0.1, 0.1)


def test_weights_of_other_patches_and_grids_fit(tmp_path: Path) -> None:
    network = VisionTransformer(VIT_SIZES['vit_mini'])
    state = {
        f'backbone.{name}': value for name, value in network.state_dict().items() if 'out_norm' not in name
    }
    state['backbone.patch_embed.proj.weight'] = torch.randn(128, 3, 14, 14)
    state['backbone.pos_embed'] = torch.randn(1, 1 + 7 * 7, 128)
    state |= {'backbone.rope_win.freqs_cos': torch.ones(3), 'head.weight': torch.ones(2, 2)}
    torch.save({'module': state}, tmp_path / 'eva.pth')
    other = VisionTransformer(VIT_SIZES['vit_mini'])
    load_backbone(other, str(tmp_path / 'eva.pth'), averaged=True)
    assert torch.equal(other.blocks[2].mlp.w3.weight, network.blocks[2].mlp.w3.weight)
    assert torch.equal(other.pos_embed[:, 0], state['backbone.pos_embed'][:, 0])
    kernel = F.interpolate(state['backbone.patch_embed.proj.weight'], size=16, mode='bicubic')
    assert torch.equal(other.patch_embed.proj.weight, kernel)
    del state['backbone.blocks.1.norm1.bias']
    torch.save(state, tmp_path / 'eva.pth')
    with pytest.raises(ValueError, match=r'1 of \d+ entries are missing.*blocks\.1\.norm1\.bias'):
        load_backbone(other, str(tmp_path / 'eva.pth'), averaged=True)


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        ('--backbone vit_large --dino --num_feature_levels 4', '--num_feature_levels 4 must be 5'),
        ('--backbone vit_large --dilation', '--dilation is not for --backbone vit_large'),
        ('--backbone vit_large --backbone_stages 3', '--backbone_stages 3 is not for --backbone vit_large'),
        ('--lr_layer_decay 0.8', '--lr_layer_decay 0.8 is not for --backbone'),
        ('--backbone vit_mini --warmup_start 2', '--warmup_start must be at most 1, not 2'),
        ('--backbone vit_mini --backbone_weights imagenet', 'have no direct URL'),
    ],
)
def test_impossible_flags(flags: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        args = settle(get_args_parser().parse_args(['--backbone_weights', 'none', *flags.split()]))
        with torch.device('meta'):
            build_model(args)
