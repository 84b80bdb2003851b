"""Types and ranges of the entries of a run's checkpoint, so that a damaged file is refused before anything
reads it.
"""

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
    """A finite number, or a tensor of such, of at least `low`. whole: an integer."""

    low: float = -math.inf
    whole: bool = False


COUNT, NOT_NEGATIVE, FINITE = Number(0, whole=True), Number(0), Number()
# In a dictionary, names with `?` may be missing, and `...` stands for all other names. A list has what every
# element must be. A value must be an instance of a type or of one in a tuple.
WEIGHTS = {'args?': (dict, Namespace), 'class_map?': {'category_ids': [COUNT], 'names': [(str, type(None))]}}
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
    'scaler?': dict.fromkeys(('scale', 'growth_factor', 'backoff_factor', 'growth_interval', '_growth_tracker'), NOT_NEGATIVE),
    'ema_updates?': COUNT,
    'model_ema?': {...: FINITE},
    'metrics?': {'train_loss': FINITE, ...: (int, float)},
}  # fmt: skip
TWINS = {'class_map': ('category_ids', 'names'), 'within_epoch': ('meters', 'tallies')}


def faults(value: Any, expected: Any, name: str = '') -> Iterator[str]:
    """Yield the entries of a value that are not as expected, and why. name: name of the value in messages."""
    if isinstance(expected, Number):
        yield from number_faults(value, expected, name)
    elif isinstance(expected, dict) and isinstance(value, Mapping):
        start = f'{name}.' if name else ''
        known = {str(key).removesuffix('?'): each for key, each in expected.items() if key is not ...}
        needed = [key for key in known if key in expected]
        yield from (f'{start}{key} is missing' for key in needed if key not in value)
        for key, each in value.items():
            if key in known or ... in expected:
                yield from faults(each, known.get(key, expected.get(...)), f'{start}{key}')
    elif isinstance(expected, list) and isinstance(value, list | tuple):
        for index, each in enumerate(value):
            yield from faults(each, expected[0], f'{name}[{index}]')
    elif isinstance(expected, dict | list) or not isinstance(value, expected):
        yield f'{name} is of type {type(value).__name__}'


def number_faults(value: Any, expected: Number, name: str) -> Iterator[str]:
    if isinstance(value, Tensor) and not expected.whole:
        if not value.isfinite().all() or (value < expected.low).any():
            yield f'{name} holds values that are not finite{" or negative" * (expected.low == 0)}'
    elif not isinstance(value, int if expected.whole else int | float) or isinstance(value, bool):
        yield f'{name} is of type {type(value).__name__}'
    elif not math.isfinite(value) or value < expected.low:
        yield f'{name} is {value}'


def check_entries(checkpoint: Mapping, source: str, resume: bool) -> None:
    """Require that the entries of a checkpoint other than its weights have the right type, and are finite.

    resume: check also the state of a run that is resumed, unless the file holds weights alone.

    Raises:
        UserError: the checkpoint is damaged; the message names the file and the entry.
    """
    expected = WEIGHTS | (
        STATE if resume and {'epoch', 'optimizer', 'lr_scheduler'} & checkpoint.keys() else {}
    )
    lengths = (
        f'{name}.{one} and {name}.{other} are not of one length'
        for name, (one, other) in TWINS.items()
        if name in checkpoint
        and name + '?' in expected
        and len(checkpoint[name][one]) != len(checkpoint[name][other])
    )
    if problem := next(chain(faults(checkpoint, expected), lengths), None):
        raise damaged(source, problem, resume)


def damaged(source: str, problem: str, resume: bool) -> UserError:
    return UserError(
        f'{source} is damaged: {problem}. Go on from another checkpoint of its run'
        + (', or start from its weights with --pretrained' if resume else '')
    )


@contextmanager
def damage_named(source: str, entry: str) -> Iterator[None]:
    """Name file and entry if a state that is restored in the block does not fit this run, which
    `check_entries` cannot see.
    """
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except (ValueError, TypeError, LookupError, AttributeError, RuntimeError) as error:
        reason = (str(error).splitlines() or [''])[0][:150]
        raise damaged(source, f'{entry} ({type(error).__name__}: {reason})', resume=True) from error
