"""
Names of the entries of a state dict here and in other projects, as tables that are read in both directions.

A row holds the name here and that in the other project. `{layer}` and `{i}` stand for a number, `{rest}` for
anything. The first row that fits a whole name is used; of rows with the same name on one side, the first is
written.
"""

import re
from functools import cache

Table = list[tuple[str, str]]

HOLES = {'layer': r'\d+', 'i': r'\d+', 'rest': '.+'}


@cache
def pattern(template: str) -> re.Pattern:
    """Return the pattern of the names that a template describes."""
    pieces = re.split(r'\{(\w+)\}', template)
    texts = [
        f'(?P<{piece}>{HOLES[piece]})' if index % 2 else re.escape(piece)
        for index, piece in enumerate(pieces)
    ]
    return re.compile(''.join(texts))


def rename(name: str, table: Table, read: bool) -> str | None:
    """Return the name on the other side of the first row that fits; None if no row fits.

    read: the name is that in the other project.
    """
    for row in table:
        if match := pattern(row[read]).fullmatch(name):
            return row[not read].format(**match.groupdict())
    return None


def rows(here: str, there: str, parts: dict[str, str]) -> Table:
    """Return a row for each part: prefix and name of the part here, prefix and name there, then anything."""
    return [(f'{here}{part}.{{rest}}', f'{there}{other}.{{rest}}') for part, other in parts.items()]


def same(*parts: str) -> dict[str, str]:
    return dict(zip(parts, parts, strict=True))


def layers(part: str, there: str, parts: dict[str, str]) -> Table:
    """Return rows for the layers of the 'encoder' or 'decoder'; there: the prefix in the other project."""
    return rows(f'transformer.{part}.layers.{{layer}}.', f'{there}{part}.layers.{{layer}}.', parts)


# transformers -----------------------------------------------------------------------------------------------
# Other spellings of its names become those of its files: modules in memory since version 5, and its own
# ResNet.
TRANSFORMERS_SPELLINGS = [
    (r'^model\.backbone\.model\.', 'model.backbone.conv_encoder.model.'),
    (r'^model\.position_embedding\.', 'model.backbone.position_embedding.'),
    (r'\.embedder\.embedder\.convolution\.', '.conv1.'),
    (r'\.embedder\.embedder\.normalization\.', '.bn1.'),
    *((rf'\.encoder\.stages\.{stage}\.layers\.', f'.layer{stage + 1}.') for stage in range(4)),
    *((rf'\.layer\.{index}\.convolution\.', f'.conv{index + 1}.') for index in range(3)),
    *((rf'\.layer\.{index}\.normalization\.', f'.bn{index + 1}.') for index in range(3)),
    (r'\.shortcut\.convolution\.', '.downsample.0.'),
    (r'\.shortcut\.normalization\.', '.downsample.1.'),
    (r'\.mlp\.fc', '.fc'),
    (r'\.o_proj\.', '.out_proj.'),
]
# The same of Conditional DETR's decoder, whose projections are apart.
CONDITIONAL_SPELLINGS = [
    (r'(decoder\..*)\.self_attn\.([qk])_(content|pos)_proj\.', r'\1.sa_\2\3_proj.'),
    (r'(decoder\..*)\.self_attn\.v_proj\.', r'\1.sa_v_proj.'),
    (r'(decoder\..*)\.encoder_attn\.([qk])_(content|pos)_proj\.', r'\1.ca_\2\3_proj.'),
    (r'(decoder\..*)\.encoder_attn\.q_pos_sine_proj\.', r'\1.ca_qpos_sine_proj.'),
    (r'(decoder\..*)\.encoder_attn\.v_proj\.', r'\1.ca_v_proj.'),
]
PROPOSALS = same('enc_output', 'enc_output_norm', 'pos_trans', 'pos_trans_norm')
LAYER = {'linear1': 'fc1', 'linear2': 'fc2', 'self_attn': 'self_attn'}
ENCODER = LAYER | {'norm1': 'self_attn_layer_norm', 'norm2': 'final_layer_norm'}
DECODER = LAYER | {
    'norm1': 'self_attn_layer_norm',
    'norm2': 'encoder_attn_layer_norm',
    'norm3': 'final_layer_norm',
}
DEFORMABLE_DECODER = DECODER | {
    'norm1': 'encoder_attn_layer_norm',
    'norm2': 'self_attn_layer_norm',
    'cross_attn': 'encoder_attn',
}
EVERY = [
    ('backbone.0.body.{rest}', 'model.backbone.conv_encoder.model.{rest}'),
    ('backbone.1.row_embed.{rest}', 'model.backbone.position_embedding.row_embeddings.{rest}'),
    ('backbone.1.col_embed.{rest}', 'model.backbone.position_embedding.column_embeddings.{rest}'),
    ('query_embed.{rest}', 'model.query_position_embeddings.{rest}'),
    *layers('encoder', 'model.', ENCODER),
]
DETR = [
    *EVERY,
    *rows('', '', {'class_embed': 'class_labels_classifier', 'bbox_embed': 'bbox_predictor'}),
    *rows('', 'model.', {'input_proj': 'input_projection'}),
    *rows('transformer.', 'model.', {f'{part}.norm': f'{part}.layernorm' for part in ('encoder', 'decoder')}),
]
# By the family of the model.
TRANSFORMERS: dict[str, Table] = {
    'detr': [*DETR, *layers('decoder', 'model.', DECODER | {'multihead_attn': 'encoder_attn'})],
    'conditional': [
        *DETR,
        *layers('decoder', 'model.', DECODER | {'cross_attn': 'encoder_attn'}),
        *rows('transformer.decoder.', 'model.decoder.', same('query_scale', 'ref_point_head')),
        ('transformer.decoder.layers.{layer}.sa_{rest}', 'model.decoder.layers.{layer}.sa_{rest}'),
        ('transformer.decoder.layers.{layer}.ca_{rest}', 'model.decoder.layers.{layer}.ca_{rest}'),
    ],
    'deformable': [
        *EVERY,
        *layers('decoder', 'model.', DEFORMABLE_DECODER),
        *rows('', '', same('class_embed.{i}', 'bbox_embed.{i}')),
        *rows('', 'model.', same('input_proj.{i}')),
        ('transformer.level_embed', 'model.level_embed'),
        *rows(
            'transformer.', 'model.', same('reference_points', 'decoder.class_embed', 'decoder.bbox_embed')
        ),
        *rows('transformer.', 'model.', PROPOSALS),
    ],
}

# detrex and mmdetection, whose layers are those of mmcv -----------------------------------------------------
FFN = {'linear1': 'ffns.0.layers.0.0', 'linear2': 'ffns.0.layers.1'}
MMCV_ENCODER = FFN | {'self_attn': 'attentions.0', 'norm1': 'norms.0', 'norm2': 'norms.1'}
MMCV_DECODER = FFN | {
    'self_attn': 'attentions.0.attn',
    'cross_attn': 'attentions.1',
    'norm2': 'norms.0',
    'norm1': 'norms.1',
    'norm3': 'norms.2',
}


def neck(num_maps: int, norm: str) -> Table:
    """Return the rows of a neck that projects `num_maps` maps of the backbone and makes further ones."""
    projections = [*(f'convs.{i}' for i in range(num_maps)), *(f'extra_convs.{i}' for i in range(9))]
    return [
        row
        for level, projection in enumerate(projections)
        for row in rows(f'input_proj.{level}.', f'neck.{projection}.', {'0': 'conv', '1': norm})
    ]


DETECTRON_BLOCK = {
    'bn{i}': 'conv{i}.norm',
    'conv{i}': 'conv{i}',
    'downsample.1': 'shortcut.norm',
    'downsample.0': 'shortcut',
}
# The families of Deformable DETR, with detectron2's backbone; heads have our names.
DETREX: Table = [
    *rows('backbone.0.body.', 'backbone.stem.', {'bn1': 'conv1.norm', 'conv1': 'conv1'}),
    *(
        row
        for stage in range(1, 5)
        for row in rows(
            f'backbone.0.body.layer{stage}.{{layer}}.', f'backbone.res{stage + 1}.{{layer}}.', DETECTRON_BLOCK
        )
    ),
    ('backbone.0.body.{rest}', 'backbone.{rest}'),
    ('query_embed.weight', 'query_embedding.weight'),
    ('transformer.level_embed', 'transformer.level_embeds'),
    *layers('encoder', 'transformer.', MMCV_ENCODER),
    *layers('decoder', 'transformer.', MMCV_DECODER),
]
# Co-DETR of mmdetection. What it numbers by auxiliary head is named by that head here.
BRANCH = 'query_sources.collaborative.'
QUERY_HEAD = 'query_head.transformer.'
PROJECTIONS = {
    'aux_pos_trans.{head}.linear': 'aux_pos_trans.{index}',
    'aux_pos_trans.{head}.norm': 'aux_pos_trans_norm.{index}',
    'pos_feats_trans.{head}.linear': 'pos_feats_trans.{index}',
    'pos_feats_trans.{head}.norm': 'pos_feats_norm.{index}',
}
AUXILIARY_HEADS = {
    'faster_rcnn.rpn': 'rpn_head',
    'faster_rcnn.masks': 'roi_head.0.mask_head',
    'faster_rcnn.roi': 'roi_head.0.bbox_head',
    'atss': 'bbox_head.0',
}
MMDETECTION: Table = [
    *rows('input_proj.', 'neck.p', {f'{level}.{{i}}': f'{level + 2}.{{i}}' for level in range(5)}),
    *rows('', '', {'backbone.0.body': 'backbone'}),
    *rows('class_embed.', 'query_head.cls_branches.', same('{i}')),
    *rows('bbox_embed.{i}.layers.', 'query_head.reg_branches.{i}.', {'0': '0', '1': '2', '2': '4'}),
    ('transformer.level_embed', 'query_head.transformer.level_embeds'),
    *rows('transformer.', QUERY_HEAD, PROPOSALS | same('decoder.norm')),
    *rows(
        'transformer.',
        QUERY_HEAD,
        {f'decoder.ref_point_head.layers.{i}': f'decoder.ref_point_head.{2 * i}' for i in (0, 1)},
    ),
    *layers('encoder', QUERY_HEAD, MMCV_ENCODER),
    *layers('decoder', QUERY_HEAD, MMCV_DECODER),
    *rows('query_sources.denoising.', 'query_head.', same('label_embedding')),
    *rows('query_sources.denoising.', 'query_head.dn_generator.', same('label_embedding')),  # of version 3
    *rows(BRANCH, QUERY_HEAD, same('head_pos_embed')),
    *rows(BRANCH, 'query_head.', same('downsample')),
    *(
        (
            f'{BRANCH}{here}.{{rest}}'.replace('{head}', head),
            f'{QUERY_HEAD}{there}.{{rest}}'.replace('{index}', index),
        )
        for index, head in (('0', 'faster_rcnn'), ('1', 'atss'))
        for here, there in PROJECTIONS.items()
    ),
    *rows(f'{BRANCH}heads.', '', AUXILIARY_HEADS),
    *rows('co_masks.', '', same('mask_head', 'mask_iou_head')),
]
QUERIES: Table = [('query_embed.weight', 'query_head.query_embedding.weight')]
DINO_QUERIES: Table = [('query_embed.weight', 'query_head.transformer.query_embed.weight')]


def mmdetection(num_maps: int, dino: bool) -> Table:
    """Return the table of a Co-DETR.

    num_maps: maps of the backbone that its neck projects; 0: it has the pyramid of a ViT.
    """
    queries = DINO_QUERIES + QUERIES if dino else QUERIES + DINO_QUERIES
    return queries + (neck(num_maps, 'gn') if num_maps else []) + MMDETECTION


def idea_dino(num_layers: int) -> Table:
    """Return the table of IDEA-Research's DINO; its heads of proposals have names, here they are the last."""
    return [
        *rows('', 'transformer.', {'query_embed': 'tgt_embed'}),
        *rows('', 'transformer.', {f'class_embed.{num_layers}': 'enc_out_class_embed'}),
        *rows('', 'transformer.', {f'bbox_embed.{num_layers}': 'enc_out_bbox_embed'}),
        *rows('query_sources.denoising.', '', {'label_embedding': 'label_enc'}),
    ]
