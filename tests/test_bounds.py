"""Numbers that make no sense are refused wherever flags come from."""

from argparse import Namespace

import pytest

from main import get_args_parser
from util.config.settle import EVERYTHING, settle
from util.flags import Bounded, float_range, int_range


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
        (float_range(), float('inf'), 'must be a finite number, not inf'),
        (float_range(), -1e-9, 'must be at least 0, not -1e-09'),
        (int_range(1, 5), 5, None),
        (int_range(1, 5), 5.0, None),
        (float_range(0, 1), 1, None),
    ],
)
def test_bounds(kind: Bounded, value: object, problem: str | None) -> None:
    assert kind.problem(value) == problem


def test_every_number_of_main_has_bounds() -> None:
    for action in get_args_parser()._actions:
        assert isinstance(action.type, Bounded) or action.type is None or action.choices, action.dest


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        ('--nheads 0', '--nheads must be at least 1, not 0'),
        ('--num_queries 1000000000', '--num_queries must be at most 100000, not 1e\\+09'),
        ('--num_feature_levels 0 --deformable', '--num_feature_levels must be at least 1'),
        ('--hidden_dim 0', '--hidden_dim must be at least 2'),
        ('--dropout 1', '--dropout must be less than 1'),
        ('--clip_max_norm nan', '--clip_max_norm must be a finite number, not nan'),
        ('--clip_max_norm -1', '--clip_max_norm must be at least 0'),
        ('--focal_alpha 2', '--focal_alpha must be at most 1, not 2'),
        ('--lr inf', '--lr must be a finite number'),
        ('--giou_loss_coef -2', '--giou_loss_coef must be at least 0'),
        ('--lr_drop_epochs 3 0', '--lr_drop_epochs must be at least 1, not 0'),
    ],
)
def test_numbers_that_make_no_sense(flags: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settle(get_args_parser().parse_args([*flags.split(), '--backbone_weights', 'none']))


@pytest.mark.parametrize(
    ('flag', 'message'),
    [
        ('img_size', 'at least 16, not 1'),
        ('num_workers', 'at least 0, not -1'),
        ('print_freq', 'at least 1, not 0'),
    ],
)
def test_numbers_of_data_and_run(flag: str, message: str) -> None:
    value = int(message.split()[-1])
    args = get_args_parser().parse_args([f'--{flag}={value}', '--backbone_weights', 'none'])
    with pytest.raises(ValueError, match=f'--{flag} must be {message}'):
        settle(args, EVERYTHING)


def test_bounds_hold_without_a_command_line() -> None:
    with pytest.raises(ValueError, match='--nheads must be a whole number'):
        settle(Namespace(nheads='8'))
    with pytest.raises(SystemExit):
        get_args_parser().parse_args(['--img_size', '800px'])
