"""
Rewrite a checkpoint under the names of another project, or without entries that only training needs.

  python tools/convert_checkpoint.py FILE OUT                  any known layout, to ours
  python tools/convert_checkpoint.py FILE OUT --strip          for inference: no queries, heads and optimizer of training
  python tools/convert_checkpoint.py FILE OUT --to mmdet       Co-DETR, to mmdetection's layout
"""

import argparse
import re
import sys
from pathlib import Path

from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from util.checkpoint import TRAINING_ONLY, flags_of, save_checkpoint
from util.foreign_names import to_mmdetection, to_official
from util.weight_files import read_checkpoint, state_of

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
    parser = argparse.ArgumentParser(
        'convert_checkpoint.py', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('source', metavar='FILE', help='checkpoint: a path or an address')
    parser.add_argument('output', metavar='OUT', type=Path, help='file to write; it must not exist')
    parser.add_argument('--strip', action='store_true', help='leave out entries that only training needs')
    parser.add_argument(
        '--to',
        default='ours',
        choices=('ours', 'mmdet'),
        help='project whose names to use (default: %(default)s)',
    )
    return parser


def strip(state: dict[str, Tensor], flags: dict) -> tuple[dict[str, Tensor], dict]:
    """Remove entries that only training reads, and their flags.

    Queries beyond the inference group are removed if the flags of the run tell which they are.
    """
    state = {name: value for name, value in state.items() if not re.match(TRAINING_ONLY, name)}
    queries = flags.get('num_queries_one2one', flags.get('num_queries'))
    if queries is not None and 'query_embed.weight' in state:
        state['query_embed.weight'] = state['query_embed.weight'][:queries].clone()
    return state, flags | {name: value for name, value in PLAIN.items() if flags.get(name) is not None}


def convert(source: str, output: Path, stripped: bool, to: str) -> str:
    """Write `output`, and return a summary.

    Raises:
        ValueError: `output` exists, or `to` has no such entry.
    """
    if output.exists():
        raise ValueError(f'{output} exists: choose another name, or remove it')
    checkpoint = read_checkpoint(source)
    layout, state = to_official(state_of(checkpoint))
    flags, found = flags_of(checkpoint), len(state)
    if stripped:
        state, flags = strip(state, flags)
    if to == 'mmdet':
        converted = {'meta': {}, 'state_dict': to_mmdetection(state)}
    else:
        converted = {'model': state} | ({'args': flags} if flags else {})
        kept = ('class_map', 'epoch', 'metrics')
        if not stripped and layout == 'official':
            kept = tuple(name for name in checkpoint if name not in ('model', 'args', 'state_dict'))
            converted['model'] = state_of(checkpoint, averaged=False)  # the average stays beside it
        converted |= {name: checkpoint[name] for name in kept if name in checkpoint}
    output.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(output, converted)
    megabytes = output.stat().st_size / 1e6
    return f'{output}: {len(state)} of {found} entries ({layout} names to {to}), {megabytes:.1f} MB'


if __name__ == '__main__':
    args = get_args_parser().parse_args()
    try:
        print(convert(args.source, args.output, args.strip, args.to))
    except (ValueError, OSError) as error:
        sys.exit(f'error: {error}')
