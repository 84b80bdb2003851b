"""Rules between several settled flags. Each function yields messages with flags, values and remedy."""

from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from .declare import DATA, NETWORK, RUN, TRAINING
from .flags import RANDOM_SCALES
from .networks import backbone_maps, kind_of

SHARDS = 'shards.json'  # index of tar shards


def is_shards(path: str | None) -> bool:
    """Return whether a value of --train_ann or --val_ann is an index of tar shards, or its folder."""
    return path is not None and (Path(path).name == SHARDS or (Path(path) / SHARDS).is_file())


def network_problems(a: Namespace) -> Iterator[str]:
    backbone = kind_of(a.backbone)
    if a.hidden_dim % a.nheads or a.hidden_dim % 4:
        yield f'--hidden_dim {a.hidden_dim} must be a multiple of --nheads {a.nheads} and of 4'
    if a.family == 'deformable':
        num_maps, num_strides, num_levels = len(backbone_maps(a)), len(backbone.pyramid), a.num_feature_levels
        if a.hidden_dim % 32:
            yield f'--hidden_dim {a.hidden_dim} must be a multiple of 32 in Deformable DETR (group norm)'
        if num_levels < num_maps:
            yield (
                f'--num_feature_levels {num_levels} must be 1, or at least the {num_maps} maps of a backbone '
                f'of --backbone_stages {a.backbone_stages}'
            )
        if num_levels == 1 and a.finest_stride == 4:
            yield (
                '--finest_stride 4 is for several feature maps, but --num_feature_levels is 1: leave one of '
                'them out'
            )
        if num_strides and num_levels not in (1, num_strides):
            yield (
                f'--num_feature_levels {num_levels} must be {num_strides}, the levels of the feature pyramid '
                f'of {a.backbone}, or 1'
            )
    if a.dilation and a.backbone_stages != 4:
        yield f'--dilation changes stage 4, but --backbone_stages is {a.backbone_stages}: give one of them'
    if 'backbone' in (a.use_checkpoint or ()) and 'use_checkpoint' not in backbone.supports:
        yield (
            f'--use_checkpoint backbone is not for --backbone {a.backbone}: leave it out, or name encoder '
            'and decoder'
        )
    if a.use_aux_ffn and a.ms_variant == 'a':
        yield '--use_aux_ffn is for --ms_variant b: leave it out, or leave --ms_variant a out'
    if len(set(a.co_aux_heads)) < len(a.co_aux_heads):
        yield f'--co_aux_heads {a.co_aux_heads} names a head twice'
    if a.masks and len(backbone.stages) == 1:
        yield f'--masks needs maps of several strides, and {a.backbone} has one: leave it out'
    yield from detection_problems(a)


def detection_problems(a: Namespace) -> Iterator[str]:
    if a.masks and a.co_masks:
        yield '--masks and --co_masks are two ways to predict masks: give one of them'
    if a.eval_module not in ('detr', *a.co_aux_heads):
        yield f'--eval_module {a.eval_module} is not among --co_aux_heads: add it there, or evaluate detr'
    if a.eval_module != 'detr' and (a.masks or a.co_masks):
        yield f'--masks and --co_masks are those of the decoder: leave --eval_module {a.eval_module} out'
    if a.eval_module != 'detr' and a.nms_iou_threshold is not None:
        yield (
            f'--nms_iou_threshold is for the decoder: --eval_module {a.eval_module} suppresses by its own '
            'rule'
        )
    if a.soft_nms_threshold and a.nms_iou_threshold is not None:
        yield (
            '--soft_nms_threshold and --nms_iou_threshold are two ways of suppression: give one '
            '(--soft_nms_threshold 0 turns the usual one off)'
        )


def training_problems(a: Namespace) -> Iterator[str]:
    if a.lr_schedule == 'cosine' and a.lr_drop_epochs:
        yield '--lr_drop_epochs is for --lr_schedule step, and cosine has no drops: leave one of them out'
    if a.hybrid_queries and not a.hybrid_k:
        yield (
            f'--hybrid_queries {a.hybrid_queries} would be trained by nothing with --hybrid_k 0: raise '
            '--hybrid_k, or give 0 for both'
        )
    if a.hybrid_k and not a.hybrid_queries:
        yield (
            f'--hybrid_k {a.hybrid_k} would train no queries with --hybrid_queries 0: raise it, or give 0 '
            'for both'
        )
    if a.co_rcnn_masks and 'faster_rcnn' not in a.co_aux_heads:
        yield '--co_rcnn_masks is a part of faster_rcnn: add it to --co_aux_heads, or leave the flag out'


def data_problems(a: Namespace) -> Iterator[str]:
    files = a.train_images, a.train_ann, a.val_images, a.val_ann
    if a.train_scales and a.train_scales[0] > a.train_scales[1]:
        yield f'--train_scales {a.train_scales[0]} {a.train_scales[1]}: give the smaller size first'
    if problem := range_problem(a.pixel_range):
        yield problem
    if a.aug not in RANDOM_SCALES and (a.train_scales or a.train_max_size):
        yield (
            f'--train_scales and --train_max_size are not for --aug {a.aug}, which scales otherwise: leave '
            'them out'
        )
    if a.repeat_threshold and (a.dataset_file == 'shapes' or is_shards(a.train_ann)):
        yield '--repeat_threshold needs image files in COCO form or LVIS: leave it out'
    if a.dataset_file == 'shapes' and any((a.coco_path, *files)):
        yield '--dataset_file shapes reads no files: leave --coco_path and the other paths out'
    if a.dataset_file in ('voc', 'yolo') and any(files):
        yield (
            f'--dataset_file {a.dataset_file} is one folder: give --coco_path instead of images and '
            'annotations'
        )
    if a.dataset_file not in ('auto', 'coco') and (is_shards(a.train_ann) or is_shards(a.val_ann)):
        yield f'tar shards hold data in COCO form: leave --dataset_file {a.dataset_file} out'
    if (is_shards(a.train_ann) and a.train_images) or (is_shards(a.val_ann) and a.val_images):
        yield 'tar shards hold their images: leave --train_images and --val_images out'
    if a.val_share:
        yield from split_problems(a)


def split_problems(a: Namespace) -> Iterator[str]:
    if a.dataset_file not in ('auto', 'coco', 'voc', 'yolo'):
        yield f'--val_share is not for --dataset_file {a.dataset_file}, which has a validation part: leave it out'
    if a.val_images or a.val_ann:
        yield '--val_share makes a validation part, and --val_images and --val_ann name one: give one of them'
    if is_shards(a.train_ann):
        yield '--val_share divides image files, not tar shards: write shards of two parts, or leave it out'


def range_problem(pixel_range: Sequence[float] | None) -> str | None:
    """Return what is wrong with a --pixel_range of numbers, or None."""
    if not pixel_range or (len(pixel_range) == 2 and pixel_range[0] < pixel_range[1]):
        return None
    values = ' '.join(f'{value:g}' for value in pixel_range)
    return f'--pixel_range {values}: give the value of black, and a larger one of white'


def run_problems(a: Namespace) -> Iterator[str]:
    if a.batches != 'random' and is_shards(a.train_ann) and not a.eval:
        yield (
            f'--batches {a.batches} chooses the images of a batch, and tar shards are streamed: leave it out'
        )
    if a.eval and not (a.resume or a.pretrained):
        yield '--eval needs weights: add --resume FILE (or --pretrained FILE, or --model NAME)'
    if a.resume and a.pretrained and a.resume != 'auto':
        yield '--resume goes on with a run, --pretrained starts one: give one of them'
    if a.frozen_weights and not a.masks:
        yield '--frozen_weights trains the heads of --masks alone: add --masks, or use --pretrained'
    if a.frozen_weights and a.pretrained:
        yield '--frozen_weights and --pretrained both start from weights: give one of them'
    if a.resume == 'auto' and not a.output_dir:
        yield '--resume auto looks into --output_dir: give it'
    if a.patience and not a.output_dir:
        yield '--patience looks into metrics.csv of --output_dir: give it'
    if a.checkpoint_steps and not a.output_dir:
        yield '--checkpoint_steps writes into --output_dir: give it'
    if a.patience and not a.eval_every:
        yield '--patience waits for a better AP, and --eval_every 0 measures none: leave one out'
    if a.fsdp and a.amp == 'fp16':
        yield '--fsdp with --amp fp16: a process would scale its part of the gradient alone; use --amp bf16'


PROBLEMS: dict[str, Callable[[Namespace], Iterator[str]]] = {
    NETWORK: network_problems,
    TRAINING: training_problems,
    DATA: data_problems,
    RUN: run_problems,
}
