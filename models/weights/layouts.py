"""State dicts under the names of other projects, read and written by the tables of `names.py`."""

import re
from collections.abc import Callable

import torch
from torch import Tensor

from datasets import class_map
from models.weights import names
from models.weights.names import Table, rename
from util.errors import UserError

State = dict[str, Tensor]

COCO_IDS = sorted(class_map.COCO_IDS)  # of the 80 classes that some projects number without gaps
NEVER = -50.0  # bias of a class that does not exist
DINO_KEY = 'transformer.decoder.ref_point_head.layers.0.weight'  # of DINO, if heads are numbered too


def read_names(state: State, table: Table) -> State:
    """Return a state dict under the names used here. An entry without a row keeps its name."""
    return {rename(name, table, read=True) or name: value for name, value in state.items()}


def write_names(state: State, table: Table, project: str, known: str) -> State:
    """Return a state dict under the names of another project.

    known: the models that it has, for the message.

    Raises:
        UserError: an entry has no row; the message lists such entries.
    """
    renamed = {name: rename(name, table, read=False) for name in state}
    refuse([name for name, other in renamed.items() if other is None], project, known)
    return {other: state[name] for name, other in renamed.items() if other is not None}


def refuse(unknown: list[str], project: str, known: str) -> None:
    if unknown:
        raise UserError(
            f'{project} has no place for {len(unknown)} entries, such as {", ".join(unknown[:4])}: only '
            f'{known} can be written for it'
        )


def count_layers(state: State) -> int:
    """Return the number of decoder layers in a state dict under the names used here."""
    return len({name.split('.')[3] for name in state if name.startswith('transformer.decoder.layers.')})


# Official repositories --------------------------------------------------------------------------------------


def from_official(state: State) -> State:
    """Keep one name of each head; official Deformable DETR has two, other files only the decoder's.

    MS-DETR's second box heads equal the first, and are left out.
    """
    state = {name.removeprefix('detr.'): value for name, value in state.items()}
    alias = re.compile(r'transformer\.decoder\.((?:class|bbox)_embed\..*)')
    aliases = {match[1]: state[name] for name in state if (match := alias.fullmatch(name))}
    return aliases | {
        name: value
        for name, value in state.items()
        if not alias.fullmatch(name) and not name.startswith('bbox_embed_o2m.')
    }


def to_official_files(state: State) -> State:
    """Add the second names that heads have in official files, and biases of 0 to projections without any.

    Raises:
        UserError: the official repositories have no such entry.
    """
    unknown = [name for name in state if name.startswith('query_sources.')]
    unknown += [DINO_KEY] if DINO_KEY in state and 'bbox_embed.0.layers.0.bias' in state else []
    refuse(
        unknown, 'the code of the DETR family', 'a detector without Co-DETR, denoising (--strip) and --dino'
    )
    state = add_aliases(state)
    for name in list(state):
        if re.match(r'bbox_embed\.\d', name) and f'class_embed_o2m.{name.split(".")[1]}.bias' in state:
            state[name.replace('bbox_embed', 'bbox_embed_o2m')] = state[name]
    projections = [name for name in state if re.fullmatch(r'input_proj\.\d+\.0\.weight', name)]
    zeros = {name.replace('weight', 'bias'): torch.zeros(len(state[name])) for name in projections}
    state = zeros | state
    if 'mask_head.out_lay.weight' not in state:
        return state
    masks = ('bbox_attention.', 'mask_head.')  # in official files the detector is a part of that with masks
    return {name if name.startswith(masks) else f'detr.{name}': value for name, value in state.items()}


def add_aliases(state: State) -> State:
    """Add the decoder's names of Deformable DETR's heads: those of refined boxes, and in two stages all."""
    two_stage = 'transformer.enc_output.weight' in state
    first, second = (state.get(f'bbox_embed.{layer}.layers.2.bias') for layer in (0, 1))
    shared = first is not None and second is not None and torch.equal(first, second)
    heads = r'(class|bbox)_embed\.\d' if two_stage else r'bbox_embed\.\d'
    aliased = [name for name in state if (two_stage or not shared) and re.match(heads, name)]
    return state | {f'transformer.decoder.{name}': state[name] for name in aliased}


# transformers -----------------------------------------------------------------------------------------------


def from_transformers(state: State) -> State:
    """Read DETR, Conditional DETR or Deformable DETR, whose saved files hold heads that layers share once."""
    deformable = 'model.input_proj.0.0.weight' in state
    conditional = any('ref_point_head' in name for name in state)
    family = 'deformable' if deformable else 'conditional' if conditional else 'detr'
    spellings = names.TRANSFORMERS_SPELLINGS + (names.CONDITIONAL_SPELLINGS if conditional else [])
    for spelling, name_in_files in spellings:
        state = {re.sub(spelling, name_in_files, name): value for name, value in state.items()}
    state = merge_in_proj(read_names(state, names.TRANSFORMERS[family]))
    if not deformable:
        return state
    state = from_official(state)
    heads = [name for name in state if re.match(r'(class|bbox)_embed\.0\.', name)]
    repeated = {
        name.replace('_embed.0.', f'_embed.{layer}.'): state[name]
        for layer in range(count_layers(state))
        for name in heads
    }
    return repeated | state


def to_transformers(state: State, family: str) -> State:
    """Write DETR, Conditional DETR or Deformable DETR.

    Raises:
        UserError: transformers has no such entry.
    """
    state = split_in_proj(add_aliases(state) if family == 'deformable' else state)
    known = 'a detector without what only training needs (--strip)'
    return write_names(state, names.TRANSFORMERS[family], 'transformers', known)


def merge_in_proj(state: State) -> State:
    """Concatenate separate q, k and v projections to one `in_proj`, as nn.MultiheadAttention has them."""
    merged = {}
    for name, value in state.items():
        match = re.fullmatch(r'(.*\.(?:self_attn|multihead_attn)\.)([qkv])_proj\.(weight|bias)', name)
        if not match:
            merged[name] = value
        elif match[2] == 'q':
            parts = [state[f'{match[1]}{part}_proj.{match[3]}'] for part in 'qkv']
            merged[f'{match[1]}in_proj_{match[3]}'] = torch.cat(parts)
    return merged


def split_in_proj(state: State) -> State:
    """Split each `in_proj` of nn.MultiheadAttention into the q, k and v projections that transformers has."""
    split: State = {}
    for name, value in state.items():
        if match := re.fullmatch(r'(.*\.)in_proj_(weight|bias)', name):
            parts = zip('qkv', value.chunk(3), strict=True)
            split |= {f'{match[1]}{part}_proj.{match[2]}': x.contiguous() for part, x in parts}
        else:
            split[name] = value
    return split


# Other projects ---------------------------------------------------------------------------------------------


def from_detrex(state: State) -> State:
    return from_official(read_names(state, [*names.neck(count_maps(state), 'norm'), *names.DETREX]))


def count_maps(state: State) -> int:
    """Return the number of the backbone's maps that a neck of mmcv projects."""
    return len({name.split('.')[2] for name in state if name.startswith('neck.convs.')})


def from_mmdetection(state: State) -> State:
    """Read Co-DETR, without tables of rotary positions and weights called `ema_*`.

    At the end of an epoch mmdetection exchanges the latter with the others, which are the averaged ones then.
    """
    table = names.mmdetection(count_maps(state), dino=False)
    left_out = re.compile(r'ema_|.*\brope(_win|_glb)?\.freqs')
    return read_names({name: x for name, x in state.items() if not left_out.match(name)}, table)


def to_mmdetection(state: State) -> State:
    """Write Co-DETR.

    Raises:
        UserError: mmdetection has no such entry.
    """
    maps = [name for name in state if re.fullmatch(r'input_proj\.\d+\.0\.weight', name)]
    pyramid = 'backbone.0.body.pos_embed' in state
    num_maps = 0 if pyramid else sum(state[name].shape[-1] == 1 for name in maps)
    table = names.mmdetection(num_maps, dino=DINO_KEY in state)
    return write_names(state, table, 'mmdetection', 'Co-DETR models without other schemes')


def from_idea_dino(state: State) -> State:
    return from_official(read_names(state, names.idea_dino(count_layers(state))))


# An entry that only one layout has -> the layout's name and its reader. The first that fits wins.
LAYOUTS: dict[str, tuple[str, Callable[[State], State]]] = {
    'model.input_projection.weight': ('transformers', from_transformers),
    'model.input_proj.0.0.weight': ('transformers', from_transformers),
    'transformer.level_embeds': ('detrex', from_detrex),
    'query_head.transformer.level_embeds': ('mmdetection', from_mmdetection),
    'transformer.tgt_embed.weight': ('IDEA DINO', from_idea_dino),
}


def translate(state: State) -> tuple[str, State]:
    """Return the layout of a state dict, and its entries under the names used here, the official ones."""
    layout, read = next((LAYOUTS[key] for key in LAYOUTS if key in state), ('official', from_official))
    return layout, read(state)


def spread_coco_classes(state: State, num_rows: int) -> State:
    """Expand class heads of 80 rows to `num_rows`, with one row per COCO id.

    A head for proposals (one more than there are decoder layers) keeps its rows, the first of which means
    'object'. DINO's is expanded too.
    """
    dino, last = DINO_KEY in state, count_layers(state)
    spread = dict(state)
    for name, value in state.items():
        match = re.fullmatch(r'class_embed\.(\d+)\.(weight|bias)', name)
        if match and len(value) == len(COCO_IDS):
            rows = list(range(len(COCO_IDS))) if int(match[1]) == last and not dino else COCO_IDS
            spread[name] = value.new_full((num_rows, *value.shape[1:]), NEVER if match[2] == 'bias' else 0.0)
            spread[name][rows] = value
    return spread
