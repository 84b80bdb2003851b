"""What the entries of a run's checkpoint are, so that a damaged file is named before anything reads it."""

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
# A dictionary names the entries that must be there, with `?` those that may be; `...` stands for all others. A list holds what
# each element of one is; a type or a tuple of types is what a value must be an instance of.
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
    'scaler?': dict.fromkeys(('scale', 'growth_factor', 'backoff_factor', 'growth_interval', '_growth_tracker'), NOT_NEGATIVE),
    'ema_updates?': COUNT,
    'model_ema?': {...: FINITE},
    'metrics?': {'train_loss': FINITE, ...: (int, float)},
}  # fmt: skip
TWINS = {'class_map': ('category_ids', 'names'), 'within_epoch': ('meters', 'tallies')}


def faults(value: Any, expected: Any, name: str = '') -> Iterator[str]:
    """Yield which entries of a value are not as expected, and why. name: what the value is called."""
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
    """Require that what is read of a checkpoint beside its weights is of the right type, and finite.

    resume: a run goes on, so the state of the optimizer and its place are read too, unless the file holds weights alone.

    Raises:
        UserError: it is damaged; the message names the file and the entry.
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
    """Name file and entry if what is restored in the block does not fit this run, in a way that `check_entries` cannot tell."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except (ValueError, TypeError, LookupError, AttributeError, RuntimeError) as error:
        reason = (str(error).splitlines() or [''])[0][:150]
        raise damaged(source, f'{entry} ({type(error).__name__}: {reason})', resume=True) from error
