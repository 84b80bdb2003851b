"""Write our weights as files of safetensors, and under the names of other projects (`names.py`)."""

import json
import re
from collections.abc import Mapping
from pathlib import Path

import torch

from models.weights.names import MMDETECTION_DINO, State, mmdetection_names, translate
from models.weights.read import CLASSES_KEY, FLAGS_KEY, safetensors
from models.weights.records import TRANSFORMERS_FLAGS
from util.errors import UserError

DINO_KEY = 'transformer.decoder.ref_point_head.layers.0.weight'  # of DINO's decoder if heads are numbered
# Our name beside that in files of transformers, for all its detectors; then by kind. {layer} and {i} are numbers.
EVERY = [
    ('backbone.0.body.{rest}', 'model.backbone.conv_encoder.model.{rest}'),
    ('backbone.1.row_embed.{rest}', 'model.backbone.position_embedding.row_embeddings.{rest}'),
    ('backbone.1.col_embed.{rest}', 'model.backbone.position_embedding.column_embeddings.{rest}'),
    ('query_embed.weight', 'model.query_position_embeddings.weight'),
    *(
        (f'transformer.{part}.layers.{{layer}}.{ours}.{{rest}}', f'model.{part}.layers.{{layer}}.{theirs}.{{rest}}')
        for part in ('encoder', 'decoder')
        for ours, theirs in (('linear1', 'fc1'), ('linear2', 'fc2'))
    ),
    ('transformer.encoder.layers.{layer}.norm1.{rest}', 'model.encoder.layers.{layer}.self_attn_layer_norm.{rest}'),
    ('transformer.encoder.layers.{layer}.norm2.{rest}', 'model.encoder.layers.{layer}.final_layer_norm.{rest}'),
    ('transformer.decoder.layers.{layer}.norm3.{rest}', 'model.decoder.layers.{layer}.final_layer_norm.{rest}'),
    ('transformer.{part}.layers.{layer}.self_attn.{rest}', 'model.{part}.layers.{layer}.self_attn.{rest}'),
]  # fmt: skip
DENSE = [
    ('input_proj.{rest}', 'model.input_projection.{rest}'),
    ('class_embed.{rest}', 'class_labels_classifier.{rest}'),
    ('bbox_embed.{rest}', 'bbox_predictor.{rest}'),
    ('transformer.decoder.norm.{rest}', 'model.decoder.layernorm.{rest}'),
    ('transformer.decoder.layers.{layer}.norm1.{rest}', 'model.decoder.layers.{layer}.self_attn_layer_norm.{rest}'),
    ('transformer.decoder.layers.{layer}.norm2.{rest}', 'model.decoder.layers.{layer}.encoder_attn_layer_norm.{rest}'),
    ('transformer.decoder.layers.{layer}.multihead_attn.{rest}', 'model.decoder.layers.{layer}.encoder_attn.{rest}'),
]  # fmt: skip
CONDITIONAL = [
    ('transformer.decoder.query_scale.{rest}', 'model.decoder.query_scale.{rest}'),
    ('transformer.decoder.ref_point_head.{rest}', 'model.decoder.ref_point_head.{rest}'),
    ('transformer.decoder.layers.{layer}.cross_attn.{rest}', 'model.decoder.layers.{layer}.encoder_attn.{rest}'),
    *(
        (f'transformer.decoder.layers.{{layer}}.{part}_{{rest}}', f'model.decoder.layers.{{layer}}.{part}_{{rest}}')
        for part in ('sa', 'ca')
    ),
]  # fmt: skip
DEFORMABLE = [
    ('input_proj.{i}.{rest}', 'model.input_proj.{i}.{rest}'),
    ('transformer.level_embed', 'model.level_embed'),
    *(
        (f'transformer.{part}.{{rest}}', f'model.{part}.{{rest}}')
        for part in ('reference_points', 'enc_output', 'enc_output_norm', 'pos_trans', 'pos_trans_norm')
    ),
    *(
        (f'transformer.decoder.{part}.{{rest}}', f'model.decoder.{part}.{{rest}}')
        for part in ('bbox_embed', 'class_embed')
    ),
    ('transformer.decoder.layers.{layer}.norm1.{rest}', 'model.decoder.layers.{layer}.encoder_attn_layer_norm.{rest}'),
    ('transformer.decoder.layers.{layer}.norm2.{rest}', 'model.decoder.layers.{layer}.self_attn_layer_norm.{rest}'),
    ('transformer.decoder.layers.{layer}.cross_attn.{rest}', 'model.decoder.layers.{layer}.encoder_attn.{rest}'),
]  # fmt: skip


def refuse_unknown(names: list[str], project: str, known: str) -> None:
    if names:
        raise UserError(
            f'{project} has no place for {len(names)} entries, such as {", ".join(names[:4])}: only {known} can be written '
            'for it'
        )


def to_official_files(state: State) -> State:
    """Add the second names that heads have in official files of Deformable DETR and MS-DETR.

    Raises:
        UserError: the official repositories have no such entry.
    """
    unknown = [name for name in state if name.startswith('query_sources.')]
    unknown += [DINO_KEY] if DINO_KEY in state and 'bbox_embed.0.layers.0.bias' in state else []
    refuse_unknown(
        unknown, 'the code of the DETR family', 'a detector without Co-DETR, denoising (--strip) and --dino'
    )
    state = with_aliases(state)
    for name in list(state):
        if re.match(r'bbox_embed\.\d', name) and f'class_embed_o2m.{name.split(".")[1]}.bias' in state:
            state[name.replace('bbox_embed', 'bbox_embed_o2m')] = state[name]
    projections = [name for name in state if re.fullmatch(r'input_proj\.\d+\.0\.weight', name)]
    biases = {name.replace('weight', 'bias'): torch.zeros(len(state[name])) for name in projections}
    state = biases | state  # a bias of 0 is as good as none
    if 'mask_head.out_lay.weight' not in state:
        return state
    masks = ('bbox_attention.', 'mask_head.')  # in official files the detector is a part of that with masks
    return {name if name.startswith(masks) else f'detr.{name}': value for name, value in state.items()}


def with_aliases(state: State) -> State:
    """Add what Deformable DETR's decoder calls its heads: with box refinement the box heads, in two stages all."""
    two_stage = 'transformer.enc_output.weight' in state
    first, second = (state.get(f'bbox_embed.{layer}.layers.2.bias') for layer in (0, 1))
    shared = first is not None and second is not None and torch.equal(first, second)
    heads = ('bbox_embed.', 'class_embed.') if two_stage else () if shared else ('bbox_embed.',)
    aliases = {
        f'transformer.decoder.{name}': value
        for name, value in state.items()
        if name.startswith(heads) and re.match(r'\w+\.\d', name)
    }
    return state | aliases


def split_in_proj(state: State) -> State:
    """Split each `in_proj` of nn.MultiheadAttention into the q, k and v projections that transformers has."""
    split: State = {}
    for name, value in state.items():
        match = re.fullmatch(r'(.*\.)in_proj_(weight|bias)', name)
        if match:
            split |= {
                f'{match[1]}{part}_proj.{match[2]}': x for part, x in zip('qkv', value.chunk(3), strict=True)
            }
        else:
            split[name] = value
    return split


def to_transformers(state: State, flags: Mapping, names: list[str | None]) -> tuple[State, dict]:
    """Return the state dict and the configuration of the same detector in transformers.

    Args:
        flags: settled flags of the detector, with `family`.
        names: name of each class index, None: no class.

    Raises:
        UserError: transformers has no such detector.
    """
    family = flags['family']
    kinds = {'detr': (DENSE, 'detr'), 'conditional': (CONDITIONAL + DENSE, 'conditional_detr')}
    table, kind = kinds.get(family, (DEFORMABLE, 'deformable_detr'))
    wrong = [flag for flag in ('pre_norm', 'dino', 'mixed_selection') if flags.get(flag)]
    wrong += ['use_ms_detr'] if flags.get('use_ms_detr') and flags.get('ms_variant') == 'b' else []
    usual = {'pe_temperature': 10000, 'finest_stride': 8, 'backbone_stages': 4}
    wrong += [flag for flag, value in usual.items() if flags.get(flag, value) != value]
    if not str(flags['backbone']).startswith('resnet') or flags['backbone'] == 'resnet10':
        wrong.append('backbone')
    if wrong:
        raise UserError(
            f'transformers has no detector of --{wrong[0]} {flags[wrong[0]]}: only DETR, Conditional DETR and Deformable DETR '
            'with a ResNet can be written for it'
        )
    if family == 'deformable':
        state = with_aliases(state)
        heads = [('class_embed.{i}.{rest}',) * 2, ('bbox_embed.{i}.{rest}',) * 2]
        table = table + heads
    state = split_in_proj(state)
    table = [*table, *EVERY]
    named = {translate(name, table, to_ours=False): name for name in state}
    same = re.compile(r'(class|bbox)_embed\.\d')
    unknown = [
        ours
        for theirs, ours in named.items()
        if theirs == ours and not (family == 'deformable' and same.match(ours))
    ]
    refuse_unknown(unknown, 'transformers', 'a detector without what only training needs (--strip)')
    config = {theirs: flags[ours] for theirs, ours in TRANSFORMERS_FLAGS.items() if ours in flags}
    if family != 'deformable':
        config = {
            key: value for key, value in config.items()
            if key not in ('encoder_n_points', 'decoder_n_points', 'num_feature_levels', 'with_box_refine', 'two_stage')
        }  # fmt: skip
    labels = {index: name or 'N/A' for index, name in enumerate(names)}
    config |= {
        'model_type': kind,
        'architectures': [f'{"".join(word.capitalize() for word in kind.split("_"))}ForObjectDetection'],
        'decoder_attention_heads': flags['nheads'],
        'decoder_ffn_dim': flags['dim_feedforward'],
        'two_stage_num_proposals': flags['num_queries'],
        'backbone': flags['backbone'],
        'use_timm_backbone': True,
        'use_pretrained_backbone': False,
        'id2label': {str(index): name for index, name in labels.items()},
        'label2id': {name: index for index, name in labels.items()},
    }
    return {theirs: state[ours].contiguous() for theirs, ours in named.items()}, config


def to_mmdetection(state: State) -> State:
    """Translate our Co-DETR to mmdetection's names.

    Raises:
        UserError: mmdetection has no such entry.
    """
    maps = [name for name in state if re.fullmatch(r'input_proj\.\d+\.0\.weight', name)]
    pyramid = 'backbone.0.body.pos_embed' in state
    table = mmdetection_names(0 if pyramid else sum(state[name].shape[-1] == 1 for name in maps))
    if 'transformer.decoder.ref_point_head.layers.0.weight' in state:
        table.insert(0, MMDETECTION_DINO)
    named = {translate(name, table, to_ours=False): name for name in state}
    unknown = [ours for theirs, ours in named.items() if theirs == ours]
    refuse_unknown(unknown, 'mmdetection', 'Co-DETR models without other schemes')
    return {theirs: state[ours] for theirs, ours in named.items()}


def write_safetensors(path: Path, checkpoint: dict) -> None:
    """Write weights, and as metadata flags and classes. Tensors that share memory are written one by one.

    Raises:
        OSError: the file cannot be written.
    """
    metadata = {key: json.dumps(checkpoint[key]) for key in (FLAGS_KEY, CLASSES_KEY) if key in checkpoint}
    state = {name: value.detach().clone().contiguous() for name, value in checkpoint['model'].items()}
    library = safetensors()
    try:
        library.torch.save_file(state, path, metadata | {'format': 'pt'})
    except library.SafetensorError as error:
        raise OSError(f'{error}') from error
