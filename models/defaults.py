"""Settle the flags of the detector: name the family, fill in its defaults, and refuse what cannot be."""

from argparse import ArgumentParser, Namespace

from util.bounds import check_bounds
from util.errors import UserError

from .flags import (
    DEFORMABLE_FLAGS,
    DINO_FLAGS,
    DROP_PATH_RATE,
    FAMILY_DEFAULTS,
    HYBRID_FLAGS,
    NUM_CLASSES,
    OFFICIAL_NAMES,
    add_model_args,
)
from .parts import PLACES
from .swin import SWIN_SIZES
from .vit import VIT_SIZES

PYRAMID_STRIDES = [4, 8, 16, 32, 64]  # of the levels that a ViT's map is made into


def resolve_args(args: Namespace) -> Namespace:
    """Return a copy of `args` with every flag of the detector settled, and `family` set. Other flags stay as they are.

    Raises:
        UserError: flags contradict each other.
    """
    parser = ArgumentParser()
    add_model_args(parser)
    defaults = vars(parser.parse_args([]))
    check_bounds(args, parser)
    given = {OFFICIAL_NAMES.get(k, k): value for k, value in vars(args).items() if value is not None}
    deformable = [flag for flag in DEFORMABLE_FLAGS if given.get(flag)]
    if deformable and given.get('conditional'):
        raise UserError(f'--conditional and --{deformable[0]} choose different models: leave one of them out')
    hybrid = any(flag in given for flag in HYBRID_FLAGS)
    deformable = deformable or hybrid or given.get('use_ms_detr')
    family = 'conditional' if given.get('conditional') else 'deformable' if deformable else 'detr'
    family_defaults = FAMILY_DEFAULTS['dino' if given.get('dino') else family]
    if hybrid or given.get('co_aux_heads'):
        family_defaults = family_defaults | {'dim_feedforward': 2048}
    if given.get('co_aux_heads'):
        family_defaults = family_defaults | {'dropout': 0.0}
    usual = {'num_classes': NUM_CLASSES, 'aux_loss': True, 'co_aux_heads': []}
    resolved = Namespace(**usual | defaults | vars(args) | family_defaults | given)
    resolved.family = family
    resolve_co_detr(resolved)
    resolve_checkpointing(resolved)
    check_args(resolved)
    return resolved


def resolve_co_detr(args: Namespace) -> None:
    """Fill in defaults that depend on --dino and --co_aux_heads."""
    if args.dino:
        for flag in DINO_FLAGS:
            setattr(args, flag, True)
    co_detr = args.dino or bool(args.co_aux_heads)
    many_levels = (
        args.family == 'deformable'
        and args.num_feature_levels >= 5
        and (args.dino or args.backbone in VIT_SIZES)
    )
    defaults = {
        'finest_stride': 4 if many_levels else 8,
        'input_proj_bias': not co_detr,
        'clamp_boxes': co_detr,
        'soft_nms_threshold': 0.8 if args.dino else 0.0,
    }
    for flag, value in defaults.items():
        if getattr(args, flag) is None:
            setattr(args, flag, value)


def resolve_checkpointing(args: Namespace) -> None:
    """Settle `use_checkpoint`: a list of parts, or None. Official namespaces, and older ones of ours, hold a bool."""
    if args.use_checkpoint is False:
        args.use_checkpoint = None
    if args.use_checkpoint is True or args.use_checkpoint == []:
        own = not args.backbone.startswith('timm/')  # networks of timm cannot be recomputed in parts
        args.use_checkpoint = list(PLACES if own else PLACES[1:])


def check_args(args: Namespace) -> None:
    """Refuse flags that contradict each other, before anything is built."""
    if args.hidden_dim % args.nheads or args.hidden_dim % 4:
        raise UserError(
            f'--hidden_dim {args.hidden_dim} must be a multiple of --nheads {args.nheads} and of 4'
        )
    if args.family != 'detr' and args.pre_norm:
        raise UserError(
            f'--pre_norm exists for DETR only, and the other flags choose {args.family}: leave it out'
        )
    if args.family == 'deformable':
        check_deformable_args(args)
    if args.family != 'conditional' and args.local_init:
        raise UserError('--local_init exists for Conditional DETR only: add --conditional, or leave it out')
    if args.dilation and args.backbone_stages != 4:
        raise UserError(
            f'--dilation changes stage 4, but --backbone_stages is {args.backbone_stages}: give one of them'
        )
    check_swin_args(args)
    check_vit_args(args)
    check_masks(args)
    check_checkpointing(args)
    check_ms_detr_args(args)
    check_detection_args(args)
    for flag in ('enc_layers', 'dec_layers', 'num_queries', 'num_classes', 'topk_eval'):
        if getattr(args, flag) < 1:
            raise UserError(f'--{flag} must be at least 1, not {getattr(args, flag)}')


def check_swin_args(args: Namespace) -> None:
    """Refuse impossible flags of Swin. Its defaults pass with any backbone, since official namespaces hold them."""
    for flag, default in (('drop_path_rate', DROP_PATH_RATE), ('backbone_frozen_stages', -1)):
        has_blocks = args.backbone in SWIN_SIZES or (args.backbone in VIT_SIZES and flag == 'drop_path_rate')
        if not has_blocks and getattr(args, flag) != default:
            raise UserError(f'--{flag} is not for --backbone {args.backbone}: leave it out')
    if not 0 <= args.drop_path_rate < 1:
        raise UserError(f'--drop_path_rate {args.drop_path_rate} must be at least 0 and less than 1')
    if not -1 <= args.backbone_frozen_stages <= args.backbone_stages + 1:
        raise UserError(
            f'--backbone_frozen_stages {args.backbone_frozen_stages} must be between -1 and {args.backbone_stages + 1}, '
            f'the number for all {args.backbone_stages} stages'
        )


def check_vit_args(args: Namespace) -> None:
    if args.backbone not in VIT_SIZES:
        return
    if args.backbone_stages != 4:
        raise UserError(
            f'--backbone_stages {args.backbone_stages} is not for {args.backbone}, which has one map: leave it out'
        )
    if args.family == 'deformable' and args.num_feature_levels not in (1, len(PYRAMID_STRIDES)):
        raise UserError(
            f'--num_feature_levels {args.num_feature_levels} must be {len(PYRAMID_STRIDES)}, the levels of the feature pyramid '
            f'of {args.backbone}, or 1'
        )


def check_masks(args: Namespace) -> None:
    if args.masks and args.co_masks:
        raise UserError('--masks and --co_masks are two ways to predict masks: give one of them')
    if args.co_masks and args.family != 'deformable':
        raise UserError(
            f'--co_masks is for Deformable DETR, and the other flags choose {args.family}: use --masks'
        )
    if (args.masks or args.co_masks) and args.eval_module != 'detr':
        raise UserError(
            f'--{"masks" if args.masks else "co_masks"} are those of the decoder: leave --eval_module {args.eval_module} out'
        )
    if args.masks and args.backbone in VIT_SIZES:
        raise UserError(f'--masks needs maps of several strides, and {args.backbone} has one: leave it out')


def check_checkpointing(args: Namespace) -> None:
    parts = args.use_checkpoint or ()
    unknown = set(parts) - set(PLACES)
    if unknown:
        raise UserError(f'--use_checkpoint {unknown.pop()} is not known: choose from {", ".join(PLACES)}')
    if 'backbone' in parts and args.backbone.startswith('timm/'):
        raise UserError(
            f'--use_checkpoint backbone is not for --backbone {args.backbone}: leave it out, or name encoder and decoder'
        )


def check_ms_detr_args(args: Namespace) -> None:
    if args.use_aux_ffn and not args.use_ms_detr:
        raise UserError('--use_aux_ffn needs --use_ms_detr: add it')
    if args.use_aux_ffn and args.ms_variant == 'a':
        raise UserError(
            '--use_aux_ffn belongs to the second reading after the cross-attention: leave it out, or leave --ms_variant a out'
        )
    if args.ms_variant == 'a' and not args.use_ms_detr:
        raise UserError('--ms_variant a needs --use_ms_detr: add it')


def check_detection_args(args: Namespace) -> None:
    if args.family == 'detr' and args.nms_iou_threshold is not None:
        raise UserError(
            '--nms_iou_threshold is not for DETR, which gives one detection a query: leave it out'
        )
    if args.eval_module not in ('detr', *args.co_aux_heads):
        raise UserError(
            f'--eval_module {args.eval_module} is not among --co_aux_heads: add it there, or evaluate detr'
        )
    if args.soft_nms_threshold and args.nms_iou_threshold is not None:
        raise UserError(
            '--soft_nms_threshold and --nms_iou_threshold are two ways of suppression: give one (--soft_nms_threshold 0 '
            'turns that of --dino off)'
        )
    if args.family != 'deformable':
        usual = {
            'soft_nms_threshold': 0,
            'clamp_boxes': False,
            'input_proj_bias': True,
            'finest_stride': 8,
            'enc_n_points': 4,
            'dec_n_points': 4,
        }
        for flag, value in usual.items():
            if getattr(args, flag) != value:
                raise UserError(
                    f'--{flag} {getattr(args, flag)} is for Deformable DETR, and the other flags choose {args.family}: leave it out'
                )
    elif args.num_feature_levels == 1 and args.finest_stride == 4:
        raise UserError(
            '--finest_stride 4 is for several feature maps, but --num_feature_levels is 1: leave one of them out'
        )
    if args.eval_module != 'detr' and args.nms_iou_threshold is not None:
        raise UserError(
            f'--nms_iou_threshold is for the decoder: --eval_module {args.eval_module} suppresses by its own rule'
        )


def check_deformable_args(args: Namespace) -> None:
    for flag, needed in (
        ('two_stage', 'with_box_refine'),
        ('look_forward_twice', 'with_box_refine'),
        ('mixed_selection', 'two_stage'),
    ):
        if getattr(args, flag) and not getattr(args, needed):
            raise UserError(f'--{flag} needs --{needed}: add it')
    if args.hidden_dim % 32:
        raise UserError(
            f'--hidden_dim {args.hidden_dim} must be a multiple of 32 in Deformable DETR (group norm)'
        )
    num_maps = len(backbone_maps(args))
    if args.num_feature_levels < num_maps:
        raise UserError(
            f'--num_feature_levels {args.num_feature_levels} must be 1, or at least the {num_maps} maps of a backbone of '
            f'--backbone_stages {args.backbone_stages}'
        )


def backbone_maps(args: Namespace) -> range:
    """Return the stages of the backbone whose maps the detector reads.

    Only the last is read for one feature level, otherwise all from the first or second on.
    """
    if args.backbone in VIT_SIZES:
        return range(3, 4)
    if args.family != 'deformable' or args.num_feature_levels == 1:
        first = args.backbone_stages
    else:
        first = 1 if args.finest_stride == 4 else 2
    return range(first, args.backbone_stages + 1)


def returned_maps(args: Namespace) -> range:
    """Return the stages of the backbone whose maps are returned: those that levels are made from; for masks all."""
    maps = backbone_maps(args)
    return range(1, maps[-1] + 1) if args.masks else maps


def has_pyramid(args: Namespace) -> bool:
    """Tell whether all levels are made from the only map of a ViT."""
    return args.backbone in VIT_SIZES and args.num_feature_levels > 1


def level_strides(args: Namespace) -> list[int]:
    """Return the strides of Deformable DETR's feature maps, finest first."""
    if has_pyramid(args):
        return PYRAMID_STRIDES
    strides = [2 ** (stage + 1) for stage in backbone_maps(args)]
    if args.dilation:
        strides[-1] //= 2
    while args.family == 'deformable' and len(strides) < args.num_feature_levels:
        strides.append(2 * strides[-1])
    return strides
