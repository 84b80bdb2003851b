"""Swin equals the official detection backbone, whatever the size of the image; its weights come from official files."""

import json
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from main import get_args_parser, main
from models import build_model
from models.backbone import build_backbone
from models.swin import (
    SWIN_SIZES,
    Block,
    FeedForward,
    SwinSize,
    SwinTransformer,
    WindowAttention,
)
from models.weights.backbones import load_backbone, resize_table
from models.weights.layouts import translate
from tests import rule
from tests.models import TWO_STAGE
from tests.parity import assert_close, float64
from tests.shared_data import SHARED, needs_shared, read_shared
from util.config.settle import settle
from util.errors import UserError

RECORD = read_shared('parity/h_deformable_detr/swin_features.json')
NAMES = {
    'tiny_w7': 'swin_tiny',
    'small_w7': 'swin_small',
    'base_w12': 'swin_base_window12',
    'large_w7': 'swin_large',
    'large_w12': 'swin_large_window12',
}
SMALL = SwinSize(16, (2, 2, 2, 2), (1, 2, 4, 8), 5)


@needs_shared
@pytest.mark.parametrize(
    'variant',
    [pytest.param(name, marks=() if name == 'tiny_w7' else pytest.mark.exhaustive) for name in NAMES],
)
def test_features_equal_official(variant: str) -> None:
    case = RECORD['variants'][variant]
    with np.load(SHARED / 'parity/h_deformable_detr/swin_features.npz') as archive:
        arrays = {name: value for name, value in archive.items() if name.startswith(variant)}
    with float64():
        model = rule.fill(SwinTransformer(SWIN_SIZES[NAMES[variant]], range(1, 5)), 'swin/').eval()
        assert sum(p.numel() for p in model.parameters()) == case['n_parameters']
        for number, image in enumerate(case['images']):
            pixels = rule.image(image['name'], image['height'], image['width'])
            with torch.no_grad():
                maps = model(pixels[None])
            for index, level in enumerate(image['levels']):
                found = maps[str(index + 1)]
                assert list(found.shape) == level['shape']
                key = f'{variant}_{number}_level{index}'
                flat = found.flatten()[:: level['stride_of_flat']]
                assert_close(flat, arrays[key], key, rtol=1e-9)


@needs_shared
def test_bias_tables_are_resized_as_official() -> None:
    with float64():
        table = torch.from_numpy(rule.parameter('swin/table', (169, 3)))
        with np.load(SHARED / 'parity/h_deformable_detr/swin_features.npz') as archive:
            assert_close(resize_table(table, 529), archive['bias_table_169_to_529'], 'table')


@needs_shared
def test_drop_path_rates_are_the_official_ones() -> None:
    for name, rate, key in (
        ('swin_tiny', 0.2, 'rate0.2_depths2262'),
        ('swin_small', 0.5, 'rate0.5_depths22182'),
    ):
        model = SwinTransformer(SWIN_SIZES[name], range(2, 5), rate)
        rates = [block.drop_path.p for stage in model.layers for block in stage.blocks]
        np.testing.assert_allclose(rates, RECORD['drop_path_schedule'][key], rtol=1e-6)


@needs_shared
@pytest.mark.parametrize(
    ('case', 'stages'),
    [pytest.param('swin_tiny', range(2, 5), marks=pytest.mark.slow), ('swin_window12_small', range(1, 5))],
)
def test_maps_and_gradients_equal_those_of_co_detr(case: str, stages: range) -> None:
    folder = SHARED / 'parity/co_deformable_detr'
    record = json.loads((folder / f'{case}.json').read_text())
    sizes = (record['arguments'][key] for key in ('embed_dim', 'depths', 'num_heads', 'window_size'))
    with float64(), np.load(folder / f'{case}.npz') as arrays:
        model = rule.fill(SwinTransformer(SwinSize(*sizes), stages, drop_path_rate=0.0))
        assert [[name, list(x.shape)] for name, x in model.state_dict().items()] == record['state_dict']
        for number in range(2):
            recorded = record[f'input{number}']
            images = torch.stack([rule.image(name, *recorded['size']) for name in recorded['names']])
            maps = list(model.train()(images).values())
            for x, expected in zip(maps, recorded['outputs'], strict=True):
                assert list(x.shape) == expected['shape']
                for key, found in (('mean', x.mean()), ('abs_mean', x.abs().mean())):
                    assert_close(found, expected[key], key, rtol=1e-9, atol=1e-12)
                assert_close(x.flatten()[:6], expected['first'], 'first', rtol=1e-9)
                assert_close(x.flatten()[-3:], expected['last'], 'last', rtol=1e-9)
            stride = maps[-1].shape[1] // arrays[f'out{number}_last'].shape[1]
            assert_close(maps[-1][:, ::stride], arrays[f'out{number}_last'], 'last map', rtol=1e-9)
            weights = [rule.uniform(f'cot/{case}/{number}/{i}', tuple(x.shape)) for i, x in enumerate(maps)]
            loss = sum((x * torch.from_numpy(w)).mean() for x, w in zip(maps, weights, strict=True))
            assert_close(loss, recorded['loss'], 'loss', rtol=1e-9, atol=1e-12)
            model.zero_grad()
            loss.backward()
            assert set(recorded['grad_norm']) == {name for name, _ in model.named_parameters()}
            for name, parameter in model.named_parameters():
                expected = recorded['grad_norm'][name]
                assert_close(parameter.grad.norm(), expected, name, rtol=1e-8)


def test_the_shift_stays_on_where_one_window_covers_the_map() -> None:
    """The first token then attends to what comes before the seam alone, which an unshifted block does not have."""
    for shift, seam in ((0, 5), (2, 2)):
        attention = WindowAttention(16, 2, 5, shift)
        x = torch.randn(1, 5, 5, 16, requires_grad=True)
        attention(x)[0, 0, 0].sum().backward()
        reached = x.grad[0].abs().sum(-1) > 1e-9
        expected = torch.zeros(5, 5, dtype=torch.bool)
        expected[:seam, :seam] = True
        assert torch.equal(reached, expected)


def test_paths_are_dropped_for_whole_images_in_training_only() -> None:
    block = Block(16, WindowAttention(16, 1, 5, 0), FeedForward(16), drop_path=0.5)
    nn.init.zeros_(block.mlp.fc2.weight)
    nn.init.zeros_(block.mlp.fc2.bias)
    x = torch.randn(64, 5, 5, 16)
    with torch.no_grad():
        branch = block.eval()(x) - x
        found = block.train()(x) - x
    kept = found.flatten(1).abs().sum(1) > 0
    assert 16 < kept.sum() < 48
    torch.testing.assert_close(found[kept], 2 * branch[kept], rtol=1e-4, atol=1e-5)


def test_recomputed_blocks_give_the_same_gradients() -> None:
    """Also where paths are dropped: the same ones both times."""
    images, gradients = torch.randn(2, 3, 50, 70), []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = SwinTransformer(SMALL, range(2, 5), 0.5)
        for block in model.units():
            block.recompute = recompute
        sum(x.square().mean() for x in model(images).values()).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for first, second in zip(*gradients, strict=True):
        torch.testing.assert_close(first, second)


def official_file(model: SwinTransformer) -> dict[str, Tensor]:
    """Its weights as the classifier's authors save them: masks, a final norm and a head, no norms of maps."""
    state = {name: x for name, x in model.state_dict().items() if not name.startswith('norm')}
    state['layers.0.blocks.1.attn_mask'] = torch.zeros(4, 9, 9)
    return state | {'norm.weight': torch.ones(128), 'head.weight': torch.ones(10, 128)}


@pytest.mark.parametrize('wrap', ['model', 'module.', 'state_dict', 'MoBY', 'bare'])
def test_official_files_of_another_window_are_read(wrap: str, tmp_path: Path) -> None:
    theirs = SwinTransformer(SwinSize(16, (2, 2, 2, 2), (1, 2, 4, 8), 3), range(1, 5))
    state = official_file(theirs)
    if wrap == 'module.':
        state = {f'module.{name}': x for name, x in state.items()}
    if wrap == 'MoBY':
        others = {'projector.weight': torch.ones(1), 'encoder_k.norm.weight': torch.ones(1)}
        state = {f'encoder.{name}': x for name, x in state.items()} | others
    key = {'state_dict': 'state_dict', 'bare': None}.get(wrap, 'model')
    torch.save({key: state} if key else state, tmp_path / 'official.pth')
    ours = SwinTransformer(SMALL, range(2, 5))
    load_backbone(ours, str(tmp_path / 'official.pth'))
    expected = theirs.state_dict()
    for name, x in ours.state_dict().items():
        if name.endswith('bias_table'):
            torch.testing.assert_close(x, resize_table(expected[name], 81))
        elif not name.endswith('relative_position_index'):
            torch.testing.assert_close(x, expected[name])


def test_files_of_other_networks_are_refused_by_name(tmp_path: Path) -> None:
    model = SwinTransformer(SMALL, range(2, 5))
    before = {name: x.clone() for name, x in model.state_dict().items()}
    complete, path = official_file(model), tmp_path / 'other.pth'
    lacking = {name: x for name, x in complete.items() if 'layers.3.blocks.1.mlp' not in name}
    wider = SwinTransformer(SwinSize(32, (2, 2, 2, 2), (2, 4, 8, 16), 5), range(2, 5))
    for state in (lacking, official_file(wider)):
        torch.save({'model': {name: x + 1 for name, x in state.items()}}, path)
        with pytest.raises(ValueError, match=r'--backbone_weights .*other\.pth does not fit SwinTransformer'):
            load_backbone(model, str(path))
    with pytest.raises(ValueError, match='--backbone_weights: no checkpoint at nowhere'):
        load_backbone(model, 'nowhere.pth')
    for name, x in model.state_dict().items():
        assert torch.equal(x, before[name])


def build_small(
    monkeypatch: pytest.MonkeyPatch,
    weights: str = 'none',
    train: bool = True,
) -> nn.Module:
    small = replace(SMALL, weights=SWIN_SIZES['swin_tiny'].weights)
    monkeypatch.setitem(SWIN_SIZES, 'swin_tiny', small)
    return build_backbone('swin_tiny', weights, False, 'frozen', range(2, 5), train)


def test_imagenet_weights_are_fetched_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """By the main process, into torch.hub's folder, from the official address."""
    fetched = []

    def fetch(url: str, path: Path, *args: object) -> None:
        fetched.append(url)
        torch.save({'model': official_file(SwinTransformer(SMALL, range(1, 5)))}, path)

    monkeypatch.setattr('util.download.fetch', fetch)
    monkeypatch.setattr('torch.hub.get_dir', lambda: str(tmp_path))
    monkeypatch.setattr('models.backbone.is_main_process', lambda: False)
    build_small(monkeypatch, 'imagenet')
    assert not fetched
    monkeypatch.setattr('models.backbone.is_main_process', lambda: True)
    first, again = (build_small(monkeypatch, 'imagenet') for _ in range(2))
    assert torch.equal(first.body.patch_embed.proj.weight, again.body.patch_embed.proj.weight)
    folder = 'https://github.com/SwinTransformer/storage/releases/download/v1.0.0'
    assert fetched == [f'{folder}/swin_tiny_patch4_window7_224.pth']


def test_no_download_is_explained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def offline(*args: object, **kwargs: object) -> None:
        raise OSError('no route to host')

    monkeypatch.setattr('urllib.request.OpenerDirector.open', offline)
    monkeypatch.setattr('torch.hub.get_dir', lambda: str(tmp_path))
    with pytest.raises(ValueError, match=r'--backbone_weights: https://.*no route to host.*pass its path'):
        build_small(monkeypatch, 'imagenet')


def test_what_swin_does_not_have_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for flags in ({'dilation': True}, {'backbone_norm': 'batch'}):
        with pytest.raises(UserError, match=f'--{next(iter(flags))}.* is not for --backbone swin_tiny'):
            settle(Namespace(backbone='swin_tiny', **flags))
    assert all(p.requires_grad for p in build_small(monkeypatch).parameters())
    assert not any(p.requires_grad for p in build_small(monkeypatch, train=False).parameters())


@pytest.mark.parametrize('family', [{}, {'conditional': True}, TWO_STAGE])
@pytest.mark.parametrize('num_stages', [3, 4])
def test_flags_choose_swin_in_every_family(
    monkeypatch: pytest.MonkeyPatch, family: dict, num_stages: int
) -> None:
    """Every parameter gets a gradient: stages that are not read are not built."""
    monkeypatch.setitem(SWIN_SIZES, 'swin_tiny', SMALL)
    flags = {
        'backbone': 'swin_tiny',
        'backbone_weights': 'none',
        'backbone_stages': num_stages,
        'drop_path_rate': 0.4,
        'use_checkpoint': True,
        'hidden_dim': 32,
        'enc_layers': 1,
        'dec_layers': 2,
        'num_queries': 8,
    }
    model, criterion, _ = build_model(Namespace(**flags | family))
    body = model.backbone[0].body
    assert all(block.recompute for block in body.units())
    assert body.layers[-1].blocks[-1].drop_path.p == pytest.approx(0.4 if num_stages == 4 else 0.4 * 5 / 7)
    targets = [{'labels': torch.tensor([1]), 'boxes': torch.tensor([[0.5, 0.5, 0.3, 0.3]])}]
    losses = criterion(model.train()(torch.randn(1, 3, 90, 70), targets), targets)
    sum(losses[name] * factor for name, factor in criterion.weight_dict.items() if name in losses).backward()
    assert not [name for name, p in model.backbone.named_parameters() if p.grad is None]


@pytest.mark.parametrize(('backbone', 'warned'), [('swin_tiny', False), ('resnet10', True)])
def test_only_networks_with_frozen_statistics_are_warned_about(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, backbone: str, warned: bool
) -> None:
    monkeypatch.setitem(SWIN_SIZES, 'swin_tiny', SMALL)
    flags = (
        '--dataset_file shapes --shapes_train 2 --shapes_val 1 --shapes_size 32 --img_size 32 --num_workers 0 --hidden_dim 32 '
        '--enc_layers 1 --dec_layers 1 --epochs 1 --device cpu --backbone_weights none --backbone'
    )
    main(get_args_parser().parse_args([*flags.split(), backbone]))
    assert ('with its norms frozen' in capsys.readouterr().out) == warned


def test_detrex_checkpoints_name_swin_without_the_joiner() -> None:
    names = (
        'norm2.bias',
        'layers.2.blocks.5.attn.relative_position_index',
        'layers.0.downsample.norm.weight',
    )
    state = {f'backbone.{name}': torch.ones(1) for name in names}
    layout, state = translate(state | {'transformer.level_embeds': torch.ones(4, 256)})
    assert layout == 'detrex' and {f'backbone.0.body.{name}' for name in names} < set(state)


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        ({'backbone': 'resnet18', 'drop_path_rate': 0.1}, '--drop_path_rate 0.1 is not for'),
        ({'backbone': 'swin_tiny', 'drop_path_rate': 1.0}, 'less than 1'),
        ({'backbone': 'swin_huge'}, "unknown backbone 'swin_huge': choose .*swin_large_window12"),
    ],
)
def test_impossible_flags_are_refused(flags: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_model(Namespace(backbone_weights='none', **flags))


@pytest.mark.skipif(not hasattr(torch.compiler, 'is_exporting'), reason='takes minutes before PyTorch 2.7')
def test_an_exported_program_takes_other_sizes() -> None:
    """Other numbers of windows, one window only, sides of every remainder, another number of images."""
    torch.manual_seed(0)
    model = SwinTransformer(replace(SMALL, depths=(2, 1)), range(1, 3)).eval()
    free = torch.export.Dim.DYNAMIC
    with torch.no_grad():
        program = torch.export.export(
            model, (torch.rand(2, 3, 64, 80),), dynamic_shapes=({0: free, 2: free, 3: free},)
        ).module(check_guards=False)
        for size in ((1, 3, 64, 80), (2, 3, 93, 118), (3, 3, 19, 41)):
            images = torch.rand(size)
            for theirs, ours in zip(program(images).values(), model(images).values(), strict=True):
                torch.testing.assert_close(theirs, ours)
