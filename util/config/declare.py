"""What a flag is: one record with every fact about it. Nothing here or in its neighbours imports PyTorch."""

from argparse import BooleanOptionalAction, Namespace
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import Any

from util.bounds import Bounded

# Kinds, by who receives a flag: build_detector; the postprocessors; build_supervision and the optimizer; the data; main and engine.
NETWORK, DETECTION, TRAINING, DATA, RUN = 'network', 'detection', 'training', 'data', 'run'
SWITCH, YES_NO, TEXT = 'switch', 'yes or no', 'text'  # types that are no number and no choice
ALWAYS, UNLESS_CONDITIONAL = 'always', 'unless conditional'
BY_NAMES = 'by names'
FAMILIES = ('detr', 'conditional', 'deformable', 'dino')  # dino: Deformable DETR with DINO's decoder
TITLES = {'detr': 'DETR', 'conditional': 'Conditional DETR', 'deformable': 'Deformable DETR'}


class ByFamily(dict):
    """A default for each of `FAMILIES`."""

    def __init__(self, *values: object) -> None:
        super().__init__(zip(FAMILIES, values, strict=True))

    def words(self) -> str:
        names: dict[str, list[str]] = {}
        for family, value in self.items():
            text = f'{value:g}' if isinstance(value, int | float) else ' '.join(value or ()) or 'none'
            if value is not None:
                names.setdefault(text, []).append(family)
        return ', '.join(f'{text} for {" and ".join(found)}' for text, found in names.items())


@dataclass(frozen=True)
class Usual:
    """A default that depends on other flags: in words, and computed from flags of which those before it are settled."""

    text: str
    of: Callable[[Namespace], object]


@dataclass(frozen=True)
class Flag:
    """All facts about a flag.

    type: SWITCH, YES_NO, TEXT, a `Bounded`, or a tuple of choices.
    default: a value, `ByFamily` or `Usual`. unset: words for a default that the value does not tell.
    families: those that it is for; () is all. backbones: beginnings of the names of those that it is for.
    needs: a flag without which it says nothing. implied_by: a switch that turns it on. chooses: giving it makes a Deformable DETR.
    aliases: names in official programs, on their command lines and in their checkpoints. same: two names of one value.
    compared: a checkpoint must have been trained with the same value; BY_NAMES: names of its weights tell.
    adopted: --eval and --pretrained take it from the checkpoint, if it is a name beside that flag alone; else only --resume does. launch: it belongs to one start of the program,
    and nothing takes it from a checkpoint.
    command: it is an option of main.py; else only a namespace or a checkpoint sets it. hidden: --help shows it under `hidden` alone.
    first: --help alone shows it. special: its families are not those of its topic.
    """

    name: str
    type: Any
    default: Any
    help: str
    kind: str = ''
    topic: str = ''
    families: tuple[str, ...] = ()
    backbones: tuple[str, ...] = ()
    unset: str = ''
    needs: str = ''
    implied_by: str = ''
    chooses: str = ''
    aliases: tuple[str, ...] = ()
    same: dict[str, str] | None = None
    nargs: str | int | None = None
    metavar: Any = None
    option: str = ''
    compared: bool | str = True
    adopted: bool | str = True
    launch: bool = False
    command: bool = True
    hidden: bool = False
    first: bool = False
    special: bool = False

    def default_of(self, args: Namespace) -> Any:
        """Return the default beside these flags, of which `family` and the flags before it are settled."""
        if isinstance(self.default, ByFamily):
            return self.default['dino' if args.dino else args.family]
        value = self.default.of(args) if isinstance(self.default, Usual) else self.default
        return list(value) if isinstance(value, list) else value

    def fits(self, args: Namespace) -> bool:
        return not self.families or args.family in self.families

    def problem(self, value: Any) -> str | None:
        """Return what is wrong with a value, wherever it comes from, or None; a value of None is left to the default."""
        if value is None:
            return None
        several = isinstance(value, list | tuple)
        if several != bool(self.nargs) and not isinstance(
            value, bool
        ):  # older programs have some as on or off
            return f'must be {"one value" if several else "a list"}, not {value!r}'
        return next(filter(None, map(self.problem_of_one, value if several else [value])), None)

    def problem_of_one(self, value: Any) -> str | None:
        if isinstance(self.type, Bounded):
            return self.type.problem(value)
        if (
            isinstance(self.type, tuple)
            and value not in self.type
            and not (self.nargs and isinstance(value, bool))
        ):
            return f'must be one of {", ".join(map(str, self.type))}, not {value!r}'
        if self.type == TEXT and not isinstance(value, str | PurePath):
            return f'must be text, not {value!r}'
        return (
            f'must be on or off, not {value!r}'
            if self.type in (SWITCH, YES_NO) and not isinstance(value, bool)
            else None
        )

    def full_help(self) -> str:
        words = self.unset
        if isinstance(self.default, ByFamily):
            words = self.default.words()
        elif isinstance(self.default, Usual):
            words = self.default.text
        elif not words and self.default not in (None, False, True, '', []):
            words = f'{self.default:g}' if isinstance(self.default, float) else str(self.default)
        notes = [' and '.join(TITLES[family] for family in self.families) + ' only'] if self.special else []
        notes += [f'needs --{self.needs}'] if self.needs else []
        notes += [f'default: {words}'] if words else []
        return (
            f'{self.help} ({"; ".join(notes)})'.replace('%', '%%') if notes else self.help.replace('%', '%%')
        )

    def add_to(self, group: Any) -> None:
        """Declare it to argparse, with its default if that depends on no other flag, else None."""
        late = isinstance(self.default, ByFamily | Usual)
        facts: dict[str, Any] = {
            'dest': self.name,
            'help': self.full_help(),
            'default': None if late else self.default,
        }
        if self.type == SWITCH:
            facts['action'] = 'store_false' if self.default is True else 'store_true'
        elif self.type == YES_NO:
            facts['action'] = BooleanOptionalAction
        else:
            facts |= {'nargs': self.nargs, 'metavar': self.metavar}
        if isinstance(self.type, tuple):
            facts |= {'choices': self.type, 'type': type(self.type[0])}
        elif isinstance(self.type, Bounded):
            facts['type'] = self.type
        group.add_argument(*(f'--{name}' for name in (self.option or self.name, *self.aliases)), **facts)


def topic(title: str, kind: str, families: tuple[str, ...] = ()) -> Callable[..., list[Flag]]:
    """Return what gives its arguments, flags, a topic, and a kind and families where they have none of their own."""

    def place(*flags: Flag) -> list[Flag]:
        return [
            replace(
                flag,
                topic=title,
                kind=flag.kind or kind,
                families=flag.families or families,
                special=bool(flag.families),
            )
            for flag in flags
        ]

    return place
