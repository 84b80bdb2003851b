"""Flags become modules, here only: `add_model_args`, `resolve_args`, `build_detector`, `build_model`."""

import copy
import math
from argparse import ArgumentParser, BooleanOptionalAction, Namespace

from torch import nn

from .backbone import NORM_LAYERS, Joiner, build_backbone
from .conditional_detr import ConditionalDecoder, ConditionalDecoderLayer
from .deformable_detr import DeformableDETR
from .deformable_transformer import (
    DeformableDecoder,
    DeformableDecoderLayer,
    DeformableEncoder,
    DeformableEncoderLayer,
    DeformableTransformer,
)
from .detr import DETR
from .dino import DinoDecoder, DinoTransformer
from .heads import box_head, class_head
from .ms_detr import (
    MixedConditionalDecoderLayer,
    MixedDecoderLayer,
    TwiceReadConditionalDecoderLayer,
    TwiceReadDecoderLayer,
)
from .ops.modules import MSDeformAttn
from .position_encoding import build_position_encoding
from .postprocess import (
    CandidatePostProcess,
    NMSPostProcess,
    SoftmaxPostProcess,
    SoftNMSPostProcess,
    TopKPostProcess,
)
from .swin import SWIN_SIZES
from .transformer import (
    Transformer,
    TransformerDecoder,
    TransformerDecoderLayer,
    TransformerEncoder,
    TransformerEncoderLayer,
)

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
RECOMPUTABLE = ('backbone', 'encoder', 'decoder')
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
                          help='positional encoding of the picture; v2 = sine, v3 = learned (default: %(default)s)')  # fmt: skip
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
                       help=f'object queries, the most boxes a picture can get (default: {family_default("num_queries")})')  # fmt: skip
    model.add_argument('--pre_norm', action='store_true', help='norm in front of each sub-layer (DETR only)')
    model.add_argument('--use_checkpoint', nargs='*', choices=RECOMPUTABLE, metavar='PART',
                       help='compute activations again in the backward pass instead of keeping them, in the stages (Swin: '
                            'blocks) of the backbone, in encoder or decoder layers: less memory, about a third more time there; '
                            'PART: backbone, encoder, decoder, any of them, or nothing for all (default: nowhere)')  # fmt: skip

    add_scheme_args(parser)

    detections = parser.add_argument_group('detections')
    detections.add_argument('--topk_eval', '--topk', type=int,
                            help='detections kept a picture (not DETR, which gives one a query; '
                                 f'default: {family_default("topk_eval")})')  # fmt: skip
    detections.add_argument('--nms_iou_threshold', type=float,
                            help='suppress overlapping detections of a class above this IoU (not DETR; default: none are)')  # fmt: skip
    detections.add_argument('--soft_nms_threshold', type=float,
                            help='lower the scores of detections of a class that overlap a better one by this IoU or more '
                                 '(Deformable DETR; 0: do not; default: 0.8 with --dino, else 0)')  # fmt: skip
    detections.add_argument('--clamp_boxes', action=BooleanOptionalAction,
                            help='cut detections off at the edges of the picture (default: as official: with --dino or '
                                 '--co_aux_heads)')  # fmt: skip
    detections.add_argument('--eval_module', default='detr', choices=('detr', *AUXILIARY_HEADS),
                            help='who detects outside training: the decoder, or one of --co_aux_heads by itself, 100 boxes a '
                                 'picture after its own suppression (default: %(default)s)')  # fmt: skip

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
                           help='queries that mend noised objects, about N positives and N negatives a picture; 0 = none, '
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
                               help='positives of a head and picture that become queries, at most (default: %(default)s)')  # fmt: skip
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


def resolve_args(args: Namespace) -> Namespace:
    """A copy of `args` with every model flag present, the family named, and its defaults where a flag was not
    given.

    ValueError: flags that contradict each other.
    """
    parser = ArgumentParser()
    add_model_args(parser)
    defaults = vars(parser.parse_args([]))
    given = {OFFICIAL_NAMES.get(k, k): value for k, value in vars(args).items() if value is not None}
    deformable = [flag for flag in DEFORMABLE_FLAGS if given.get(flag)]
    if deformable and given.get('conditional'):
        raise ValueError(
            f'--conditional and --{deformable[0]} choose different models: leave one of them out'
        )
    hybrid = any(flag in given for flag in HYBRID_FLAGS)
    deformable = deformable or hybrid or given.get('use_ms_detr')
    family = 'conditional' if given.get('conditional') else 'deformable' if deformable else 'detr'
    family_defaults = FAMILY_DEFAULTS['dino' if given.get('dino') else family]
    if hybrid or given.get('co_aux_heads'):
        family_defaults = family_defaults | {'dim_feedforward': 2048}
    if given.get('co_aux_heads'):
        family_defaults = family_defaults | {'dropout': 0.0}
    resolved = Namespace(**{'num_classes': NUM_CLASSES} | defaults | vars(args) | family_defaults | given)
    resolved.family = family
    resolve_hybrid(resolved)
    resolve_co_detr(resolved)
    resolve_checkpointing(resolved)
    for term, value in (('cls', 2.0), ('bbox', 5.0), ('giou', 2.0)):
        if getattr(resolved, f'enc_{term}_loss_coef') is None:
            usual = value if resolved.use_ms_detr else getattr(resolved, f'{term}_loss_coef')
            setattr(resolved, f'enc_{term}_loss_coef', usual)
    check_args(resolved)
    return resolved


def resolve_hybrid(args: Namespace) -> None:
    """Numbers that were not given; all stay None where no flag of hybrid matching was given."""
    if all(getattr(args, flag) is None for flag in HYBRID_FLAGS):
        return
    if args.hybrid_queries is None:
        args.hybrid_queries = 1500 if args.hybrid_k else 0
    if args.hybrid_k is None:
        args.hybrid_k = 5 if args.hybrid_queries else 0
    if args.hybrid_lambda is None:
        args.hybrid_lambda = 1.0


def resolve_co_detr(args: Namespace) -> None:
    """What DINO's decoder and Co-DETR's heads change where nothing was given."""
    if args.dino:
        for flag in DINO_FLAGS:
            setattr(args, flag, True)
    co_detr = args.dino or bool(args.co_aux_heads)
    many_levels = args.dino and args.num_feature_levels >= 5
    defaults = {
        'finest_stride': 4 if many_levels else 8,
        'input_proj_bias': not co_detr,
        'clamp_boxes': co_detr,
        'soft_nms_threshold': 0.8 if args.dino else 0.0,
        'class_loss': 'quality_focal' if args.dino else 'focal',
        'with_coord_feat': not args.dino,
    }
    for flag, value in defaults.items():
        if getattr(args, flag) is None:
            setattr(args, flag, value)


def resolve_checkpointing(args: Namespace) -> None:
    """The parts that are recomputed, None for none. Namespaces of official code, and older ones of ours, hold True or
    False.
    """
    if args.use_checkpoint is False:
        args.use_checkpoint = None
    if args.use_checkpoint is True or args.use_checkpoint == []:
        own = not args.backbone.startswith('timm/')  # we know the parts of the others
        args.use_checkpoint = list(RECOMPUTABLE if own else RECOMPUTABLE[1:])


def check_args(args: Namespace) -> None:
    """Refuse what cannot be, before anything is built."""
    if args.hidden_dim % args.nheads or args.hidden_dim % 4:
        raise ValueError(
            f'--hidden_dim {args.hidden_dim} must be a multiple of --nheads {args.nheads} and of 4'
        )
    if args.family != 'detr' and args.pre_norm:
        raise ValueError(
            f'--pre_norm exists for DETR only, and the other flags choose {args.family}: leave it out'
        )
    if args.family == 'detr' and args.nms_iou_threshold is not None:
        raise ValueError(
            '--nms_iou_threshold is not for DETR, which gives one detection a query: leave it out'
        )
    if args.nms_iou_threshold is not None and not 0 <= args.nms_iou_threshold <= 1:
        raise ValueError(f'--nms_iou_threshold {args.nms_iou_threshold} must be between 0 and 1')
    if args.family == 'deformable':
        check_deformable_args(args)
    if args.family != 'conditional' and args.local_init:
        raise ValueError('--local_init exists for Conditional DETR only: add --conditional, or leave it out')
    if args.dilation and args.backbone_stages != 4:
        raise ValueError(
            f'--dilation changes stage 4, but --backbone_stages is {args.backbone_stages}: give one of them'
        )
    check_swin_args(args)
    check_checkpointing(args)
    check_scheme_args(args)
    check_co_detr_args(args)
    for flag in (
        'enc_layers',
        'dec_layers',
        'num_queries',
        'num_classes',
        'topk_eval',
        'o2m_matcher_k',
        'group_detr',
        'max_pos_coords',
    ):
        if getattr(args, flag) < 1:
            raise ValueError(f'--{flag} must be at least 1, not {getattr(args, flag)}')


def check_swin_args(args: Namespace) -> None:
    """Official namespaces hold Swin's default beside other backbones too."""
    for flag, default in (('drop_path_rate', DROP_PATH_RATE), ('backbone_frozen_stages', -1)):
        if args.backbone not in SWIN_SIZES and getattr(args, flag) != default:
            raise ValueError(f'--{flag} is for Swin, and --backbone is {args.backbone}: leave it out')
    if not 0 <= args.drop_path_rate < 1:
        raise ValueError(f'--drop_path_rate {args.drop_path_rate} must be at least 0 and less than 1')
    if not -1 <= args.backbone_frozen_stages <= args.backbone_stages + 1:
        raise ValueError(
            f'--backbone_frozen_stages {args.backbone_frozen_stages} must be between -1 and {args.backbone_stages + 1}, '
            f'the number for all {args.backbone_stages} stages'
        )


def check_checkpointing(args: Namespace) -> None:
    parts = args.use_checkpoint or ()
    unknown = set(parts) - set(RECOMPUTABLE)
    if unknown:
        raise ValueError(
            f'--use_checkpoint {unknown.pop()} is not known: choose of {", ".join(RECOMPUTABLE)}'
        )
    if 'backbone' in parts and args.backbone.startswith('timm/'):
        raise ValueError(
            f'--use_checkpoint backbone is not for --backbone {args.backbone}: leave it out, or name encoder and decoder'
        )


def recomputes(args: Namespace, part: str) -> bool:
    """Whether activations of this part are computed again in the backward pass."""
    return part in (args.use_checkpoint or ())


def check_scheme_args(args: Namespace) -> None:
    if args.hybrid_queries and not args.hybrid_k:
        raise ValueError(
            f'--hybrid_queries {args.hybrid_queries} would be trained by nothing with --hybrid_k 0: raise --hybrid_k, or give 0 for both'
        )
    for flag in HYBRID_FLAGS:
        if (getattr(args, flag) or 0) < 0:
            raise ValueError(f'--{flag} must not be negative, as {getattr(args, flag)} is')
    for flag in ('use_aux_ffn', 'use_indices_merge'):
        if getattr(args, flag) and not args.use_ms_detr:
            raise ValueError(f'--{flag} needs --use_ms_detr: add it')
    if args.use_aux_ffn and args.ms_variant == 'a':
        raise ValueError(
            '--use_aux_ffn belongs to the second reading after the cross-attention: leave it out, or leave --ms_variant a out'
        )
    if args.ms_variant == 'a' and not args.use_ms_detr:
        raise ValueError('--ms_variant a needs --use_ms_detr: add it')


def check_co_detr_args(args: Namespace) -> None:
    for flag in ('dn_number', 'co_aux_heads'):
        if getattr(args, flag) and not args.two_stage:
            raise ValueError(f'--{flag} needs --two_stage and --with_box_refine (or --dino): add them')
    if len(set(args.co_aux_heads)) < len(args.co_aux_heads):
        raise ValueError(f'--co_aux_heads {" ".join(args.co_aux_heads)} names a head twice')
    unknown = set(args.co_aux_heads) - set(AUXILIARY_HEADS)
    if unknown:
        raise ValueError(
            f'--co_aux_heads {unknown.pop()} is not known: choose of {", ".join(AUXILIARY_HEADS)}'
        )
    if args.eval_module not in ('detr', *args.co_aux_heads):
        raise ValueError(
            f'--eval_module {args.eval_module} is not among --co_aux_heads: add it there, or evaluate detr'
        )
    for flag in ('dn_number', 'dn_label_noise_ratio', 'dn_box_noise_scale', 'lambda_1', 'lambda_2'):
        if getattr(args, flag) < 0:
            raise ValueError(f'--{flag} must not be negative, as {getattr(args, flag)} is')
    if args.dn_label_noise_ratio > 2:
        raise ValueError(
            f'--dn_label_noise_ratio {args.dn_label_noise_ratio}: half of it is a share, so 2 is the most'
        )
    if not 0 <= args.soft_nms_threshold <= 1:
        raise ValueError(f'--soft_nms_threshold {args.soft_nms_threshold} must be between 0 and 1')
    if args.soft_nms_threshold and args.nms_iou_threshold is not None:
        raise ValueError(
            '--soft_nms_threshold and --nms_iou_threshold are two ways of suppression: give one (--soft_nms_threshold 0 '
            'turns that of --dino off)'
        )
    if args.family != 'deformable':
        usual = {
            'soft_nms_threshold': 0,
            'clamp_boxes': False,
            'class_loss': 'focal',
            'input_proj_bias': True,
            'finest_stride': 8,
        }
        for flag, value in usual.items():
            if getattr(args, flag) != value:
                raise ValueError(
                    f'--{flag} {getattr(args, flag)} is for Deformable DETR, and the other flags choose {args.family}: leave it out'
                )
    elif args.num_feature_levels == 1 and args.finest_stride == 4:
        raise ValueError(
            '--finest_stride 4 is of several feature maps, but --num_feature_levels is 1: leave one of them out'
        )
    if args.eval_module != 'detr' and args.nms_iou_threshold is not None:
        raise ValueError(
            f'--nms_iou_threshold is for the decoder: --eval_module {args.eval_module} suppresses by its own rule'
        )


def check_deformable_args(args: Namespace) -> None:
    for flag, needed in (
        ('two_stage', 'with_box_refine'),
        ('look_forward_twice', 'with_box_refine'),
        ('mixed_selection', 'two_stage'),
    ):
        if getattr(args, flag) and not getattr(args, needed):
            raise ValueError(f'--{flag} needs --{needed}: add it')
    if args.hidden_dim % 32:
        raise ValueError(
            f'--hidden_dim {args.hidden_dim} must be a multiple of 32 in Deformable DETR (group norm)'
        )
    num_maps = len(backbone_maps(args))
    if args.num_feature_levels < num_maps:
        raise ValueError(
            f'--num_feature_levels {args.num_feature_levels} must be 1, or at least the {num_maps} maps of a backbone of '
            f'--backbone_stages {args.backbone_stages}'
        )
    for flag in ('enc_n_points', 'dec_n_points'):
        if getattr(args, flag) < 1:
            raise ValueError(f'--{flag} must be at least 1, not {getattr(args, flag)}')


def backbone_maps(args: Namespace) -> range:
    """Stages of the backbone whose maps the detector reads: the last, or all from the second on."""
    if args.family != 'deformable' or args.num_feature_levels == 1:
        first = args.backbone_stages
    else:
        first = 1 if args.finest_stride == 4 else 2
    return range(first, args.backbone_stages + 1)


def level_strides(args: Namespace) -> list[int]:
    """Of the feature maps of Deformable DETR, finest first."""
    strides = [2 ** (stage + 1) for stage in backbone_maps(args)]
    if args.dilation:
        strides[-1] //= 2
    while len(strides) < args.num_feature_levels:
        strides.append(2 * strides[-1])
    return strides


def build_transformer(args: Namespace) -> Transformer:
    sizes = args.hidden_dim, args.nheads, args.dim_feedforward, args.dropout
    encoder = TransformerEncoder(
        TransformerEncoderLayer(*sizes, args.pre_norm),
        args.enc_layers,
        nn.LayerNorm(args.hidden_dim) if args.pre_norm else None,
        recomputes(args, 'encoder'),
    )
    norm, use_checkpoint = nn.LayerNorm(args.hidden_dim), recomputes(args, 'decoder')
    if args.family == 'detr':
        layer = TransformerDecoderLayer(*sizes, args.pre_norm)
        return Transformer(encoder, TransformerDecoder(layer, args.dec_layers, norm, use_checkpoint))
    layer = build_decoder_layer(
        args,
        (ConditionalDecoderLayer, TwiceReadConditionalDecoderLayer, MixedConditionalDecoderLayer),
        sizes,
    )
    decoder = ConditionalDecoder(layer, args.dec_layers, norm, args.pe_temperature, use_checkpoint)
    transformer = Transformer(encoder, decoder)
    if args.local_init:
        transformer.decoder.start_local(args.local_init)
    return transformer


def build_decoder_layer(args: Namespace, layers: tuple[type[nn.Module], ...], sizes: tuple) -> nn.Module:
    """layers: the plain one, and those of MS-DETR's variants a and b; sizes: arguments of each."""
    plain, variant_a, variant_b = layers
    if not args.use_ms_detr:
        return plain(*sizes)
    if args.ms_variant == 'a':
        return variant_a(*sizes)
    layer = variant_b(*sizes)
    if args.use_aux_ffn:
        layer.add_aux_ffn(args.hidden_dim, args.dim_feedforward, args.dropout)
    return layer


def build_deformable_transformer(args: Namespace) -> DeformableTransformer:
    sizes = args.dim_feedforward, args.dropout

    def attention(num_points: int) -> MSDeformAttn:
        return MSDeformAttn(args.hidden_dim, args.num_feature_levels, args.nheads, num_points)

    encoder_layer = DeformableEncoderLayer(attention(args.enc_n_points), *sizes)
    encoder = DeformableEncoder(encoder_layer, args.enc_layers, recomputes(args, 'encoder'))
    layers = DeformableDecoderLayer, TwiceReadDecoderLayer, MixedDecoderLayer
    decoder_layer = build_decoder_layer(args, layers, (attention(args.dec_n_points), *sizes))
    decoder_class, transformer_class = (
        (DinoDecoder, DinoTransformer) if args.dino else (DeformableDecoder, DeformableTransformer)
    )
    decoder = decoder_class(
        decoder_layer, args.dec_layers, args.look_forward_twice, recomputes(args, 'decoder')
    )
    return transformer_class(
        encoder, decoder, args.hidden_dim, args.num_feature_levels, args.two_stage, args.pe_temperature
    )


def build_layer_heads(args: Namespace) -> tuple[nn.ModuleList, nn.ModuleList]:
    """Class and box heads of Deformable DETR: one a decoder layer with box refinement (and one for proposals in
    two stages), else one in every place.
    """
    class_embed = class_head(args.hidden_dim, args.num_classes, prior=0.01)
    bbox_embed = box_head(args.hidden_dim, start_at_reference=True)
    if not args.with_box_refine:
        nn.init.constant_(bbox_embed.layers[-1].bias[2:], -2.0)  # boxes begin at 0.12 of a side
        return tuple(nn.ModuleList([head] * args.dec_layers) for head in (class_embed, bbox_embed))
    num_heads = args.dec_layers + args.two_stage
    heads = tuple(
        nn.ModuleList(copy.deepcopy(head) for _ in range(num_heads)) for head in (class_embed, bbox_embed)
    )
    if not args.two_stage:
        nn.init.constant_(heads[1][0].layers[-1].bias[2:], -2.0)
    return heads


def build_detector(
    args: Namespace, num_queries: dict[str, int], query_sources: nn.ModuleDict | None = None
) -> nn.Module:
    """The detector alone. args: resolved. num_queries: learned queries of each group, the inference group
    first.
    """
    backbone = Joiner(
        build_backbone(
            args.backbone,
            args.backbone_weights,
            args.dilation,
            args.backbone_norm,
            backbone_maps(args),
            train=getattr(args, 'lr_backbone', 1) > 0,
            drop_path_rate=args.drop_path_rate,
            use_checkpoint=recomputes(args, 'backbone'),
            frozen_stages=args.backbone_frozen_stages,
        ),
        build_position_encoding(
            args.position_embedding,
            args.hidden_dim,
            temperature=args.pe_temperature,
            offset=-0.5 if args.family == 'deformable' and not args.dino else 0.0,
            scale=args.position_embedding_scale,
        ),
    )
    second_heads = args.use_ms_detr and args.ms_variant == 'a'
    if args.family == 'deformable':
        transformer = build_deformable_transformer(args)
        heads = build_layer_heads(args)
        return DeformableDETR(
            backbone,
            transformer,
            heads,
            num_queries,
            args.with_box_refine,
            args.two_stage,
            args.mixed_selection,
            args.aux_loss,
            query_sources,
            copy.deepcopy(heads[0][: args.dec_layers]) if second_heads else None,
            None if args.eval_module == 'detr' else args.eval_module,
            args.input_proj_bias,
        )
    focal = args.family != 'detr'
    heads = (
        class_head(args.hidden_dim, args.num_classes, prior=0.01)
        if focal
        else class_head(args.hidden_dim, args.num_classes + 1),
        box_head(args.hidden_dim, start_at_reference=focal),
    )
    class_embed_o2m = copy.deepcopy(heads[0]) if second_heads else None
    return DETR(
        backbone, build_transformer(args), heads, num_queries, args.aux_loss, query_sources, class_embed_o2m
    )


def build_model(args: Namespace) -> tuple[nn.Module, nn.Module, dict[str, nn.Module]]:
    """Model, criterion and postprocessors from parsed flags (`main.get_args_parser`, or a part of its names).

    `args.num_classes` is 91 unless the data set has set it. ValueError: impossible flags.
    """
    from .training import build_supervision

    args = resolve_args(args)
    criterion, num_queries, query_sources = build_supervision(args)
    model = build_detector(args, num_queries, query_sources)
    if args.two_stage and not any('_enc' in name for name in criterion.weight_dict):
        # Nothing trains these heads (--no_aux_loss): no gradient is asked of them, which processes would wait for.
        model.class_embed[-1].requires_grad_(False)
        model.bbox_embed[-1].requires_grad_(False)
    return model, criterion, build_postprocessors(args)


def build_postprocessors(args: Namespace) -> dict[str, nn.Module]:
    """`bbox`: outputs to detections in pixels."""
    if args.family == 'detr':
        return {'bbox': SoftmaxPostProcess()}
    if args.eval_module != 'detr':
        return {'bbox': CandidatePostProcess(AUXILIARY_HEADS[args.eval_module])}
    if args.nms_iou_threshold is not None:
        return {'bbox': NMSPostProcess(args.topk_eval, args.nms_iou_threshold, args.clamp_boxes)}
    if args.soft_nms_threshold:
        return {'bbox': SoftNMSPostProcess(args.topk_eval, args.soft_nms_threshold, args.num_queries)}
    return {'bbox': TopKPostProcess(args.topk_eval, args.clamp_boxes)}
