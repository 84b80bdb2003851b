"""The table of flags, recipes, and the flags that files hold."""

import json
import resource
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

import main
from datasets.build import DATASETS
from models.backbone import NORM_LAYERS
from models.postprocess import AUXILIARY_HEADS
from models.training.losses import BOX_LOSSES
from tests.runs import ROOT, TINY, run
from util.command_line import Bounded, float_range, int_range
from util.config.declare import DATA, read_texts
from util.config.flags import BOX_TERMS, FLAGS, NO_OPTIONS, TRUST
from util.config.parser import build_parser
from util.config.recipes import ZOO, find_recipe, recipe_names, with_named_flags
from util.config.recorded import VAL_DATA, adopt, changes_text
from util.config.settle import EVERYTHING, OLD, Settled, chosen_by, settle, use_current_names

RECORDED = Path(__file__).parent / 'recorded'
# Of a recipe that was another reading of its config.
CHANGED = {'swin_large_co_dino_5scale_lsj_lvis_36ep': {'drop_path_rate': 0.3}}
# Added since: --evaluator, which LVIS chooses. Merged since: --lsj_size into --img_size, whose default was
# 1024; --group_aspect_ratio and --bucket_sizes into --batches.
USUAL_THEN = {'lsj_size': 1024}
BATCH = ('total_batch_size', 'batch_size')  # a recipe states its batch, which was a comment before
# Flags of the main.py of DETR, Conditional, Deformable, H-Deformable and MS-DETR. Ours has what they train
# and evaluate with.
OFFICIAL = """
    lr lr_backbone lr_backbone_names lr_linear_proj_names lr_linear_proj_mult batch_size weight_decay epochs
    lr_drop lr_drop_epochs clip_max_norm sgd with_box_refine two_stage frozen_weights backbone dilation
    position_embedding position_embedding_scale num_feature_levels enc_layers dec_layers dim_feedforward
    hidden_dim dropout nheads num_queries dec_n_points enc_n_points pre_norm masks no_aux_loss
    set_cost_class set_cost_bbox set_cost_giou mask_loss_coef dice_loss_coef cls_loss_coef bbox_loss_coef
    giou_loss_coef eos_coef focal_alpha dataset_file coco_path output_dir device seed resume eval
    num_workers dist_url cache_mode num_queries_one2one num_queries_one2many k_one2many lambda_one2many
    mixed_selection look_forward_twice topk drop_path_rate pretrained_backbone_path use_checkpoint
    use_ms_detr use_aux_ffn o2m_matcher_threshold o2m_matcher_k use_indices_merge o2m_cls_loss_coef
    o2m_bbox_loss_coef o2m_giou_loss_coef enc_cls_loss_coef enc_bbox_loss_coef enc_giou_loss_coef
"""


def parse(line: str) -> Namespace:
    return main.get_args_parser().parse_args(line.split())


@pytest.mark.parametrize('name', recipe_names())
def test_a_recipe_settles_as_recorded(name: str) -> None:
    """The flags in force before there was a table, but for the batch."""
    recorded = use_current_names(USUAL_THEN | json.loads((RECORDED / 'recipes.json').read_text())[name])
    settled = json.loads(json.dumps(vars(settle(with_named_flags(parse(f'--recipe {name}')), EVERYTHING))))
    usual = json.loads(json.dumps(vars(settle(Namespace(), EVERYTHING))))
    added = {flag: settled[flag] for flag in (*BATCH, 'evaluator')}
    assert added['evaluator'] == ('lvis' if 'lvis' in name else 'coco')
    assert settled == usual | recorded | added | {'recipe': name, 'output_dir': f'exps/{name}'} | CHANGED.get(
        name, {}
    )
    assert added['total_batch_size'] in (8, 16, 32, 64) or name == 'detr_r50_masks'


@pytest.mark.parametrize('name', [row.name for row in ZOO if row.name])
def test_a_model_is_its_recipe(name: str) -> None:
    """All flags of the recipe are in force but the data, which are the user's; given ones win."""
    row = next(row for row in ZOO if row.name == name)
    recipe = row.recipe.flags
    settled = settle(with_named_flags(parse(f'--model {name} --pretrained FILE --lr 7e-5')), EVERYTHING)
    for flag in recipe.given - set(VAL_DATA) - {'lr'}:
        assert getattr(settled, flag) == getattr(recipe, flag), flag
    assert settled.lr == 7e-5 and settled.dataset_file == 'auto' and settled.pretrained == 'FILE'


def test_a_fine_tuning_by_name_has_scheme_schedule_and_batch(capsys: pytest.CaptureFixture[str]) -> None:
    line = '--model h_deformable_detr_resnet50 --pretrained FILE --dataset_file shapes --dry_run'
    main.main(parse(f'{line} --total_batch_size 16'))
    said = capsys.readouterr().out
    assert 'one2many' in said and 'in 12 epochs' in said and '16 images a step' in said
    assert 'family  Deformable DETR (chosen by --' in said


def test_a_copied_script_is_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (
        (ROOT / 'scripts/r50_h_deformable_detr_12ep.sh')
        .read_text()
        .replace('# H-Deformable', '# Mine, H-Deformable')
    )
    (tmp_path / 'mine.sh').write_text(text.replace('--epochs 12', '--epochs 7'))
    monkeypatch.setattr('util.config.recipes.SCRIPTS', tmp_path)
    assert find_recipe('mine').flags.epochs == 7
    for bad, message in (
        (text + 'echo done\nrecipe --lr 1 "$@"\n', 'once'),
        (text.replace('--epochs 12', '--epochs $N'), r'\$N means something to the shell'),
        (text.replace('--epochs 12', '--epoch 12'), '2'),
    ):
        (tmp_path / f'bad{len(bad)}.sh').write_text(bad)
        with pytest.raises((ValueError, SystemExit), match=message):
            _ = find_recipe(f'bad{len(bad)}').flags
    with pytest.raises(ValueError, match=r"no recipe 'mne' is in scripts/: did you mean mine\?"):
        find_recipe('mne')


def test_flags_of_official_programs_are_options() -> None:
    options = main.get_args_parser()._option_string_actions
    assert not [flag for flag in OFFICIAL.split() if f'--{flag}' not in options]
    for flag, why in NO_OPTIONS.items():
        with pytest.raises(SystemExit):
            parse(f'--{flag} 1')
        assert flag not in OFFICIAL.split() and why


def test_names_in_the_table_are_those_of_the_code() -> None:
    assert list(FLAGS['dataset_file'].type) == ['auto', *DATASETS] and list(
        FLAGS['backbone_norm'].type
    ) == list(NORM_LAYERS)
    assert list(FLAGS['co_aux_heads'].type) == list(AUXILIARY_HEADS)
    assert list(BOX_TERMS) == list(BOX_LOSSES)
    assert set(read_texts()) <= set(FLAGS), 'every text is that of a flag'


@pytest.mark.parametrize(
    ('line', 'family'),
    [
        ('', 'DETR (no flag of a variant is given)'),
        ('--conditional', 'Conditional DETR (--conditional)'),
        ('--num_feature_levels 1', 'Deformable DETR (chosen by --num_feature_levels 1)'),
        ('--hybrid_k 0', 'Deformable DETR (chosen by --hybrid_k 0)'),
        ('--use_ms_detr', 'Deformable DETR (chosen by --use_ms_detr)'),
        ('--dino --num_queries 900', 'Deformable DETR (chosen by --'),
        ('--num_feature_levels 4', 'Deformable DETR (chosen by --num_feature_levels 4)'),
    ],
)
def test_the_family_and_what_chose_it_are_said(line: str, family: str) -> None:
    assert chosen_by(settle(parse(line))).startswith(family)


def test_settled_flags_are_not_changed() -> None:
    args = settle(parse('--conditional'), EVERYTHING)
    assert isinstance(args, Settled)
    with pytest.raises(AttributeError, match=r'use but\(lr=\.\.\.\)'):
        args.lr = 1
    assert args.but(lr=1).lr == 1 and args.lr == 1e-4 and vars(settle(args, EVERYTHING)) == vars(args)


def checkpoint(folder: Path, **changes: object) -> Path:
    """What a run of an earlier version has written, without its weights."""
    flags = json.loads((RECORDED / 'flags_of_a_run.json').read_text())
    file = folder / 'checkpoint.pth'
    saved = {'model': {}, 'args': flags | changes, 'epoch': 0, 'lr_scheduler': {}}
    saved |= {
        'optimizer': {'state': {}, 'param_groups': []},
        'class_map': {'category_ids': [1], 'names': ['disc']},
    }
    torch.save(saved, file)
    return file


def test_a_file_is_read_before_flags_are_judged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Commands without the flags of the model, typed as a newcomer would."""
    file = checkpoint(tmp_path)
    flags = json.loads((RECORDED / 'flags_of_a_run.json').read_text())
    for more in ('--nms_iou_threshold 0.6', '--clamp_boxes', '--soft_nms_threshold 0.5', ''):
        args, _ = main.configure(parse(f'--eval --resume {file} {more}'))
        assert (args.family, args.hidden_dim, args.shapes_val) == ('deformable', 32, 4)
    (tmp_path / 'heads').mkdir()
    heads = checkpoint(tmp_path / 'heads', co_aux_heads=['faster_rcnn'])
    assert (
        main.configure(parse(f'--eval --resume {heads} --eval_module faster_rcnn'))[0].eval_module
        == 'faster_rcnn'
    )
    with pytest.raises(
        ValueError, match=r'checkpoint\.pth: --nheads 8 contradicts the weights, .* trained with 4'
    ):
        main.configure(parse(f'--eval --resume {file} --nheads 8'))
    args, _ = main.configure(parse(f'--resume auto --output_dir {tmp_path}'))
    same = {name: value for name, value in flags.items() if name in FLAGS and not FLAGS[name].launch}
    assert {
        name: getattr(args, name) for name in same
    } == same and 'other flags' not in capsys.readouterr().out
    args, _ = main.configure(parse(f'--resume auto --output_dir {tmp_path} --epochs 9 --lr 0.5'))
    assert 'goes on with other flags: --epochs 3 -> 9, --lr 0.001 -> 0.5' in capsys.readouterr().out
    args, _ = main.configure(parse(f'--pretrained {file} --dataset_file shapes --epochs 2'))
    assert (args.family, args.hidden_dim, args.epochs, args.lr, args.ema) == ('deformable', 32, 2, 2e-4, 0)


def test_a_file_cannot_ask_for_trust(tmp_path: Path) -> None:
    file = checkpoint(tmp_path, **dict.fromkeys(TRUST, True), device='cuda', fsdp=True)
    for line in (f'--eval --resume {file}', f'--resume {file}', f'--pretrained {file}'):
        args, _ = main.configure(parse(line))
        assert not any(getattr(args, flag) for flag in TRUST) and args.device == 'auto' and not args.fsdp


def test_new_data_take_the_place_of_those_of_the_run(tmp_path: Path) -> None:
    file = checkpoint(tmp_path, dataset_file='coco', coco_path='old', train_ann='old.json')
    args, _ = main.configure(parse(f'--resume {file} --coco_path new'))
    assert (args.coco_path, args.train_ann) == ('new', None)
    args, _ = main.configure(parse(f'--resume {file}'))
    assert (args.coco_path, args.train_ann) == ('old', 'old.json')


def test_a_run_is_repeated_from_its_flags(tmp_path: Path) -> None:
    run(tmp_path, '--epochs', '1', '--lr', '0.002', '--eval_every', '0')
    file = tmp_path / 'flags.json'
    assert json.loads(file.read_text())['family'] == 'conditional'
    again = settle(with_named_flags(parse(f'--config {file} --epochs 4')), EVERYTHING)
    first = settle(parse(f'{TINY} --epochs 4 --lr 0.002 --eval_every 0'), EVERYTHING)
    own = {name for name, flag in FLAGS.items() if flag.launch}
    assert {name: value for name, value in vars(again).items() if name not in own} == {
        name: value for name, value in vars(first).items() if name not in own
    }
    (tmp_path / 'mine.json').write_text('{"lr": 0.5, "dino": true}')
    assert settle(with_named_flags(parse(f'--config {tmp_path}/mine.json --lr 1'))).lr == 1
    for text, message in (('{"lrr": 1}', "'lrr' is no flag: did you mean lr"), ('[', 'is no file of flags')):
        (tmp_path / 'bad.json').write_text(text)
        with pytest.raises(ValueError, match=message):
            with_named_flags(parse(f'--config {tmp_path}/bad.json'))


@pytest.mark.parametrize(
    'name', ['--model h_deformable_detr_resnet50 --pretrained FILE', '--recipe r50_deformable_detr']
)
def test_flags_of_a_file_go_before_those_of_a_model_or_recipe(tmp_path: Path, name: str) -> None:
    file = tmp_path / 'mine.json'
    file.write_text('{"lr": 0.5, "epochs": 7}')
    settled = settle(with_named_flags(parse(f'--config {file} --epochs 4 {name}')), EVERYTHING)
    assert (settled.lr, settled.epochs, settled.family) == (0.5, 4, 'deformable')


@pytest.mark.parametrize(
    ('program', 'words'),
    [
        ('main.py', '--help'),
        ('main.py', '--help all'),
        ('main.py', '--epoch 3'),
        ('run_with_submitit.py', '--ngpu 8'),
    ],
)
def test_help_and_mistyped_flags_are_answered_without_pytorch(program: str, words: str) -> None:
    code = (
        'import runpy, sys\n'
        f'sys.argv = [{program!r}, *{words.split()}]\n'
        'try:\n'
        f"    runpy.run_path({program!r}, run_name='__main__')\n"
        'finally:\n'
        "    assert 'argparse' in sys.modules and 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    seconds = []  # of the processor, so that a busy machine changes little
    for _ in range(3):
        start = sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
        result = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
        seconds.append(sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2]) - start)
        assert result.returncode == (0 if 'help' in words else 2), result.stderr
        assert 'AssertionError' not in result.stderr
        assert ('did you mean' in result.stderr) == ('help' not in words)
    assert min(seconds) < 0.5


def test_adopting_leaves_no_trace_in_the_given_flags() -> None:
    flags = json.loads((RECORDED / 'flags_of_a_run.json').read_text())
    args = parse('--lr_drop 7')
    resumed = settle(adopt(args, args.given, flags, resume=True), EVERYTHING)
    assert (
        resumed.lr_drop == 7 and args.hidden_dim == 256 and changes_text(resumed, flags) == '--lr_drop 2 -> 7'
    )
    assert settle(Namespace(img_size=64), (DATA,)).img_size == 64


def test_old_names_in_records_are_read_and_on_a_command_line_refused(capsys: pytest.CaptureFixture) -> None:
    """Of shards: their place is that of the annotations now."""
    old = Namespace(train_shards='a/shards.json', val_shards=None, val_ann='b.json')
    settled = settle(old, (DATA,))
    assert (settled.train_ann, settled.val_ann) == ('a/shards.json', 'b.json')
    assert not any(hasattr(settled, name) for name in OLD)
    for name in OLD:
        with pytest.raises(SystemExit):
            build_parser('').parse_args([f'--{name}', 'x'])
        assert OLD[name].instead in capsys.readouterr().err


@pytest.mark.parametrize(
    ('kind', 'value', 'problem'),
    [
        (int_range(1, 5), 0, 'must be at least 1, not 0'),
        (int_range(1, 5), 6, 'must be at most 5, not 6'),
        (int_range(1, 5), 2.5, 'must be a whole number, not 2.5'),
        (int_range(1, 5), True, 'must be a whole number, not True'),
        (int_range(1, 5), '3', "must be a whole number, not '3'"),
        (float_range(0, 1, below=True), 1, 'must be less than 1, not 1'),
        (float_range(), float('nan'), 'must be a finite number, not nan'),
        (float_range(), -1e-9, 'must be at least 0, not -1e-09'),
        (int_range(1, 5), 5.0, None),
        (float_range(0, 1), 1, None),
    ],
)
def test_bounds(kind: Bounded, value: object, problem: str | None) -> None:
    assert kind.problem(value) == problem


def test_every_number_has_bounds_wherever_it_comes_from() -> None:
    for action in main.get_args_parser()._actions:
        assert isinstance(action.type, Bounded) or action.type is None or action.choices, action.dest
    for line, message in (
        ('--num_queries 1000000000', '--num_queries must be at most 100000, not 1e\\+09'),
        ('--clip_max_norm nan', '--clip_max_norm must be a finite number, not nan'),
        ('--lr_drop_epochs 3 0', '--lr_drop_epochs must be at least 1, not 0'),
        ('--img_size 1', '--img_size must be at least 16, not 1'),
        ('--print_freq 0', '--print_freq must be at least 1, not 0'),
    ):
        with pytest.raises(ValueError, match=message):
            settle(parse(line), EVERYTHING)
    with pytest.raises(ValueError, match='--nheads must be a whole number'):
        settle(Namespace(nheads='8'))
    with pytest.raises(SystemExit):
        parse('--img_size 800px')
