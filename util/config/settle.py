"""Settle flags: name the family, fill in defaults, refuse what cannot be, and tell what follows from flags."""

from argparse import Namespace
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from util.errors import UserError

from .declare import (
    ALWAYS,
    DATA,
    DETECTION,
    NETWORK,
    RUN,
    TRAINING,
    UNLESS_CONDITIONAL,
    Flag,
)
from .flags import FLAGS, RANDOM_SCALES
from .networks import TITLES, VARIANTS, Usual, backbone_maps, decoder_of, kind_of

DETECTOR = (NETWORK, DETECTION)
MODEL = (NETWORK, DETECTION, TRAINING)
EVERYTHING = (*MODEL, DATA, RUN)
OFFICIAL_NAMES = {alias: flag.name for flag in FLAGS.values() for alias in flag.aliases}
PLACES = ('backbone', 'encoder', 'decoder')  # parts of a network that --use_checkpoint names
SHARDS = 'shards.json'  # index of tar shards


@dataclass(frozen=True)
class OldFlag:
    """A flag that only older records hold.

    instead: what the command line answers to a user who gives it. today: the flags that have its meaning today, from its
    value and the whole record; they replace those of the record.
    """

    instead: str
    today: Callable[[Any, Mapping], dict]


OLD = {
    'train_shards': OldFlag(
        'give --train_ann shards.json or its folder', lambda place, _: {'train_ann': place} if place else {}
    ),
    'val_shards': OldFlag(
        'give --val_ann shards.json or its folder', lambda place, _: {'val_ann': place} if place else {}
    ),
    'lsj_size': OldFlag(
        'give --img_size, the side of the squares of --aug lsj',
        lambda size, record: {'img_size': size} if record.get('aug') == 'lsj' else {},
    ),
    'group_aspect_ratio': OldFlag('give --batches aspect', lambda on, _: {'batches': 'aspect'} if on else {}),
    'coco_eval': OldFlag('leave it out: hotcoco computes all metrics', lambda *_: {}),
    'bucket_sizes': OldFlag('give --batches size', lambda on, _: {'batches': 'size'} if on else {}),
    'no_validate': OldFlag('give --eval_every 0', lambda on, _: {'eval_every': 0} if on else {}),
}


def in_our_names(record: Mapping) -> dict:
    """Return the flags of a namespace or a record under today's names, instead of official names and those in `OLD`."""
    named = {OFFICIAL_NAMES.get(name, name): value for name, value in record.items()}
    flags = {name: value for name, value in named.items() if name not in OLD}
    for name, old in OLD.items():
        if name in named:
            flags |= old.today(named[name], named)
    return flags


def is_shards(place: str | None) -> bool:
    """Return whether a value of --train_ann or --val_ann is an index of tar shards, or the folder of one."""
    return place is not None and (Path(place).name == SHARDS or (Path(place) / SHARDS).is_file())


class Settled(Namespace):
    """Settled flags, which nobody changes: `but` returns a copy with other values."""

    def __init__(self, **values: Any) -> None:
        vars(self).update(values)

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(f'settled flags are not changed: use but({name}=...)')

    def but(self, **values: Any) -> 'Settled':
        return Settled(**vars(self) | values)


def settle(args: Namespace, kinds: Collection[str] = MODEL) -> Settled:
    """Return a copy of flags, or of some of them, with every flag of these kinds settled, and `family`. Others stay as they are.

    Raises:
        UserError: a value makes no sense, or flags contradict each other.
    """
    given = in_our_names({name: value for name, value in vars(args).items() if value is not None})
    others = {name: value for name, value in vars(args).items() if name not in OLD}
    flags = [flag for flag in FLAGS.values() if flag.kind in kinds]
    settle_checkpointing(given)
    check_values(given, flags)
    settled = Namespace(**others | given, **{} if 'family' in given else {'family': ''})
    settled.family = family_of(given)
    for flag in sorted(flags, key=lambda flag: flag.depends_on_flags):
        if flag.name not in given:
            setattr(settled, flag.name, flag.default_of(settled))
        if flag.name in decoder_of(settled).implies:
            setattr(settled, flag.name, True)
    check(settled, flags)
    return Settled(**vars(settled))


def settle_checkpointing(given: dict) -> None:
    """Make a list of parts, or nothing, of `use_checkpoint`. Official namespaces, and older ones of ours, hold a bool."""
    value = given.get('use_checkpoint')
    if value is False:
        del given['use_checkpoint']
    elif value is True or value == []:  # networks of timm cannot be recomputed in parts
        whole = 'use_checkpoint' not in kind_of(str(given.get('backbone', ''))).supports
        given['use_checkpoint'] = list(PLACES[whole:])


def family_of(given: dict) -> str:
    """Return the family that given flags choose.

    Raises:
        UserError: they choose two.
    """
    chosen = [flag.name for flag in FLAGS.values() if flag.chooses == ALWAYS and given.get(flag.name)]
    decoders = [f'--{variant.name}' for variant in VARIANTS if variant.name in chosen]
    if len(decoders) > 1:
        raise UserError(f'{" and ".join(decoders)} choose different decoders: give one of them')
    if given.get('conditional'):
        if chosen:
            raise UserError(f'--conditional and --{chosen[0]} choose different models: leave one of them out')
        return 'conditional'
    # --hybrid_k 0 does so too, as in H-DETR's baselines.
    chosen += [
        f.name
        for f in FLAGS.values()
        if f.chooses == UNLESS_CONDITIONAL and given.get(f.name, False) is not False
    ]
    return 'deformable' if chosen else 'detr'


def chosen_by(args: Settled) -> str:
    """Describe the family of settled flags, and the flag that chose it."""
    title = TITLES[args.family]
    if args.family == 'detr':
        return f'{title} (no flag of a variant is given)'
    if args.family == 'conditional':
        return f'{title} (--conditional)'
    flags = [flag for flag in FLAGS.values() if flag.chooses and getattr(args, flag.name, None) is not None]
    chosen = [flag for flag in flags if getattr(args, flag.name) != flag.default_of(args)]
    chosen += [
        flag for flag in flags if isinstance(flag.default, Usual)
    ]  # one that says what is usual beside it
    chosen += [FLAGS['num_feature_levels']]
    value = getattr(args, chosen[0].name)
    return f'{title} (chosen by --{chosen[0].name}{"" if value is True else f" {value}"})'


def check_values(values: Mapping, flags: Collection[Flag]) -> None:
    """Refuse values that make no sense, each by itself."""
    for flag in flags:
        if problem := flag.problem(values.get(flag.name)):
            raise UserError(f'--{flag.name} {problem}')


def check(args: Namespace, flags: Collection[Flag]) -> None:
    """Refuse flags of other families and backbones, or without what they need, and what `RULES` refuse."""
    for flag in flags:
        value = getattr(args, flag.name)
        if value == flag.default_of(args):
            continue
        shown = f'--{flag.name}' if value is True else f'--{flag.name} {value}'
        if flag.needs and not getattr(args, flag.needs, None):
            raise UserError(f'{shown} needs --{flag.needs}: add it')
        if not flag.fits(args):
            families = ' and '.join(TITLES[family] for family in flag.families)
            raise UserError(
                f'{shown} is for {families}, and the other flags choose {args.family}: leave it out'
            )
        if not flag.fits_backbone(args):
            raise UserError(f'{shown} is not for --backbone {args.backbone}: leave it out')
    kinds = {flag.kind for flag in flags}
    for kind, rules in RULES.items():
        for rule in rules if kind in kinds else ():
            if message := rule(args):
                raise UserError(message)


def deformable(a: Namespace) -> bool:
    return a.family == 'deformable'


# A rule returns what is wrong, or something false.
RULES: dict[str, list[Callable[[Namespace], object]]] = {
    NETWORK: [
        lambda a: (a.hidden_dim % a.nheads or a.hidden_dim % 4)
        and f'--hidden_dim {a.hidden_dim} must be a multiple of --nheads {a.nheads} and of 4',
        lambda a: (deformable(a) and a.hidden_dim % 32)
        and f'--hidden_dim {a.hidden_dim} must be a multiple of 32 in Deformable DETR (group norm)',
        lambda a: (deformable(a) and a.num_feature_levels < len(backbone_maps(a)))
        and f'--num_feature_levels {a.num_feature_levels} must be 1, or at least the {len(backbone_maps(a))} maps of a backbone of --backbone_stages {a.backbone_stages}',
        lambda a: (deformable(a) and a.num_feature_levels == 1 and a.finest_stride == 4)
        and '--finest_stride 4 is for several feature maps, but --num_feature_levels is 1: leave one of them out',
        lambda a: (a.dilation and a.backbone_stages != 4)
        and f'--dilation changes stage 4, but --backbone_stages is {a.backbone_stages}: give one of them',
        lambda a: a.backbone_frozen_stages > a.backbone_stages + 1
        and f'--backbone_frozen_stages {a.backbone_frozen_stages} is more than all stages, of which there are {a.backbone_stages}',
        lambda a: (deformable(a) and (levels := len(kind_of(a.backbone).pyramid)) and a.num_feature_levels not in (1, levels))
        and f'--num_feature_levels {a.num_feature_levels} must be {levels}, the levels of the feature pyramid of {a.backbone}, or 1',
        lambda a: (a.masks and a.co_masks)
        and '--masks and --co_masks are two ways to predict masks: give one of them',
        lambda a: ((a.masks or a.co_masks) and a.eval_module != 'detr')
        and f'--masks and --co_masks are those of the decoder: leave --eval_module {a.eval_module} out',
        lambda a: (a.masks and len(kind_of(a.backbone).stages) == 1)
        and f'--masks needs maps of several strides, and {a.backbone} has one: leave it out',
        lambda a: ('backbone' in (a.use_checkpoint or ()) and 'use_checkpoint' not in kind_of(a.backbone).supports)
        and f'--use_checkpoint backbone is not for --backbone {a.backbone}: leave it out, or name encoder and decoder',
        lambda a: (a.use_aux_ffn and a.ms_variant == 'a')
        and '--use_aux_ffn belongs to the second reading after the cross-attention: leave it out, or leave --ms_variant a out',
        lambda a: a.eval_module not in ('detr', *a.co_aux_heads)
        and f'--eval_module {a.eval_module} is not among --co_aux_heads: add it there, or evaluate detr',
        lambda a: (a.soft_nms_threshold and a.nms_iou_threshold is not None)
        and '--soft_nms_threshold and --nms_iou_threshold are two ways of suppression: give one (--soft_nms_threshold 0 turns the usual one off)',
        lambda a: (a.eval_module != 'detr' and a.nms_iou_threshold is not None)
        and f'--nms_iou_threshold is for the decoder: --eval_module {a.eval_module} suppresses by its own rule',
        lambda a: len(set(a.co_aux_heads)) < len(a.co_aux_heads)
        and f'--co_aux_heads {a.co_aux_heads} names a head twice',
    ],
    TRAINING: [
        lambda a: (a.lr_schedule == 'cosine' and a.lr_drop_epochs)
        and '--lr_drop_epochs is for --lr_schedule step, and cosine has no drops: leave one of them out',
        lambda a: (a.hybrid_queries and not a.hybrid_k)
        and f'--hybrid_queries {a.hybrid_queries} would be trained by nothing with --hybrid_k 0: raise --hybrid_k, or give 0 for both',
        lambda a: (a.hybrid_k and not a.hybrid_queries)
        and f'--hybrid_k {a.hybrid_k} would train no queries with --hybrid_queries 0: raise it, or give 0 for both',
        lambda a: (a.co_rcnn_masks and 'faster_rcnn' not in a.co_aux_heads)
        and '--co_rcnn_masks is a part of faster_rcnn: add it to --co_aux_heads, or leave the flag out',
    ],
    DATA: [
        lambda a: (a.train_scales and a.train_scales[0] > a.train_scales[1])
        and f'--train_scales {a.train_scales[0]} {a.train_scales[1]}: give the smaller size first',
        lambda a: (a.aug not in RANDOM_SCALES and (a.train_scales or a.train_max_size))
        and f'--train_scales and --train_max_size are not for --aug {a.aug}, which scales otherwise: leave them out',
        lambda a: (a.repeat_threshold and (a.dataset_file == 'shapes' or is_shards(a.train_ann)))
        and '--repeat_threshold needs image files in COCO form or LVIS: leave it out',
        lambda a: (a.dataset_file == 'shapes' and any((a.coco_path, a.train_images, a.train_ann, a.val_images, a.val_ann)))
        and '--dataset_file shapes reads no files: leave --coco_path and the other paths out',
        lambda a: (a.dataset_file in ('voc', 'yolo') and any((a.train_images, a.train_ann, a.val_images, a.val_ann)))
        and f'--dataset_file {a.dataset_file} is one folder: give --coco_path instead of images and annotations',
        lambda a: (a.dataset_file != 'coco' and any(map(is_shards, (a.train_ann, a.val_ann))))
        and f'tar shards hold data in COCO form: leave --dataset_file {a.dataset_file} out',
        lambda a: ((is_shards(a.train_ann) and a.train_images) or (is_shards(a.val_ann) and a.val_images))
        and 'tar shards hold their images: leave --train_images and --val_images out',
    ],
    RUN: [
        lambda a: (a.batches != 'random' and is_shards(a.train_ann) and not a.eval)
        and f'--batches {a.batches} chooses the images of a batch, and tar shards are streamed: leave it out',
        lambda a: (a.eval and not (a.resume or a.pretrained))
        and '--eval needs weights: add --resume FILE (or --pretrained FILE, or --model NAME)',
        lambda a: (a.resume and a.pretrained and a.resume != 'auto')
        and '--resume goes on with a run, --pretrained starts one: give one of them',
        lambda a: (a.frozen_weights and not a.masks)
        and '--frozen_weights trains the heads of --masks alone: add --masks, or use --pretrained',
        lambda a: (a.frozen_weights and a.pretrained)
        and '--frozen_weights and --pretrained both start from weights: give one of them',
        lambda a: (a.resume == 'auto' and not a.output_dir)
        and '--resume auto looks into --output_dir: give it',
        lambda a: (a.patience and not a.output_dir)
        and '--patience looks into metrics.csv of --output_dir: give it',
        lambda a: (a.patience and not a.eval_every)
        and '--patience waits for a better AP, and --eval_every 0 measures none: leave one out',
        lambda a: (a.fsdp and a.amp == 'fp16')
        and '--fsdp with --amp fp16: a process would scale its part of the gradient alone; use --amp bf16',
        lambda a: (a.checkpoint_steps and not a.output_dir)
        and '--checkpoint_steps writes into --output_dir: give it',
    ],
}  # fmt: skip


def check_processes(args: Namespace, world_size: int) -> int:
    """Return the batches of an optimizer step, from --total_batch_size and what is known only when the processes run.

    Raises:
        UserError: so many processes do not fit the flags.
    """
    if args.fsdp and world_size == 1:
        raise UserError(
            '--fsdp shares a model among processes, and there is one: start several, or leave it out'
        )
    if args.total_batch_size is None or args.eval:
        return args.accum_steps
    at_a_time = args.batch_size * world_size
    if args.total_batch_size % at_a_time:
        raise UserError(
            f'--total_batch_size {args.total_batch_size} is not a multiple of --batch_size {args.batch_size} x {world_size} processes'
        )
    return args.total_batch_size // at_a_time
