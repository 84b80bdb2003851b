"""Backbones: names, weights from files, what trains, and features of any timm network."""

import math
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torchvision.ops.misc import FrozenBatchNorm2d

import main
from datasets.class_map import ClassMap
from models import build_detector
from models.backbone import BACKBONES, build_backbone
from models.detector import load_detector
from tests.models import SMALL
from tests.runs import parse
from tests.shared_data import SHARED, needs_shared
from util.config.flags import FLAGS
from util.config.networks import KINDS, level_strides
from util.config.settle import settle
from util.errors import UserError
from util.nested_tensor import nested_tensor_from_tensor_list

LAST = range(4, 5)  # the map of the last stage alone


def features(backbone: torch.nn.Module, size: int = 64) -> torch.Tensor:
    with torch.no_grad():
        return backbone.eval()(nested_tensor_from_tensor_list([torch.randn(3, size, size)]))[-1].tensors


@pytest.mark.parametrize(
    ('name', 'dilation', 'stages', 'channels', 'cells'),
    [
        ('resnet18', False, 4, 512, 2),
        ('resnet34', False, 3, 256, 4),
        ('resnet50', True, 4, 2048, 4),
        ('resnet10', False, 2, 128, 8),
        ('mobilenet_v2', False, 4, 1280, 2),
        ('mobilenet_v2', False, 3, 96, 4),
    ],
)
def test_last_map(name: str, dilation: bool, stages: int, channels: int, cells: int) -> None:
    backbone = build_backbone(name, 'none', dilation, 'frozen', range(stages, stages + 1), train=True)
    assert features(backbone).shape == (1, channels, cells, cells)
    assert backbone.num_channels == [channels]


@pytest.mark.parametrize('name', ['resnet18', 'tf_efficientnet_lite0', 'convnext_atto', 'mambaout_femto'])
def test_networks_of_timm(name: str) -> None:
    pytest.importorskip('timm')
    backbone = build_backbone(f'timm/{name}', 'none', False, 'frozen', LAST, train=True)
    x = features(backbone, size=224)
    assert x.shape == (1, backbone.num_channels[0], 7, 7)


@pytest.mark.parametrize(
    ('name', 'reason'),
    [
        ('vit_tiny_patch16_224', r'strides \[16\], not \[32\]'),
        ('vit_small_patch14_dinov2', r'strides \[14\], not \[32\]'),
        ('vit_small_patch16_dinov3', r'strides \[16\], not \[32\]'),
        ('swin_tiny_patch4_window7_224', "height .* doesn't match"),
        ('swinv2_tiny_window8_256', "height .* doesn't match"),
        ('hiera_tiny_224', 'dimension'),
        ('hrnet_w18_small', 'dimension'),
    ],
)
def test_networks_of_timm_that_are_no_backbones(name: str, reason: str) -> None:
    """They are made for one size or one stride; told by what they do, not by their names."""
    pytest.importorskip('timm')
    with torch.device('meta'), pytest.raises(UserError, match=f'timm/{name} is no backbone .*{reason}'):
        build_backbone(f'timm/{name}', 'none', False, 'frozen', LAST, train=True)


def test_a_network_of_timm_that_cannot_dilate() -> None:
    pytest.importorskip('timm')
    with torch.device('meta'), pytest.raises(UserError, match='timm/vgg11 --backbone_stages 4 --dilation'):
        build_backbone('timm/vgg11', 'none', True, 'frozen', LAST, train=True)


def test_no_backbone_is_told_before_data_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip('timm')
    monkeypatch.setattr(main, 'build_datasets', None)
    with pytest.raises(UserError, match='timm/vit_tiny_patch16_224 is no backbone'):
        main.main(parse('', '--backbone', 'timm/vit_tiny_patch16_224'))


@pytest.mark.parametrize(
    'name',
    [
        'hf-hub:timm/resnet18',
        'hf_hub:timm/resnet18',
        'local-dir:.',
        'resnet18.x/../y',
        '/tmp',
        'resnet18.a:b',
    ],
)
@pytest.mark.parametrize('program', ['load_detector', 'main'])
def test_a_file_names_networks_of_the_registry_alone(
    name: str, program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other sources are refused without a look at them."""
    timm = pytest.importorskip('timm')
    monkeypatch.setattr(timm, 'create_model', None)
    args = SMALL | {'conditional': True, 'backbone': f'timm/{name}'}
    torch.save(
        {'args': args, 'model': {}, 'class_map': ClassMap.coco().to_dict()}, tmp_path / 'checkpoint.pth'
    )
    with pytest.raises(UserError, match='is not in the registry of timm'):
        if program == 'main':
            main.main(parse('', '--eval', '--resume', str(tmp_path / 'checkpoint.pth'), flags='--device cpu'))
        else:
            load_detector(weights=tmp_path / 'checkpoint.pth')


@pytest.mark.parametrize(
    ('name', 'channels'),
    [
        ('resnet18', [64, 128, 256, 512]),
        ('mobilenet_v2', [24, 32, 96, 1280]),
        ('timm/resnet18', [64, 128, 256, 512]),
        ('swin_tiny', [96, 192, 384, 768]),
    ],
)
def test_maps_of_several_stages(name: str, channels: list[int]) -> None:
    if name.startswith('timm/'):
        pytest.importorskip('timm')
    backbone = build_backbone(name, 'none', False, 'frozen', range(1, 5), train=True).eval()
    assert backbone.num_channels == channels
    with torch.no_grad():
        maps = backbone(nested_tensor_from_tensor_list([torch.randn(3, 64, 96), torch.randn(3, 64, 64)]))
    assert [x.tensors.shape[1:] for x in maps] == [
        (width, 64 // stride, 96 // stride) for width, stride in zip(channels, (4, 8, 16, 32), strict=True)
    ]
    assert [x.mask[1, 0].sum().item() for x in maps] == [8, 4, 2, 1], 'a third of the second image is padding'


def test_what_trains() -> None:
    names = {
        name.split('.')[0]
        for name, p in build_backbone('resnet18', 'none', False, 'frozen', LAST, True).body.named_parameters()
        if p.requires_grad
    }
    assert names == {'layer2', 'layer3', 'layer4'}
    frozen = build_backbone('resnet18', 'none', False, 'frozen', LAST, train=False)
    assert not any(p.requires_grad for p in frozen.parameters())
    scratch = build_backbone('resnet18', 'none', False, 'batch', LAST, train=True)
    assert all(p.requires_grad for p in scratch.parameters())
    assert not any(isinstance(module, FrozenBatchNorm2d) for module in scratch.modules())


@needs_shared
@pytest.mark.parametrize(
    ('name', 'file'),
    [
        ('resnet50', 'resnet50_augnet_selfsup_fp16.pth'),
        ('mobilenet_v2', 'mobilenet_v2_imagenet_features.pth'),
        ('timm/tf_efficientnet_lite0', 'tf_efficientnet_lite0_imagenet.pth'),
    ],
)
def test_weights_from_a_file(name: str, file: str) -> None:
    if name.startswith('timm/'):
        pytest.importorskip('timm')
    path = SHARED / 'weights' / file
    first = build_backbone(name, str(path), False, 'frozen', LAST, train=True)
    again = build_backbone(name, str(path), False, 'frozen', LAST, train=True)
    for (key, value), other in zip(
        first.body.state_dict().items(), again.body.state_dict().values(), strict=True
    ):
        assert torch.equal(value, other), key
    random = build_backbone(name, 'none', False, 'frozen', LAST, train=True)
    key = next(key for key, value in first.body.state_dict().items() if value.ndim == 4)
    assert not torch.equal(first.body.state_dict()[key], random.body.state_dict()[key])


def test_a_file_of_another_network_is_refused(tmp_path: Path) -> None:
    torch.save({'conv1.weight': torch.zeros(64, 3, 7, 7)}, tmp_path / 'other.pth')
    with pytest.raises(ValueError, match=r'does not fit resnet18: .* missing'):
        build_backbone('resnet18', str(tmp_path / 'other.pth'), False, 'frozen', LAST, train=True)


@pytest.mark.parametrize(
    ('name', 'levels'),
    [
        ('resnet10', 4),
        ('mobilenet_v2', 5),
        ('swin_tiny', 4),
        ('vit_mini', 5),
        ('vit_mini', 1),
        ('timm/resnet18', 4),
    ],
)
def test_levels_have_the_strides_that_settings_state(name: str, levels: int) -> None:
    """The table of `util.config.networks` is about these networks."""
    if name.startswith('timm/'):
        pytest.importorskip('timm')
    args = settle(
        Namespace(
            **SMALL | {'backbone': name, 'backbone_stages': 4, 'num_feature_levels': levels, 'dino': True}
        )
    )
    model, seen = build_detector(args, {'one2one': args.num_queries}).eval(), []
    model.transformer.encoder.register_forward_hook(lambda _, inputs, output: seen.extend(output.shapes))
    model(torch.zeros(1, 3, 192, 256))
    strides = level_strides(args)
    assert seen == [(math.ceil(192 / stride), math.ceil(256 / stride)) for stride in strides]


def test_every_beginning_of_a_name_is_in_both_tables() -> None:
    assert list(BACKBONES) == list(KINDS)
    assert all(name in FLAGS for kind in KINDS.values() for name in kind.supports)
    flags = {name for name, flag in FLAGS.items() if flag.some_backbones}
    assert flags == {name for kind in KINDS.values() for name in kind.supports} - {'use_checkpoint'}


class NoAnswer(Exception):
    """As the HTTP library of huggingface_hub raises it."""

    __module__ = 'httpx._exceptions'


@pytest.mark.parametrize(
    ('name', 'error'),
    [
        ('resnet50', UserError),
        ('timm/legacy_xception', UserError),
        ('timm/resnet18', OSError),
        ('timm/resnet18', NoAnswer),
    ],
)
def test_no_download_is_explained(
    name: str, error: type[Exception], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Our own, and that of huggingface_hub, which has most of timm's files."""

    def offline(*args: object, **kwargs: object) -> None:
        raise error('no route to host')

    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    place = 'util.download.fetch' if error is UserError else 'timm.create_model'
    if name.startswith('timm/'):
        pytest.importorskip('timm')
    monkeypatch.setattr(place, offline)
    with pytest.raises(UserError, match=r'no route to host.*--backbone_weights FILE, or none'):
        build_backbone(name, 'imagenet', False, 'frozen', LAST, train=True)


@pytest.mark.parametrize('norm', ['frozen', 'batch'])
@pytest.mark.parametrize('name', ['resnet18', 'mobilenet_v2'])
def test_recomputed_stages_give_the_same(name: str, norm: str) -> None:
    """Maps, gradients, and statistics of batch norms, which see the batch once."""
    results = []
    for recompute in (False, True):
        torch.manual_seed(0)
        backbone = build_backbone(name, 'none', False, norm, range(2, 5), True)
        for part in backbone.body.units():
            part.recompute = recompute
        maps = backbone.train()(nested_tensor_from_tensor_list(torch.randn(2, 3, 64, 96)))
        kept = count_kept(
            lambda backbone=backbone: backbone(nested_tensor_from_tensor_list(torch.randn(2, 3, 64, 96)))
        )
        sum(x.tensors.square().mean() for x in maps).backward()
        gradients = [p.grad for p in backbone.parameters() if p.grad is not None]
        results.append([kept, [x.tensors for x in maps], gradients, list(backbone.state_dict().values())])
    assert results[1][0] < results[0][0] / 2
    torch.testing.assert_close(results[1][1:], results[0][1:])
    assert all(x.momentum == 0.1 for x in backbone.modules() if isinstance(x, torch.nn.BatchNorm2d))


def count_kept(run: Callable[[], object]) -> int:
    """Numbers that autograd keeps of a forward pass."""
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (sizes.append(x.numel()), x)[1], lambda x: x):
        run()
    return sum(sizes)
