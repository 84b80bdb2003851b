"""
The table of all flags, with all facts about each. Their texts and topics are in `help.txt`.

The parser, --help, the checks of values and families, the defaults, the comparison with a checkpoint and
OUT/flags.json come from this table. `declare.py` explains the facts. Rules between several flags are in
`rules.py`.
"""

import math
from argparse import Namespace

from util.command_line import MOST, float_range, int_range

from .declare import (
    ALWAYS,
    BY_NAMES,
    DATA,
    DETECTION,
    NETWORK,
    RUN,
    SWITCH,
    TEXT,
    TRAINING,
    UNLESS_CONDITIONAL,
    YES_NO,
    ByFamily,
    Flag,
    group,
    table,
)
from .networks import VARIANTS, Decoder, Usual, has_pyramid

DETR, DEFORMABLE, QUERIES = ('detr',), ('deformable',), ('conditional', 'deformable')


def hybrid(a: Namespace) -> bool:
    return any(getattr(a, name, None) is not None for name in ('hybrid_k', 'hybrid_queries', 'hybrid_lambda'))


def implied(variant: Decoder) -> str:
    *others, last = (f'--{name}' for name in variant.implies)
    return f'{", ".join(others)} and {last}' if others else last


# Value of --aug -> its effect on training images. Its class is in `datasets.augmentations.AUGMENTATIONS`.
AUGMENTATIONS = {
    'detr': 'flip, scale and crop',
    'flip': 'flip only',
    'none': 'as at evaluation',
    'co_detr': "as detr by mmdetection's rules of resizing and its choice of objects, at evaluation too",
    'lsj': 'large-scale jitter in a square and, where objects have masks, copy-paste',
}
# Losses of boxes (functions in `models.training.losses.BOX_LOSSES`): coefficient, and what they measure.
BOX_TERMS = {'bbox': (5, 'the L1 distance of boxes'), 'giou': (2, 'the generalized IoU of boxes')}
RANDOM_SCALES = ('detr', 'co_detr')  # values of --aug that use --train_scales and --train_max_size

# Of the second predictions of MS-DETR and of its proposals.
MIXED_COEFFICIENTS = {'cls': 2.0, 'bbox': 5.0, 'giou': 2.0}


def coefficients_of(term: str) -> tuple[Flag, Flag]:
    """Return the flags of a loss for MS-DETR's second predictions and for two-stage proposals."""
    mixed, name = MIXED_COEFFICIENTS.get(term, 0.0), f'{term}_loss_coef'
    usual = Usual(
        f'{mixed:g} with --use_ms_detr, else --{name}', lambda a: mixed if a.use_ms_detr else getattr(a, name)
    )
    return (
        Flag(
            f'o2m_{name}',
            float_range(),
            mixed,
            f'--{name} for the second predictions of --use_ms_detr',
            needs='use_ms_detr',
            hidden=True,
        ),
        Flag(f'enc_{name}', float_range(), usual, f'--{name} for the proposals of --two_stage', hidden=True),
    )


# Defaults that depend on other flags.
USUAL = {
    'img_size': Usual('1024 with --aug lsj, else 800', lambda a: 1024 if a.aug == 'lsj' else 800),
    'finest_stride': Usual('4 with 5 levels of a ViT, else 8', lambda a: 4 if has_pyramid(a) else 8),
    'input_proj_bias': Usual('no with --co_aux_heads, else yes, as official', lambda a: not a.co_aux_heads),
    'dim_feedforward': Usual(
        '1024 for deformable without --hybrid_k or --co_aux_heads, else 2048',
        lambda a: 2048 if a.family != 'deformable' or a.co_aux_heads or hybrid(a) else 1024,
    ),
    'dropout': Usual('0 with --co_aux_heads, else 0.1', lambda a: 0.0 if a.co_aux_heads else 0.1),
    'clamp_boxes': Usual('yes with --co_aux_heads, else no, as official', lambda a: bool(a.co_aux_heads)),
    'enc_match': Usual(
        'anchors with --use_ms_detr, else boxes',
        lambda a: 'anchors' if a.use_ms_detr and a.two_stage else 'boxes',
    ),
    'hybrid_k': Usual(
        '5 with --hybrid_queries, else 0',
        lambda a: (5 if getattr(a, 'hybrid_queries', 0) else 0) if hybrid(a) else None,
    ),
    'hybrid_queries': Usual(
        '1500 with --hybrid_k, else 0', lambda a: (1500 if a.hybrid_k else 0) if hybrid(a) else None
    ),
    'hybrid_lambda': Usual('1', lambda a: 1.0 if hybrid(a) else None),
    'evaluator': Usual(
        'lvis with --dataset_file lvis, else coco',
        lambda a: 'lvis' if getattr(a, 'dataset_file', '') == 'lvis' else 'coco',
    ),
}

FLAGS = table(
    Flag('num_classes', int_range(1, 10**6), 91, kind=NETWORK, launch=True, command=False),
    *group(DATA)(
        Flag(
            'dataset_file',
            ('auto', 'coco', 'lvis', 'voc', 'yolo', 'shapes'),
            'auto',
            same={'coco': 'auto'},
            first=True,
        ),
        Flag('coco_path', TEXT, None, first=True),
        Flag('train_images', TEXT, None),
        Flag('train_ann', TEXT, None),
        Flag('val_images', TEXT, None),
        Flag('val_ann', TEXT, None),
        Flag('val_share', float_range(0, 1, below=True), 0.0),
        Flag('split_seed', int_range(0, 2**32 - 1), 0, needs='val_share'),
        Flag('class_ids', ('auto', 'contiguous'), 'auto'),
        Flag('check_data', SWITCH, False, launch=True),
        Flag('allow_outside', SWITCH, False, launch=True),
        Flag('allow_pipe', SWITCH, False, launch=True),
        Flag('exif', ('auto', 'stored', 'upright'), 'auto'),
        Flag('upright', YES_NO, None, command=False),
        Flag('pixel_range', float_range(-MOST), None, nargs=2),
        Flag('repeat_threshold', float_range(0, 1), 0.0),
        Flag('img_size', int_range(16, 10**5), USUAL['img_size']),
        Flag('max_size', int_range(16, 10**5), None),
        Flag('train_scales', int_range(16, 10**5), None, nargs=2),
        Flag('train_max_size', int_range(16, 10**5), None),
        Flag(
            'aug',
            tuple(AUGMENTATIONS),
            'detr',
            help=f'augmentation of training images. {"; ".join(map(": ".join, AUGMENTATIONS.items()))}',
        ),
        Flag('shapes_train', int_range(1, 10**9), 4000),
        Flag('shapes_val', int_range(1, 10**9), 200),
        Flag('shapes_size', int_range(1, 10**9), 128, hidden=True),
    ),
    *group(DATA)(
        Flag('num_workers', int_range(0, 10**4), 2, launch=True),
        Flag('batches', ('random', 'aspect', 'size'), 'random'),
        Flag('skip_unreadable', int_range(0), None),
        Flag('cache_mode', SWITCH, False, launch=True, hidden=True),
        Flag('shard_buffer', int_range(1), 1000, hidden=True),
    ),
    *group(NETWORK)(Flag('conditional', SWITCH, False, compared=False, first=True)),
    *group(NETWORK, DEFORMABLE)(
        Flag('deformable', SWITCH, False, chooses=ALWAYS, compared=False, first=True),
        Flag('with_box_refine', SWITCH, False, chooses=ALWAYS),
        Flag('two_stage', SWITCH, False, needs='with_box_refine', chooses=ALWAYS),
        Flag('mixed_selection', SWITCH, False, needs='two_stage', chooses=ALWAYS),
        Flag('look_forward_twice', SWITCH, False, needs='with_box_refine', chooses=ALWAYS, compared=False),
        Flag('num_feature_levels', int_range(1, 16), ByFamily(None, None, 4), chooses=ALWAYS),
        Flag('finest_stride', (4, 8), USUAL['finest_stride'], command=False),
        Flag('input_proj_bias', YES_NO, USUAL['input_proj_bias'], compared=False, command=False),
        *(
            Flag(variant.name, SWITCH, False, f'{variant.help}; implies {implied(variant)}', chooses=ALWAYS)
            for variant in VARIANTS
        ),
        Flag('enc_n_points', int_range(1, 1000), 4, hidden=True),
        Flag('dec_n_points', int_range(1, 1000), 4, hidden=True),
    ),
    *group(NETWORK)(
        Flag('backbone', TEXT, 'resnet50'),
        Flag('backbone_weights', TEXT, 'imagenet', launch=True, aliases=('pretrained_backbone_path',)),
        Flag('backbone_norm', ('frozen', 'batch', 'group'), 'frozen', compared=False, some_backbones=True),
        Flag('backbone_stages', (2, 3, 4), 4, some_backbones=True),
        Flag('dilation', SWITCH, False, some_backbones=True),
        Flag('drop_path_rate', float_range(0, 1, below=True), 0.2, some_backbones=True, compared=False),
        Flag(
            'position_embedding',
            ('sine', 'learned', 'v2', 'v3'),
            'sine',
            same={'v2': 'sine', 'v3': 'learned'},
            hidden=True,
        ),
        Flag('pe_temperature', float_range(1e-06), 10000.0),
        Flag('position_embedding_scale', float_range(1e-06), 2 * math.pi, hidden=True),
    ),
    *group(NETWORK)(
        Flag('enc_layers', int_range(1, 1000), 6),
        Flag('dec_layers', int_range(1, 1000), 6),
        Flag('dim_feedforward', int_range(1, 10**6), USUAL['dim_feedforward']),
        Flag('hidden_dim', int_range(2, 10**5), 256),
        Flag('dropout', float_range(0, 1, below=True), USUAL['dropout'], compared=False),
        Flag('nheads', int_range(1, 10**4), 8),
        Flag(
            'num_queries',
            int_range(1, 10**5),
            ByFamily(100, 300, 300),
            compared=False,
            aliases=('num_queries_one2one',),
        ),
        Flag('pre_norm', SWITCH, False, families=DETR, hidden=True),
        Flag(
            'use_checkpoint',
            ('backbone', 'encoder', 'decoder'),
            None,
            compared=False,
            adopted=False,
            nargs='*',
        ),
    ),
    *group(NETWORK, QUERIES)(
        Flag('use_ms_detr', SWITCH, False, chooses=UNLESS_CONDITIONAL, compared=BY_NAMES),
        Flag('ms_variant', ('a', 'b'), 'b', needs='use_ms_detr', compared=BY_NAMES),
        Flag('use_aux_ffn', SWITCH, False, needs='use_ms_detr', compared=False),
    ),
    *group(DETECTION)(
        Flag('masks', SWITCH, False),
        Flag('co_masks', SWITCH, False, families=DEFORMABLE),
        Flag('topk_eval', int_range(1, 10**6), 100, aliases=('topk',)),
        Flag('nms_iou_threshold', float_range(0, 1), None, families=QUERIES, hidden=True),
        Flag('soft_nms_threshold', float_range(0, 1), 0.0, families=DEFORMABLE, hidden=True),
        Flag('clamp_boxes', YES_NO, USUAL['clamp_boxes'], families=DEFORMABLE, hidden=True),
        Flag('eval_module', ('detr', 'faster_rcnn', 'atss'), 'detr', families=DEFORMABLE, adopted=False),
    ),
    *group(TRAINING)(
        Flag('epochs', int_range(1), ByFamily(300, 50, 50), first=True),
        Flag('batch_size', int_range(1, 10**5), 2, first=True),
        Flag('total_batch_size', int_range(1, 10**7), None),
        Flag('accum_steps', int_range(1, 10**6), 1, command=False),
        Flag('lr', float_range(), ByFamily(1e-4, 1e-4, 2e-4), first=True),
        Flag('lr_backbone', float_range(), ByFamily(1e-5, 1e-5, 2e-5)),
        Flag('freeze', TEXT, [], nargs='+'),
        Flag(
            'lr_backbone_names',
            TEXT,
            ByFamily(['backbone'], ['backbone'], ['backbone.0']),
            nargs='+',
            hidden=True,
        ),
        Flag(
            'lr_linear_proj_names',
            TEXT,
            ByFamily([], [], ['reference_points', 'sampling_offsets']),
            nargs='*',
            hidden=True,
        ),
        Flag('lr_linear_proj_mult', float_range(), 0.1),
        Flag('sgd', SWITCH, False, hidden=True),
        Flag('weight_decay', float_range(), 0.0001),
        Flag('lr_schedule', ('step', 'cosine'), 'step'),
        Flag('lr_drop', int_range(1), ByFamily(200, 40, 40)),
        Flag('lr_drop_epochs', int_range(1), None, nargs='+'),
        Flag('warmup_steps', int_range(0), 0),
        Flag('warmup_start', float_range(0, 1), 0.0, needs='warmup_steps'),
        Flag('lr_layer_decay', float_range(1e-06, 1), None, some_backbones=True),
        Flag('clip_max_norm', float_range(), 0.1),
        Flag('ema', float_range(0, 1, below=True), 0.0),
        Flag('ema_warmup', int_range(0), 0, needs='ema'),
    ),
    *group(TRAINING)(
        Flag('set_cost_class', float_range(), ByFamily(1.0, 2.0, 2.0), hidden=True),
        Flag('set_cost_bbox', float_range(), 5, hidden=True),
        Flag('set_cost_giou', float_range(), 2, hidden=True),
        Flag(
            'enc_match',
            ('boxes', 'anchors'),
            USUAL['enc_match'],
            needs='two_stage',
            families=DEFORMABLE,
            command=False,
        ),
    ),
    *group(TRAINING)(
        Flag(
            'aux_loss',
            SWITCH,
            True,
            kind=NETWORK,
            compared=False,
            adopted=False,
            option='no_aux_loss',
            hidden=True,
        ),
        Flag('cls_loss_coef', float_range(), ByFamily(1.0, 2.0, 2.0)),
        *(
            Flag(f'{term}_loss_coef', float_range(), coef, f'coefficient of {title}', hidden=True)
            for term, (coef, title) in BOX_TERMS.items()
        ),
        Flag('mask_loss_coef', float_range(), 1.0, hidden=True),
        Flag('dice_loss_coef', float_range(), 1.0, hidden=True),
        Flag('co_mask_loss_coef', float_range(), 12.0, needs='co_masks', families=DEFORMABLE, hidden=True),
        Flag(
            'co_mask_iou_loss_coef', float_range(), 6.0, needs='co_masks', families=DEFORMABLE, command=False
        ),
        Flag('eos_coef', float_range(), 0.1, families=DETR, hidden=True),
        Flag('class_loss', ('focal', 'quality_focal'), 'focal', families=DEFORMABLE, command=False),
        Flag('focal_alpha', float_range(0, 1), 0.25, families=QUERIES, hidden=True),
    ),
    *group(TRAINING, QUERIES)(
        Flag(
            'hybrid_k',
            int_range(0, 1000),
            USUAL['hybrid_k'],
            chooses=UNLESS_CONDITIONAL,
            aliases=('k_one2many',),
        ),
        Flag(
            'hybrid_queries',
            int_range(0, 10**5),
            USUAL['hybrid_queries'],
            chooses=UNLESS_CONDITIONAL,
            aliases=('num_queries_one2many',),
        ),
        Flag(
            'hybrid_lambda',
            float_range(),
            USUAL['hybrid_lambda'],
            chooses=UNLESS_CONDITIONAL,
            aliases=('lambda_one2many',),
        ),
    ),
    *group(TRAINING)(Flag('group_detr', int_range(1, 1000), 1)),
    *group(TRAINING, DEFORMABLE)(
        Flag('dn_number', int_range(0, 10**5), 0, needs='two_stage', chooses=ALWAYS),
        Flag('dn_label_noise_ratio', float_range(0, 2), 0.5, needs='dn_number', hidden=True),
        Flag('dn_box_noise_scale', float_range(), 1.0, needs='dn_number'),
    ),
    *group(TRAINING, DEFORMABLE)(
        Flag(
            'co_aux_heads',
            ('faster_rcnn', 'atss'),
            [],
            needs='two_stage',
            chooses=ALWAYS,
            kind=NETWORK,
            compared=False,
            adopted='eval_module',
            nargs='+',
        ),
        Flag('co_rcnn_head', ('2fc', '4conv1fc'), '2fc', needs='co_aux_heads'),
        Flag('co_rcnn_masks', SWITCH, False, needs='co_aux_heads'),
        Flag('lambda_1', float_range(), 1.0, needs='co_aux_heads', hidden=True),
        Flag('lambda_2', float_range(), 2.0, needs='co_aux_heads', hidden=True),
        Flag('max_pos_coords', int_range(1, 10**5), 300, needs='co_aux_heads', hidden=True),
        Flag('with_coord_feat', YES_NO, True, needs='co_aux_heads', command=False),
    ),
    *group(TRAINING, QUERIES)(
        Flag('o2m_matcher_k', int_range(1, 10**4), 6, needs='use_ms_detr', hidden=True),
        Flag('o2m_matcher_threshold', float_range(), 0.4, needs='use_ms_detr', hidden=True),
        Flag('use_indices_merge', SWITCH, False, needs='use_ms_detr', hidden=True),
        *(flag for term in ('cls', *BOX_TERMS) for flag in coefficients_of(term)),
    ),
    *group(RUN)(
        Flag('amp', ('off', 'bf16', 'fp16'), 'off', first=True),
        Flag('tf32', YES_NO, None),
        Flag('compile', SWITCH, False, launch=True),
        Flag('fsdp', SWITCH, False, launch=True),
        Flag('worst_batch_first', YES_NO, None, hidden=True, launch=True),
    ),
    *group(RUN)(
        Flag('eval', SWITCH, False, first=True, launch=True),
        Flag('eval_every', int_range(0), 1),
        Flag('patience', int_range(1), None),
        Flag('evaluator', ('coco', 'lvis'), USUAL['evaluator'], hidden=True),
    ),
    *group(RUN)(
        Flag('output_dir', TEXT, '', first=True, launch=True),
        Flag('resume', TEXT, '', first=True, launch=True),
        Flag('pretrained', TEXT, '', first=True, launch=True),
        Flag('allow_http', SWITCH, False, launch=True),
        Flag('config', TEXT, '', launch=True),
        Flag('frozen_weights', TEXT, None),
        Flag('recipe', TEXT, '', first=True, launch=True),
        Flag('model', TEXT, '', first=True, launch=True),
        Flag('dry_run', SWITCH, False, launch=True),
        Flag('save_every', int_range(1), None),
        Flag('checkpoint_steps', int_range(1), None),
        Flag('keep_checkpoints', int_range(1), None),
        Flag('bad_steps', int_range(1), 3, hidden=True),
        Flag('device', TEXT, 'auto', first=True, launch=True),
        Flag('seed', int_range(0, 2**63 - 1), 42),
        Flag('print_freq', int_range(1), 10, launch=True),
        Flag('tensorboard', SWITCH, False),
        Flag('wandb', TEXT, ''),
        Flag('dist_url', TEXT, 'env://', hidden=True, launch=True),
    ),
)

# Flags that allow risky content of files: only a command line sets them, never a checkpoint.
TRUST = ('allow_outside', 'allow_pipe', 'allow_http')

# Names that a command line may have although they are not options: arguments of classes, and a former flag.
NO_OPTIONS = {
    name: f'{flag.help} (an argument of its class; only a checkpoint or a namespace sets it)'
    for name, flag in FLAGS.items()
    if not flag.command and name != 'num_classes'
} | {'local_init': 'its gain for small models was never part of a recipe, and is gone: leave it out'}
