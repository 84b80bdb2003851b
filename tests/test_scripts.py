"""Recipes in scripts/: each builds the model that it names."""

import json
import os
import re
import subprocess
from argparse import Namespace
from functools import cache
from pathlib import Path

import pytest
import torch

import main
from main import get_args_parser
from models import build_model
from util.config.recipes import ZOO, find_recipe, recipe_names, with_named_flags
from util.config.settle import settle

SCRIPTS = Path(__file__).resolve().parents[1] / 'scripts'
# Parameters of the official models (of ViT and LVIS by hand from the specification's tables), in all (Co-DETR's without its 53,120 of frozen norms, which are no parameters here);
# and epochs and the drop of the learning rate.
RECIPES = {
    'detr_r50_500ep': (41_524_768, 500, 400),
    'detr_r50_50ep': (41_524_768, 50, 40),
    'detr_r50dc5_500ep': (41_524_768, 500, 400),
    'detr_r50dc5_50ep': (41_524_768, 50, 40),
    'detr_r101_500ep': (60_464_672, 500, 400),
    'detr_r101_50ep': (60_464_672, 50, 40),
    'detr_r101dc5_500ep': (60_464_672, 500, 400),
    'detr_r101dc5_50ep': (60_464_672, 50, 40),
    'conddetr_r50_epoch50': (43_418_401, 50, 40),
    'conddetr_r50dc5_epoch50': (43_418_401, 50, 40),
    'conddetr_r101_epoch50': (62_358_305, 50, 40),
    'conddetr_r101dc5_epoch50': (62_358_305, 50, 40),
    'r101_h_deformable_detr_12ep': (66_885_977, 12, 11),
    'r101_h_deformable_detr_36ep': (66_885_977, 36, 30),
    'swin_small_h_deformable_detr_12ep': (69_807_011, 12, 11),
    'swin_small_h_deformable_detr_36ep': (69_807_011, 36, 30),
    'r50_deformable_detr': (40_069_665, 50, 40),
    'r50_deformable_detr_single_scale': (34_066_593, 50, 40),
    'r50_deformable_detr_single_scale_dc5': (34_066_593, 50, 40),
    'r50_deformable_detr_plus_iterative_bbox_refinement': (40_849_660, 50, 40),
    'r50_deformable_detr_plus_iterative_bbox_refinement_plus_plus_two_stage': (41_181_529, 50, 40),
    'r50_two_stage_deformable_detr_12ep': (47_485_273, 12, 11),
    'r50_two_stage_deformable_detr_36ep': (47_485_273, 36, 30),
    'r50_two_stage_deformable_detr_tricks_12ep': (47_562_073, 12, 11),
    'r50_two_stage_deformable_detr_tricks_36ep': (47_562_073, 36, 30),
    'r50_h_deformable_detr_12ep': (47_946_073, 12, 11),
    'r50_h_deformable_detr_36ep': (47_946_073, 36, 30),
    'r50_ms_detr_300': (53_793_625, 12, 11),
    'r50_ms_detr_pp_300': (53_870_425, 12, 11),
    'r50_ms_detr_pp_900': (54_024_025, 12, 11),
    'r50_ms_detr_a_300': (47_625_595, 12, 11),
    'swin_tiny_two_stage_deformable_detr_12ep': (48_028_307, 12, 11),
    'swin_tiny_two_stage_deformable_detr_36ep': (48_028_307, 36, 30),
    'swin_tiny_two_stage_deformable_detr_tricks_12ep': (48_105_107, 12, 11),
    'swin_tiny_two_stage_deformable_detr_tricks_36ep': (48_105_107, 36, 30),
    'swin_large_two_stage_deformable_detr_12ep': (217_619_117, 12, 11),
    'swin_large_two_stage_deformable_detr_36ep': (217_619_117, 36, 30),
    'swin_large_two_stage_deformable_detr_tricks_12ep': (217_695_917, 12, 11),
    'swin_large_two_stage_deformable_detr_tricks_36ep': (217_695_917, 36, 30),
    'swin_tiny_h_deformable_detr_12ep': (48_489_107, 12, 11),
    'swin_tiny_h_deformable_detr_36ep': (48_489_107, 36, 30),
    'swin_tiny_h_deformable_detr_decay0.05_12ep': (48_489_107, 12, 11),
    'swin_tiny_h_deformable_detr_decay0.05_36ep': (48_489_107, 36, 30),
    'swin_large_h_deformable_detr_12ep': (218_079_917, 12, 11),
    'swin_large_h_deformable_detr_36ep': (218_079_917, 36, 30),
    'swin_large_h_deformable_detr_900_12ep': (218_233_517, 12, 11),
    'swin_large_h_deformable_detr_900_36ep': (218_233_517, 36, 30),
    'swin_large_h_deformable_detr_900_decay0.05_36ep': (218_233_517, 36, 30),
    'r50_co_deformable_detr_12ep': (65_076_774, 12, 11),
    'r50_co_deformable_detr_mask_12ep': (65_076_774 + 2_643_280, 12, 11),
    'swin_tiny_co_deformable_detr_12ep': (65_619_808, 12, 11),
    'swin_tiny_co_deformable_detr_36ep': (65_619_808, 36, 30),
    'swin_small_co_deformable_detr_12ep': (86_937_712, 12, 11),
    'swin_small_co_deformable_detr_36ep': (86_937_712, 36, 30),
    'swin_base_co_deformable_detr_12ep': (125_683_934, 12, 11),
    'swin_base_co_deformable_detr_36ep': (125_683_934, 36, 30),
    'swin_large_co_deformable_detr_12ep': (235_413_658, 12, 11),
    'swin_large_co_deformable_detr_36ep': (235_567_258, 36, 30),
    'r50_co_dino_5scale_12ep': (65_150_885, 12, 11),
    'r50_co_dino_5scale_lsj_12ep': (65_150_885, 12, 11),
    'r50_co_dino_5scale_lsj_36ep': (65_150_885, 36, 30),
    'r50_co_dino_5scale_9encoder_lsj_12ep': (69_071_429, 12, 11),
    'r50_co_dino_5scale_9encoder_lsj_36ep': (69_071_429, 36, 30),
    'swin_large_co_dino_5scale_12ep': (235_471_769, 12, 11),
    'swin_large_co_dino_5scale_24ep': (235_471_769, 24, 20),
    'swin_large_co_dino_5scale_36ep': (235_471_769, 36, 30),
    'swin_large_co_dino_5scale_lsj_12ep': (235_471_769, 12, 11),
    'swin_large_co_dino_5scale_lsj_24ep': (235_471_769, 24, 20),
    'swin_large_co_dino_5scale_lsj_36ep': (235_471_769, 36, 30),
    'swin_large_co_dino_5scale_o365_16ep': (235_471_769, 16, 8),
    'vit_large_co_dino_5scale_o365_12ep': (365_367_657, 12, 7),
    'r50_co_dino_5scale_lvis_12ep': (75_802_540, 12, 11),
    'r50_co_dino_5scale_lsj_lvis_12ep': (75_802_540, 12, 11),
    'swin_large_co_dino_5scale_lsj_lvis_36ep': (246_123_424, 36, 30),
    'swin_large_co_dino_5scale_lsj_o365_lvis_16ep': (246_123_424, 16, 8),
    'vit_large_co_dino_5scale_lsj_o365_lvis_16ep': (374_877_868, 16, 11),
    'vit_large_co_dino_5scale_o365_instance_12ep': (384_026_919, 12, 7),
    'vit_large_co_dino_5scale_lsj_o365_lvis_instance_16ep': (395_194_678, 16, 11),
    'detr_r50_masks': (42_858_425, 25, 15),
}
# Learning rates that are not those of the family.
RATES = {
    'swin_large_co_dino_5scale_o365': 1e-4,
    'swin_large_co_dino_5scale_lsj_o365': 1e-4,
    'vit_large': 5e-5,
}
TOOLS = (
    'build_ops',
    'compare_schemes',
    'env',
    'gpu_check',
    'recipe',
    'quickstart',
    'test',
)  # scripts that are no recipes
QUICK = ('r50_h_deformable_detr_12ep', 'r50_co_dino_5scale_12ep')
# Arguments of the official scripts behind the recipes, by their names without schedule or, where it matters, with it.
BASE = '--with_box_refine --two_stage --dim_feedforward 2048'
TRICKS = '--dropout 0.0 --mixed_selection --look_forward_twice'
HYBRID = '--num_queries_one2one 300 --num_queries_one2many 1500 --k_one2many 6 --lambda_one2many 1.0'
MIXED = (
    '--use_ms_detr --use_aux_ffn --cls_loss_coef 1 --o2m_cls_loss_coef 2 --enc_cls_loss_coef 2 --enc_bbox_loss_coef 5 '
    '--enc_giou_loss_coef 2'
)
TINY, LARGE = '--backbone swin_tiny', '--backbone swin_large'
MORE, DROP, DECAY = '--num_queries_one2one 900', '--drop_path_rate 0.5', '--weight_decay 0.05'
OFFICIAL = {
    'r50_two_stage_deformable_detr': BASE,
    'r50_two_stage_deformable_detr_tricks': f'{BASE} {TRICKS}',
    'r50_h_deformable_detr': f'{BASE} {TRICKS} {HYBRID}',
    'r50_ms_detr_300': f'{BASE} {MIXED} --num_queries 300',
    'r50_ms_detr_pp_300': f'{BASE} {TRICKS} {MIXED} --num_queries 300',
    'r50_ms_detr_pp_900': f'{BASE} {TRICKS} {MIXED} --num_queries 900 --topk_eval 300',
    'swin_tiny_two_stage_deformable_detr': f'{BASE} {TINY}',
    'swin_tiny_two_stage_deformable_detr_tricks': f'{BASE} {TRICKS} {TINY}',
    'swin_large_two_stage_deformable_detr_12ep': f'{BASE} {LARGE}',
    'swin_large_two_stage_deformable_detr_36ep': f'{BASE} {LARGE} {DROP}',
    'swin_large_two_stage_deformable_detr_tricks_12ep': f'{BASE} {TRICKS} {LARGE}',
    'swin_large_two_stage_deformable_detr_tricks_36ep': f'{BASE} {TRICKS} {LARGE} {DROP}',
    'swin_tiny_h_deformable_detr': f'{BASE} {TRICKS} {HYBRID} {TINY}',
    'swin_tiny_h_deformable_detr_decay0.05': f'{BASE} {TRICKS} {HYBRID} {TINY} {DECAY}',
    'swin_large_h_deformable_detr_12ep': f'{BASE} {TRICKS} {HYBRID} {LARGE}',
    'swin_large_h_deformable_detr_36ep': f'{BASE} {TRICKS} {HYBRID} {LARGE} {DROP}',
    'swin_large_h_deformable_detr_900_12ep': f'{BASE} {TRICKS} {HYBRID} {LARGE} {MORE}',
    'swin_large_h_deformable_detr_900_36ep': f'{BASE} {TRICKS} {HYBRID} {LARGE} {MORE} {DROP}',
    'swin_large_h_deformable_detr_900_decay0.05_36ep': f'{BASE} {TRICKS} {HYBRID} {LARGE} {MORE} {DROP} {DECAY}',
    'r50_ms_detr_a_300': f'{BASE} --use_ms_detr --cls_loss_coef 1 --o2m_cls_loss_coef 2 --num_queries 300 --ms_variant a',
}

HEADS, PLAIN, JITTER = (
    '--co_aux_heads faster_rcnn atss',
    '--aug co_detr --batches aspect',
    '--aug lsj --img_size',
)
DINO = f'--dino --num_feature_levels 5 --num_queries 900 --dn_number 100 {HEADS} --class_ids contiguous'
CO = f'{BASE} {TRICKS} {HEADS} --class_ids contiguous {PLAIN}'
# Co-DETR with Swin: windows of 12 in the larger two, and a drop path of its own for each schedule.
SWIN_CO = {
    'tiny_co_deformable_detr': ('swin_tiny', f'{CO} {DECAY}', {12: 0.2, 36: 0.3}),
    'small_co_deformable_detr': ('swin_small', f'{CO} {DECAY}', {12: 0.2, 36: 0.4}),
    'base_co_deformable_detr': ('swin_base_window12', f'{CO} {DECAY}', {12: 0.2, 36: 0.4}),
    'large_co_deformable_detr': ('swin_large_window12', f'{CO} {DECAY}', {12: 0.3, 36: 0.6}),
    'large_co_dino_5scale': ('swin_large_window12', f'{DINO} {PLAIN}', {12: 0.3, 24: 0.5, 36: 0.6}),
    'large_co_dino_5scale_lsj': ('swin_large_window12', f'{DINO} {JITTER} 1280', {12: 0.3, 24: 0.5, 36: 0.5}),
}
RESNET_101 = '--backbone resnet101'
OFFICIAL |= {
    f'{name}_{short}{schedule}': f'{family} {backbone} {"--dilation --batch_size 1" * dc5}'
    for name, schedule, family in (
        ('detr', '_500ep', ''), ('detr', '_50ep', ''), ('conddetr', '_epoch50', '--conditional'),
    )
    for short, backbone, dc5 in (
        ('r50', '', False), ('r50dc5', '', True), ('r101', RESNET_101, False), ('r101dc5', RESNET_101, True),
    )
} | {
    'r101_h_deformable_detr': f'{BASE} {TRICKS} {HYBRID} {RESNET_101}',
    'swin_small_h_deformable_detr': f'{BASE} {TRICKS} {HYBRID} --backbone swin_small',
}  # fmt: skip
OFFICIAL |= {
    'r50_co_deformable_detr': CO,
    'r50_co_deformable_detr_mask': f'{CO} --co_rcnn_masks',
    'r50_co_dino_5scale': f'{DINO} {PLAIN}',
    'r50_co_dino_5scale_lsj': f'{DINO} {JITTER} 1024',
    'r50_co_dino_5scale_9encoder_lsj': f'{DINO} {JITTER} 1024 --enc_layers 9',
} | {
    f'swin_{name}_{epochs}ep': f'--backbone {backbone} {flags} --drop_path_rate {rate}'
    for name, (backbone, flags, rates) in SWIN_CO.items()
    for epochs, rate in rates.items()
}
OFFICIAL['swin_large_co_deformable_detr_36ep'] += ' --num_queries 900 --topk_eval 300'


def flags_of(script: Path, *more: str) -> list[str]:
    """What a recipe would call main.py with."""
    done = subprocess.run(
        ['bash', str(script), *more],
        env=os.environ | {'LAUNCH': 'echo'},
        capture_output=True,
        text=True,
        check=True,
    )
    program, *flags = done.stdout.split()
    assert program == 'main.py'
    return flags


# What recipes of the same model differ in.
SCHEDULE = dict.fromkeys(('epochs', 'lr_drop', 'weight_decay', 'aug', 'img_size', 'batches', 'output_dir'))
SCHEDULE['drop_path_rate'] = 0.2


@cache
def num_parameters(flags: str) -> int:
    with torch.device('meta'):
        model = build_model(Namespace(**json.loads(flags)))[0]
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.skipif(os.name == 'nt', reason='recipes are shell scripts')
@pytest.mark.parametrize(
    'path',
    [
        pytest.param(path, id=path.stem, marks=() if path.stem in QUICK else pytest.mark.slow)
        for path in sorted(SCRIPTS.glob('*.sh'))
        if path.stem not in TOOLS
    ],
)
def test_recipe_builds_the_official_model(path: Path) -> None:
    flags = flags_of(path, '--coco_path', 'DATA', '--backbone_weights', 'none')
    args = settle(get_args_parser().parse_args(flags))
    assert args.output_dir == f'exps/{path.stem}' and args.coco_path == 'DATA'
    parameters, epochs, lr_drop = RECIPES[path.stem]
    usual = 1e-4 if args.family in ('detr', 'conditional') else 2e-4
    lr = next((rate for name, rate in RATES.items() if path.stem.startswith(name)), usual)
    assert (args.lr, args.lr_backbone, args.epochs, args.lr_drop) == (lr, lr / 10, epochs, lr_drop)
    lvis = args.dataset_file == 'lvis'
    assert (args.class_ids == 'contiguous') == ('_co_' in path.stem and not lvis)
    if '_co_' in path.stem:
        args = args.but(num_classes=1203 if lvis else 80)
    assert num_parameters(json.dumps({**vars(args), **SCHEDULE}, sort_keys=True)) == parameters
    if official := OFFICIAL.get(path.stem, OFFICIAL.get(re.sub(r'_\d+ep$', '', path.stem))):
        schedule = ['--epochs', str(epochs), '--lr_drop', str(lr_drop), '--backbone_weights', 'none']
        meant = settle(get_args_parser().parse_args([*official.split(), *schedule])).but(
            num_classes=args.num_classes
        )
        differing = {key for key, value in vars(meant).items() if vars(args)[key] != value}
        assert differing == {'output_dir', 'coco_path', 'total_batch_size'} | {'batch_size'} & differing
    recipe = find_recipe(path.stem)
    assert (recipe.epochs, recipe.data) == (epochs, 'LVIS v1 val' if lvis else 'COCO val2017'), (
        'the head says what to expect'
    )
    asked = get_args_parser().parse_args(
        ['--coco_path', 'DATA', '--recipe', path.stem, '--backbone_weights', 'none']
    )
    assert vars(settle(with_named_flags(asked))) == vars(args) | {'recipe': path.stem, 'num_classes': 91}, (
        'without a shell the same'
    )


def test_every_recipe_is_in_the_zoo() -> None:
    assert {row.script for row in ZOO} == {*RECIPES, ''} and recipe_names() == sorted(RECIPES)


# Of the recipes of masks, LVIS, Objects365 and ViT those that are always tried.
DRY = ('vit_large_co_dino_5scale_o365_instance_12ep', 'r50_co_dino_5scale_lvis_12ep', 'detr_r50_masks')


@pytest.mark.slow
@pytest.mark.skipif(os.name == 'nt', reason='recipes are shell scripts')
@pytest.mark.parametrize(
    'name',
    [
        pytest.param(path.stem, marks=() if path.stem in DRY else pytest.mark.exhaustive)
        for path in sorted(SCRIPTS.glob('*.sh'))
        if any(word in path.stem for word in ('vit', 'lvis', 'o365', 'mask'))
    ],
)
def test_dry_run_of_a_recipe(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    more = ['--pretrained', 'O365.pth'] if 'o365' in name else []
    main.main(
        get_args_parser().parse_args(flags_of(SCRIPTS / f'{name}.sh', '--dry_run', '--use_checkpoint', *more))
    )
    printed = capsys.readouterr().out
    assert 'GiB a process' in printed and 'multiply-adds' in printed
    assert ('at 26 rates in all' in printed) == ('vit_large' in name and 'lsj' not in name)


def test_the_comparison_passes_its_words_as_they_are(tmp_path: Path) -> None:
    """Of the command line, of DATA and of the folder; nothing in them is run."""
    (tmp_path / 'bin').mkdir()
    (tmp_path / 'bin/python').write_text('#!/bin/sh\nprintf "%s\\0" "$@"\n')
    (tmp_path / 'bin/python').chmod(0o755)
    odd = f"it's {{}} $(touch {tmp_path}/ran) `touch {tmp_path}/ran`; touch {tmp_path}/ran"
    out = tmp_path / 'my "out" $(touch ran)'
    environment = os.environ | {
        'PATH': f'{tmp_path}/bin:{os.environ["PATH"]}',
        'VENV': 'none',
        'OUT': str(out),
        'NAMES': 'detr conditional',
        'SEEDS': '7',
        'DATA': '--coco_path "my data" --val_ann $(touch\\ ran)',
        'WEIGHTS': 'my file',
    }
    words = ['bash', str(SCRIPTS / 'compare_schemes.sh'), '--wandb', odd, '--notes', 'two  spaces']
    subprocess.run(words, env=environment, check=True, capture_output=True)
    for name in ('detr', 'conditional'):
        found = (out / name / 'seed7/train.log').read_text().split('\0')
        assert found[2:8] == ['--output_dir', f'{out}/{name}/seed7', '--resume', 'auto', '--seed', '7']
        assert found[8:12] == ['--coco_path', 'my data', '--val_ann', '$(touch ran)']
        assert found[found.index('--backbone_weights') + 1] == 'my file'
        assert found[-5:] == ['--wandb', odd, '--notes', 'two  spaces', '']
    assert not (tmp_path / 'ran').exists() and not (SCRIPTS.parent / 'ran').exists()
