"""
Names of other projects for the entries of a state dict: one table per project, which a key that only it has reveals.

A rule is a pattern and its replacement; the first that matches a whole name wins.
"""

import re
from collections.abc import Callable

import torch
from torch import Tensor

State = dict[str, Tensor]
Rules = list[tuple[str, str]]

# transformers' DETR and Conditional DETR: names of saved files (all versions) and of live modules since
# version 5. `@` stands for the layer prefix, `#` for weight or bias.
TRANSFORMERS: Rules = [
    (r'model\.backbone\.(?:conv_encoder\.)?model\.embedder\.embedder\.convolution\.(.*)', r'backbone.0.body.conv1.\1'),
    (r'model\.backbone\.(?:conv_encoder\.)?model\.embedder\.embedder\.normalization\.(.*)', r'backbone.0.body.bn1.\1'),
    (r'model\.backbone\.(?:conv_encoder\.)?model\.encoder\.stages\.(\d)\.layers\.(\d+)\.layer\.(\d)\.convolution\.(.*)',
     r'backbone.0.body.layer<\1>.\2.conv<\3>.\4'),
    (r'model\.backbone\.(?:conv_encoder\.)?model\.encoder\.stages\.(\d)\.layers\.(\d+)\.layer\.(\d)\.normalization\.(.*)',
     r'backbone.0.body.layer<\1>.\2.bn<\3>.\4'),
    (r'model\.backbone\.(?:conv_encoder\.)?model\.encoder\.stages\.(\d)\.layers\.(\d+)\.shortcut\.convolution\.(.*)',
     r'backbone.0.body.layer<\1>.\2.downsample.0.\3'),
    (r'model\.backbone\.(?:conv_encoder\.)?model\.encoder\.stages\.(\d)\.layers\.(\d+)\.shortcut\.normalization\.(.*)',
     r'backbone.0.body.layer<\1>.\2.downsample.1.\3'),
    (r'model\.backbone\.(?:conv_encoder\.)?model\.(.*)', r'backbone.0.body.\1'),
    (r'model\.(?:backbone\.)?position_embedding\.row_embeddings\.(.*)', r'backbone.1.row_embed.\1'),
    (r'model\.(?:backbone\.)?position_embedding\.column_embeddings\.(.*)', r'backbone.1.col_embed.\1'),
    (r'model\.input_projection\.(.*)', r'input_proj.\1'),
    (r'model\.query_position_embeddings\.(.*)', r'query_embed.\1'),
    (r'class_labels_classifier\.(.*)', r'class_embed.\1'),
    (r'bbox_predictor\.(.*)', r'bbox_embed.\1'),
    (r'model\.encoder\.layernorm\.(.*)', r'transformer.encoder.norm.\1'),
    (r'model\.decoder\.layernorm\.(.*)', r'transformer.decoder.norm.\1'),
    (r'model\.decoder\.(query_scale|ref_point_head)\.(.*)', r'transformer.decoder.\1.\2'),
    (r'model\.(@)\.(?:mlp\.)?fc([12])\.(#)', r'transformer.\1.linear\2.\3'),
    (r'model\.(@)\.self_attn_layer_norm\.(#)', r'transformer.\1.norm1.\2'),
    (r'model\.(encoder@)\.final_layer_norm\.(#)', r'transformer.\1.norm2.\2'),
    (r'model\.(decoder@)\.encoder_attn_layer_norm\.(#)', r'transformer.\1.norm2.\2'),
    (r'model\.(decoder@)\.final_layer_norm\.(#)', r'transformer.\1.norm3.\2'),
    (r'model\.(@)\.self_attn\.([qkv])_proj\.(#)', r'transformer.\1.self_attn.\2_proj.\3'),
    (r'model\.(@)\.self_attn\.(?:o_proj|out_proj)\.(#)', r'transformer.\1.self_attn.out_proj.\2'),
    (r'model\.(decoder@)\.encoder_attn\.([qkv])_proj\.(#)', r'transformer.\1.multihead_attn.\2_proj.\3'),
    (r'model\.(decoder@)\.encoder_attn\.(?:o_proj|out_proj)\.(#)', r'transformer.\1.multihead_attn.out_proj.\2'),
]  # fmt: skip
# Conditional DETR's decoder differs: its projections are apart already.
TRANSFORMERS_CONDITIONAL: Rules = [
    (r'model\.(decoder@)\.(sa_\w+|ca_\w+)\.(#)', r'transformer.\1.\2.\3'),
    (r'model\.(decoder@)\.self_attn\.([qk])_(content|pos)_proj\.(#)', r'transformer.\1.sa_\2\3_proj.\4'),
    (r'model\.(decoder@)\.self_attn\.v_proj\.(#)', r'transformer.\1.sa_v_proj.\2'),
    (r'model\.(decoder@)\.encoder_attn\.([qk])_(content|pos)_proj\.(#)', r'transformer.\1.ca_\2\3_proj.\4'),
    (r'model\.(decoder@)\.encoder_attn\.q_pos_sine_proj\.(#)', r'transformer.\1.ca_qpos_sine_proj.\2'),
    (r'model\.(decoder@)\.encoder_attn\.v_proj\.(#)', r'transformer.\1.ca_v_proj.\2'),
    (r'model\.(decoder@)\.encoder_attn\.(?:o_proj|out_proj)\.(#)', r'transformer.\1.cross_attn.out_proj.\2'),
    *TRANSFORMERS,
]

# Deformable DETR: the attention modules keep their names, the decoder's norms are numbered otherwise.
TRANSFORMERS_DEFORMABLE: Rules = [
    (r'model\.(input_proj\.\d+\.[01])\.(#)', r'\1.\2'),
    (r'model\.(level_embed|(?:reference_points|enc_output|enc_output_norm|pos_trans|pos_trans_norm)\..*)', r'transformer.\1'),
    (r'model\.(decoder\.(?:class|bbox)_embed\..*)', r'transformer.\1'),
    (r'model\.(encoder@\.self_attn\.(?:sampling_offsets|attention_weights|value_proj|output_proj))\.(#)',
     r'transformer.\1.\2'),
    (r'model\.(decoder@)\.encoder_attn\.(sampling_offsets|attention_weights|value_proj|output_proj)\.(#)',
     r'transformer.\1.cross_attn.\2.\3'),
    (r'model\.(decoder@)\.self_attn_layer_norm\.(#)', r'transformer.\1.norm2.\2'),
    (r'model\.(decoder@)\.encoder_attn_layer_norm\.(#)', r'transformer.\1.norm1.\2'),
    *TRANSFORMERS,
]  # fmt: skip

# detrex's Deformable family: detectron2's backbone, a neck, layers made of lists.
DETREX: Rules = [
    (r'backbone\.stem\.conv1\.weight', r'backbone.0.body.conv1.weight'),
    (r'backbone\.stem\.conv1\.norm\.(.*)', r'backbone.0.body.bn1.\1'),
    *(
        rule
        for stage in (1, 2, 3, 4)
        for rule in (
            (rf'backbone\.res{stage + 1}\.(\d+)\.conv(\d)\.weight', rf'backbone.0.body.layer{stage}.\1.conv\2.weight'),
            (rf'backbone\.res{stage + 1}\.(\d+)\.conv(\d)\.norm\.(.*)', rf'backbone.0.body.layer{stage}.\1.bn\2.\3'),
            (rf'backbone\.res{stage + 1}\.0\.shortcut\.weight', rf'backbone.0.body.layer{stage}.0.downsample.0.weight'),
            (rf'backbone\.res{stage + 1}\.0\.shortcut\.norm\.(.*)', rf'backbone.0.body.layer{stage}.0.downsample.1.\1'),
        )
    ),
    (r'backbone\.(.*)', r'backbone.0.body.\1'),
    (r'neck\.convs\.(\d)\.conv\.(#)', r'input_proj.\1.0.\2'),
    (r'neck\.convs\.(\d)\.norm\.(#)', r'input_proj.\1.1.\2'),
    *(
        (rf'neck\.extra_convs\.{extra}\.{part}\.(#)', rf'input_proj.{3 + extra}.{index}.\1')
        for extra in (0, 1)
        for index, part in enumerate(('conv', 'norm'))
    ),
    (r'query_embedding\.weight', r'query_embed.weight'),
    (r'transformer\.level_embeds', r'transformer.level_embed'),
    (r'transformer\.(encoder@)\.attentions\.0\.(.*)', r'transformer.\1.self_attn.\2'),
    (r'transformer\.(decoder@)\.attentions\.0\.attn\.(.*)', r'transformer.\1.self_attn.\2'),
    (r'transformer\.(decoder@)\.attentions\.1\.(.*)', r'transformer.\1.cross_attn.\2'),
    (r'transformer\.(@)\.ffns\.0\.layers\.0\.0\.(#)', r'transformer.\1.linear1.\2'),
    (r'transformer\.(@)\.ffns\.0\.layers\.1\.(#)', r'transformer.\1.linear2.\2'),
    (r'transformer\.(encoder@)\.norms\.0\.(#)', r'transformer.\1.norm1.\2'),
    (r'transformer\.(encoder@)\.norms\.1\.(#)', r'transformer.\1.norm2.\2'),
    (r'transformer\.(decoder@)\.norms\.0\.(#)', r'transformer.\1.norm2.\2'),
    (r'transformer\.(decoder@)\.norms\.1\.(#)', r'transformer.\1.norm1.\2'),
    (r'transformer\.(decoder@)\.norms\.2\.(#)', r'transformer.\1.norm3.\2'),
]  # fmt: skip
# mmdetection's Co-DETR, our name beside theirs, for both directions. {layer} and {i} are numbers, {rest} is anything.
# Modules that they number by auxiliary head are named by it here.
ENCODER, DECODER = ('transformer.encoder.layers.{layer}.', 'transformer.decoder.layers.{layer}.')
SOURCE = 'query_sources.collaborative.'
MMDETECTION: list[tuple[str, str]] = [
    ('backbone.0.body.{rest}', 'backbone.{rest}'),
    ('class_embed.{i}.{rest}', 'query_head.cls_branches.{i}.{rest}'),
    *(
        (f'bbox_embed.{{i}}.layers.{ours}.{{rest}}', f'query_head.reg_branches.{{i}}.{theirs}.{{rest}}')
        for ours, theirs in ((0, 0), (1, 2), (2, 4))
    ),
    ('query_embed.weight', 'query_head.query_embedding.weight'),
    ('transformer.level_embed', 'query_head.transformer.level_embeds'),
    *(
        (f'transformer.{part}.{{rest}}', f'query_head.transformer.{part}.{{rest}}')
        for part in ('enc_output', 'enc_output_norm', 'pos_trans', 'pos_trans_norm', 'decoder.norm')
    ),
    *(
        (
            f'transformer.decoder.ref_point_head.layers.{ours}.{{rest}}',
            f'query_head.transformer.decoder.ref_point_head.{theirs}.{{rest}}',
        )
        for ours, theirs in ((0, 0), (1, 2))
    ),
    *(
        (f'{layer}{ours}.{{rest}}', f'query_head.{layer}{theirs}.{{rest}}')
        for layer, parts in (
            (ENCODER, {'self_attn': 'attentions.0', 'norm1': 'norms.0', 'norm2': 'norms.1'}),
            (
                DECODER,
                {
                    'self_attn': 'attentions.0.attn', 'cross_attn': 'attentions.1', 'norm2': 'norms.0',
                    'norm1': 'norms.1', 'norm3': 'norms.2',
                },
            ),
        )
        for ours, theirs in (parts | {'linear1': 'ffns.0.layers.0.0', 'linear2': 'ffns.0.layers.1'}).items()
    ),
    ('query_sources.denoising.label_embedding.weight', 'query_head.label_embedding.weight'),
    (f'{SOURCE}downsample.{{rest}}', 'query_head.downsample.{rest}'),
    (f'{SOURCE}head_pos_embed.weight', 'query_head.transformer.head_pos_embed.weight'),
    *(
        (f'{SOURCE}{ours}.{head}.{part}.{{rest}}', f'query_head.transformer.{theirs}.{index}.{{rest}}')
        for index, head in enumerate(('faster_rcnn', 'atss'))
        for ours, part, theirs in (
            ('aux_pos_trans', 'linear', 'aux_pos_trans'),
            ('aux_pos_trans', 'norm', 'aux_pos_trans_norm'),
            ('pos_feats_trans', 'linear', 'pos_feats_trans'),
            ('pos_feats_trans', 'norm', 'pos_feats_norm'),
        )
    ),
    (f'{SOURCE}heads.faster_rcnn.rpn.{{rest}}', 'rpn_head.{rest}'),
    ('co_masks.mask_head.{rest}', 'mask_head.{rest}'),
    ('co_masks.mask_iou_head.{rest}', 'mask_iou_head.{rest}'),
    (f'{SOURCE}heads.faster_rcnn.masks.{{rest}}', 'roi_head.0.mask_head.{rest}'),
    (f'{SOURCE}heads.faster_rcnn.roi.{{rest}}', 'roi_head.0.bbox_head.{rest}'),
    (f'{SOURCE}heads.atss.{{rest}}', 'bbox_head.0.{rest}'),
]  # fmt: skip
# Other names of the same entries: the query content of DINO, and the port to mmdetection 3.
MMDETECTION_DINO = ('query_embed.weight', 'query_head.transformer.query_embed.weight')
MMDETECTION_3 = (
    'query_sources.denoising.label_embedding.weight', 'query_head.dn_generator.label_embedding.weight',
)  # fmt: skip
# COCO's ids of the 80 classes that some projects number without gaps.
COCO_IDS = [
    *range(1, 12), *range(13, 26), 27, 28, *range(31, 45), *range(46, 66), 67, 70, *range(72, 83), *range(84, 91),
]  # fmt: skip
NEVER = -50.0  # bias of a class that does not exist


def rename(name: str, rules: Rules) -> str:
    """Return the official name, or the name itself if no rule fits, so that it is reported as left over."""
    for pattern, replacement in rules:
        pattern = pattern.replace('coder@', r'coder\.layers\.\d+').replace('(#)', '(weight|bias)')
        pattern = pattern.replace('(@)', r'((?:encoder|decoder)\.layers\.\d+)')
        match = re.fullmatch(pattern, name)
        if match:
            # Stages and convolutions are numbered from 0 there and from 1 here.
            return re.sub(r'<(\d)>', lambda number: str(int(number[1]) + 1), match.expand(replacement))
    return name


def merge_in_proj(state: State) -> State:
    """Concatenate separate q, k and v projections to one `in_proj`, as nn.MultiheadAttention keeps them."""
    merged = {}
    for name, value in state.items():
        match = re.fullmatch(r'(.*\.(?:self_attn|multihead_attn)\.)([qkv])_proj\.(weight|bias)', name)
        if not match:
            merged[name] = value
        elif match[2] == 'q':
            parts = [state[f'{match[1]}{part}_proj.{match[3]}'] for part in 'qkv']
            merged[f'{match[1]}in_proj_{match[3]}'] = torch.cat(parts)
    return merged


def from_transformers(state: State) -> State:
    conditional = any('ref_point_head' in name for name in state)
    rules = TRANSFORMERS_CONDITIONAL if conditional else TRANSFORMERS
    return merge_in_proj({rename(name, rules): value for name, value in state.items()})


def from_transformers_deformable(state: State) -> State:
    """Translate, and repeat the first heads for every layer: saved files hold shared heads once."""
    state = merge_in_proj({rename(name, TRANSFORMERS_DEFORMABLE): value for name, value in state.items()})
    state = drop_head_aliases(state)
    layers = {name.split('.')[3] for name in state if name.startswith('transformer.decoder.layers.')}
    heads = [name for name in state if re.match(r'(class|bbox)_embed\.0\.', name)]
    repeated = {
        re.sub(r'_embed\.0\.', f'_embed.{layer}.', name): state[name] for layer in layers for name in heads
    }
    return repeated | state


def from_detrex(state: State) -> State:
    return drop_head_aliases({rename(name, DETREX): value for name, value in state.items()})


def mmdetection_names(num_maps: int) -> list[tuple[str, str]]:
    """Return the table for a neck that projects `num_maps` maps of the backbone and makes the others.

    Without any map it is the feature pyramid of a ViT.
    """
    pyramid = [
        (f'input_proj.{level}.{{i}}.{{rest}}', f'neck.p{level + 2}.{{i}}.{{rest}}') for level in range(5)
    ]
    if num_maps == 0:  # of a ViT
        return pyramid + MMDETECTION
    neck = [
        (f'input_proj.{projection}.{index}.{{rest}}', f'neck.{name}.{part}.{{rest}}')
        for projection, name in (
            *((level, f'convs.{level}') for level in range(num_maps)),
            *((num_maps + level, f'extra_convs.{level}') for level in range(9)),
        )
        for index, part in enumerate(('conv', 'gn'))
    ]
    return neck + MMDETECTION


def translate(name: str, table: list[tuple[str, str]], to_ours: bool) -> str:
    """Return the other name by the first row that fits, or the name itself."""
    for row in table:
        theirs, ours = row[to_ours], row[not to_ours]
        pattern = re.escape(theirs).replace(r'\{rest\}', '(?P<rest>.+)')
        pattern = re.sub(r'\\{(layer|i)\\}', r'(?P<\1>\\d+)', pattern).replace(r'\{part\}', r'(?P<part>\w+)')
        if match := re.fullmatch(pattern, name):
            return ours.format(**match.groupdict())
    return name


def from_mmdetection(state: State) -> State:
    """Translate, leaving out averaged weights (`ema_*`): at the end of an epoch they are swapped with the others."""
    maps = {name.split('.')[2] for name in state if name.startswith('neck.convs.')}
    table = [*mmdetection_names(len(maps)), MMDETECTION_DINO, MMDETECTION_3]
    return {
        translate(name, table, to_ours=True): value
        for name, value in state.items()
        if not name.startswith('ema_')
        and not re.search(r'\brope(_win|_glb)?\.freqs', name)  # tables are computed
    }


def from_idea_dino(state: State) -> State:
    """Translate IDEA-Research/DINO: the proposals' heads have names of their own there, and are the last of ours."""
    layers = {name.split('.')[3] for name in state if name.startswith('transformer.decoder.layers.')}
    rules = [
        (r'transformer\.tgt_embed\.(.*)', r'query_embed.\1'),
        (r'transformer\.enc_out_(class|bbox)_embed\.(.*)', rf'\1_embed.{len(layers)}.\2'),
        (r'label_enc\.(.*)', r'query_sources.denoising.label_embedding.\1'),
    ]
    return drop_head_aliases({rename(name, rules): value for name, value in state.items()})


def drop_head_aliases(state: State) -> State:
    """Keep one name of each head; official Deformable DETR has two, other files one of them.

    MS-DETR's second box heads equal the first, and are dropped.
    """
    alias = re.compile(r'transformer\.decoder\.((?:class|bbox)_embed\..*)')
    aliases = {match[1]: state[name] for name in state if (match := alias.fullmatch(name))}
    return aliases | {
        name: value
        for name, value in state.items()
        if not alias.fullmatch(name) and not name.startswith('bbox_embed_o2m.')
    }


def spread_coco_classes(state: State, num_rows: int) -> State:
    """Expand class heads of 80 rows to `num_rows`, with one row per COCO id.

    A head for proposals (one more than there are decoder layers) keeps its rows, the first of which stands for
    'object'. DINO's is expanded too.
    """
    dino = 'transformer.decoder.ref_point_head.layers.0.weight' in state
    layers = {name.split('.')[3] for name in state if name.startswith('transformer.decoder.layers.')}
    spread = dict(state)
    for name, value in state.items():
        match = re.fullmatch(r'class_embed\.(\d+)\.(weight|bias)', name)
        if match and len(value) == len(COCO_IDS):
            agnostic = int(match[1]) == len(layers) and not dino
            rows = list(range(len(COCO_IDS))) if agnostic else COCO_IDS
            spread[name] = value.new_full((num_rows, *value.shape[1:]), NEVER if match[2] == 'bias' else 0.0)
            spread[name][rows] = value
    return spread


# Layout -> a key that only it has, and its converter. The first that fits wins.
LAYOUTS: dict[str, tuple[str, Callable[[State], State]]] = {
    'transformers': ('model.input_projection.weight', from_transformers),
    'transformers, Deformable': ('model.input_proj.0.0.weight', from_transformers_deformable),
    'detrex': ('transformer.level_embeds', from_detrex),
    'mmdetection': ('query_head.transformer.level_embeds', from_mmdetection),
    'IDEA DINO': ('transformer.tgt_embed.weight', from_idea_dino),
}


def to_official(state: State) -> tuple[str, State]:
    """Return the layout's name, and the state dict under official names without aliases."""
    if any(name.startswith('detr.') for name in state):  # official detectors with masks wrap the detector
        state = {name.removeprefix('detr.'): value for name, value in state.items()}
    for layout, (key, convert) in LAYOUTS.items():
        if key in state:
            return layout, convert(state)
    return 'official', drop_head_aliases(state)
