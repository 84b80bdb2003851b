"""
Numbers of flags with bounds, the parser of all programs, and `run_command`, which runs a program on its
command line.

An error of a user ends a program with one message, an error of the code with its traceback.
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

HTTP_ALLOWED: ContextVar[bool] = ContextVar('HTTP_ALLOWED', default=False)  # set by --allow_http
MOST = 10**12  # of numbers without another limit


@dataclass(frozen=True)
class Bounded:
    """Type of a flag: a finite number from `low` to `high`.

    whole: it is an integer. below: `high` itself is too large.
    """

    low: float
    high: float
    whole: bool
    below: bool = False

    def __call__(self, text: str) -> int | float:
        """Read a number from the command line; `check_bounds` checks its bounds."""
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
    """Return the type of an integer from `low` to `high`."""
    return Bounded(low, high, whole=True)


def float_range(low: float = 0.0, high: float = MOST, below: bool = False) -> Bounded:
    """Return the type of a number from `low` to `high`; below: `high` itself is too large."""
    return Bounded(low, high, whole=False, below=below)


def check_bounds(args: Namespace, parser: ArgumentParser) -> None:
    """Check the numbers among the flags of a parser, whatever set them. A value of None means the default.

    Raises:
        UserError: a number is out of its bounds.
    """
    for action in parser._actions:
        value = getattr(args, action.dest, None)
        if not isinstance(action.type, Bounded) or value is None:
            continue
        for number in value if isinstance(value, list | tuple) else [value]:
            if problem := action.type.problem(number):
                raise UserError(f'--{action.dest} {problem}')


class ParsedFlags(Namespace):
    """Parsed flags with the names of those that were given, which `vars` does not show."""

    __slots__ = ('given',)


def given_of(args: Namespace) -> frozenset[str]:
    """Return the names of the flags that were given; in a plain namespace, all of them."""
    return getattr(args, 'given', frozenset(vars(args)))


class FlagParser(ArgumentParser):
    """Parser of `ParsedFlags`, without abbreviations. It suggests known flags for a mistyped one."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{'formatter_class': argparse.RawDescriptionHelpFormatter} | options)
        self.allow_abbrev = False

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: None = None
    ) -> ParsedFlags:
        flags, unknown = self.parse_known_args(args, ParsedFlags())
        if unknown:
            self.error(f'unrecognized arguments: {" ".join(unknown)}{suggestions(self, unknown)}')
        unset = object()
        marked = super().parse_args(args, Namespace(**dict.fromkeys(vars(flags), unset)))
        flags.given = frozenset(flag for flag, value in vars(marked).items() if value is not unset)
        return flags


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return a text with known names that begin like a name or are spelled alike; '' if there are none."""
    names = list(known)
    similar = [other for other in names if other.startswith(name)] + difflib.get_close_matches(name, names, 3)
    suggested = list(dict.fromkeys(similar))[:3]
    return f': did you mean {" or ".join(suggested)}?' if suggested else ''


def suggestions(parser: ArgumentParser, unknown: Sequence[str]) -> str:
    """Return a text with options that are similar to unknown ones; '' if there are none."""
    options = [option for action in parser._actions for option in action.option_strings]
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            options += [
                name for command in action.choices.values() for name in command._option_string_actions
            ]
    words = [word.split('=')[0] for word in unknown if word.startswith('--')]
    texts = [word + text for word in words if (text := did_you_mean(word, options))]
    return f' ({" ".join(texts)})' if texts else ''


def add_http_flag(parser: Any) -> None:
    """Declare --allow_http in a parser or a group; `run_command` sets HTTP_ALLOWED to its value."""
    text = 'fetch from http:// URLs too, though anyone on the network could change the files'
    parser.add_argument('--allow_http', action='store_true', help=f'{text} (default: only https)')


def run_command(
    program: Callable[[Any], object], parser: ArgumentParser, argv: Sequence[str] | None = None
) -> None:
    """Run a program on its command line, and print its result.

    A `UserError`, or an `OSError` that the user can fix (`is_of_user`), ends it with the message alone and
    status 1. Every other exception is an error of the code and keeps its traceback.
    """
    args = parser.parse_args(argv)
    HTTP_ALLOWED.set(getattr(args, 'allow_http', False))
    try:
        check_bounds(args, parser)
        result = program(args)
    except UserError as error:
        # The error of a loader worker contains its traceback, of which users need the last line.
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
    if result is not None:
        print(result)


def is_of_user(error: OSError, args: Namespace) -> bool:
    """Return whether the disk is full, or the error is about the path of a flag, or one above or below."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    values = [value if isinstance(value, list | tuple) else [value] for value in vars(args).values()]
    words = [word for value in values for word in value if word and isinstance(word, str | Path)]
    flag_paths = [Path(os.path.abspath(word)) for word in words]
    names = [
        name for name in (error.filename, error.filename2) if isinstance(name, str | bytes | os.PathLike)
    ]
    paths = [Path(os.path.abspath(os.fsdecode(name))) for name in names]
    return any(a.is_relative_to(b) or b.is_relative_to(a) for a in flag_paths for b in paths)
