"""Recipes in scripts/: bash runs what Python reads, and each builds the network that it names."""

import json
import os
import re
import subprocess
from functools import cache
from pathlib import Path

import pytest
import torch

import main
from main import get_args_parser
from models import build_model
from util.config.recipes import ZOO, find_recipe, recipe_names
from util.config.settle import Settled, settle

SCRIPTS = Path(__file__).resolve().parents[1] / 'scripts'
# Parameters of the official models (of ViT and LVIS by hand from the specification's tables), in all, by recipes without their
# schedules. Co-DETR's without its 53,120 of frozen norms, which are no parameters here.
PARAMETERS = {
    'detr_r50': 41_524_768,
    'detr_r50dc5': 41_524_768,
    'detr_r101': 60_464_672,
    'detr_r101dc5': 60_464_672,
    'conddetr_r50': 43_418_401,
    'conddetr_r50dc5': 43_418_401,
    'conddetr_r101': 62_358_305,
    'conddetr_r101dc5': 62_358_305,
    'r101_h_deformable_detr': 66_885_977,
    'swin_small_h_deformable_detr': 69_807_011,
    'r50_deformable_detr': 40_069_665,
    'r50_deformable_detr_single_scale': 34_066_593,
    'r50_deformable_detr_single_scale_dc5': 34_066_593,
    'r50_deformable_detr_plus_iterative_bbox_refinement': 40_849_660,
    'r50_deformable_detr_plus_iterative_bbox_refinement_plus_plus_two_stage': 41_181_529,
    'r50_two_stage_deformable_detr': 47_485_273,
    'r50_two_stage_deformable_detr_tricks': 47_562_073,
    'r50_h_deformable_detr': 47_946_073,
    'r50_ms_detr_300': 53_793_625,
    'r50_ms_detr_pp_300': 53_870_425,
    'r50_ms_detr_pp_900': 54_024_025,
    'r50_ms_detr_a_300': 47_625_595,
    'swin_tiny_two_stage_deformable_detr': 48_028_307,
    'swin_tiny_two_stage_deformable_detr_tricks': 48_105_107,
    'swin_large_two_stage_deformable_detr': 217_619_117,
    'swin_large_two_stage_deformable_detr_tricks': 217_695_917,
    'swin_tiny_h_deformable_detr': 48_489_107,
    'swin_tiny_h_deformable_detr_decay0.05': 48_489_107,
    'swin_large_h_deformable_detr': 218_079_917,
    'swin_large_h_deformable_detr_900': 218_233_517,
    'swin_large_h_deformable_detr_900_decay0.05': 218_233_517,
    'r50_co_deformable_detr': 65_076_774,
    'r50_co_deformable_detr_mask': 67_720_054,
    'swin_tiny_co_deformable_detr': 65_619_808,
    'swin_small_co_deformable_detr': 86_937_712,
    'swin_base_co_deformable_detr': 125_683_934,
    'swin_large_co_deformable_detr_12ep': 235_413_658,
    'swin_large_co_deformable_detr_36ep': 235_567_258,
    'r50_co_dino_5scale': 65_150_885,
    'r50_co_dino_5scale_lsj': 65_150_885,
    'r50_co_dino_5scale_9encoder_lsj': 69_071_429,
    'swin_large_co_dino_5scale': 235_471_769,
    'swin_large_co_dino_5scale_lsj': 235_471_769,
    'swin_large_co_dino_5scale_o365': 235_471_769,
    'vit_large_co_dino_5scale_o365': 365_367_657,
    'r50_co_dino_5scale_lvis': 75_802_540,
    'r50_co_dino_5scale_lsj_lvis': 75_802_540,
    'swin_large_co_dino_5scale_lsj_lvis': 246_123_424,
    'swin_large_co_dino_5scale_lsj_o365_lvis': 246_123_424,
    'vit_large_co_dino_5scale_lsj_o365_lvis': 374_877_868,
    'vit_large_co_dino_5scale_o365_instance': 384_026_919,
    'vit_large_co_dino_5scale_lsj_o365_lvis_instance': 395_194_678,
    'detr_r50_masks': 42_858_425,
}
QUICK = ('r50_h_deformable_detr', 'r50_co_dino_5scale')
# One of each scheme and one of each backbone; the others combine these.
BUILT = (
    *QUICK,
    'detr_r50',
    'detr_r50dc5',
    'detr_r101',
    'detr_r50_masks',
    'conddetr_r50',
    'r50_deformable_detr',
    'r50_deformable_detr_single_scale',
    'r50_deformable_detr_plus_iterative_bbox_refinement',
    'r50_two_stage_deformable_detr',
    'r50_ms_detr_300',
    'r50_ms_detr_pp_300',
    'r50_ms_detr_a_300',
    'swin_tiny_h_deformable_detr',
    'swin_small_h_deformable_detr',
    'swin_large_two_stage_deformable_detr_tricks',
    'r50_co_deformable_detr_mask',
    'swin_base_co_deformable_detr',
    'r50_co_dino_5scale_9encoder_lsj',
    'r50_co_dino_5scale_lvis',
    'vit_large_co_dino_5scale_lsj_o365_lvis_instance',
)


def without_schedule(name: str) -> str:
    return name if name in PARAMETERS else re.sub(r'_(\d+ep|epoch50)$', '', name)


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


@pytest.mark.skipif(os.name == 'nt', reason='recipes are shell scripts')
def test_bash_runs_what_python_reads() -> None:
    assert {row.script for row in ZOO} == {*recipe_names(), ''}
    assert {without_schedule(name) for name in recipe_names()} == PARAMETERS.keys()
    for name in recipe_names():
        words = flags_of(SCRIPTS / f'{name}.sh', '--coco_path', 'DATA')
        recipe = find_recipe(name)
        assert words == ['--output_dir', f'exps/{name}', *recipe.words, '--coco_path', 'DATA']
        lvis = recipe.flags.dataset_file == 'lvis'
        told = recipe.epochs, recipe.data
        assert told == (settle(recipe.flags).epochs, 'LVIS v1 val' if lvis else 'COCO val2017'), name


@cache
def num_parameters(network: str) -> int:
    with torch.device('meta'):
        model = build_model(Settled(**json.loads(network)))[0]
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    'network',
    [
        pytest.param(
            x, marks=() if x in QUICK else pytest.mark.slow if x in BUILT else pytest.mark.exhaustive
        )
        for x in PARAMETERS
    ],
)
def test_a_recipe_builds_the_official_network(network: str) -> None:
    for name in recipe_names():
        if without_schedule(name) == network:
            args = settle(find_recipe(name).flags)
            lvis = args.dataset_file == 'lvis'
            assert (args.class_ids == 'contiguous') == ('_co_' in name and not lvis)
            classes = (1203 if lvis else 80) if '_co_' in name else 91
            args = args.but(num_classes=classes, backbone_weights='none', epochs=1, lr_drop=1)
            assert num_parameters(json.dumps(vars(args), sort_keys=True)) == PARAMETERS[network]


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
