"""What a flag is: one record with every fact about it. No module of this folder imports PyTorch."""

import re
from argparse import BooleanOptionalAction, Namespace
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Any

from util.command_line import Bounded

from .networks import TITLES, VARIANTS, Usual, decoder_of, kind_of

# Kinds of flags, by what reads them: build_detector; the postprocessors; build_supervision and the optimizer;
# the datasets and loaders; main.py and engine.py.
NETWORK, DETECTION, TRAINING, DATA, RUN = 'network', 'detection', 'training', 'data', 'run'
SWITCH, YES_NO, TEXT = 'switch', 'yes or no', 'text'  # types other than numbers and choices
ALWAYS, UNLESS_CONDITIONAL = 'always', 'unless conditional'
BY_NAMES = 'by names'
TEXTS = Path(__file__).with_name('help.txt')


class ByFamily(dict):
    """A default for each family."""

    def __init__(self, *values: object) -> None:
        super().__init__(zip(TITLES, values, strict=True))


@dataclass(frozen=True)
class Flag:
    """All facts about a flag.

    Value:
        type: SWITCH, YES_NO, TEXT, a `Bounded`, or a tuple of choices.
        default: a value, `ByFamily` or `Usual`; a record of `networks.DECODERS` may have another one.
        families: families that have the flag; () means all. some_backbones: only backbones have it whose
            record in `networks.KINDS` names it.
        needs: another flag, without which it has no effect.
        chooses: the flag makes the model a Deformable DETR: ALWAYS, or UNLESS_CONDITIONAL.

    Command line:
        command: it is an option of main.py; otherwise only a namespace or a checkpoint sets it.
        option: name of the option, if it is not the flag's. nargs: as in argparse.
        aliases: names in official programs, on their command lines and in their checkpoints.
        help, topic, metavar, unset: from `help.txt`. unset: words for a default that the value does not show.
        first: plain --help shows it. hidden: only `--help hidden` shows it.
        show_families: the help names its families, which are not those of its topic.

    Checkpoints:
        compared: a checkpoint must have been trained with the same value. BY_NAMES: the names of its weights
            show it.
        same: values that mean the same as another one.
        adopted: --eval and --pretrained take it from the checkpoint; a name: only if that flag is given.
            --resume takes it in any case.
        launch: it belongs to one start of the program, and is neither compared with a checkpoint nor taken
            from it.
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
    show_families: bool = False

    @property
    def is_compared(self) -> bool:
        return self.compared is True and not self.launch

    @property
    def variant_defaults(self) -> dict[str, Any]:
        """Defaults of the variants of the decoder that have another one than their family, by their names."""
        variants = [variant for variant in VARIANTS if self.name in variant.defaults]
        return {variant.name: variant.defaults[self.name] for variant in variants}

    @property
    def depends_on_flags(self) -> bool:
        defaults = self.default, *self.variant_defaults.values()
        return any(isinstance(default, Usual) for default in defaults)

    def default_of(self, args: Namespace) -> Any:
        """Return the default with these flags; `family` and the flags before this one must be settled."""
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
        """Return what is wrong with a value from any source, or None. A value of None means the default."""
        if value is None:
            return None
        is_list = isinstance(value, list | tuple)
        # Official programs and older records have some lists as on or off.
        if is_list != bool(self.nargs) and not isinstance(value, bool):
            return f'must be {"one value" if is_list else "a list"}, not {value!r}'
        problems = map(self.problem_of_one, value if is_list else [value])
        return next(filter(None, problems), None)

    def problem_of_one(self, value: Any) -> str | None:
        if isinstance(self.type, Bounded):
            return self.type.problem(value)
        if isinstance(self.type, tuple):
            known = value in self.type or (self.nargs and isinstance(value, bool))
            return None if known else f'must be one of {", ".join(map(str, self.type))}, not {value!r}'
        if self.type == TEXT:
            return None if isinstance(value, str | PurePath) else f'must be text, not {value!r}'
        return None if isinstance(value, bool) else f'must be on or off, not {value!r}'

    def full_help(self) -> str:
        notes = []
        if self.show_families:
            notes.append(' and '.join(TITLES[family] for family in self.families) + ' only')
        if self.needs:
            notes.append(f'needs --{self.needs}')
        if default := self.default_text():
            notes.append(f'default: {default}')
        text = f'{self.help} ({"; ".join(notes)})' if notes else self.help
        return text.replace('%', '%%')

    def default_text(self) -> str:
        """Describe the default, and those of families or variants with their names; '' if none is shown."""
        if isinstance(self.default, ByFamily):
            names: dict[str, list[str]] = {}
            for name, value in (self.default | self.variant_defaults).items():
                if value is not None:
                    names.setdefault(value_text(value), []).append(name)
            return ', '.join(f'{text} for {" and ".join(users)}' for text, users in names.items())
        text = self.unset or value_text(self.default)
        if others := [f'{value_text(value)} with --{name}' for name, value in self.variant_defaults.items()]:
            return ', '.join([*others, f'else {text}'])
        return text if self.unset or self.default not in (None, False, True, '', []) else ''

    def add_to(self, group: Any) -> None:
        """Declare it to argparse, with its default if that depends on no other flag, otherwise None."""
        late = isinstance(self.default, ByFamily | Usual) or bool(self.variant_defaults)
        facts: dict[str, Any] = {'dest': self.name, 'help': self.full_help()}
        facts['default'] = None if late else self.default
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


def value_text(value: Any) -> str:
    if isinstance(value, Usual):
        return value.text
    if isinstance(value, bool):
        return 'yes' if value else 'no'
    if isinstance(value, int | float):
        return f'{value:g}'
    return value if isinstance(value, str) else ' '.join(value or ()) or 'none'


def group(kind: str, families: tuple[str, ...] = ()) -> Callable[..., list[Flag]]:
    """Return a function that sets the kind and the families of flags that have none."""

    def place(*flags: Flag) -> list[Flag]:
        return [
            replace(
                flag,
                kind=flag.kind or kind,
                families=flag.families or families,
                show_families=bool(flag.families),
            )
            for flag in flags
        ]

    return place


def table(*flags: Flag) -> dict[str, Flag]:
    """Return flags by name, with topic, metavar, help and unset from `help.txt`.

    A flag with `help` is not in the file. Unless it has a topic, it gets that of the flag before it.
    """
    texts = read_texts()
    flags_by_name, topic = {}, ''
    for flag in flags:
        if not flag.help:
            flag = replace(flag, **texts[flag.name])
        topic = flag.topic or topic
        flags_by_name[flag.name] = replace(flag, topic=topic)
    return flags_by_name


def read_texts() -> dict[str, dict[str, Any]]:
    """Read `help.txt`: for each flag the fields of `Flag` that it has.

    A paragraph is `# TOPIC`, or `NAME METAVAR: HELP (default: UNSET)`, where METAVAR and the last part may be
    missing.
    """
    texts, topic = {}, ''
    for paragraph in re.split(r'\n+(?=\S)', TEXTS.read_text(encoding='utf-8')):
        words = ' '.join(paragraph.split())
        if words.startswith('# '):
            topic = words[2:]
        elif words:
            head, _, text = words.partition(': ')
            name, *metavars = head.split()
            metavar = tuple(metavars) if len(metavars) > 1 else ''.join(metavars) or None
            text, _, unset = text.partition(' (default: ')
            texts[name] = {'topic': topic, 'metavar': metavar, 'help': text, 'unset': unset.removesuffix(')')}
    return texts
