"""The parser of main.py, and its help by topic, from the table of flags."""

import argparse
import sys
import textwrap
from argparse import ArgumentParser
from collections.abc import Sequence

from util.command_line import FlagParser

from .flags import FLAGS, NO_OPTIONS
from .settle import OLD

REFUSED = NO_OPTIONS | {name: old.instead for name, old in OLD.items()}


class NoOption(argparse.Action):
    """Refuse a former option, or an argument of a class that never was one, and name the alternative."""

    def __call__(
        self, parser: ArgumentParser, namespace: object, values: object, option: str | None = None
    ) -> None:
        parser.error(f'{option} is no option: {REFUSED[self.dest]}')


class HelpByTopic(argparse.Action):
    """Print the help of --help, --help all, --help hidden, or --help WORD (topics with that word)."""

    def __init__(self, option_strings: Sequence[str], dest: str, **options: object) -> None:
        options |= {'nargs': '?', 'const': '', 'default': argparse.SUPPRESS, 'metavar': 'TOPIC'}
        super().__init__(option_strings, dest, **options)  # type: ignore[arg-type]  # options of add_argument

    def __call__(
        self, parser: ArgumentParser, namespace: object, topic: object, option: str | None = None
    ) -> None:
        print(help_text(parser, str(topic)))
        sys.exit(0)


def help_text(parser: ArgumentParser, topic: str) -> str:
    """Return the help of a topic: '' for a first run, 'all', 'hidden', or a word of a group's title."""
    formatter = parser.formatter_class(prog=parser.prog)
    groups = [group for group in parser._action_groups if group._group_actions]
    if topic in ('', 'all', 'hidden'):
        chosen = groups if topic else []
    else:
        chosen = [group for group in groups if topic.lower() in str(group.title).lower()]
    for group in chosen:
        formatter.start_section(group.title)
        actions = group._group_actions
        formatter.add_arguments([a for a in actions if is_hidden(a.dest) == (topic == 'hidden')])
        formatter.end_section()
    if chosen:
        return formatter.format_help()
    if topic:
        formatter.add_text(f"no group of flags has '{topic}' in its title; these are the groups:")
    else:
        formatter.add_usage(parser.usage, [], [])
        formatter.add_text(parser.description)
        formatter.start_section('what a first run needs')
        formatter.add_arguments([a for a in parser._actions if a.dest in FLAGS and FLAGS[a.dest].first])
        formatter.end_section()
    titles = [str(group.title).split(' (')[0] for group in groups if group.title != 'options']
    formatter.start_section(
        'more, by --help all, --help hidden (rarely needed), or --help and a word of one of these'
    )
    formatter.add_text(textwrap.fill('; '.join(titles), 100))
    formatter.end_section()
    return formatter.format_help()


def is_hidden(name: str) -> bool:
    return name in FLAGS and FLAGS[name].hidden


def build_parser(description: str | None) -> FlagParser:
    """Build the parser of main.py, whose help is by topic."""
    parser = FlagParser(usage='python main.py [flags]', description=description, add_help=False)
    parser.add_argument(
        '-h',
        '--help',
        action=HelpByTopic,
        help='show what a first run needs; all: every flag; else flags of a topic',
    )
    groups: dict[str, object] = {}
    for flag in FLAGS.values():
        if flag.command:
            if flag.topic not in groups:
                groups[flag.topic] = parser.add_argument_group(flag.topic)
            flag.add_to(groups[flag.topic])
    for name in REFUSED:
        parser.add_argument(
            f'--{name}', action=NoOption, nargs='*', help=argparse.SUPPRESS, default=argparse.SUPPRESS
        )
    return parser
