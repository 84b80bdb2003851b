"""Numbers of flags with the bounds within which they make sense, declared where the flag is."""

import argparse
import math
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


def int_range(low: int, high: int = MOST) -> Bounded:
    """Return the type of a whole number between two bounds, which belong to it."""
    return Bounded(low, high, whole=True)


def float_range(low: float = 0.0, high: float = MOST, below: bool = False) -> Bounded:
    """Return the type of a number between two bounds, which belong to it; below: but not the upper one."""
    return Bounded(low, high, whole=False, below=below)


def check_bounds(args: Namespace, parser: ArgumentParser) -> None:
    """Check the numbers among a parser's flags, which may not come from a command line; None is left to its default.

    Raises:
        UserError: a number is out of its bounds.
    """
    for action in parser._actions:
        given = getattr(args, action.dest, None)
        if not isinstance(action.type, Bounded) or given is None:
            continue
        for value in given if isinstance(given, list | tuple) else [given]:
            if problem := action.type.problem(value):
                raise UserError(f'--{action.dest} {problem}')
