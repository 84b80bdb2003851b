"""Flags that change a network's numbers and no shape of its weights are compared with those in the file."""

from argparse import Namespace
from pathlib import Path

import pytest
import torch
from torch import nn

from models import build_model
from models.detector import load_detector
from models.weights.load import load_checkpoint
from models.weights.records import extract_flags
from tests.models import SMALL, TRICKS
from tests.runs import load, run
from util.command_line import float_range
from util.config.declare import DETECTION, NETWORK, Flag
from util.config.flags import FLAGS
from util.config.recorded import NetworkFlags, adopt, settle_recorded

# Values that differ while all shapes are equal, and flags that both models have.
SILENT = {
    'dilation': (
        {'dilation': True},
        {'backbone': 'resnet50', 'backbone_stages': 4, 'enc_layers': 1, 'dec_layers': 1},
    ),
    'nheads': ({'nheads': 8}, {}),
    'pe_temperature': ({'pe_temperature': 20.0}, {'conditional': True}),
    'position_embedding_scale': ({'position_embedding_scale': 3.0}, {}),
    'enc_n_points': (
        {'nheads': 2, 'enc_n_points': 8, 'dec_n_points': 8},
        {'deformable': True, 'enc_layers': 1, 'dec_layers': 2},
    ),
    'with_box_refine': ({'with_box_refine': True}, {'deformable': True, 'enc_layers': 1, 'dec_layers': 2}),
}


def build(flags: dict) -> nn.Module:
    torch.manual_seed(0)
    return build_model(Namespace(**SMALL | flags))[0]


def official(flags: dict) -> Namespace:
    """Flags as an official program keeps them: what it has no flag for is missing."""
    named = SMALL | flags
    return Namespace(
        **{'focal_alpha': 0.25} if named.pop('conditional', False) else {},
        **{'num_feature_levels': 4} if named.pop('deformable', False) else {},
        **{name: value for name, value in named.items() if name != 'num_classes'},
    )


@pytest.mark.parametrize('written', ['ours', 'official'])
@pytest.mark.parametrize('flag', SILENT)
def test_another_value_is_refused_with_both(flag: str, written: str) -> None:
    change, common = SILENT[flag]
    plain, other = build(common), build(common | change)
    shapes = [{name: x.shape for name, x in model.state_dict().items()} for model in (plain, other)]
    assert shapes[0] == shapes[1], 'no shape tells'
    for model, theirs, ours in ((plain, common | change, common), (other, common, common | change)):
        args = official(theirs) if written == 'official' else vars(settle_recorded(SMALL | theirs))
        checkpoint = {'model': build(theirs).state_dict(), 'args': args}
        values = [getattr(settle_recorded(SMALL | given), flag) for given in (theirs, ours)]
        there, here = [{True: 'on', False: 'off'}.get(x, x) if isinstance(x, bool) else x for x in values]
        before = {name: x.clone() for name, x in model.state_dict().items()}
        with pytest.raises(ValueError, match=f'--{flag} {there} there, {here} here'):
            load_checkpoint(model, checkpoint)
        assert all(torch.equal(before[name], x) for name, x in model.state_dict().items())
        report = load_checkpoint(model, checkpoint, resize=True)
        assert 'warning: the weights were trained with other flags' in str(report)
        assert report.differing[flag] == tuple(values)


def test_every_flag_is_compared_or_has_a_reason() -> None:
    """The compared ones are those that change evaluated numbers; the rest only train, detect, or show in
    names.
    """
    compared = {name for flags in ({'dino': True}, {}) for name in NetworkFlags.of(settle_recorded(flags))}
    assert compared >= {
        *SILENT,
        'dec_n_points',
        'pre_norm',
        'position_embedding',
        'finest_stride',
        'dino',
        'family',
    }
    assert not compared & {'dropout', 'topk_eval', 'num_queries', 'use_checkpoint', 'backbone_weights'}


def test_heads_of_layers_tell_box_refinement_where_no_flag_does() -> None:
    plain, refine = (build({'deformable': True, 'with_box_refine': on}) for on in (False, True))
    with pytest.raises(ValueError, match=r'trained without --with_box_refine.* leave it out'):
        load_checkpoint(refine, plain.state_dict())
    with pytest.raises(ValueError, match=r'trained with --with_box_refine.* add it'):
        load_checkpoint(plain, refine.state_dict())
    assert 'no flags in the file' in str(load_checkpoint(plain, plain.state_dict()))


def test_families_are_told_from_official_flags() -> None:
    assert settle_recorded(vars(official({'conditional': True}))).family == 'conditional'
    assert settle_recorded(vars(official({'deformable': True}))).family == 'deformable'
    assert settle_recorded(vars(official({}))).family == 'detr'
    second = {'model': {'class_embed_o2m.0.bias': torch.ones(1)}, 'args': Namespace(use_ms_detr=True)}
    assert extract_flags(second)['ms_variant'] == 'a' and 'ms_variant' not in extract_flags(
        second | {'model': {}}
    )


def test_transformers_configuration_is_compared(tmp_path: Path) -> None:
    config = {
        'model_type': 'deformable_detr',
        'd_model': 32,
        'encoder_layers': 2,
        'decoder_layers': 3,
        'encoder_ffn_dim': 64,
        'encoder_attention_heads': 8,
        'decoder_attention_heads': 8,
        'num_queries': 12,
        'two_stage': True,
        'with_box_refine': True,
        'backbone': 'resnet10',
    }
    model = build(TRICKS | {'mixed_selection': False, 'backbone_stages': 4})
    with pytest.raises(ValueError, match='--nheads 8 there, 4 here'):
        load_checkpoint(model, {'model': model.state_dict(), 'config': config})
    same = config | {'encoder_attention_heads': 4, 'decoder_attention_heads': 4}
    assert load_checkpoint(model, {'model': model.state_dict(), 'config': same}).has_flags
    for wrong, message in (
        ({'decoder_attention_heads': 4}, '8 attention heads in the encoder and 4'),
        ({'model_type': 'bert'}, "that of 'bert'"),
        (
            {'backbone': None, 'backbone_config': {'model_type': 'dinov2'}},
            "backbone that is not known: 'dinov2'",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            load_checkpoint(model, {'model': model.state_dict(), 'config': config | wrong})


def test_evaluation_takes_the_model_from_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Unless a flag is given that contradicts it."""
    run(tmp_path / 'run', '--epochs', '1', '--nheads', '2', '--pe_temperature', '20')
    file, data = (
        tmp_path / 'run/checkpoint.pth',
        '--dataset_file shapes --shapes_val 4 --shapes_size 64 --img_size 64',
    )
    data += ' --device cpu --num_workers 0 --batch_size 4'
    capsys.readouterr()
    run(tmp_path / 'eval', '--eval', '--resume', str(file), flags=data)
    assert 'conditional, resnet10, 10 queries, 1+2 layers of 32' in capsys.readouterr().out
    run(tmp_path / 'eval', '--eval', '--resume', str(file), '--nheads', '2', '--topk_eval', '5', flags=data)
    for flags, message in (
        (
            ['--nheads', '4'],
            '--nheads 4 contradicts the weights, which were trained with 2',
        ),
        (
            ['--dilation'],
            '--dilation contradicts the weights, which were trained with it off',
        ),
        (['--deformable'], 'trained with the family conditional'),
    ):
        with pytest.raises(ValueError, match=message):
            run(tmp_path / 'eval', '--eval', '--resume', str(file), *flags, flags=data)
    run(tmp_path / 'tuned', '--epochs', '1', '--nheads', '4', '--pretrained', str(file))
    assert 'warning: the weights were trained with other flags: --nheads' in capsys.readouterr().out
    assert load(tmp_path / 'tuned')['args']['nheads'] == 4
    detector = load_detector(weights=file)
    assert detector.args.nheads == 2 and detector.class_map.num_classes == 6


def test_the_names_of_files_tell_which_queries_only_train(tmp_path: Path) -> None:
    state = build(TRICKS | {'hybrid_k': 2, 'hybrid_queries': 24}).state_dict()
    plain = build(TRICKS)
    torch.save({'model': state}, tmp_path / 'r50_hybrid_branch_lambda1_group6_t24_dp0_12eps.pth')
    torch.save({'model': state}, tmp_path / 'something.pth')
    load_checkpoint(plain, tmp_path / 'r50_hybrid_branch_lambda1_group6_t24_dp0_12eps.pth')
    assert torch.equal(plain.query_embed.weight, state['query_embed.weight'][:12])
    with pytest.raises(ValueError, match=r'query_embed\.weight: \(36, 32\) there'):
        load_checkpoint(plain, tmp_path / 'something.pth')


def test_a_flag_that_is_newer_than_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of detections contradicts no weights; one of the network is compared with its default, and the
    message says so.
    """
    old = vars(settle_recorded(SMALL))
    for flag in (
        Flag('score_power', float_range(), None, 'new', kind=DETECTION),
        Flag('sharpness', float_range(), 1.0, 'new', kind=NETWORK),
    ):
        monkeypatch.setitem(FLAGS, flag.name, flag)
    args = Namespace(**old, score_power=2.0, sharpness=1.0)
    assert adopt(args, {'score_power', 'sharpness'}, old).score_power == 2.0
    args.sharpness = 3.0
    with pytest.raises(
        ValueError, match=r'--sharpness 3.0 .*with 1.0, the default, since their file does not know this flag'
    ):
        adopt(args, {'sharpness'}, old)


@pytest.mark.parametrize(
    'flag', ['enc_n_points', 'dec_n_points', 'finest_stride', 'clamp_boxes', 'soft_nms_threshold']
)
@pytest.mark.parametrize('family', ['detr', 'conditional'])
def test_a_flag_that_a_family_does_not_read_is_refused(flag: str, family: str) -> None:
    given = {
        flag: 4 if flag == 'finest_stride' else 8 if 'points' in flag else flag == 'clamp_boxes' or 1,
        'conditional': family == 'conditional',
    }
    with pytest.raises(
        ValueError, match=f'--{flag}.* is for Deformable DETR, and the other flags choose {family}'
    ):
        settle_recorded(SMALL | given)
