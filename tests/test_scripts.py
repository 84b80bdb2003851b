"""Recipes in scripts/: each builds the model that it names."""

import os
import subprocess
from pathlib import Path

import pytest

from main import get_args_parser
from models import build_model, resolve_args

SCRIPTS = Path(__file__).resolve().parents[1] / 'scripts'
# Parameters of the official models, in all; and epochs and the drop of the learning rate.
RECIPES = {
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
}


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
@pytest.mark.parametrize('path', sorted(SCRIPTS.glob('r50*.sh')), ids=lambda path: path.stem)
def test_recipe_builds_the_official_model(path: Path) -> None:
    flags = flags_of(path, '--coco_path', 'DATA', '--backbone_weights', 'none')
    args = resolve_args(get_args_parser().parse_args(flags))
    assert args.output_dir == f'exps/{path.stem}' and args.coco_path == 'DATA'
    parameters, epochs, lr_drop = RECIPES[path.stem]
    assert (args.lr, args.lr_backbone, args.epochs, args.lr_drop) == (2e-4, 2e-5, epochs, lr_drop)
    model = build_model(args)[0]
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert 'AP on COCO val2017' in path.read_text().splitlines()[1], 'the head says what to expect'
