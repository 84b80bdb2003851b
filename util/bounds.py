"""Numbers of flags with the bounds within which they make sense, declared where the flag is."""

import argparse
import math
import os
from argparse import ArgumentParser, Namespace
from dataclasses import dataclass
from typing import Any

from util.errors import UserError

MOST = 10**12


@dataclass(frozen=True)
class Bounded:
    """Type of a flag: a finite number from `low` to `high`. whole: it is an integer. below: `high` itself is too large."""

    low: float
    high: float
    whole: bool
    below: bool = False

    def __call__(self, text: str) -> int | float:
        """Read a number from the command line; `check_bounds` judges it, wherever it comes from."""
        try:
            return int(text) if self.whole else float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f'{text!r} is not a {"whole " * self.whole}number') from None

    def problem(self, value: Any) -> str | None:
        """Return what is wrong with a value, or None."""
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or (self.whole and value != int(value)):
            return f'must be a {"whole" if self.whole else "finite"} number, not {value!r}'
        if value < self.low:
            return f'must be at least {self.low:g}, not {value:g}'
        if value > self.high or (self.below and value == self.high):
            return f'must be {"less than" if self.below else "at most"} {self.high:g}, not {value:g}'
        return None


def whole(low: int, high: int = MOST) -> Bounded:
    """Return the type of a whole number between two bounds, which belong to it."""
    return Bounded(low, high, whole=True)


def real(low: float = 0.0, high: float = MOST, below: bool = False) -> Bounded:
    """Return the type of a number between two bounds, which belong to it; below: but not the upper one."""
    return Bounded(low, high, whole=False, below=below)


def check_bounds(args: Namespace, parser: ArgumentParser) -> None:
    """Check the values of a parser's flags, which may not come from a command line; None is left to its default.

    Raises:
        UserError: a number is out of its bounds, or a value is of a type or word that the command line would not give.
    """
    for action in parser._actions:
        given = getattr(args, action.dest, None)
        if given is not None and (problem := problem_of(action, given)):
            raise UserError(f'--{action.dest} {problem}')


def problem_of(action: argparse.Action, given: Any) -> str | None:
    """Return what is wrong with the value of a flag, or None."""
    if action.nargs == 0:
        return None if isinstance(given, bool) else f'must be on or off, not {given!r}'
    several = isinstance(given, list | tuple)
    if several != bool(action.nargs) and not isinstance(given, bool):  # older programs have some as on or off
        return f'must be {"one value" if several else "a list"}, not {given!r}'
    for value in given if several else [given]:
        problem: str | None
        if not isinstance(value, str | int | float | os.PathLike):
            problem = f'must be text or a number, not {value!r}'
        elif isinstance(action.type, Bounded):
            problem = action.type.problem(value)
        elif action.choices and value not in action.choices and not isinstance(value, bool):
            problem = f'must be one of {", ".join(map(str, action.choices))}, not {value!r}'
        else:
            text = action.type is None and not isinstance(value, str | os.PathLike | bool)
            problem = f'must be text, not {value!r}' if text else None
        if problem:
            return problem
    return None
