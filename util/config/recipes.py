"""
Recipes, which are defined by the shell scripts in scripts/, and published weights.

A recipe is one call, `recipe FLAGS "$@"` (scripts/recipe.sh). The first line of its head states its result. A
copied script is a recipe too: `main.py --recipe mine` trains as `bash scripts/mine.sh` does.
"""

import csv
import json
import re
import shlex
from argparse import Namespace
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from util.command_line import ParsedFlags, did_you_mean, given_of
from util.errors import UserError

from .declare import NETWORK
from .flags import FLAGS
from .parser import build_parser
from .recorded import VAL_DATA, adopt
from .settle import use_current_names

SCRIPTS = Path(__file__).resolve().parents[2] / 'scripts'
CALL = 'recipe '
HEAD = re.compile(
    r'# (?P<title>.*?): (?:(?P<ap>[\d.]+) )?AP on (?P<data>COCO val2017|LVIS v1 val)'
    r'.*?(?:after|;) (?P<epochs>\d+) epochs'
)


@dataclass(frozen=True)
class Recipe:
    """A recipe.

    words: its flags, as a shell reads them. title, ap, data, epochs: what it trains and its published AP
    (None: not published), as far as its head states them.
    """

    name: str
    words: tuple[str, ...]
    title: str
    ap: float | None = None
    data: str = ''
    epochs: int | None = None

    @property
    def flags(self) -> ParsedFlags:
        """Return the flags of main.py with those of the recipe, which `given` names."""
        return build_parser(None).parse_args(self.words)


def recipe_names() -> list[str]:
    return sorted(path.stem for path in SCRIPTS.glob('*.sh') if f'\n{CALL}' in path.read_text())


@cache
def find_recipe(name: str) -> Recipe:
    """Read a recipe.

    Raises:
        UserError: no recipe has this name (the message names similar ones), or the script is not a single
            call.
    """
    path = SCRIPTS / f'{name}.sh'
    if Path(name).name != name or not path.is_file():
        raise UserError(f'no recipe {name!r} is in scripts/{did_you_mean(name, recipe_names())}')
    text = path.read_text()
    calls = [line for line in text.replace('\\\n', ' ').splitlines() if line.startswith(CALL)]
    head = HEAD.match(text.splitlines()[1]) if text.count('\n') else None
    if len(calls) != 1 or not calls[0].endswith(' "$@"'):
        raise UserError(f'scripts/{name}.sh is no recipe: it must call `recipe FLAGS "$@"` once')
    words = tuple(shlex.split(calls[0])[1:-1])
    if shell_words := [word for word in words if set(word) & set('$`*?')]:
        raise UserError(
            f'scripts/{name}.sh is no recipe: {shell_words[0]} means something to the shell alone; write its '
            'value'
        )
    if head is None:  # a user's recipe
        return Recipe(name, words, name)
    ap = float(head['ap']) if head['ap'] else None
    return Recipe(name, words, head['title'], ap, head['data'], int(head['epochs']))


def merge(args: Namespace, values: Mapping[str, object]) -> ParsedFlags:
    """Return a copy of flags with other values for those that were not given, which then count as given."""
    given = given_of(args)
    new = {name: value for name, value in values.items() if name not in given}
    flags = ParsedFlags(**vars(args) | new)
    flags.given = given | new.keys()
    return flags


def with_recipe(args: Namespace, recipe: Recipe, excluded: Collection[str] = ()) -> ParsedFlags:
    """Return a copy of flags in which those not given come from a recipe, unless they are excluded."""
    flags = recipe.flags
    return merge(args, {name: getattr(flags, name) for name in flags.given if name not in excluded})


def with_config(args: Namespace, file: str | Path) -> ParsedFlags:
    """Return a copy of flags in which those not given come from a JSON file.

    file: OUT/flags.json of a run, or an object of flags and values.

    Raises:
        UserError: it cannot be read, or has an unknown flag.
    """
    try:
        content = json.loads(Path(file).read_text(encoding='utf-8'))
        kinds = content.get('settled')
        if kinds:  # of another start of the program, whose folders and devices are not taken
            values = use_current_names(
                {name: value for kind in kinds.values() for name, value in kind.items()}
            )
            values = {
                name: value for name, value in values.items() if name in FLAGS and not FLAGS[name].launch
            }
        else:
            values = use_current_names(content)
        unknown = [name for name in values if name not in FLAGS]
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(
            f'--config {file} is no file of flags ({error}): give flags.json of a run, or {{"lr": 1e-4}}'
        ) from error
    if unknown:
        raise UserError(f'--config {file}: {unknown[0]!r} is no flag{did_you_mean(unknown[0], FLAGS)}')
    return merge(args, {name: value for name, value in values.items() if value is not None})


def with_named_flags(args: Namespace) -> Namespace:
    """Return a copy of flags in which those not given come from --config, and --model or --recipe."""
    if args.config:
        args = with_config(args, args.config)
    if args.model:
        return with_row(args)
    if args.recipe:
        return merge(with_recipe(args, find_recipe(args.recipe)), {'output_dir': f'exps/{args.recipe}'})
    return args


@dataclass(frozen=True)
class Row:
    """Published weights, a line of `zoo.csv`.

    name: entry of torch.hub; '' where nobody publishes weights and another row has the same network. script:
    recipe in scripts/. weights: URL; '' if there is none. linked: where weights without a URL, or the
    authors' own, are linked from. size: published parameters (millions) and multiply-adds (1e9). The other
    fields are for weights without a recipe (flags: those of their network), or with another result than the
    recipe states.
    """

    name: str = ''
    script: str = ''
    weights: str = ''
    linked: str = ''
    size: tuple[int, ...] = ()
    ap: float | None = None
    title: str = ''
    flags: str = ''
    epochs: int | None = None
    num_classes: int | None = None

    @property
    def recipe(self) -> Recipe:
        if self.script:
            return find_recipe(self.script)
        return Recipe(self.name, tuple(self.flags.split()), self.title, self.ap, 'COCO val2017', self.epochs)

    @property
    def classes(self) -> int:
        """Class indices of the weights: COCO's ids, or those of another dataset."""
        return self.num_classes or (1203 if self.recipe.flags.dataset_file == 'lvis' else 91)

    @property
    def network(self) -> str:
        """Flags of the network and its classes, as text: equal for rows of equal networks."""
        flags = self.recipe.flags
        others = ('masks', 'co_masks', 'img_size')  # they change parameters or operations too
        given = sorted(name for name in flags.given if FLAGS[name].kind == NETWORK or name in others)
        return repr([*((name, getattr(flags, name)) for name in given), self.classes])

    def source(self) -> str:
        """Return the URL of the weights.

        Raises:
            UserError: they have no URL; the message says where they are linked from.
        """
        if self.weights:
            return self.weights
        page = self.linked or 'no place: their authors have not published them'
        raise UserError(
            f'the weights of {self.name} ({self.recipe.title}) have no direct address: fetch them by hand '
            f'from {page}, and pass their path (weights=PATH, --weights PATH, or --resume PATH)'
        )


def read_rows() -> list[Row]:
    """Read `zoo.csv`; an empty cell means the default of its field."""
    types: dict[str, Callable[[str], Any]] = {
        'size': lambda cell: tuple(map(int, cell.split())),
        'ap': float,
        'epochs': int,
        'num_classes': int,
    }
    with Path(__file__).with_name('zoo.csv').open(newline='', encoding='utf-8') as file:
        rows = [{name: cell for name, cell in row.items() if cell} for row in csv.DictReader(file)]
    return [Row(**{name: types.get(name, str)(cell) for name, cell in row.items()}) for row in rows]


ZOO = read_rows()


def find_row(name: str) -> Row:
    """Return the row of a hub entry, or of a recipe in scripts/ (which need not have weights).

    Raises:
        UserError: there is no such row; the message names similar ones.
    """
    for row in ZOO:
        if name and name in (row.name, row.script):
            return row
    if name in recipe_names():
        return Row(name, name)
    near = did_you_mean(name, [row.name for row in ZOO])
    raise UserError(f'no model {name!r} is known{near or ":"} docs/zoo.md has all')


def with_row(args: Namespace) -> ParsedFlags:
    """Return a copy of flags in which those not given come from --model: its recipe, and --pretrained.

    Raises:
        UserError: there is no such row, a given flag contradicts its network, or its weights have no URL.
    """
    row = find_row(args.model)
    adopt(args, given_of(args), vars(row.recipe.flags))  # refuses flags that contradict the weights
    counts_recipe_data = args.dry_run and not given_of(args) & set(VAL_DATA)
    args = with_recipe(args, row.recipe, () if counts_recipe_data else VAL_DATA)
    has_weights = args.resume not in ('', 'auto') or args.pretrained or args.frozen_weights
    return args if has_weights else merge(args, {'pretrained': row.source()})
