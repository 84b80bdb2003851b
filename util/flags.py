"""Declare the flags of a run (precision, processes, evaluation, files), and show the help of all flags by topic."""

import argparse
import difflib
import errno
import os
import sys
import textwrap
from argparse import ArgumentParser, BooleanOptionalAction, Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from util.bounds import check_bounds, whole
from util.distributed.collectives import get_world_size
from util.errors import UserError
from util.trackers import check_trackers

# Flags of a first run; `--help` shows these alone.
ESSENTIAL = (
    'dataset_file', 'coco_path', 'output_dir', 'resume', 'pretrained', 'model', 'eval', 'conditional', 'deformable', 'epochs',
    'batch_size', 'lr', 'amp', 'device',
)  # fmt: skip


class ParsedFlags(Namespace):
    """Parsed flags that remember which were given; `vars` and copies of a Namespace do not show that."""

    __slots__ = ('given',)


class FlagParser(ArgumentParser):
    """Parser whose result is a `ParsedFlags`. It knows no abbreviations, and answers a mistyped flag with those nearest to it."""

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


def suggestions(parser: ArgumentParser, unknown: Sequence[str]) -> str:
    """Return the text that names, for each unknown option, the options that begin alike or are spelled alike; or ''."""
    options = [option for action in parser._actions for option in action.option_strings]
    for commands in (
        action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction)
    ):
        options += [option for command in commands.values() for option in command._option_string_actions]
    found = []
    for word in (word.split('=')[0] for word in unknown if word.startswith('--')):
        alike = [option for option in options if option.startswith(word)]
        near = dict.fromkeys(alike + difflib.get_close_matches(word, options, 3))
        if near:
            found.append(f'{word}: did you mean {" or ".join(list(near)[:3])}?')
    return f' ({" ".join(found)})' if found else ''


def run_command(
    program: Callable[[Any], object], parser: ArgumentParser, argv: Sequence[str] | None = None
) -> None:
    """Run a program on its command line, and print what it returns.

    A `UserError`, or an `OSError` that the user must settle (`is_of_user`), ends it with the message alone and status 1. Every other
    exception is a fault of the code and keeps its traceback.
    """
    args = parser.parse_args(argv)
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
            f'error: {error} A worker was killed, perhaps for lack of memory: lower --num_workers, and --resume auto'
        )
    if found is not None:
        print(found)


def is_of_user(error: OSError, args: Namespace) -> bool:
    """Return whether the disk is full, or the error is about a path that a flag names, or one below or above it."""
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


class HelpByTopic(argparse.Action):
    """Action of `--help` (flags of a first run), `--help all`, and `--help TOPIC` (groups whose title has that word)."""

    def __init__(self, option_strings: Sequence[str], dest: str, **options: object) -> None:
        options |= {'nargs': '?', 'const': '', 'default': argparse.SUPPRESS, 'metavar': 'TOPIC'}
        super().__init__(option_strings, dest, **options)  # type: ignore[arg-type]  # options of add_argument

    def __call__(
        self, parser: ArgumentParser, namespace: object, topic: object, option: str | None = None
    ) -> None:
        print(help_text(parser, str(topic)))
        sys.exit(0)


def help_text(parser: ArgumentParser, topic: str) -> str:
    """Return the help of a topic: '' for a first run, 'all', or a word of a group's title."""
    if topic == 'all':
        return parser.format_help()
    formatter = parser.formatter_class(prog=parser.prog)
    groups = [group for group in parser._action_groups if group._group_actions]
    if topic:
        chosen = [group for group in groups if group.title and topic.lower() in group.title.lower()]
        for group in chosen:
            formatter.start_section(group.title)
            formatter.add_arguments(group._group_actions)
            formatter.end_section()
        if chosen:
            return formatter.format_help()
        formatter.add_text(f"no group of flags has '{topic}' in its title; these are the groups:")
    else:
        formatter.add_usage(parser.usage, [], [])
        formatter.add_text(parser.description)
        formatter.start_section('what a first run needs')
        by_name = {action.dest: action for action in parser._actions}
        formatter.add_arguments([by_name[name] for name in ESSENTIAL if name in by_name])
        formatter.end_section()
    titles = [str(group.title).split(' (')[0] for group in groups if group.title != 'options']
    formatter.start_section('more, by --help all, or --help and a word of one of these')
    formatter.add_text(textwrap.fill('; '.join(titles), 100))
    formatter.end_section()
    return formatter.format_help()


def make_parser(description: str | None) -> FlagParser:
    """Make the parser of main.py, whose help goes by topics."""
    parser = FlagParser(
        usage='python main.py [flags]',
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
    )
    parser.add_argument(
        '-h',
        '--help',
        action=HelpByTopic,
        help='show what a first run needs; all: every flag; else flags of a topic',
    )
    return parser


def add_run_args(parser: ArgumentParser) -> None:
    """Declare flags of precision, processes, evaluation and files."""
    add_scale_args(parser)
    add_evaluation_args(parser)
    group = parser.add_argument_group('run')
    group.add_argument(
        '--output_dir', default='', metavar='DIR',
        help='folder of checkpoints, metrics.csv, log.jsonl and drawn images; nothing is written without it',
    )  # fmt: skip
    group.add_argument(
        '--resume', default='', metavar='FILE',
        help='go on with this checkpoint (path or address): weights, optimizer, schedule, random numbers; auto: the one in '
        '--output_dir, if any',
    )  # fmt: skip
    group.add_argument(
        '--pretrained', default='', metavar='FILE',
        help='start from these weights (path or address); heads of another number of classes start anew',
    )  # fmt: skip
    group.add_argument(
        '--frozen_weights', metavar='FILE',
        help='start from these weights of boxes, and train the heads of --masks alone',
    )  # fmt: skip
    group.add_argument(
        '--model', default='', metavar='NAME',
        help='take the flags of the detector from a row of docs/zoo.md, a hub entry or a recipe, and start from its published '
        'weights unless --resume or --pretrained names others',
    )  # fmt: skip
    group.add_argument(
        '--dry_run', action='store_true',
        help='print parameters, FLOPs, memory, learning rates and steps, then stop: nothing is read, downloaded or trained',
    )  # fmt: skip
    group.add_argument(
        '--save_every',
        type=whole(1),
        metavar='N',
        help='keep a numbered checkpoint every N epochs, and at each drop of the learning rate (default: only the last and the '
        'best are kept)',
    )
    group.add_argument(
        '--checkpoint_steps', type=whole(1), metavar='N',
        help='write checkpoint.pth every N steps of an epoch too (default: after each epoch, and when the run is asked to stop)',
    )  # fmt: skip
    group.add_argument(
        '--keep_checkpoints',
        type=whole(1),
        metavar='N',
        help='keep only the newest N numbered checkpoints (default: all)',
    )
    group.add_argument(
        '--bad_steps', default=3, type=whole(1), metavar='N',
        help='stop after N steps in a row whose gradient is not finite; each of them is left out, and its batch is saved in '
        '--output_dir for tools/replay.py (default: %(default)s)',
    )  # fmt: skip
    group.add_argument(
        '--device',
        default='auto',
        help='cuda, mps or cpu; auto takes the first there is (default: %(default)s)',
    )
    group.add_argument(
        '--seed',
        default=42,
        type=whole(0, 2**63 - 1),
        help='seed of all random numbers (default: %(default)s)',
    )
    group.add_argument(
        '--print_freq',
        default=10,
        type=whole(1),
        help='optimizer steps between two progress lines (default: %(default)s)',
    )
    group.add_argument(
        '--tensorboard', action='store_true', help='write TensorBoard events into --output_dir'
    )
    group.add_argument(
        '--wandb', default='', metavar='PROJECT', help='log to this project of Weights & Biases too'
    )
    group.add_argument(
        '--dist_url',
        default='env://',
        help='address where processes meet (default: %(default)s, as torchrun says)',
    )


def add_scale_args(parser: ArgumentParser) -> None:
    group = parser.add_argument_group('precision, memory, processes')
    group.add_argument(
        '--amp', default='off', choices=('off', 'bf16', 'fp16'),
        help='16-bit arithmetic in the model; boxes, matching and losses stay in float32 (default: %(default)s)',
    )  # fmt: skip
    group.add_argument(
        '--tf32', action=BooleanOptionalAction,
        help='compute float32 products of NVIDIA GPUs with 10 bits of the mantissa, several times as fast (default: in '
        "convolutions only, PyTorch's default)",
    )  # fmt: skip
    group.add_argument(
        '--compile', action='store_true',
        help='torch.compile of backbone stages and transformer layers, for any image size; the first steps take minutes',
    )  # fmt: skip
    group.add_argument(
        '--fsdp', action='store_true',
        help='keep a part of the weights, gradients and optimizer states in each process (FSDP2), for models that do not fit; '
        'checkpoints are the same',
    )  # fmt: skip
    group.add_argument(
        '--worst_batch_first', action=BooleanOptionalAction,
        help='try a batch of the largest images with the most objects before the first step, so that a lack of memory shows at '
        'once (default: on GPUs)',
    )  # fmt: skip


def add_evaluation_args(parser: ArgumentParser) -> None:
    group = parser.add_argument_group('evaluation')
    group.add_argument('--eval', action='store_true', help='evaluate --resume or --pretrained, then stop')
    group.add_argument(
        '--eval_every', default=1, type=whole(1),
        help='epochs between evaluations; the last epoch is always evaluated (default: %(default)s)',
    )  # fmt: skip
    group.add_argument(
        '--patience', type=whole(1), metavar='N',
        help='stop after N evaluations without a better AP of boxes (default: train all epochs)',
    )  # fmt: skip
    group.add_argument(
        '--no_validate', action='store_true', help='train without evaluating; validation data are not read'
    )
    group.add_argument(
        '--coco_eval', default='auto', choices=('auto', 'hotcoco', 'pycocotools'),
        help='library that computes COCO metrics; auto: hotcoco if it is installed (default: %(default)s)',
    )  # fmt: skip


def check_run_args(args: Namespace) -> None:
    """Refuse impossible combinations, and settle --accum_steps.

    Raises:
        UserError: flags contradict each other, or a number makes no sense.
    """
    parser = ArgumentParser()
    add_run_args(parser)
    check_bounds(args, parser)
    check_trackers(args)
    if args.eval and not (args.resume or args.pretrained):
        raise UserError('--eval needs weights: add --resume FILE (or --pretrained FILE, or --model NAME)')
    if args.resume and args.pretrained and args.resume != 'auto':
        raise UserError('--resume goes on with a run, --pretrained starts one: give one of them')
    if args.frozen_weights and not args.masks:
        raise UserError(
            '--frozen_weights trains the heads of --masks alone: add --masks, or use --pretrained'
        )
    if args.frozen_weights and args.pretrained:
        raise UserError('--frozen_weights and --pretrained both start from weights: give one of them')
    if args.resume == 'auto' and not args.output_dir:
        raise UserError('--resume auto looks into --output_dir: give it')
    if args.patience and not args.output_dir:
        raise UserError('--patience looks into metrics.csv of --output_dir: give it')
    if args.patience and args.no_validate:
        raise UserError('--patience waits for a better AP, and --no_validate measures none: leave one out')
    if args.no_validate and args.eval:
        raise UserError('--eval evaluates, --no_validate does not: leave one out')
    if args.fsdp and get_world_size() == 1:
        raise UserError(
            '--fsdp shares a model among processes, and there is one: start several, or leave it out'
        )
    if args.fsdp and args.co_masks:
        raise UserError(
            '--fsdp with --co_masks: masks are made after the forward pass, when a process has its part of the weights alone; '
            'leave one out'
        )
    if args.fsdp and args.amp == 'fp16':
        raise UserError(
            '--fsdp with --amp fp16: a process would scale its part of the gradient alone; use --amp bf16'
        )
    if args.checkpoint_steps and not args.output_dir:
        raise UserError('--checkpoint_steps writes into --output_dir: give it')
    if args.total_batch_size is not None:
        at_a_time = args.batch_size * get_world_size()
        if args.total_batch_size % at_a_time:
            raise UserError(
                f'--total_batch_size {args.total_batch_size} is not a multiple of --batch_size {args.batch_size} x '
                f'{get_world_size()} processes'
            )
        args.accum_steps = args.total_batch_size // at_a_time
