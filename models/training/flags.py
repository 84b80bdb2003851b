"""
Declare the flags of training: optimization, matching, losses, and every scheme of additional supervision.

Their defaults by family, and checks of their combinations, are here too. Inference reads none of these flags.
"""

from argparse import ArgumentParser, BooleanOptionalAction, Namespace

from models.defaults import resolve_args
from models.flags import AUXILIARY_HEADS, HYBRID_FLAGS, family_default
from models.vit import VIT_SIZES
from util.bounds import check_bounds, real, whole
from util.errors import UserError

from .losses import BOX_LOSSES

SCHEDULES = ('step', 'cosine')
RCNN_HEADS = ('2fc', '4conv1fc')
# Defaults of flags: the official values of each family.
TRAINING_DEFAULTS = {
    'detr': {
        'set_cost_class': 1.0,
        'cls_loss_coef': 1.0,
        'lr': 1e-4,
        'lr_backbone': 1e-5,
        'lr_backbone_names': ['backbone'],
        'lr_linear_proj_names': [],
        'epochs': 300,
        'lr_drop': 200,
    },
    'conditional': {
        'set_cost_class': 2.0,
        'cls_loss_coef': 2.0,
        'lr': 1e-4,
        'lr_backbone': 1e-5,
        'lr_backbone_names': ['backbone'],
        'lr_linear_proj_names': [],
        'epochs': 50,
        'lr_drop': 40,
    },
    'deformable': {
        'set_cost_class': 2.0,
        'cls_loss_coef': 2.0,
        'lr': 2e-4,
        'lr_backbone': 2e-5,
        'lr_backbone_names': ['backbone.0'],
        'lr_linear_proj_names': ['reference_points', 'sampling_offsets'],
        'epochs': 50,
        'lr_drop': 40,
    },
}
# Deformable DETR with DINO's decoder.
TRAINING_DEFAULTS['dino'] = TRAINING_DEFAULTS['deformable'] | {
    'cls_loss_coef': 1.0,
    'lr_linear_proj_names': [],
    'epochs': 12,
    'lr_drop': 11,
}
# Coefficients of MS-DETR's second reading and of its proposals.
MIXED_COEFFICIENTS = {'cls': 2.0, 'bbox': 5.0, 'giou': 2.0}


def default_of(flag: str) -> str:
    """Describe the default of a flag of training in words, for a help text."""
    return family_default(flag, TRAINING_DEFAULTS)


def add_training_args(parser: ArgumentParser) -> None:
    add_optimization_args(parser)
    add_matching_args(parser)
    add_loss_args(parser)
    add_scheme_args(parser)


def add_optimization_args(parser: ArgumentParser) -> None:
    group = parser.add_argument_group('optimization')
    group.add_argument(
        '--epochs', type=whole(1), help=f'passes over the training images (default: {default_of("epochs")})'
    )
    group.add_argument(
        '--batch_size',
        default=2,
        type=whole(1, 10**5),
        help='images per process and forward pass (default: %(default)s)',
    )
    group.add_argument(
        '--accum_steps', default=1, type=whole(1, 10**6),
        help='number of batches per optimizer step, whose gradient is that of one large batch, except for averages inside '
        '--co_aux_heads (default: %(default)s)',
    )  # fmt: skip
    group.add_argument(
        '--total_batch_size',
        type=whole(1, 10**7),
        help='images per optimizer step over all processes; sets --accum_steps (default: --batch_size x processes x '
        '--accum_steps)',
    )
    group.add_argument('--lr', type=real(), help=f'learning rate (default: {default_of("lr")})')
    group.add_argument(
        '--lr_backbone', type=real(),
        help=f'learning rate of the backbone; 0 freezes it (default: {default_of("lr_backbone")})',
    )  # fmt: skip
    group.add_argument(
        '--freeze', nargs='+', default=[], metavar='PART',
        help='do not train these parts: backbone, encoder, decoder, or any words between the dots of parameter names, such as '
        'decoder.layers.0 (default: all is trained that the backbone does not freeze itself)',
    )  # fmt: skip
    group.add_argument(
        '--lr_backbone_names', nargs='+', metavar='PART',
        help='a parameter belongs to the backbone if its name contains one of these '
        f'(default: {default_of("lr_backbone_names")})',
    )  # fmt: skip
    group.add_argument(
        '--lr_linear_proj_names', nargs='*', metavar='PART',
        help='a parameter learns at --lr times --lr_linear_proj_mult if its name contains one of these '
        f'(default: {default_of("lr_linear_proj_names")})',
    )  # fmt: skip
    group.add_argument(
        '--lr_linear_proj_mult', default=0.1, type=real(),
        help='factor of the learning rate for --lr_linear_proj_names (default: %(default)s)',
    )  # fmt: skip
    group.add_argument('--sgd', action='store_true', help='use SGD with momentum 0.9 instead of AdamW')
    group.add_argument(
        '--weight_decay',
        default=1e-4,
        type=real(),
        help='weight decay of all parameters (default: %(default)s)',
    )
    group.add_argument(
        '--lr_schedule', default='step', choices=SCHEDULES,
        help='step divides the learning rate by 10 after --lr_drop epochs; cosine lowers it to 0 over all --epochs '
        '(default: %(default)s)',
    )  # fmt: skip
    group.add_argument(
        '--lr_drop', type=whole(1),
        help=f'epochs after which the learning rate is divided by 10 (default: {default_of("lr_drop")})',
    )  # fmt: skip
    group.add_argument(
        '--lr_drop_epochs', nargs='+', type=whole(1), metavar='EPOCH',
        help='divide the learning rate by 10 after each of these epochs (default: every --lr_drop epochs)',
    )  # fmt: skip
    group.add_argument(
        '--warmup_steps', default=0, type=whole(0), metavar='N',
        help='raise the learning rate linearly over the first N optimizer steps (default: %(default)s)',
    )  # fmt: skip
    group.add_argument(
        '--warmup_start', default=0.0, type=real(0, 1), metavar='FACTOR',
        help='factor of the learning rate in the first of --warmup_steps (default: 0, one step above 0)',
    )  # fmt: skip
    group.add_argument(
        '--lr_layer_decay', type=real(1e-6, 1), metavar='FACTOR',
        help='multiply the learning rate by FACTOR for each block of a ViT, counted from the last, and decay no biases and norms; '
        '--lr_backbone is not used then (default: no such factor)',
    )  # fmt: skip
    group.add_argument(
        '--clip_max_norm', default=0.1, type=real(),
        help='clip the gradient to this norm; 0 does not clip (default: %(default)s)',
    )  # fmt: skip
    group.add_argument(
        '--ema', default=0.0, type=real(0, 1, below=True), metavar='DECAY',
        help='decay per step of an exponential moving average of the weights, which is evaluated and saved too; usual: 0.9997 '
        '(default: 0, no average)',
    )  # fmt: skip
    group.add_argument(
        '--ema_warmup', default=0, type=whole(0), metavar='N',
        help='let the average of --ema follow the weights closely during the first steps, exponentially less over N of them; '
        'usual for ViT: 2000 (default: 0, another rule for about 10 steps)',
    )  # fmt: skip


def add_matching_args(parser: ArgumentParser) -> None:
    group = parser.add_argument_group('matching costs')
    group.add_argument(
        '--set_cost_class',
        type=real(),
        help=f'weight of the class in the matching cost (default: {default_of("set_cost_class")})',
    )
    group.add_argument(
        '--set_cost_bbox', default=5, type=real(),
        help='weight of the L1 distance of boxes in the matching cost (default: %(default)s)',
    )  # fmt: skip
    group.add_argument(
        '--set_cost_giou', default=2, type=real(),
        help='weight of the generalized IoU in the matching cost (default: %(default)s)',
    )  # fmt: skip

    group.add_argument(
        '--enc_match', choices=('boxes', 'anchors'),
        help='boxes of encoder proposals that are matched with the objects: boxes are refined ones, compared by class too; '
        'anchors are those before refinement, compared by place alone (default: anchors with --use_ms_detr, else boxes)',
    )  # fmt: skip


def add_loss_args(parser: ArgumentParser) -> None:
    group = parser.add_argument_group('losses (a term of coefficient 0 does not exist)')
    group.add_argument(
        '--no_aux_loss', dest='aux_loss', action='store_false', help='supervise the last decoder layer only'
    )
    group.add_argument(
        '--cls_loss_coef', type=real(),
        help=f'coefficient of the class loss (default: {default_of("cls_loss_coef")})',
    )  # fmt: skip
    for term, loss in BOX_LOSSES.items():
        group.add_argument(
            f'--{term}_loss_coef', default=loss.coef, type=real(),
            help=f'coefficient of {loss.title} (default: %(default)s)',
        )  # fmt: skip
    for term, title in (('mask', 'the focal loss of masks'), ('dice', 'the Dice loss of masks')):
        group.add_argument(
            f'--{term}_loss_coef',
            default=1.0,
            type=real(),
            help=f'coefficient of {title} (default: %(default)s)',
        )
    group.add_argument(
        '--co_mask_loss_coef', default=12.0, type=real(),
        help='coefficient of the masks of --co_masks; 15.96 in the official COCO model (default: %(default)s)',
    )  # fmt: skip
    group.add_argument(
        '--co_mask_iou_loss_coef', default=6.0, type=real(),
        help="coefficient of the predicted IoU of --co_masks's masks (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        '--eos_coef', default=0.1, type=real(),
        help="weight of the class 'no object' in the class loss (DETR only; default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        '--class_loss', choices=('focal', 'quality_focal'),
        help='class loss of Deformable DETR (the other families have one each); in quality_focal the target of a positive is the IoU '
        'of its box (default: quality_focal with --dino, else focal)',
    )  # fmt: skip
    group.add_argument(
        '--focal_alpha', default=0.25, type=real(0, 1),
        help='weight of positives in the focal loss (not DETR; default: %(default)s)',
    )  # fmt: skip


def add_scheme_args(parser: ArgumentParser) -> None:
    """Declare the schemes of additional supervision. They can be combined, and do not change inference."""
    group = parser.add_argument_group(
        'hybrid matching (H-DETR, arXiv:2207.13080; Deformable or Conditional DETR)'
    )
    group.add_argument(
        '--hybrid_k', '--k_one2many', type=whole(0, 1000), metavar='K',
        help='train a second group of queries, of which K are matched to each object; 0 trains none (default: 5 with '
        '--hybrid_queries, else 0)',
    )  # fmt: skip
    group.add_argument(
        '--hybrid_queries', '--num_queries_one2many', type=whole(0, 10**5), metavar='N',
        help='number of queries in the group of --hybrid_k (default: 1500 with --hybrid_k, else 0)',
    )  # fmt: skip
    group.add_argument(
        '--hybrid_lambda', '--lambda_one2many', type=real(), metavar='FACTOR',
        help='factor of the losses of the group of --hybrid_k (default: 1)',
    )  # fmt: skip
    group = parser.add_argument_group('groups of queries (Group DETR, arXiv:2207.13085; any family)')
    group.add_argument(
        '--group_detr', default=1, type=whole(1, 1000), metavar='G',
        help='train G groups of --num_queries queries, each matched one-to-one (default: %(default)s)',
    )  # fmt: skip
    add_denoising_args(parser)
    add_collaborative_args(parser)
    add_mixed_args(parser)


def add_denoising_args(parser: ArgumentParser) -> None:
    group = parser.add_argument_group(
        'contrastive denoising (DINO, arXiv:2203.03605; Deformable DETR in two stages)'
    )
    group.add_argument(
        '--dn_number', default=0, type=whole(0, 10**5), metavar='N',
        help='add queries that reconstruct noised objects, about N positives and N negatives per image; 0 adds none, '
        'usual: 100 (default: %(default)s)',
    )  # fmt: skip
    group.add_argument(
        '--dn_label_noise_ratio', default=0.5, type=real(0, 2),
        help='twice the share of labels that denoising replaces by random ones (default: %(default)s)',
    )  # fmt: skip
    group.add_argument(
        '--dn_box_noise_scale', default=1.0, type=real(),
        help='largest displacement of the corners of noised boxes, as a multiple of half the side (default: %(default)s)',
    )  # fmt: skip


def add_collaborative_args(parser: ArgumentParser) -> None:
    group = parser.add_argument_group(
        'collaborative heads (Co-DETR, arXiv:2211.12860; Deformable DETR in two stages)'
    )
    group.add_argument(
        '--co_aux_heads', nargs='+', default=[], choices=AUXILIARY_HEADS, metavar='HEAD',
        help="detectors to train on the encoder's output, whose positives become decoder queries: faster_rcnn, atss or both "
        '(default: none)',
    )  # fmt: skip
    group.add_argument(
        '--co_rcnn_head', default='2fc', choices=RCNN_HEADS,
        help='RoI head of faster_rcnn. 2fc: two layers, a box for each class; 4conv1fc: four convolutions and a layer, one box '
        'for all classes (ViT on COCO; default: %(default)s)',
    )  # fmt: skip
    group.add_argument(
        '--co_rcnn_masks', action='store_true',
        help='train masks of the positive RoIs of faster_rcnn too (co_deformable_detr_mask_r50); only --eval_module faster_rcnn '
        'predicts them',
    )  # fmt: skip
    group.add_argument(
        '--lambda_1', default=1.0, type=real(),
        help='factor of the losses of queries made from positives of --co_aux_heads (default: %(default)s)',
    )  # fmt: skip
    group.add_argument(
        '--lambda_2', default=2.0, type=real(),
        help='factor of the losses of --co_aux_heads themselves, times --dec_layers (default: %(default)s)',
    )  # fmt: skip
    group.add_argument(
        '--max_pos_coords', default=300, type=whole(1, 10**5),
        help='largest number of positives of --co_aux_heads, per head and image, that become queries (default: %(default)s)',
    )  # fmt: skip
    group.add_argument(
        '--with_coord_feat', action=BooleanOptionalAction,
        help='add the feature that one of --co_aux_heads saw to the content of its queries (default: no with --dino, else yes)',
    )  # fmt: skip


def add_mixed_args(parser: ArgumentParser) -> None:
    group = parser.add_argument_group('one-to-many matching of --use_ms_detr')
    group.add_argument(
        '--o2m_matcher_k', default=6, type=whole(1, 10**4),
        help='largest number of queries that one-to-many matching gives an object (default: %(default)s)',
    )  # fmt: skip
    group.add_argument(
        '--o2m_matcher_threshold', default=0.4, type=real(),
        help='smallest one-to-many score with which a query is positive for its best object (default: %(default)s)',
    )  # fmt: skip
    group.add_argument(
        '--o2m_iou_weight', default=0.7, type=real(),
        help='weight of the IoU in the one-to-many score (default: %(default)s)',
    )  # fmt: skip
    group.add_argument(
        '--o2m_score_weight', default=0.3, type=real(),
        help="weight of the class's probability in the one-to-many score (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        '--use_indices_merge', action='store_true',
        help='add the pairs of the one-to-one matching for queries without a one-to-many pair',
    )  # fmt: skip
    for term in ('cls', *BOX_LOSSES):
        default = MIXED_COEFFICIENTS.get(term, 0.0)
        group.add_argument(
            f'--o2m_{term}_loss_coef', type=real(), default=default,
            help=f'--{term}_loss_coef for the second predictions of --use_ms_detr (default: %(default)s)',
        )  # fmt: skip
        group.add_argument(
            f'--enc_{term}_loss_coef', type=real(),
            help=f'--{term}_loss_coef for the proposals of --two_stage (default: {default:g} with --use_ms_detr, else '
            f'--{term}_loss_coef)',
        )  # fmt: skip


def resolve_all(args: Namespace) -> Namespace:
    """Return a copy of `args` with every flag of detector and training settled.

    Raises:
        UserError: flags contradict each other.
    """
    return resolve_training(resolve_args(args))


def resolve_training(args: Namespace) -> Namespace:
    """Return a copy of `args` with every flag of training settled; those of the model are so (`models.resolve_args`).

    Raises:
        UserError: flags contradict each other.
    """
    parser = ArgumentParser()
    add_training_args(parser)
    defaults = vars(parser.parse_args([]))
    check_bounds(args, parser)
    family_defaults = TRAINING_DEFAULTS['dino' if args.dino else args.family]
    given = {name: value for name, value in vars(args).items() if value is not None}
    resolved = Namespace(**vars(args) | defaults | family_defaults | given)
    resolve_hybrid(resolved)
    if resolved.enc_match is None:
        resolved.enc_match = 'anchors' if args.use_ms_detr and args.two_stage else 'boxes'
    if resolved.class_loss is None:
        resolved.class_loss = 'quality_focal' if args.dino else 'focal'
    if resolved.with_coord_feat is None:
        resolved.with_coord_feat = not args.dino
    for term in ('cls', *BOX_LOSSES):
        if getattr(resolved, f'enc_{term}_loss_coef') is None:
            own = getattr(resolved, f'{term}_loss_coef')
            usual = MIXED_COEFFICIENTS.get(term, 0.0) if args.use_ms_detr else own
            setattr(resolved, f'enc_{term}_loss_coef', usual)
    check_training(resolved)
    return resolved


def resolve_hybrid(args: Namespace) -> None:
    """Fill in flags of hybrid matching that were not given. All stay None if none was given."""
    if all(getattr(args, flag) is None for flag in HYBRID_FLAGS):
        return
    if args.hybrid_queries is None:
        args.hybrid_queries = 1500 if args.hybrid_k else 0
    if args.hybrid_k is None:
        args.hybrid_k = 5 if args.hybrid_queries else 0
    if args.hybrid_lambda is None:
        args.hybrid_lambda = 1.0


def check_training(args: Namespace) -> None:
    """Refuse flags of training that contradict each other."""
    if args.lr_layer_decay is not None and args.backbone not in VIT_SIZES:
        raise UserError(
            f'--lr_layer_decay {args.lr_layer_decay} is a factor for the blocks of a ViT, and --backbone is '
            f'{args.backbone}: leave it out, or choose vit_large'
        )
    if args.lr_schedule == 'cosine' and args.lr_drop_epochs:
        raise UserError(
            '--lr_drop_epochs is for --lr_schedule step, and cosine has no drops: leave one of them out'
        )
    if args.hybrid_queries and not args.hybrid_k:
        raise UserError(
            f'--hybrid_queries {args.hybrid_queries} would be trained by nothing with --hybrid_k 0: raise --hybrid_k, or give '
            '0 for both'
        )
    if args.hybrid_k and not args.hybrid_queries:
        raise UserError(
            f'--hybrid_k {args.hybrid_k} would train no queries with --hybrid_queries 0: raise it, or give 0 for both'
        )
    if args.use_indices_merge and not args.use_ms_detr:
        raise UserError('--use_indices_merge needs --use_ms_detr: add it')
    if args.enc_match == 'anchors' and not args.two_stage:
        raise UserError('--enc_match anchors is for the proposals of --two_stage: add it, or leave it out')
    if args.class_loss != 'focal' and args.family != 'deformable':
        raise UserError(
            f'--class_loss {args.class_loss} is for Deformable DETR, and the other flags choose {args.family}: leave it out'
        )
    check_heads(args)


def check_heads(args: Namespace) -> None:
    for flag in ('dn_number', 'co_aux_heads'):
        if getattr(args, flag) and not args.two_stage:
            raise UserError(f'--{flag} needs --two_stage and --with_box_refine (or --dino): add them')
    if args.co_rcnn_masks and 'faster_rcnn' not in args.co_aux_heads:
        raise UserError(
            '--co_rcnn_masks is a part of faster_rcnn: add it to --co_aux_heads, or leave the flag out'
        )
    if len(set(args.co_aux_heads)) < len(args.co_aux_heads):
        raise UserError(f'--co_aux_heads {" ".join(args.co_aux_heads)} names a head twice')
    unknown = set(args.co_aux_heads) - set(AUXILIARY_HEADS)
    if unknown:
        raise UserError(
            f'--co_aux_heads {unknown.pop()} is not known: choose from {", ".join(AUXILIARY_HEADS)}'
        )
