"""What a flag is: one record with every fact about it. Nothing here or in its neighbours imports PyTorch."""

import re
from argparse import BooleanOptionalAction, Namespace
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Any

from util.flags import Bounded

from .networks import TITLES, VARIANTS, Usual, decoder_of, kind_of

# Kinds, by who receives a flag: build_detector; the postprocessors; build_supervision and the optimizer; the
# data; main and engine.
NETWORK, DETECTION, TRAINING, DATA, RUN = 'network', 'detection', 'training', 'data', 'run'
SWITCH, YES_NO, TEXT = 'switch', 'yes or no', 'text'  # types that are no number and no choice
ALWAYS, UNLESS_CONDITIONAL = 'always', 'unless conditional'
BY_NAMES = 'by names'
TEXTS = Path(__file__).with_name('help.txt')


class ByFamily(dict):
    """A default for each family."""

    def __init__(self, *values: object) -> None:
        super().__init__(zip(TITLES, values, strict=True))


def in_words(value: Any) -> str:
    if isinstance(value, Usual):
        return value.text
    if isinstance(value, bool):
        return 'yes' if value else 'no'
    if isinstance(value, int | float):
        return f'{value:g}'
    return value if isinstance(value, str) else ' '.join(value or ()) or 'none'


@dataclass(frozen=True)
class Flag:
    """All facts about a flag.

    type: SWITCH, YES_NO, TEXT, a `Bounded`, or a tuple of choices. default: a value, `ByFamily` or `Usual`;
    records of `networks.DECODERS` may have another one. unset: words for a default that the value does not
    show. families: those that it is for; () is all. some_backbones: it is for those alone whose record in
    `networks.KINDS` names it. needs: a flag without which it says nothing. chooses: giving it makes a
    Deformable DETR. aliases: names in official programs, on their command lines and in their checkpoints.
    same: two names of one value. compared: a checkpoint must have been trained with the same value; BY_NAMES:
    names of its weights show it. adopted: --eval and --pretrained take it from the checkpoint, if it is a
    name beside that flag alone; else only --resume does. launch: it belongs to one start of the program, and
    nothing takes it from a checkpoint. command: it is an option of main.py; else only a namespace or a
    checkpoint sets it. hidden: --help shows it under `hidden` alone. first: --help alone shows it. special:
    its families are not those of its topic.
    """

    name: str
    type: Any
    default: Any
    help: str = ''
    kind: str = ''
    topic: str = ''
    families: tuple[str, ...] = ()
    some_backbones: bool = False
    unset: str = ''
    needs: str = ''
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

    @property
    def of_variants(self) -> dict[str, Any]:
        """Defaults of the variants of the decoder that have another one than their family, by their names."""
        return {
            variant.name: variant.defaults[self.name] for variant in VARIANTS if self.name in variant.defaults
        }

    @property
    def depends_on_flags(self) -> bool:
        return any(isinstance(default, Usual) for default in (self.default, *self.of_variants.values()))

    def default_of(self, args: Namespace) -> Any:
        """Return the default beside these flags, of which `family` and the flags before it are settled."""
        default = decoder_of(args).defaults.get(self.name, self.default)
        if isinstance(default, ByFamily):
            default = default[args.family]
        value = default.of(args) if isinstance(default, Usual) else default
        return list(value) if isinstance(value, list) else value

    def fits(self, args: Namespace) -> bool:
        return not self.families or args.family in self.families

    def fits_backbone(self, args: Namespace) -> bool:
        return not self.some_backbones or self.name in kind_of(args.backbone).supports

    def problem(self, value: Any) -> str | None:
        """Return what is wrong with a value, wherever it comes from, or None; a value of None is left to the
        default.
        """
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
        notes = [' and '.join(TITLES[family] for family in self.families) + ' only'] if self.special else []
        notes += [f'needs --{self.needs}'] if self.needs else []
        words = self.default_in_words()
        notes += [f'default: {words}'] if words else []
        return (
            f'{self.help} ({"; ".join(notes)})'.replace('%', '%%') if notes else self.help.replace('%', '%%')
        )

    def default_in_words(self) -> str:
        """Describe the default; of a family or variant with its name."""
        if not isinstance(self.default, ByFamily):
            plain = self.unset
            if isinstance(self.default, Usual) or (
                not plain and self.default not in (None, False, True, '', [])
            ):
                plain = in_words(self.default)
            others = [f'{in_words(value)} with --{name}' for name, value in self.of_variants.items()]
            return ', '.join(
                [*others, f'else {plain or in_words(self.default)}'] if others else filter(None, [plain])
            )
        names: dict[str, list[str]] = {}
        for name, value in (self.default | self.of_variants).items():
            if value is not None:
                names.setdefault(in_words(value), []).append(name)
        return ', '.join(f'{text} for {" and ".join(found)}' for text, found in names.items())

    def add_to(self, group: Any) -> None:
        """Declare it to argparse, with its default if that depends on no other flag, else None."""
        late = isinstance(self.default, ByFamily | Usual) or bool(self.of_variants)
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


def group(kind: str, families: tuple[str, ...] = ()) -> Callable[..., list[Flag]]:
    """Return a function that gives flags a kind and families where they have none of their own."""

    def place(*flags: Flag) -> list[Flag]:
        return [
            replace(
                flag, kind=flag.kind or kind, families=flag.families or families, special=bool(flag.families)
            )
            for flag in flags
        ]

    return place


def table(*flags: Flag) -> dict[str, Flag]:
    """Return flags by name, with their texts and topics from `help.txt`.

    A flag that has `help` of its own is not in the file. Its topic is then that of the flag before it, unless
    it has a topic of its own too.
    """
    texts = read_texts()
    named, topic = {}, ''
    for flag in flags:
        if not flag.help:
            topic, text, unset = texts[flag.name]
            flag = replace(flag, topic=topic, help=text, unset=unset)
        named[flag.name] = replace(flag, topic=flag.topic or topic)
    return named


def read_texts() -> dict[str, tuple[str, str, str]]:
    """Read `help.txt`: topic, text, and words for the default ('' if the value shows it) of each flag."""
    texts, topic = {}, ''
    for paragraph in re.split(r'\n+(?=\S)', TEXTS.read_text(encoding='utf-8')):
        words = ' '.join(paragraph.split())
        if words.startswith('# '):
            topic = words[2:]
        elif words:
            name, _, text = words.partition(': ')
            text, _, unset = text.partition(' (default: ')
            texts[name] = topic, text, unset.removesuffix(')')
    return texts
