"""What a run is going to do, printed before it starts or by --dry_run, and statistics of an epoch."""

import re
from collections.abc import Mapping

import torch
from torch import nn

from datasets.augmentations import build_augmentation
from models.build import build_model
from models.costs import activation_bytes, count_flops, if_known
from models.ops.functions import describe as describe_kernels
from models.training.criterion import SetCriterion, Supervision, loss_suffixes
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
    """Print data, classes, model, batch, learning rates and steps. flops: text of the operations."""
    last = list(datasets.values())[-1]  # of validation; without it of training
    names = [name for name in last.class_map.names if name is not None]
    sizes = ', '.join(f'{len(data)} {split}' for split, data in datasets.items())
    device = next(model.parameters()).device
    precision = 'float32' if args.amp == 'off' else f'{args.amp}, and float32 for boxes, matching and losses'
    rows = {
        'family': chosen_by(args),
        'data': sizes if args.dataset_file == 'auto' else f'{args.dataset_file}, {sizes}',
        'classes': f'{len(names)}: {", ".join(names[:8])}{", ..." if len(names) > 8 else ""}',
        'model': f'{args.family}, {args.backbone}, {args.num_queries} queries, '
        f'{args.enc_layers}+{args.dec_layers} layers of {args.hidden_dim}',
        'parameters': parameters_text(model),
        'device': f'{device}, {get_world_size()} process(es){", sharded" if args.fsdp else ""}, '
        f'torch {torch.__version__}',
        'precision': precision,
        'FLOPs': flops,
    }
    if args.family == 'deformable':
        rows['kernels'] = describe_kernels(device.type)
    if args.eval:
        print_rows(rows)
        return
    if build_augmentation(args).mix('train', False) and not datasets['train'].return_masks:
        rows['copy-paste'] = 'none, since there are objects without a segmentation'
    steps, num_images = schedule.steps_per_epoch, len(datasets['train'])
    print_rows(
        rows
        | {
            'supervision': supervision_table(criterion.table, model.num_queries, criterion.weight_dict),
            'batch': batch_text(args),
            'learning rate': rates_text(args, schedule),
            'steps': f'{steps} an epoch, {steps * args.epochs} in {args.epochs} epochs',
            'output': args.output_dir or 'nothing is written (no --output_dir)',
        }
    )
    if args.backbone_weights != 'none' or args.resume or args.pretrained or args.frozen_weights:
        return
    has_statistics = any(name.endswith('running_mean') for name, _ in model.named_buffers())
    if args.backbone_norm == 'frozen' and has_statistics:
        print(
            'warning: the backbone starts from random numbers with its norms frozen: '
            'add --backbone_norm batch'
        )
    if args.dataset_file != 'shapes' and num_images < FROM_SCRATCH_NEEDS:
        print(
            f'warning: {num_images} images are few to train from random numbers; '
            '--backbone_weights imagenet or --pretrained learn much faster'
        )


def print_rows(rows: dict[str, str]) -> None:
    print('\n'.join(f'{name:>14}  {text}' for name, text in rows.items()), flush=True)


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Return the number of all parameters and of those that are trained."""
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)


def parameters_text(model: nn.Module) -> str:
    total, trained = count_parameters(model)
    return f'{total:,}, {trained:,} trainable'


def batch_text(args: Settled) -> str:
    """Describe the images of an optimizer step."""
    batches, processes = args.accum_steps, get_world_size()
    number = args.batch_size * batches * processes
    return f'{number} images a step ({args.batch_size} x {batches} accumulated x {processes} processes)'


def rates_text(args: Settled, schedule: Schedule) -> str:
    """Describe the learning rates of the groups, and their schedule."""
    if args.lr_layer_decay is not None:
        decay = f'blocks of the backbone times {args.lr_layer_decay} each, counted from the last'
        return f'{schedule.base_rates[0]:g}, {schedule}, {decay}'
    names = ('', 'backbone ', ' and '.join(args.lr_linear_proj_names) + ' ')
    rates = [f'{name}{rate:g}' for name, rate in zip(names, schedule.base_rates, strict=False)]
    return f'{", ".join(rates)}, {schedule}'


def flops_text(model: nn.Module, dataset: ImageData) -> str:
    """Describe the operations for the first image of a dataset."""
    height, width = dataset[0][0].shape[-2:]
    if getattr(model, 'eval_module', None) is not None:
        return 'not counted: those of an auxiliary head depend on its detections'

    def text() -> str:
        flops = count_flops(model, height, width)
        return f'{flops / 1e9:.3g} G ({flops / 2e9:.3g} G multiply-adds) for an image of {width} x {height}'

    return if_known(text)


def print_dry_run(args: Settled, num_images: int | None) -> None:
    """Print what a run would need: parameters, operations, memory, rates and steps.

    num_images: number of training images; None: that of COCO or LVIS.

    Raises:
        UserError: the images do not fill a step.
    """
    contiguous = args.dataset_file in ('auto', 'coco') and args.class_ids == 'contiguous'
    num_classes = {'lvis': 1203}.get(args.dataset_file, 80 if contiguous else args.num_classes)
    args = args.but(num_classes=num_classes, backbone_weights='none')
    known_images = {'shapes': args.shapes_train, 'lvis': LVIS_TRAIN_IMAGES}
    if num_images is None:
        num_images = known_images.get(args.dataset_file, COCO_TRAIN_IMAGES)
    batch = args.batch_size * args.accum_steps * get_world_size()
    steps = num_images // batch
    with torch.device('meta'):
        model, criterion, _ = build_model(args)
        schedule = build_schedule(args, model, max(1, steps))
    if num_images < batch and not args.eval:
        raise UserError(
            f'{num_images} training images do not fill one step of {batch}: '
            'lower --batch_size or --total_batch_size, or add images'
        )
    queries = model.num_queries
    rates: dict[float, int] = {}
    for group in schedule.optimizer.param_groups:
        rates[group['lr']] = rates.get(group['lr'], 0) + sum(p.numel() for p in group['params'])
    groups = [f'{number:,} parameters at {rate:g}' for rate, number in rates.items()]
    if len(groups) > LEARNING_RATES_SHOWN:
        groups = [
            *groups[: LEARNING_RATES_SHOWN - 1],
            f'... and at {len(groups)} rates in all, to {groups[-1].split()[-1]}',
        ]
    print_rows(
        {
            'family': chosen_by(args),
            'model': f'{args.family}, {args.backbone}, {sum(queries.values())} learned queries in training',
            'parameters': parameters_text(model),
            'FLOPs': if_known(lambda: published_flops_text(args, model)),
            'memory': if_known(lambda: estimated_memory(args, model)),
            'groups': '; '.join(groups),
            'batch': batch_text(args),
            'steps': f'{steps} an epoch of {num_images:,} images, '
            f'{steps * args.epochs} in {args.epochs} epochs',
            'learning rate': rates_text(args, schedule),
            'supervision': supervision_table(criterion.table, queries, criterion.weight_dict),
        }
    )


def published_flops_text(args: Settled, model: nn.Module) -> str:
    """Describe the operations for the image that published tables count, at the size of evaluation."""
    height, width = build_augmentation(args).evaluated_size(FLOPS_SIZE)
    flops = count_flops(model, height, width) / 2e9
    return (
        f'{flops:.4g} G multiply-adds for one image of {height} x {width} at evaluation, '
        'as published tables count them'
    )


def estimated_memory(args: Settled, model: nn.Module) -> str:
    """Describe the memory of a training step with the largest images."""
    height, width = build_augmentation(args).largest_size()
    total, trained = count_parameters(model)
    moments = 1 if args.sgd else 2
    weights = 4 * (total + trained * (1 + moments)) / 2**30
    activations = activation_bytes(model, args.batch_size, height, width) / 2**30
    recomputed = ['what is recomputed'] if args.use_checkpoint else []
    left_out = ', '.join(['losses', *model.query_sources, *recomputed])
    return (
        f'about {weights + activations:.3g} GiB a process in float32: {weights:.3g} for weights, gradients '
        f'and moments, {activations:.3g} of activations of {args.batch_size} images of {height} x {width} '
        f'(without {left_out})'
    )


def supervision_table(
    table: dict[str, Supervision], num_queries: dict[str, int], weight_dict: dict[str, float]
) -> str:
    """Describe each kind that has coefficients in a line: queries, layers, matcher, coefficients, divisor."""
    rows = []
    for kind, row in table.items():
        (suffix,) = loss_suffixes(kind, 1)
        coef = {term: weight_dict.get(f'loss_{term}{suffix}') for term in row.coef}
        if None in coef.values():
            continue
        first = rf'loss_{next(iter(row.coef), "ce")}(_\d+)?{suffix}'
        layers = sum(re.fullmatch(first, name) is not None for name in weight_dict)
        origin = f'{num_queries[kind]} queries' if kind in num_queries else row.description
        if row.matcher is None:
            rule, divisor = 'known in advance', 'its own count'
        else:
            repeats = row.matcher.repeats
            rule, divisor = str(row.matcher), 'objects' if repeats == 1 else f'{repeats} x objects'
        losses = ' + '.join(f'{value:g} {term}' for term, value in coef.items())
        scale = '' if row.scale == 1 else f', all x {row.scale:g}'
        rows.append(
            (kind, origin, f'{layers} x' if layers > 1 else '', rule, f'({losses}) / {divisor}{scale}')
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        '  '.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
    return ('\n' + 16 * ' ').join(lines)


def statistics_text(metrics: dict[str, float]) -> str:
    """Describe `SetCriterion.statistics` in one line, '' for a single kind. Names begin with `train_`."""
    kinds = [name.removeprefix('train_positives_') for name in metrics if name.startswith('train_positives_')]
    if len(kinds) < 2:
        return ''
    texts = (
        f'{kind} {metrics[f"train_positives_{kind}"]:.2f}, {100 * metrics[f"train_share_{kind}"]:.0f} %'
        for kind in kinds
    )
    return f'queries per object and share of the loss: {"; ".join(texts)}'
