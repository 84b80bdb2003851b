"""What a run is going to do: printed before it starts, or by --dry_run in place of it."""

from collections.abc import Mapping
from typing import cast

import torch
from torch import nn

from datasets.augmentations import build_augmentation
from models.build import build_model
from models.costs import activation_bytes, count_flops, if_known
from models.ops.functions import describe as describe_kernels
from models.training.criterion import SetCriterion
from models.training.report import supervision_table
from util.config.settle import Settled, chosen_by
from util.distributed.collectives import get_world_size
from util.errors import UserError
from util.optim import Schedule, build_schedule
from util.run import ImageData

FROM_SCRATCH_NEEDS = 10_000  # images; DETR's authors' advice
LEARNING_RATES_SHOWN = 4
COCO_TRAIN_IMAGES, LVIS_TRAIN_IMAGES = 118_287, 100_170  # train2017; LVIS v1
FLOPS_SIZE = (800, 1136)  # height and width of one image with the mean cost of COCO val2017's first 100


def print_plan(
    args: Settled,
    model: nn.Module,
    criterion: SetCriterion,
    datasets: Mapping[str, ImageData],
    schedule: Schedule,
    flops: str,
) -> None:
    """Print data, classes, effective batch, learning rates, model size and steps. flops: operations in words."""
    shown = list(datasets.values())[-1]  # without validation that of training
    names = [name for name in shown.class_map.names if name is not None]
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    rows = {
        'family': chosen_by(args),
        'data': f'{args.dataset_file}, '
        + ', '.join(f'{len(data)} {split}' for split, data in datasets.items()),
        'classes': f'{len(names)}: {", ".join(names[:8])}{", ..." if len(names) > 8 else ""}',
        'model': f'{args.family}, {args.backbone}, {args.num_queries} queries, '
        f'{args.enc_layers}+{args.dec_layers} layers of {args.hidden_dim}',
        'parameters': f'{total:,}, {trainable:,} trainable',
        'device': f'{next(model.parameters()).device}, {get_world_size()} process(es){", sharded" if args.fsdp else ""}, '
        f'torch {torch.__version__}',
        'precision': {'off': 'float32'}.get(
            args.amp, f'{args.amp}, and float32 for boxes, matching and losses'
        ),
        'FLOPs': flops,
    }
    if args.family == 'deformable':
        rows['kernels'] = describe_kernels(next(model.parameters()).device.type)
    if not args.eval:
        if build_augmentation(args).mix('train', False) and not datasets['train'].return_masks:
            rows['copy-paste'] = 'none, since there are objects without a segmentation'
        steps = schedule.steps_per_epoch
        rows |= {
            'supervision': supervision_table(criterion.table, model.num_queries, criterion.weight_dict),
            'batch': batch_text(args),
            'learning rate': rates_text(args, schedule),
            'steps': f'{steps} an epoch, {steps * args.epochs} in {args.epochs} epochs',
            'output': args.output_dir or 'nothing is written (no --output_dir)',
        }
    print('\n'.join(f'{name:>14}  {text}' for name, text in rows.items()), flush=True)
    scratch = args.backbone_weights == 'none' and not (args.resume or args.pretrained or args.frozen_weights)
    has_statistics = any(name.endswith('running_mean') for name, _ in model.named_buffers())
    if scratch and not args.eval and args.backbone_norm == 'frozen' and has_statistics:
        print(
            'warning: the backbone starts from random numbers with its norms frozen: add --backbone_norm batch'
        )
    if (
        scratch
        and not args.eval
        and args.dataset_file != 'shapes'
        and len(datasets['train']) < FROM_SCRATCH_NEEDS
    ):
        print(
            f'warning: {len(datasets["train"])} images are few to train from random numbers; --backbone_weights imagenet '
            'or --pretrained learn much faster'
        )


def batch_text(args: Settled) -> str:
    """Describe the images of an optimizer step."""
    batches, processes = args.accum_steps, get_world_size()
    number = args.batch_size * batches * processes
    return f'{number} images a step ({args.batch_size} x {batches} accumulated x {processes} processes)'


def rates_text(args: Settled, schedule: Schedule) -> str:
    """Describe the learning rates of the groups, and their schedule."""
    names = ('', 'backbone ', ' and '.join(args.lr_linear_proj_names) + ' ')
    if args.lr_layer_decay is not None:
        names = ('',)
    rates = [f'{name}{rate:g}' for name, rate in zip(names, schedule.base_rates, strict=False)]
    text = f'{", ".join(rates)}, {schedule}'
    if args.lr_layer_decay is not None:
        text = f'{text}, blocks of the backbone times {args.lr_layer_decay} each, counted from the last'
    return text


def training_images(args: Settled) -> int:
    """Return the number of training images that the flags alone state: of COCO or LVIS where data are files."""
    return {'shapes': args.shapes_train, 'lvis': LVIS_TRAIN_IMAGES}.get(args.dataset_file, COCO_TRAIN_IMAGES)


def flops_text(model: nn.Module, dataset: ImageData) -> str:
    """Describe the operations for the first image of a dataset."""
    height, width = dataset[0][0].shape[-2:]
    if getattr(model, 'eval_module', None) is not None:
        return 'not counted: those of an auxiliary head depend on what it finds'

    def text() -> str:
        flops = count_flops(model, height, width)
        return f'{flops / 1e9:.3g} G ({flops / 2e9:.3g} G multiply-adds) for an image of {width} x {height}'

    return if_known(text)


def print_dry_run(args: Settled, num_images: int | None) -> None:
    """Print what a run would need, from the flags alone: parameters, operations, memory, learning rates and steps.

    num_images: number of training images; None: that of COCO or LVIS.

    Raises:
        UserError: the images do not fill a step.
    """
    contiguous = args.dataset_file == 'coco' and args.class_ids == 'contiguous'
    num_classes = {'lvis': 1203}.get(args.dataset_file, 80 if contiguous else args.num_classes)
    args = args.but(num_classes=num_classes, backbone_weights='none')
    num_images = num_images or training_images(args)
    batch = args.batch_size * args.accum_steps * get_world_size()
    steps = num_images // batch
    with torch.device('meta'):
        model, criterion, _ = build_model(args)
        schedule = build_schedule(args, model, max(1, steps))
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if num_images < batch and not args.eval:
        raise UserError(
            f'{num_images} training images do not fill one step of {batch}: lower --batch_size or --total_batch_size, '
            'or add images'
        )
    queries = cast(dict[str, int], model.num_queries)
    rates: dict[float, int] = {}
    for group in schedule.optimizer.param_groups:
        rates[group['lr']] = rates.get(group['lr'], 0) + sum(p.numel() for p in group['params'])
    groups = [f'{number:,} parameters at {rate:g}' for rate, number in rates.items()]
    if len(groups) > LEARNING_RATES_SHOWN:
        groups = [
            *groups[: LEARNING_RATES_SHOWN - 1],
            f'... and at {len(groups)} rates in all, to {groups[-1].split()[-1]}',
        ]
    rows = {
        'family': chosen_by(args),
        'model': f'{args.family}, {args.backbone}, {sum(queries.values())} learned queries in training',
        'parameters': f'{total:,}, {trained:,} trainable',
        'FLOPs': if_known(lambda: published_flops_text(args, model)),
        'memory': if_known(lambda: memory_text(args, model)),
        'groups': '; '.join(groups),
        'batch': batch_text(args),
        'steps': f'{steps} an epoch of {num_images:,} images, {steps * args.epochs} in {args.epochs} epochs',
        'learning rate': rates_text(args, schedule),
        'supervision': supervision_table(criterion.table, queries, criterion.weight_dict),
    }
    print('\n'.join(f'{name:>14}  {text}' for name, text in rows.items()), flush=True)


def published_flops_text(args: Settled, model: nn.Module) -> str:
    """Describe the operations for the image that published tables count, at the size that is asked for."""
    height, width = build_augmentation(args).evaluated_size(FLOPS_SIZE)
    flops = count_flops(model, height, width) / 2e9
    return f'{flops:.4g} G multiply-adds for one image of {height} x {width} at evaluation, as published tables count them'


def memory_text(args: Settled, model: nn.Module) -> str:
    """Describe the memory of a training step with the largest images."""
    height, width = build_augmentation(args).largest_size()
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    moments = 1 if args.sgd else 2
    weights = 4 * (total + trained * (1 + moments)) / 2**30
    kept = activation_bytes(model, args.batch_size, height, width) / 2**30
    sources = cast(nn.ModuleDict, model.query_sources)
    left_out = ', '.join(['losses', *sources, *['what is recomputed'] * bool(args.use_checkpoint)])
    return (
        f'about {weights + kept:.3g} GiB a process in float32: {weights:.3g} for weights, gradients and moments, {kept:.3g} '
        f'of activations of {args.batch_size} images of {height} x {width} (without {left_out})'
    )
