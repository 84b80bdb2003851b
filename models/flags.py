"""Declare the flags of the detector: what inference needs. What each means when it is not given stands here too."""

import math
from argparse import ArgumentParser, BooleanOptionalAction

from .backbone import NORM_LAYERS
from .parts import PLACES

# What a flag means when it is not given: the official value of the family.
FAMILY_DEFAULTS = {
    'detr': {
        'num_queries': 100,
        'dim_feedforward': 2048,
        'dropout': 0.1,
        'pe_temperature': 10000.0,
        'topk_eval': 100,
    },
    'conditional': {
        'num_queries': 300,
        'dim_feedforward': 2048,
        'dropout': 0.1,
        'pe_temperature': 10000.0,
        'topk_eval': 100,
    },
    'deformable': {
        'num_queries': 300,
        'dim_feedforward': 1024,
        'dropout': 0.1,
        'pe_temperature': 10000.0,
        'topk_eval': 100,
        'num_feature_levels': 4,
    },
}
# Deformable DETR with DINO's decoder.
FAMILY_DEFAULTS['dino'] = FAMILY_DEFAULTS['deformable'] | {
    'num_queries': 900,
    'dim_feedforward': 2048,
    'dropout': 0.0,
    'pe_temperature': 20.0,
    'topk_eval': 300,
}
# What --dino is made of.
DINO_FLAGS = ('with_box_refine', 'two_stage', 'mixed_selection', 'look_forward_twice')
# Any of these makes the model a Deformable DETR.
DEFORMABLE_FLAGS = (
    'deformable', *DINO_FLAGS, 'num_feature_levels', 'dino', 'dn_number', 'co_aux_heads',
)  # fmt: skip
# So do these and --use_ms_detr, unless --conditional is there; H-DETR's even at 0, as in its baselines.
HYBRID_FLAGS = ('hybrid_k', 'hybrid_queries', 'hybrid_lambda')
# IoU above which detections of an auxiliary head suppress one another.
AUXILIARY_HEADS = {'faster_rcnn': 0.5, 'atss': 0.6}
# Names of official namespaces (as in their checkpoints) -> ours.
OFFICIAL_NAMES = {
    'num_queries_one2one': 'num_queries',
    'num_queries_one2many': 'hybrid_queries',
    'k_one2many': 'hybrid_k',
    'lambda_one2many': 'hybrid_lambda',
    'topk': 'topk_eval',
}
NUM_CLASSES = 91  # of COCO, where no data set has said otherwise
DROP_PATH_RATE = 0.2


def family_default(flag: str, tables: dict[str, dict] = FAMILY_DEFAULTS) -> str:
    """Describe, for a help text, a default that depends on the family. tables: values of flags by family."""
    families: dict[str, list[str]] = {}
    for family, table in tables.items():
        value = table[flag]
        text = f'{value:g}' if isinstance(value, int | float) else ' '.join(value) or 'none'
        families.setdefault(text, []).append(family)
    return ', '.join(f'{text} for {" and ".join(names)}' for text, names in families.items())


def add_model_args(parser: ArgumentParser) -> None:
    """Declare the flags of the detector and its detections."""
    family = parser.add_argument_group('model family (plain DETR when no flag of a variant is given)')
    family.add_argument('--conditional', action='store_true', help='Conditional DETR (arXiv:2108.06152)')
    family.add_argument(
        '--local_init',
        default=0.0,
        type=float,
        metavar='GAIN',
        help='Conditional DETR: start with attention around the reference points, as sharp as GAIN says; helps small models that '
        'learn from random numbers, for instance 12 (default: 0, the official initial values)',
    )

    deformable = parser.add_argument_group(
        'Deformable DETR (arXiv:2010.04159; any of these flags chooses it)'
    )
    deformable.add_argument('--deformable', action='store_true', help='Deformable DETR without more')
    deformable.add_argument(
        '--with_box_refine',
        action='store_true',
        help='each decoder layer refines the boxes of the one before',
    )
    deformable.add_argument('--two_stage', action='store_true',
                            help="the encoder's best proposals are the queries; needs --with_box_refine")  # fmt: skip
    deformable.add_argument('--mixed_selection', action='store_true',
                            help='two-stage queries take only their place from the proposals; their content is learned')  # fmt: skip
    deformable.add_argument('--look_forward_twice', action='store_true',
                            help="a layer's box loss also trains the refinement of the layer before")  # fmt: skip
    deformable.add_argument('--num_feature_levels', type=int,
                            help='feature maps: 1 = the last of the backbone, else all from its second stage on and '
                                 'strided ones beyond (default: 4)')  # fmt: skip
    deformable.add_argument('--finest_stride', type=int, choices=(4, 8),
                            help='of several feature maps: 4 adds that of the first stage of the backbone (default: 8; with '
                                 '--dino and 5 or more levels 4)')  # fmt: skip
    deformable.add_argument('--input_proj_bias', action=BooleanOptionalAction,
                            help='the projections of feature maps have biases (default: as official: without with --dino '
                                 'or --co_aux_heads)')  # fmt: skip
    deformable.add_argument('--dino', action='store_true',
                            help="DINO's decoder (arXiv:2203.03605): positions follow from the boxes, proposals are chosen by "
                                 'their best class; implies two stages and all flags above that change them')  # fmt: skip
    for part in ('enc', 'dec'):
        deformable.add_argument(
            f'--{part}_n_points',
            default=4,
            type=int,
            help='places that a head reads on each level (default: %(default)s)',
        )

    backbone = parser.add_argument_group('backbone')
    backbone.add_argument('--backbone', default='resnet50', metavar='NAME',
                          help='resnet10, any ResNet of torchvision (resnet18 ... resnet152, resnext..., wide_resnet...), mobilenet_v2, swin_tiny, swin_small, swin_base, swin_large (the last '
                               'two also with _window12), or timm/NAME for any feature network of timm (default: %(default)s)')  # fmt: skip
    backbone.add_argument('--backbone_weights', '--pretrained_backbone_path', default='imagenet', metavar='SOURCE',
                          help='imagenet (downloaded), none (random), or a file of a state dict under the names of '
                               'torchvision, timm or the official Swin; not read when a checkpoint is loaded '
                               '(default: %(default)s)')  # fmt: skip
    backbone.add_argument('--backbone_norm', default='frozen', choices=NORM_LAYERS,
                          help='norm layers: frozen statistics with stem and first stage frozen (official), or batch or '
                               'group norms with everything trained, to start from random numbers; Swin has layer norms '
                               'and takes none of these (default: %(default)s)')  # fmt: skip
    backbone.add_argument('--backbone_stages', default=4, type=int, choices=(2, 3, 4),
                          help='stages used; 4 ends at stride 32, 3 at 16, 2 at 8 (default: %(default)s)')  # fmt: skip
    backbone.add_argument('--dilation', action='store_true',
                          help='dilate the last stage instead of striding: DC5, stride 16')  # fmt: skip
    backbone.add_argument('--drop_path_rate', default=DROP_PATH_RATE, type=float,
                          help='Swin, while training: probability that the last block is skipped; it grows from 0 over the '
                               'blocks (default: %(default)s)')  # fmt: skip
    backbone.add_argument('--backbone_frozen_stages', default=-1, type=int, metavar='N',
                          help='Swin: 0 and 1 freeze the patches, 2 also the first stage, ... 5 all four; norms of the maps '
                               'always train (default: %(default)s, which freezes nothing)')  # fmt: skip
    backbone.add_argument('--position_embedding', default='sine', choices=('sine', 'learned', 'v2', 'v3'),
                          help='positional encoding of the image; v2 = sine, v3 = learned (default: %(default)s)')  # fmt: skip
    backbone.add_argument(
        '--pe_temperature',
        type=float,
        help='of sine encodings; about 20 resolves places better where there are few tokens '
        f'(default: {family_default("pe_temperature")})',
    )

    backbone.add_argument('--position_embedding_scale', default=2 * math.pi, type=float,
                          help='angle of a whole side in sine encodings (default: 2 pi)')  # fmt: skip

    model = parser.add_argument_group('transformer')
    model.add_argument('--enc_layers', default=6, type=int, help='encoder layers (default: %(default)s)')
    model.add_argument('--dec_layers', default=6, type=int, help='decoder layers (default: %(default)s)')
    model.add_argument('--dim_feedforward', type=int,
                       help=f'hidden width of the feed-forward blocks (default: {family_default("dim_feedforward")}; '
                            '2048 with --hybrid_k or --co_aux_heads)')  # fmt: skip
    model.add_argument(
        '--hidden_dim', default=256, type=int, help='width of tokens and queries (default: %(default)s)'
    )
    model.add_argument('--dropout', type=float,
                       help=f'dropout probability (default: {family_default("dropout")}; 0 with --co_aux_heads)')  # fmt: skip
    model.add_argument('--nheads', default=8, type=int, help='attention heads (default: %(default)s)')
    model.add_argument('--num_queries', '--num_queries_one2one', type=int,
                       help=f'object queries, the most boxes an image can get (default: {family_default("num_queries")})')  # fmt: skip
    model.add_argument('--pre_norm', action='store_true', help='norm in front of each sub-layer (DETR only)')
    model.add_argument('--use_checkpoint', nargs='*', choices=PLACES, metavar='PART',
                       help='compute activations again in the backward pass instead of keeping them, in the stages (Swin: '
                            'blocks) of the backbone, in encoder or decoder layers: less memory, about a third more time there; '
                            'PART: backbone, encoder, decoder, any of them, or nothing for all (default: nowhere)')  # fmt: skip

    mixed = parser.add_argument_group(
        'mixed supervision (MS-DETR, arXiv:2401.03989; Deformable or Conditional DETR)'
    )
    mixed.add_argument('--use_ms_detr', action='store_true',
                       help='read the queries a second time while training, and supervise that reading one-to-many')  # fmt: skip
    mixed.add_argument('--ms_variant', default='b', choices=('a', 'b'),
                       help='b reads after the cross-attention, which moves in front of the self-attention, at inference too; a '
                            'reads at the output of a layer, by class heads of their own (default: %(default)s)')  # fmt: skip
    mixed.add_argument('--use_aux_ffn', action='store_true',
                       help='give the second reading a feed-forward block of its own (variant b)')  # fmt: skip

    detections = parser.add_argument_group('detections')
    detections.add_argument('--topk_eval', '--topk', type=int,
                            help='detections kept an image (not DETR, which gives one a query; '
                                 f'default: {family_default("topk_eval")})')  # fmt: skip
    detections.add_argument('--nms_iou_threshold', type=float,
                            help='suppress overlapping detections of a class above this IoU (not DETR; default: none are)')  # fmt: skip
    detections.add_argument('--soft_nms_threshold', type=float,
                            help='lower the scores of detections of a class that overlap a better one by this IoU or more '
                                 '(Deformable DETR; 0: do not; default: 0.8 with --dino, else 0)')  # fmt: skip
    detections.add_argument('--clamp_boxes', action=BooleanOptionalAction,
                            help='cut detections off at the edges of the image (default: as official: with --dino or '
                                 '--co_aux_heads)')  # fmt: skip
    detections.add_argument('--eval_module', default='detr', choices=('detr', *AUXILIARY_HEADS),
                            help='who detects outside training: the decoder, or one of --co_aux_heads by itself, 100 boxes a '
                                 'image after its own suppression (default: %(default)s)')  # fmt: skip
