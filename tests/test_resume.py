"""Which flags a resumed run has, and checkpoints that are damaged."""

import csv
import math
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import main
from tests.runs import load, run
from util.command_line import run_command
from util.config.recorded import adopt, changes_text
from util.config.settle import settle
from util.logger import Meter

SMALL = ('--shapes_train', '4', '--eval_every', '0')
DATA = '--dataset_file shapes --shapes_train 4 --shapes_size 64 --eval_every 0 --num_workers 0 --device cpu'


def rates(folder: Path) -> list[float]:
    with (folder / 'metrics.csv').open() as file:
        return [float(row['lr']) for row in csv.DictReader(file)]


def test_given_flags_win_and_others_stay_those_of_the_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A cosine run that is finished and goes on to more epochs has the rates of the longer cosine."""
    first = [
        '--epochs',
        '2',
        '--lr_schedule',
        'cosine',
        '--weight_decay',
        '0.05',
        '--aug',
        'flip',
        '--ema',
        '0.5',
    ]
    run(tmp_path, *SMALL, *first)
    capsys.readouterr()
    run(tmp_path, *SMALL, *first, '--resume', 'auto')
    said = capsys.readouterr().out
    assert 'all 2 epochs are done; raise --epochs' in said and 'other flags' not in said
    run(tmp_path, '--epochs', '4', '--resume', 'auto', flags=DATA)
    said = capsys.readouterr().out
    assert f'{tmp_path}/checkpoint.pth goes on with other flags: --epochs 2 -> 4\n' in said
    assert 'cosine to 0 over 4 epochs' in said
    longer = [1e-3 * 0.5 * (1 + math.cos(math.pi * epoch / 4)) for epoch in (2, 3)]
    assert rates(tmp_path) == pytest.approx([1e-3, 5e-4, *longer])
    checkpoint = load(tmp_path)
    stayed = {
        name: checkpoint['args'][name] for name in ('lr_schedule', 'weight_decay', 'aug', 'ema', 'hidden_dim')
    }
    assert list(stayed.values()) == ['cosine', 0.05, 'flip', 0.5, 32]
    flags = f'{DATA} --epochs 5 --lr_schedule step --lr_drop 3 --weight_decay 0'
    run(tmp_path, '--resume', 'auto', flags=flags)
    assert rates(tmp_path)[4] == pytest.approx(1e-4)
    assert {group['weight_decay'] for group in load(tmp_path)['optimizer']['param_groups']} == {0.0}


@pytest.mark.parametrize(
    ('recorded', 'given', 'expected'),
    [
        ({'lr_drop_epochs': [8, 11]}, {'lr_drop': 5}, {'lr_drop': 5, 'lr_drop_epochs': None}),
        ({'lr_drop_epochs': [8, 11]}, {'lr_drop': 40}, {'lr_drop_epochs': [8, 11]}),
        ({'lr_drop_epochs': [8]}, {'lr_schedule': 'cosine'}, {'lr_drop_epochs': None}),
        ({'lr_schedule': 'cosine'}, {'lr_drop_epochs': [3]}, {'lr_schedule': 'step', 'lr_drop_epochs': [3]}),
        ({'total_batch_size': 16}, {'batch_size': 4}, {'total_batch_size': 16, 'batch_size': 4}),
        ({'cls_loss_coef': 1.5, 'seed': 7}, {'set_cost_bbox': 3.0}, {'cls_loss_coef': 1.5, 'seed': 7}),
        ({'device': 'cuda', 'coco_path': 'x'}, {}, {'device': 'cpu', 'coco_path': 'x'}),
        ({'train_ann': 'x', 'coco_path': 'x'}, {'coco_path': 'z'}, {'train_ann': None, 'coco_path': 'z'}),
    ],
)
def test_flags_that_exclude_each_other(recorded: dict, given: dict, expected: dict) -> None:
    command = {'deformable': True, 'seed': 42, 'device': 'cpu', 'coco_path': 'y', 'train_ann': None}
    theirs = vars(settle(Namespace(**command | recorded)))
    args = settle(Namespace(**command | given))
    resumed = settle(adopt(args, set(given), theirs, resume=True))
    assert {name: getattr(resumed, name) for name in expected} == expected
    text = changes_text(resumed, theirs)
    assert all((f'--{name} ' in text) == (theirs[name] != getattr(resumed, name)) for name in given), text
    assert changes_text(settle(adopt(args, set(), theirs, resume=True)), theirs) == ''


# Damaged checkpoints -------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """The checkpoint of a run in the middle of its second epoch."""
    folder = tmp_path_factory.mktemp('whole')
    run(folder, *SMALL, '--epochs', '1', '--ema', '0.5')
    return load(folder) | {'within_epoch': {'images': 4, 'meters': [Meter().state_dict()], 'tallies': [{}]}}


def put(*path: object) -> Callable[[dict], None]:
    """What sets an entry, named by its keys, to the last of the arguments."""

    def change(checkpoint: dict) -> None:
        *keys, last, value = path
        for key in keys:
            checkpoint = checkpoint[key]
        checkpoint[last] = value

    return change


def drop(*path: object) -> Callable[[dict], None]:
    def change(checkpoint: dict) -> None:
        *keys, last = path
        for key in keys:
            checkpoint = checkpoint[key]
        del checkpoint[last]

    return change


nan = float('nan')
DAMAGE = [
    ('args is of type list', put('args', [1])),
    ("in args, --lr must be a finite number, not 'fast'", put('args', 'lr', 'fast')),
    ('in args, --lr must be a finite number, not nan', put('args', 'lr', nan)),
    ('in args, --weight_decay must be at least 0, not -1', put('args', 'weight_decay', -1)),
    ('in args, --lr_backbone_names must be a list, not 5', put('args', 'lr_backbone_names', 5)),
    ('in args, --freeze must be text, not 5', put('args', 'freeze', [5])),
    ('in args, --lr_schedule must be one of step, cosine', put('args', 'lr_schedule', 'falling')),
    ('in args, --sgd must be on or off', put('args', 'sgd', 'no')),
    ('in args, --backbone must be text', put('args', 'backbone', 50)),
    ('class_map is of type NoneType', put('class_map', None)),
    ('class_map.names is missing', drop('class_map', 'names')),
    ('class_map.category_ids[0] is -1', put('class_map', 'category_ids', 0, -1)),
    ('class_map.names is of type str', put('class_map', 'names', 'cat')),
    ('class_map.category_ids and class_map.names are not of one length', put('class_map', 'names', ['cat'])),
    ('epoch is of type str', put('epoch', 'one')),
    ('epoch is of type float', put('epoch', nan)),
    ('epoch is -2', put('epoch', -2)),
    ('epoch is missing', drop('epoch')),
    ('lr_scheduler is of type list', put('lr_scheduler', [1])),
    ('lr_scheduler is missing', drop('lr_scheduler')),
    ('optimizer is of type int', put('optimizer', 1)),
    ('optimizer is missing', drop('optimizer')),
    ('optimizer.param_groups is missing', drop('optimizer', 'param_groups')),
    ('optimizer.state is of type list', put('optimizer', 'state', [])),
    (
        'optimizer.state.0.exp_avg holds values that are not finite',
        put('optimizer', 'state', 0, 'exp_avg', torch.full((2,), nan)),
    ),
    (
        'optimizer.state.0.exp_avg_sq holds values that are not finite or negative',
        put('optimizer', 'state', 0, 'exp_avg_sq', -torch.ones(2)),
    ),
    ('optimizer.state.0.step is -3.0', put('optimizer', 'state', 0, 'step', -3.0)),
    ('within_epoch is of type list', put('within_epoch', [4])),
    ('within_epoch.images is missing', drop('within_epoch', 'images')),
    ('within_epoch.images is -4', put('within_epoch', 'images', -4)),
    ('within_epoch.meters is of type int', put('within_epoch', 'meters', 4)),
    ('within_epoch.meters[0].names is missing', drop('within_epoch', 'meters', 0, 'names')),
    ('within_epoch.tallies is missing', drop('within_epoch', 'tallies')),
    (
        'within_epoch.meters and within_epoch.tallies are not of one length',
        put('within_epoch', 'tallies', []),
    ),
    ('rng[0] is of type int', put('rng', [4])),
    ('ema_updates is -1', put('ema_updates', -1)),
    ('model_ema is of type int', put('model_ema', 3)),
    ('in args, --lr_drop must be one value, not [1]', put('args', 'lr_drop', [1])),
    (
        "in args, --aug must be one of detr, flip, none, co_detr, lsj, not {'a': 1}",
        put('args', 'aug', {'a': 1}),
    ),
    ('in args, --lr_backbone_names must be text, not None', put('args', 'lr_backbone_names', [None])),
    ('epoch is of type Tensor', put('epoch', torch.zeros(2))),
    ('lr_scheduler.lr_lambdas is of type int', put('lr_scheduler', 'lr_lambdas', 3)),
    ('lr_scheduler.skipped is of type NoneType', put('lr_scheduler', 'skipped', None)),
    (
        'lr_scheduler.lr_lambdas[0].left_out is of type NoneType',
        put('lr_scheduler', 'lr_lambdas', [{'left_out': None}]),
    ),
    (
        'optimizer (ValueError: a tensor is [2] instead of',
        put('optimizer', 'state', 0, 'exp_avg', torch.ones(2)),
    ),
    ("optimizer (KeyError: 'step')", drop('optimizer', 'state', 0, 'step')),
    ('rng (ValueError: not enough values', put('rng', 0, 'numpy', [])),
    ("model_ema or ema_updates (KeyError: 'ema_updates')", drop('ema_updates')),
    (
        'model_ema.query_embed.weight holds values that are not finite',
        put('model_ema', 'query_embed.weight', torch.full((2,), nan)),
    ),
    ('model_ema or ema_updates (KeyError: ', put('model_ema', {})),
    (
        'model_ema or ema_updates (ValueError: a tensor is [2] instead of',
        put('model_ema', 'query_embed.weight', torch.ones(2)),
    ),
    ('scaler.scale is missing', put('scaler', {'a': 1.0})),
]


def copied(value: object) -> object:
    """A copy of dictionaries and lists; tensors are shared."""
    if isinstance(value, dict):
        return {key: copied(each) for key, each in value.items()}
    return [copied(each) for each in value] if isinstance(value, list) else value


@pytest.mark.parametrize(('problem', 'change'), DAMAGE, ids=[problem for problem, _ in DAMAGE])
def test_damaged_checkpoints_are_named(
    problem: str, change: Callable, whole: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = copied(whole)
    change(checkpoint)
    file = tmp_path / 'checkpoint.pth'
    torch.save(checkpoint, file)
    before = file.read_bytes()
    doors = [['--resume', 'auto']] + [['--eval', '--resume', str(file)]] * problem.startswith(
        ('args', 'in args, --backbone', 'class_map')
    )
    for door in doors:
        argv = [*DATA.replace('--eval_every 0', '').split(), '--output_dir', str(tmp_path), *door]
        with pytest.raises(SystemExit) as stop:
            run_command(main.main, main.get_args_parser(), argv)
        text = stop.value.code
        assert (
            isinstance(text, str) and text.startswith('error: ') and problem in text and '\n' not in text
        ), text
        assert str(file) in text and 'another checkpoint of its run' in text
    assert file.read_bytes() == before


def test_the_whole_checkpoint_goes_on(whole: dict, tmp_path: Path) -> None:
    """A flag that is None there, and by default is not, stays the default."""
    place = {'epoch': -1, 'within_epoch': whole['within_epoch'] | {'images': 0}}
    flags = whole['args'] | {'img_size': None, 'aug': None}
    torch.save(whole | place | {'args': flags}, tmp_path / 'checkpoint.pth')
    run(tmp_path, *SMALL, '--epochs', '1', '--resume', 'auto')
    assert load(tmp_path)['epoch'] == 0
