"""Summary of a run, printed before it starts."""

from collections.abc import Mapping
from typing import cast

import torch
from torch import nn
from torch.utils.data import DataLoader

from util.config.settle import Settled, chosen_by
from util.costs import activation_bytes, count_flops, if_known
from util.distributed.collectives import get_world_size
from util.errors import UserError
from util.run_state import ImageData

FROM_SCRATCH_NEEDS = 10_000  # images; DETR's authors' advice
LEARNING_RATES_SHOWN = 4
COCO_TRAIN_IMAGES, LVIS_TRAIN_IMAGES = 118_287, 100_170  # train2017; LVIS v1
FLOPS_SIZE = (800, 1136)  # height and width of one image with the mean cost of COCO val2017's first 100


def print_plan(
    args: Settled,
    model: nn.Module,
    datasets: Mapping[str, ImageData],
    loaders: dict[str, DataLoader],
    rates: str,
    notes: dict[str, str],
) -> None:
    """Print data, classes, effective batch, learning rates, model size and steps.

    rates: learning rates and their schedule in words. notes: further rows.
    """
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
        **notes,
    }
    if not args.eval:
        batch = args.batch_size * args.accum_steps * get_world_size()
        steps = len(loaders['train']) // args.accum_steps
        rows |= {
            'batch': f'{batch} images a step ({args.batch_size} x {args.accum_steps} accumulated x '
            f'{get_world_size()} processes)',
            'learning rate': rates,
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


def flops_text(model: nn.Module, dataset: ImageData) -> str:
    """Describe the operations for the first image of a data set."""
    height, width = dataset[0][0].shape[-2:]
    if getattr(model, 'eval_module', None) is not None:
        return 'not counted: those of an auxiliary head depend on what it finds'

    def text() -> str:
        flops = count_flops(model, height, width)
        return f'{flops / 1e9:.3g} G ({flops / 2e9:.3g} G multiply-adds) for an image of {width} x {height}'

    return if_known(text)


def print_dry_run(
    args: Settled,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    num_images: int,
    sizes: tuple[tuple[int, int], tuple[int, int]],
    notes: dict[str, str],
) -> None:
    """Print what a run would need: parameters, operations, memory, learning rates and steps.

    sizes: (height, width) of an image of FLOPS_SIZE in evaluation, and of the largest one in training. notes: further rows.
    """
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    batch = args.batch_size * args.accum_steps * get_world_size()
    if num_images < batch and not args.eval:
        raise UserError(
            f'{num_images} training images do not fill one step of {batch}: lower --batch_size, --accum_steps or '
            '--total_batch_size, or add images'
        )
    steps = num_images // batch
    queries = cast(dict[str, int], model.num_queries)
    rates: dict[float, int] = {}
    for group in optimizer.param_groups:
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
        'FLOPs': if_known(lambda: published_flops_text(model, sizes[0])),
        'memory': if_known(lambda: memory_text(args, model, sizes[1])),
        'groups': '; '.join(groups),
        'batch': f'{batch} images a step ({args.batch_size} x {args.accum_steps} accumulated x {get_world_size()} '
        'processes)',
        'steps': f'{steps} an epoch of {num_images:,} images, {steps * args.epochs} in {args.epochs} epochs',
        **notes,
    }
    print('\n'.join(f'{name:>14}  {text}' for name, text in rows.items()), flush=True)


def published_flops_text(model: nn.Module, size: tuple[int, int]) -> str:
    """Describe the operations for the image that published tables count, at its (height, width) in evaluation."""
    height, width = size
    flops = count_flops(model, height, width) / 2e9
    return f'{flops:.4g} G multiply-adds for one image of {height} x {width} at evaluation, as published tables count them'


def memory_text(args: Settled, model: nn.Module, size: tuple[int, int]) -> str:
    """Describe the memory of a training step with the largest images, of this (height, width)."""
    height, width = size
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
