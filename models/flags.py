"""Declare the flags of the detector, all that inference needs, and their defaults by family."""

import math
from argparse import ArgumentParser, BooleanOptionalAction

from util.bounds import real, whole

from .backbone import NORM_LAYERS
from .parts import PLACES

# Defaults of flags: the official values of each family.
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
# Flags that --dino implies.
DINO_FLAGS = ('with_box_refine', 'two_stage', 'mixed_selection', 'look_forward_twice')
# Any of these flags makes the model a Deformable DETR.
DEFORMABLE_FLAGS = (
    'deformable', *DINO_FLAGS, 'num_feature_levels', 'dino', 'dn_number', 'co_aux_heads',
)  # fmt: skip
# These and --use_ms_detr do so too, unless --conditional is given; these even at 0, as in H-DETR's baselines.
HYBRID_FLAGS = ('hybrid_k', 'hybrid_queries', 'hybrid_lambda')
# Threshold of NMS between detections of an auxiliary head (IoU).
AUXILIARY_HEADS = {'faster_rcnn': 0.5, 'atss': 0.6}
# Names of flags in official namespaces (as in their checkpoints) -> our names.
OFFICIAL_NAMES = {
    'num_queries_one2one': 'num_queries',
    'num_queries_one2many': 'hybrid_queries',
    'k_one2many': 'hybrid_k',
    'lambda_one2many': 'hybrid_lambda',
    'topk': 'topk_eval',
}
NUM_CLASSES = 91  # ids of COCO; used unless a data set has set another number
DROP_PATH_RATE = 0.2


def family_default(flag: str, tables: dict[str, dict] = FAMILY_DEFAULTS) -> str:
    """Describe in words a default that depends on the family, for a help text. tables: values of flags by family."""
    families: dict[str, list[str]] = {}
    for family, table in tables.items():
        value = table[flag]
        text = f'{value:g}' if isinstance(value, int | float) else ' '.join(value) or 'none'
        families.setdefault(text, []).append(family)
    return ', '.join(f'{text} for {" and ".join(names)}' for text, names in families.items())


def add_model_args(parser: ArgumentParser) -> None:
    """Declare the flags of the detector and its detections."""
    family = parser.add_argument_group('model family (plain DETR when no flag of a variant is given)')
    family.add_argument(
        '--conditional', action='store_true', help='build Conditional DETR (arXiv:2108.06152)'
    )
    family.add_argument(
        '--local_init',
        default=0.0,
        type=real(),
        metavar='GAIN',
        help='initialise the attention of Conditional DETR around the reference points, the sharper the larger GAIN is; helps '
        'small models that train from scratch, usual: 12 (default: 0, the official initialisation)',
    )

    deformable = parser.add_argument_group(
        'Deformable DETR (arXiv:2010.04159; any of these flags chooses it)'
    )
    deformable.add_argument(
        '--deformable', action='store_true', help='build Deformable DETR without further options'
    )
    deformable.add_argument(
        '--with_box_refine',
        action='store_true',
        help='let each decoder layer refine the boxes of the layer before',
    )
    deformable.add_argument('--two_stage', action='store_true',
                            help="make queries from the encoder's best proposals; needs --with_box_refine")  # fmt: skip
    deformable.add_argument('--mixed_selection', action='store_true',
                            help='take only the positions of two-stage queries from proposals, and learn their content')  # fmt: skip
    deformable.add_argument('--look_forward_twice', action='store_true',
                            help='let the box loss of a layer also train the refinement of the layer before')  # fmt: skip
    deformable.add_argument('--num_feature_levels', type=whole(1, 16),
                            help="number of feature maps; 1 is the backbone's last, more are its maps from the second stage on "
                                 'and strided convolutions of the last (default: 4)')  # fmt: skip
    deformable.add_argument('--finest_stride', type=int, choices=(4, 8),
                            help="stride in pixels of the finest of several feature maps; 4 adds that of the backbone's first "
                                 'stage (default: 4 with --dino and 5 or more levels, else 8)')  # fmt: skip
    deformable.add_argument('--input_proj_bias', action=BooleanOptionalAction,
                            help='give the projections of feature maps biases (default, as official: no with --dino or '
                                 '--co_aux_heads, else yes)')  # fmt: skip
    deformable.add_argument('--dino', action='store_true',
                            help="use DINO's decoder (arXiv:2203.03605), which computes positions from boxes and chooses "
                                 'proposals by their best class; implies --with_box_refine, --two_stage, --mixed_selection and '
                                 '--look_forward_twice')  # fmt: skip
    for part in ('enc', 'dec'):
        deformable.add_argument(
            f'--{part}_n_points',
            default=4,
            type=whole(1, 1000),
            help=f'points that an attention head of the {part}oder samples on each level (default: %(default)s)',
        )

    backbone = parser.add_argument_group('backbone')
    backbone.add_argument('--backbone', default='resnet50', metavar='NAME',
                          help='network that extracts features: resnet10, any ResNet of torchvision (resnet18 ... resnet152, '
                               'resnext..., wide_resnet...), mobilenet_v2, swin_tiny, swin_small, swin_base, swin_large (the last '
                               'two also with _window12), or timm/NAME for most convolutional networks of timm (default: %(default)s)')  # fmt: skip
    backbone.add_argument('--backbone_weights', '--pretrained_backbone_path', default='imagenet', metavar='SOURCE',
                          help='initial weights of the backbone: imagenet (downloaded), none (random), or a file of a state dict '
                               'under the names of torchvision, timm or official Swin; not read when a checkpoint is loaded '
                               '(default: %(default)s)')  # fmt: skip
    backbone.add_argument('--backbone_norm', default='frozen', choices=NORM_LAYERS,
                          help='norm layers of the backbone: frozen batch norms, with stem and first stage frozen too (official), '
                               'or batch or group norms with everything trained, for training from scratch; Swin always has '
                               'layer norms (default: %(default)s)')  # fmt: skip
    backbone.add_argument('--backbone_stages', default=4, type=int, choices=(2, 3, 4),
                          help='number of stages of the backbone; 4 ends at stride 32, 3 at 16, 2 at 8 (default: %(default)s)')  # fmt: skip
    backbone.add_argument('--dilation', action='store_true',
                          help='dilate the last stage of the backbone instead of striding it (DC5, stride 16)')  # fmt: skip
    backbone.add_argument('--drop_path_rate', default=DROP_PATH_RATE, type=real(0, 1, below=True),
                          help='probability that the last block of Swin is skipped while training; it grows linearly from 0 over '
                               'the blocks (default: %(default)s)')  # fmt: skip
    backbone.add_argument('--backbone_frozen_stages', default=-1, type=whole(-1, 5), metavar='N',
                          help='stages of Swin to freeze: 0 and 1 freeze the patch embedding, 2 also the first stage, ... 5 all '
                               'four; norms of the maps always train (default: %(default)s, which freezes nothing)')  # fmt: skip
    backbone.add_argument('--position_embedding', default='sine', choices=('sine', 'learned', 'v2', 'v3'),
                          help='position encoding of the feature maps; v2 = sine, v3 = learned (default: %(default)s)')  # fmt: skip
    backbone.add_argument(
        '--pe_temperature',
        type=real(1e-6),
        help='temperature of sine encodings; about 20 resolves positions better on small feature maps '
        f'(default: {family_default("pe_temperature")})',
    )

    backbone.add_argument('--position_embedding_scale', default=2 * math.pi, type=real(1e-6),
                          help='angle in radians that a whole side spans in sine encodings (default: 2 pi)')  # fmt: skip

    model = parser.add_argument_group('transformer')
    model.add_argument(
        '--enc_layers', default=6, type=whole(0, 1000), help='encoder layers (default: %(default)s)'
    )
    model.add_argument(
        '--dec_layers', default=6, type=whole(1, 1000), help='decoder layers (default: %(default)s)'
    )
    model.add_argument('--dim_feedforward', type=whole(1, 10**6),
                       help=f'hidden channels of the feed-forward blocks (default: {family_default("dim_feedforward")}; '
                            '2048 with --hybrid_k or --co_aux_heads)')  # fmt: skip
    model.add_argument(
        '--hidden_dim',
        default=256,
        type=whole(2, 10**5),
        help='channels of tokens and queries (default: %(default)s)',
    )
    model.add_argument('--dropout', type=real(0, 1, below=True),
                       help='dropout probability in the transformer (default: '
                            f'{family_default("dropout")}; 0 with --co_aux_heads)')  # fmt: skip
    model.add_argument(
        '--nheads', default=8, type=whole(1, 10**4), help='attention heads (default: %(default)s)'
    )
    model.add_argument('--num_queries', '--num_queries_one2one', type=whole(1, 10**5),
                       help='number of object queries, the most objects an image can get '
                            f'(default: {family_default("num_queries")})')  # fmt: skip
    model.add_argument(
        '--pre_norm', action='store_true', help='put norms in front of the sub-layers (DETR only)'
    )
    model.add_argument('--use_checkpoint', nargs='*', choices=PLACES, metavar='PART',
                       help='recompute activations in the backward pass instead of keeping them, which saves memory and takes '
                            'about a third more time; PART is any of backbone, encoder and decoder, none named means all '
                            '(default: recompute nothing)')  # fmt: skip

    mixed = parser.add_argument_group(
        'mixed supervision (MS-DETR, arXiv:2401.03989; Deformable or Conditional DETR)'
    )
    mixed.add_argument('--use_ms_detr', action='store_true',
                       help='predict from the queries a second time while training, and supervise that one-to-many')  # fmt: skip
    mixed.add_argument('--ms_variant', default='b', choices=('a', 'b'),
                       help='where --use_ms_detr predicts a second time: b after the cross-attention, which moves in front of '
                            'the self-attention, at inference too; a at the output of each layer, with class heads of their own '
                            '(default: %(default)s)')  # fmt: skip
    mixed.add_argument('--use_aux_ffn', action='store_true',
                       help='give the second predictions of --ms_variant b a feed-forward block of their own')  # fmt: skip

    detections = parser.add_argument_group('detections')
    detections.add_argument('--masks', action='store_true',
                            help='predict a mask for each query of the decoder too (DETR, Sec. 4.4; any family); training data '
                                 'need segmentations')  # fmt: skip
    detections.add_argument('--co_masks', action='store_true',
                            help='predict masks of the detections from their RoI features (ViT models of Co-DETR; Deformable '
                                 'DETR); training data need segmentations')  # fmt: skip
    detections.add_argument('--topk_eval', '--topk', type=whole(1, 10**6),
                            help='number of detections kept per image (not DETR, which gives one per query; '
                                 f'default: {family_default("topk_eval")})')  # fmt: skip
    detections.add_argument('--nms_iou_threshold', type=real(0, 1),
                            help='suppress detections that overlap a better one of their class by more than this IoU (not DETR; '
                                 'default: no suppression)')  # fmt: skip
    detections.add_argument('--soft_nms_threshold', type=real(0, 1),
                            help='lower the scores of detections that overlap a better one of their class by this IoU or more '
                                 '(Deformable DETR; 0 turns it off; default: 0.8 with --dino, else 0)')  # fmt: skip
    detections.add_argument('--clamp_boxes', action=BooleanOptionalAction,
                            help='clip detections to the image (default, as official: yes with --dino or --co_aux_heads, else '
                                 'no)')  # fmt: skip
    detections.add_argument('--eval_module', default='detr', choices=('detr', *AUXILIARY_HEADS),
                            help='module that detects outside training: the decoder (detr), or one of --co_aux_heads, with 100 '
                                 'boxes per image after its own NMS (default: %(default)s)')  # fmt: skip
