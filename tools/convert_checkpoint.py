"""
Rewrite a checkpoint under the names of another project, or without entries that only training needs.

  python tools/convert_checkpoint.py FILE OUT                  any known layout, to that of this repository
  python tools/convert_checkpoint.py FILE OUT --strip          for inference: nothing that only training needs
  python tools/convert_checkpoint.py FILE OUT --to official    DETR, ..., MS-DETR (not Co-DETR): official code
  python tools/convert_checkpoint.py FILE OUT --to mmdet       Co-DETR, to mmdetection's layout
  python tools/convert_checkpoint.py FILE DIR --to transformers    a folder for from_pretrained

OUT ending in .safetensors is written in that format.
"""

import argparse
import sys
from collections.abc import Iterable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from models.weights.layouts import State, to_mmdetection, to_official_files, translate
from models.weights.load import MASKS, TRAINING_ONLY
from models.weights.read import SAFETENSORS, extract_weights, read_checkpoint
from models.weights.records import extract_class_map, extract_flags
from models.weights.write import write_safetensors, write_transformers
from util.command_line import FlagParser, add_http_flag, run_command
from util.config.recipes import find_row
from util.config.recorded import settle_recorded
from util.errors import UserError
from util.files import save_atomically, save_checkpoint

# Flags of a run without schemes that only train.
PLAIN = {
    'hybrid_k': 0,
    'hybrid_queries': 0,
    'group_detr': 1,
    'dn_number': 0,
    'co_aux_heads': [],
    'eval_module': 'detr',
}


def get_args_parser() -> argparse.ArgumentParser:
    parser = FlagParser('convert_checkpoint.py', description=__doc__)
    parser.add_argument('source', metavar='FILE', help='checkpoint: a path or a URL')
    parser.add_argument('output', metavar='OUT', type=Path, help='file to write; it must not exist')
    parser.add_argument('--strip', action='store_true', help='leave out entries that only training needs')
    parser.add_argument(
        '--to',
        default='ours',
        choices=('ours', 'official', 'mmdet', 'transformers'),
        help='project whose names to use (default: %(default)s)',
    )
    parser.add_argument(
        '--model',
        default='',
        metavar='NAME',
        help='hub entry or recipe with the flags of the weights, for --to transformers if the file has none',
    )
    add_http_flag(parser)
    return parser


def strip(state: State, flags: dict) -> tuple[State, dict]:
    """Remove entries that only training reads, and their flags.

    Queries of other groups than that of inference are removed if the flags of the run say how many there are.
    """
    masks = MASKS if flags.get('masks') or flags.get('co_masks') else ()
    state = {
        name: value
        for name, value in state.items()
        if name.startswith(masks) or not TRAINING_ONLY.match(name)
    }
    queries = flags.get('num_queries_one2one', flags.get('num_queries'))
    if queries is not None and 'query_embed.weight' in state:
        state['query_embed.weight'] = state['query_embed.weight'][:queries].clone()
    return state, flags | {name: value for name, value in PLAIN.items() if flags.get(name) is not None}


def convert(source: str, output: Path, stripped: bool, to: str, model: str = '') -> str:
    """Write `output`, and return a summary.

    Args:
        stripped: leave out what only training needs.
        to: ours, official, mmdet or transformers.
        model: row of the zoo whose flags to take, for a file without flags.

    Raises:
        UserError: `output` exists, or `to` has no such entry.
    """
    if output.exists():
        raise UserError(f'{output} exists: choose another name, or remove it')
    checkpoint = read_checkpoint(source)
    layout, state = translate(extract_weights(checkpoint, source=source))
    if not any(name.startswith(('transformer.', 'query_embed.', 'backbone.')) for name in state):
        raise UserError(f'{source} holds no detector of this family, but {", ".join(list(state)[:3])} ...')
    flags, num_entries = extract_flags(checkpoint), len(state)
    if model and not flags:
        flags = vars(find_row(model).recipe.flags)
    if stripped:
        state, flags = strip(state, flags)
    as_safetensors = output.suffix == SAFETENSORS
    whole_run = to == 'ours' and not as_safetensors and not stripped
    written = output
    if to == 'transformers':
        if not flags:
            raise UserError(
                f'{source} records no flags of its model, which a configuration needs: name it (--model NAME)'
            )
        names = list(extract_class_map(checkpoint, source).names)
        write_transformers(output, state, vars(settle_recorded(flags)), names)
        written = output / f'model{SAFETENSORS}'
    else:
        if to == 'ours':
            converted = native_checkpoint(checkpoint, layout, state, flags, whole_run)
        elif to == 'official':
            converted = {'model': to_official_files(state)}
        else:
            converted = {'meta': {}, 'model' if as_safetensors else 'state_dict': to_mmdetection(state)}
        if as_safetensors:
            save_atomically(output, partial(write_safetensors, checkpoint=converted))
        else:
            save_checkpoint(output, converted)
    note = ''
    if 'optimizer' in checkpoint and not whole_run:
        average = 'averaged ' * ('model_ema' in checkpoint)
        note = f'; the {average}weights alone, without the state of the run'
    size = written.stat().st_size / 1e6
    return f'{output}: {len(state)} of {num_entries} entries ({layout} names to {to}), {size:.1f} MB{note}'


def native_checkpoint(checkpoint: dict, layout: str, state: State, flags: dict, whole_run: bool) -> dict:
    """Return weights, flags and classes, and with whole_run the state of the run too."""
    converted = {'model': state} | ({'args': flags} if flags else {})
    entries: Iterable[str] = ('class_map', 'epoch', 'metrics')
    if whole_run and layout == 'official':
        entries = checkpoint.keys() - {'model', 'args', 'state_dict'}
        converted['model'] = extract_weights(checkpoint, averaged=False)  # the average is copied too
    return converted | {name: checkpoint[name] for name in entries if name in checkpoint}


def main(args: argparse.Namespace) -> str:
    return convert(args.source, args.output, args.strip, args.to, args.model)


if __name__ == '__main__':
    run_command(main, get_args_parser())
