"""Parse command lines, and run a program on one: errors of users end in one message, faults of the code in a
traceback.
"""

import argparse
import difflib
import errno
import math
import os
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from util.errors import UserError

HTTP_ALLOWED: ContextVar[bool] = ContextVar('HTTP_ALLOWED', default=False)  # by --allow_http of this program
MOST = 10**12  # of numbers without another limit


@dataclass(frozen=True)
class Bounded:
    """Type of a flag: a finite number from `low` to `high`. whole: it is an integer. below: `high` itself is
    too large.
    """

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
    """Check the numbers among a parser's flags, which may not come from a command line; None is left to its
    default.

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


class ParsedFlags(Namespace):
    """Parsed flags that remember which were given; `vars` and copies of a Namespace do not show that."""

    __slots__ = ('given',)


def given_of(args: Namespace) -> frozenset[str]:
    """Return the names of the flags that were given; all of a plain namespace, which Python code has made."""
    return getattr(args, 'given', frozenset(vars(args)))


class FlagParser(ArgumentParser):
    """Parser whose result is a `ParsedFlags`. It knows no abbreviations, and answers a mistyped flag with
    those nearest to it.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{'formatter_class': argparse.RawDescriptionHelpFormatter} | options)
        self.allow_abbrev = False

    def parse_args(self, args: Sequence[str] | None = None, namespace: None = None) -> ParsedFlags:  # type: ignore[override]
        flags, unknown = self.parse_known_args(args, ParsedFlags())
        if unknown:
            self.error(f'unrecognized arguments: {" ".join(unknown)}{suggestions(self, unknown)}')
        unset = object()
        marked = super().parse_args(args, Namespace(**dict.fromkeys(vars(flags), unset)))
        flags.given = frozenset(flag for flag, value in vars(marked).items() if value is not unset)
        return flags


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return a text that names the known names that begin like this one or are spelled alike; '' if there are
    none.
    """
    known = list(known)
    alike = [other for other in known if other.startswith(name)] + difflib.get_close_matches(name, known, 3)
    near = list(dict.fromkeys(alike))[:3]
    return f': did you mean {" or ".join(near)}?' if near else ''


def suggestions(parser: ArgumentParser, unknown: Sequence[str]) -> str:
    """Return the text that names, for each unknown option, those that are nearest to it; or ''."""
    options = [option for action in parser._actions for option in action.option_strings]
    for commands in (
        action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction)
    ):
        options += [option for command in commands.values() for option in command._option_string_actions]
    words = [word.split('=')[0] for word in unknown if word.startswith('--')]
    found = [word + text for word in words if (text := did_you_mean(word, options))]
    return f' ({" ".join(found)})' if found else ''


def add_http_flag(parser: Any) -> None:
    """Declare --allow_http in a parser or a group; `run_command` sets HTTP_ALLOWED to it."""
    parser.add_argument(
        '--allow_http', action='store_true',
        help='fetch from http:// addresses too, though anybody on the way can change what comes (default: https alone)',
    )  # fmt: skip


def run_command(
    program: Callable[[Any], object], parser: ArgumentParser, argv: Sequence[str] | None = None
) -> None:
    """Run a program on its command line, and print what it returns.

    A `UserError`, or an `OSError` that the user must settle (`is_of_user`), ends it with the message alone
    and status 1. Every other exception is a fault of the code and keeps its traceback.
    """
    args = parser.parse_args(argv)
    HTTP_ALLOWED.set(getattr(args, 'allow_http', False))
    try:
        check_bounds(args, parser)
        found = program(args)
    except UserError as error:
        # A loader worker's error holds its traceback, whose last line says all.
        text = str(error)
        sys.exit(f'error: {text.strip().splitlines()[-1] if "Original Traceback" in text else text}')
    except OSError as error:
        if not is_of_user(error, args):
            raise
        sys.exit(f'error: {error}')
    except KeyboardInterrupt:
        sys.exit(130)
    except RuntimeError as error:
        if not str(error).startswith('DataLoader worker'):
            raise
        sys.exit(
            f'error: {error} A worker was killed, perhaps for lack of memory: lower --num_workers, and '
            '--resume auto'
        )
    if found is not None:
        print(found)


def is_of_user(error: OSError, args: Namespace) -> bool:
    """Return whether the disk is full, or the error is about a path that a flag names, or one below or above
    it.
    """
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    values = [
        value for value in vars(args).values() if value and isinstance(value, str | Path | list | tuple)
    ]
    words = [word for value in values for word in ([value] if isinstance(value, str | Path) else value)]
    named = [Path(os.path.abspath(word)) for word in words if isinstance(word, str | Path)]
    names = [
        name for name in (error.filename, error.filename2) if isinstance(name, str | bytes | os.PathLike)
    ]
    about = [Path(os.path.abspath(os.fsdecode(name))) for name in names]
    return any(one.is_relative_to(other) or other.is_relative_to(one) for one in named for other in about)
