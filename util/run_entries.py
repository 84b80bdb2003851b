"""Types and ranges of the entries of a checkpoint. A damaged file is refused before anything uses it."""

import math
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from util.errors import UserError


@dataclass(frozen=True)
class Number:
    """A finite number that is at least `low`, or a tensor of such numbers. whole: an integer."""

    low: float = -math.inf
    whole: bool = False


COUNT, NOT_NEGATIVE, FINITE = Number(0, whole=True), Number(0), Number()
SCALER = ('scale', 'growth_factor', 'backoff_factor', 'growth_interval', '_growth_tracker')
# What a value must be: an instance of a type, or of one in a tuple; a list of elements like the given one; or
# a dictionary. There a name with `?` may be missing, and `...` stands for all other names.
WEIGHTS = {
    'args?': (dict, Namespace),
    'class_map?': {'category_ids': [COUNT], 'names': [(str, type(None))]},
}
METER = {
    'names': [str],
    'totals?': {...: FINITE},
    'pending?': (Tensor, type(None)),
    'num_pending?': COUNT,
    'count?': COUNT,
}
STATE = {
    'epoch': Number(-1, whole=True),
    'optimizer': {
        'state': {...: {'step?': NOT_NEGATIVE, 'exp_avg_sq?': NOT_NEGATIVE, ...: FINITE}},
        'param_groups': [{'params': [COUNT]}],
    },
    'lr_scheduler': {
        'step_size?': Number(1, whole=True),
        'milestones?': Counter,
        'skipped?': [COUNT],
        'lr_lambdas?': [{'left_out?': [COUNT]}],  # of files before `skipped`
    },
    'within_epoch?': {'images': COUNT, 'meters': [METER], 'tallies': [{...: FINITE}]},
    'rng?': [{'python': tuple, 'numpy': list, 'torch': Tensor}],
    'scaler?': dict.fromkeys(SCALER, NOT_NEGATIVE),
    'ema_updates?': COUNT,
    'model_ema?': {...: FINITE},
    'metrics?': {'train_loss': FINITE, ...: (int, float)},
}
SAME_LENGTH = {'class_map': ('category_ids', 'names'), 'within_epoch': ('meters', 'tallies')}


def problems(value: Any, expected: Any, name: str = '') -> Iterator[str]:
    """Yield the problems of a value and its elements. name: name of the value in messages."""
    if isinstance(expected, Number):
        yield from number_problems(value, expected, name)
    elif isinstance(expected, dict) and isinstance(value, Mapping):
        prefix = f'{name}.' if name else ''
        entries = {str(key).removesuffix('?'): entry for key, entry in expected.items() if key is not ...}
        yield from (f'{prefix}{key} is missing' for key in entries if key in expected and key not in value)
        for key, element in value.items():
            if key in entries or ... in expected:
                yield from problems(element, entries.get(key, expected.get(...)), f'{prefix}{key}')
    elif isinstance(expected, list) and isinstance(value, list | tuple):
        for index, element in enumerate(value):
            yield from problems(element, expected[0], f'{name}[{index}]')
    elif isinstance(expected, dict | list) or not isinstance(value, expected):
        yield f'{name} is of type {type(value).__name__}'


def number_problems(value: Any, expected: Number, name: str) -> Iterator[str]:
    if isinstance(value, Tensor) and not expected.whole:
        if not value.isfinite().all() or (value < expected.low).any():
            yield f'{name} holds values that are not finite{" or negative" * (expected.low == 0)}'
    elif not isinstance(value, int if expected.whole else int | float) or isinstance(value, bool):
        yield f'{name} is of type {type(value).__name__}'
    elif not math.isfinite(value) or value < expected.low:
        yield f'{name} is {value}'


def check_entries(checkpoint: Mapping, source: str, resume: bool) -> None:
    """Require that the entries of a checkpoint, except its weights, have the right type and are finite.

    resume: check also the state of a run that is resumed, unless the file has weights only.

    Raises:
        UserError: the checkpoint is damaged; the message names the file and the entry.
    """
    has_state = resume and {'epoch', 'optimizer', 'lr_scheduler'} & checkpoint.keys()
    expected = WEIGHTS | (STATE if has_state else {})
    lengths = (
        f'{name}.{one} and {name}.{other} are not of one length'
        for name, (one, other) in SAME_LENGTH.items()
        if name in checkpoint and f'{name}?' in expected
        if len(checkpoint[name][one]) != len(checkpoint[name][other])
    )
    if problem := next(chain(problems(checkpoint, expected), lengths), None):
        raise damaged(source, problem, resume)


def damaged(source: str, problem: str, resume: bool) -> UserError:
    remedy = ', or start from its weights with --pretrained' if resume else ''
    return UserError(f'{source} is damaged: {problem}. Go on from another checkpoint of its run{remedy}')


@contextmanager
def damage_named(source: str, entry: str) -> Iterator[None]:
    """Name file and entry if a state that is restored in the block does not fit this run.

    `check_entries` cannot know this.
    """
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except (ValueError, TypeError, LookupError, AttributeError, RuntimeError) as error:
        reason = (str(error).splitlines() or [''])[0][:150]
        raise damaged(source, f'{entry} ({type(error).__name__}: {reason})', resume=True) from error
