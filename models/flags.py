"""The flags of model, matching and losses, and what each means when it is not given."""

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
        'set_cost_class': 1.0,
        'cls_loss_coef': 1.0,
        'lr': 1e-4,
        'lr_backbone': 1e-5,
        'lr_backbone_names': ['backbone'],
        'lr_linear_proj_names': [],
        'epochs': 300,
        'lr_drop': 200,
        'save_every': 100,
    },
    'conditional': {
        'num_queries': 300,
        'dim_feedforward': 2048,
        'dropout': 0.1,
        'pe_temperature': 10000.0,
        'topk_eval': 100,
        'set_cost_class': 2.0,
        'cls_loss_coef': 2.0,
        'lr': 1e-4,
        'lr_backbone': 1e-5,
        'lr_backbone_names': ['backbone'],
        'lr_linear_proj_names': [],
        'epochs': 50,
        'lr_drop': 40,
        'save_every': 10,
    },
    'deformable': {
        'num_queries': 300,
        'dim_feedforward': 1024,
        'dropout': 0.1,
        'pe_temperature': 10000.0,
        'topk_eval': 100,
        'num_feature_levels': 4,
        'set_cost_class': 2.0,
        'cls_loss_coef': 2.0,
        'lr': 2e-4,
        'lr_backbone': 2e-5,
        'lr_backbone_names': ['backbone.0'],
        'lr_linear_proj_names': ['reference_points', 'sampling_offsets'],
        'epochs': 50,
        'lr_drop': 40,
        'save_every': 5,
    },
}
# Deformable DETR with DINO's decoder.
FAMILY_DEFAULTS['dino'] = FAMILY_DEFAULTS['deformable'] | {
    'num_queries': 900,
    'dim_feedforward': 2048,
    'dropout': 0.0,
    'pe_temperature': 20.0,
    'topk_eval': 300,
    'cls_loss_coef': 1.0,
    'lr_linear_proj_names': [],
    'epochs': 12,
    'lr_drop': 11,
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


def family_default(flag: str) -> str:
    """Text for the help of a flag whose default depends on the family."""
    families: dict[str, list[str]] = {}
    for family, table in FAMILY_DEFAULTS.items():
        value = table[flag]
        text = f'{value:g}' if isinstance(value, int | float) else ' '.join(value) or 'none'
        families.setdefault(text, []).append(family)
    return ', '.join(f'{text} for {" and ".join(names)}' for text, names in families.items())


def add_model_args(parser: ArgumentParser) -> None:
    """Declare the flags of model, matching and losses."""
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
                          help='resnet10 to resnet101, mobilenet_v2, swin_tiny, swin_small, swin_base, swin_large (the last '
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

    add_scheme_args(parser)

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

    matching = parser.add_argument_group('matching costs')
    matching.add_argument('--set_cost_class', type=float,
                          help=f'class (default: {family_default("set_cost_class")})')  # fmt: skip
    matching.add_argument(
        '--set_cost_bbox', default=5, type=float, help='L1 distance of boxes (default: %(default)s)'
    )
    matching.add_argument(
        '--set_cost_giou', default=2, type=float, help='generalised IoU (default: %(default)s)'
    )

    loss = parser.add_argument_group('loss coefficients')
    loss.add_argument(
        '--no_aux_loss', dest='aux_loss', action='store_false', help='supervise the last decoder layer only'
    )
    loss.add_argument(
        '--cls_loss_coef', type=float, help=f'class (default: {family_default("cls_loss_coef")})'
    )
    loss.add_argument(
        '--bbox_loss_coef', default=5, type=float, help='L1 distance of boxes (default: %(default)s)'
    )
    loss.add_argument(
        '--giou_loss_coef', default=2, type=float, help='generalised IoU (default: %(default)s)'
    )
    loss.add_argument('--eos_coef', default=0.1, type=float,
                      help="weight of the class 'no object' (DETR only; default: %(default)s)")  # fmt: skip
    loss.add_argument('--class_loss', choices=('focal', 'quality_focal'),
                      help='of sigmoid classes; quality_focal asks a positive for the IoU of its box (default: quality_focal '
                           'with --dino, else focal)')  # fmt: skip
    loss.add_argument('--focal_alpha', default=0.25, type=float,
                      help='weight of positives in the focal loss (not DETR; default: %(default)s)')  # fmt: skip


def add_scheme_args(parser: ArgumentParser) -> None:
    """Flags of further supervision while training. All combine. Inference stays what it is, but for the order of
    sub-layers in variant b of MS-DETR.
    """
    hybrid = parser.add_argument_group(
        'hybrid matching (H-DETR, arXiv:2207.13080; Deformable or Conditional DETR)'
    )
    hybrid.add_argument('--hybrid_k', '--k_one2many', type=int, metavar='K',
                        help='a second group of queries, in which K queries answer for each object; 0 = none '
                             '(default: 5 with --hybrid_queries, else 0)')  # fmt: skip
    hybrid.add_argument('--hybrid_queries', '--num_queries_one2many', type=int, metavar='N',
                        help='queries of that group (default: 1500 with --hybrid_k, else 0)')  # fmt: skip
    hybrid.add_argument('--hybrid_lambda', '--lambda_one2many', type=float, metavar='FACTOR',
                        help='of the losses of that group (default: 1)')  # fmt: skip
    groups = parser.add_argument_group('groups of queries (Group DETR, arXiv:2207.13085; any family)')
    groups.add_argument('--group_detr', default=1, type=int, metavar='G',
                        help='G groups of --num_queries queries, each matched one-to-one (default: %(default)s)')  # fmt: skip

    denoising = parser.add_argument_group(
        'contrastive denoising (DINO, arXiv:2203.03605; Deformable DETR in two stages)'
    )
    denoising.add_argument('--dn_number', default=0, type=int, metavar='N',
                           help='queries that mend noised objects, about N positives and N negatives an image; 0 = none, '
                                'usual: 100')  # fmt: skip
    denoising.add_argument('--dn_label_noise_ratio', default=0.5, type=float,
                           help='half of it is the share of labels that are drawn anew (default: %(default)s)')  # fmt: skip
    denoising.add_argument('--dn_box_noise_scale', default=1.0, type=float,
                           help='largest move of a corner, in halves of the sides (default: %(default)s)')  # fmt: skip

    collaborative = parser.add_argument_group(
        'collaborative heads (Co-DETR, arXiv:2211.12860; Deformable DETR in two stages)'
    )
    collaborative.add_argument('--co_aux_heads', nargs='+', default=[], choices=AUXILIARY_HEADS, metavar='HEAD',
                               help="detectors that train on the encoder's output, and whose positives become decoder "
                                    'queries: faster_rcnn, atss, or both (default: none)')  # fmt: skip
    collaborative.add_argument('--lambda_1', default=1.0, type=float,
                               help='of the losses of those queries (default: %(default)s)')  # fmt: skip
    collaborative.add_argument('--lambda_2', default=2.0, type=float,
                               help="of the heads' own losses, times --dec_layers (default: %(default)s)")  # fmt: skip
    collaborative.add_argument('--max_pos_coords', default=300, type=int,
                               help='positives of a head and image that become queries, at most (default: %(default)s)')  # fmt: skip
    collaborative.add_argument('--with_coord_feat', action=BooleanOptionalAction,
                               help='the content of those queries also has the feature that the head saw (default: yes, no '
                                    'with --dino)')  # fmt: skip

    mixed = parser.add_argument_group(
        'mixed supervision (MS-DETR, arXiv:2401.03989; Deformable or Conditional DETR)'
    )
    mixed.add_argument('--use_ms_detr', action='store_true',
                       help='the queries are read a second time and supervised one-to-many')  # fmt: skip
    mixed.add_argument('--ms_variant', default='b', choices=('a', 'b'),
                       help='b: read after the cross-attention, which moves in front of the self-attention; a: read at the '
                            'output of a layer, by class heads of their own (default: %(default)s)')  # fmt: skip
    mixed.add_argument('--use_aux_ffn', action='store_true',
                       help='a feed-forward block of its own for the second reading (variant b)')  # fmt: skip
    mixed.add_argument('--o2m_matcher_k', default=6, type=int,
                       help='queries an object gets at most (default: %(default)s)')  # fmt: skip
    mixed.add_argument('--o2m_matcher_threshold', default=0.4, type=float,
                       help='score from which a query counts for its best object (default: %(default)s)')  # fmt: skip
    mixed.add_argument('--o2m_iou_weight', default=0.7, type=float,
                       help='weight of the IoU in that score (default: %(default)s)')  # fmt: skip
    mixed.add_argument('--o2m_score_weight', default=0.3, type=float,
                       help="weight of the class's probability in that score (default: %(default)s)")  # fmt: skip
    mixed.add_argument('--use_indices_merge', action='store_true',
                       help='pairs of the one-to-one matching are added, for queries that have none')  # fmt: skip
    for kind, title in (('o2m', 'second reading'), ('enc', 'proposals of two stages')):
        for term, default in (('cls', 2), ('bbox', 5), ('giou', 2)):
            otherwise = '' if kind == 'o2m' else f' with --use_ms_detr, else as --{term}_loss_coef'
            mixed.add_argument(f'--{kind}_{term}_loss_coef', type=float, default=default if kind == 'o2m' else None,
                               help=f'{title}: coefficient (default: {default}{otherwise})')  # fmt: skip
