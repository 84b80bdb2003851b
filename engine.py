"""
Run one epoch of training, or one evaluation: plain loops that know no scheme by name.

A training step synchronises with the device twice: when the criterion copies the matching costs, and when the norm of the gradient
tells whether the step is made. Co-DETR's heads and denoising add some.
"""

import math
import re
from argparse import Namespace
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, Dataset

from datasets.coco_eval import CocoEvaluator, Summary, encode_masks
from models.detector import detections_of, to_cpu
from models.training.criterion import weighted_sum
from util.black_box import BlackBox
from util.box_ops import box_cxcywh_to_xyxy
from util.distributed.parallel import local_gradients
from util.errors import UserError
from util.logger import Progress
from util.nested_tensor import NestedTensor, collate_fn
from util.precision import Precision
from util.run_state import EpochState
from util.visualize import contact_sheet

DRAWN_SCORE = 0.3  # focal losses keep scores low


def build_optimizer(
    model: nn.Module,
    lr: float,
    lr_backbone: float,
    weight_decay: float,
    backbone_names: Sequence[str] = ('backbone',),
    slow_names: Sequence[str] = (),
    slow_factor: float = 0.1,
    sgd: bool = False,
    layer_decay: float | None = None,
) -> torch.optim.Optimizer:
    """Build AdamW (or SGD) with the official parameter groups.

    The backbone learns at `lr_backbone`, parameters of `slow_names` at `lr * slow_factor`, the rest at `lr`. A parameter belongs
    to a group if its name contains one of the group's names.

    layer_decay: factor of `layer_decay_groups`, which then makes the groups.

    Raises:
        UserError: a parameter belongs to two groups.
    """
    params: dict[str, list[nn.Parameter]] = {'rest': [], 'backbone': [], 'slow': []}
    for name, parameter in model.named_parameters():
        groups = [
            group
            for group, parts in (('backbone', backbone_names), ('slow', slow_names))
            if any(part in name for part in parts)
        ]
        if len(groups) == 2:
            raise UserError(
                f'{name} fits --lr_backbone_names {" ".join(backbone_names)} and --lr_linear_proj_names '
                f'{" ".join(slow_names)}: make the names disjoint'
            )
        if parameter.requires_grad:
            params[groups[0] if groups else 'rest'].append(parameter)
    rates = {'rest': lr, 'backbone': lr_backbone, 'slow': lr * slow_factor}
    if not slow_names:
        del rates['slow']
    groups = [{'params': params[group], 'lr': rate} for group, rate in rates.items()]
    if layer_decay is not None:
        groups = layer_decay_groups(model, lr, weight_decay, layer_decay)
    fused = all(p.device.type in ('cpu', 'cuda', 'mps') for p in model.parameters())
    if sgd:
        # PyTorch has no fused SGD for parts of weights, and steps them one by one where some are whole.
        sharded = any(isinstance(p, DTensor) for p in model.parameters())
        how = {'foreach': False} if sharded else {'fused': fused}
        return torch.optim.SGD(groups, lr=lr, momentum=0.9, weight_decay=weight_decay, **how)
    return torch.optim.AdamW(groups, lr=lr, weight_decay=weight_decay, fused=fused)


def optimizer_of(model: nn.Module, args: Namespace) -> torch.optim.Optimizer:
    """Build the optimizer that the flags ask for."""
    return build_optimizer(
        model,
        lr=args.lr,
        lr_backbone=args.lr_backbone,
        weight_decay=args.weight_decay,
        backbone_names=args.lr_backbone_names,
        slow_names=args.lr_linear_proj_names,
        slow_factor=args.lr_linear_proj_mult,
        sgd=args.sgd,
        layer_decay=args.lr_layer_decay,
    )


def layer_decay_groups(model: nn.Module, lr: float, weight_decay: float, factor: float) -> list[dict]:
    """Return parameter groups whose rate falls by `factor` with each block of a ViT (Co-DETR; BEiT, arXiv:2106.08254).

    All that is no block and no embedding learns at `lr`. Biases, norms and other vectors are not decayed. The first group
    is the rest of the model, the second the backbone's last block.
    """
    depth = len(model.backbone[0].body.blocks)
    groups: dict[tuple[bool, int], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        block = re.match(r'backbone\.0\.body\.blocks\.(\d+)\.', name)
        embeds = name.startswith(('backbone.0.body.pos_embed', 'backbone.0.body.patch_embed.'))
        layer = int(block[1]) + 1 if block else 0 if embeds else depth + 1
        groups.setdefault((parameter.ndim == 1 or name.endswith('.bias'), -layer), []).append(parameter)
    return [
        {
            'params': groups[key],
            'lr': lr * factor ** (depth + 1 + key[1]),
            'weight_decay': 0.0 if key[0] else weight_decay,
        }
        for key in sorted(groups)
    ]


@dataclass
class Schedule:
    """Factor of the learning rate after a number of steps of the run, those left out included.

    kind: `step` multiplies by 0.1 after the epochs of `drops`, or after every `drop_every`; `cosine` falls to 0 over `epochs`
    (SGDR, arXiv:1608.03983, Eq. 5). Both follow the images that were seen. warmup_steps: over the first of them that the
    optimizer makes, it rises linearly from `warmup_start`.
    """

    kind: str
    epochs: int
    drop_every: int
    drops: list[int]
    warmup_steps: int
    steps_per_epoch: int = 1
    warmup_start: float = 0.0
    left_out: list[int] = field(default_factory=list)  # numbers of the steps that the optimizer did not make

    def __call__(self, step: int) -> float:
        warm, made = 1.0, step - bisect_left(self.left_out, step)
        if self.warmup_start and made < self.warmup_steps:
            warm = self.warmup_start + (1 - self.warmup_start) * made / self.warmup_steps
        elif self.warmup_steps:
            warm = min(1.0, (made + 1) / self.warmup_steps)
        if self.kind == 'cosine':
            done = min(step / (self.epochs * self.steps_per_epoch), 1.0)
            return warm * 0.5 * (1 + math.cos(math.pi * done))
        return warm * 0.1 ** self.num_drops(step // self.steps_per_epoch)

    def num_drops(self, epochs_done: int) -> int:
        if self.kind != 'step':
            return 0
        if self.drops:
            return sum(epochs_done >= epoch for epoch in self.drops)
        return epochs_done // self.drop_every

    def drops_after(self, epoch: int) -> bool:
        """Return whether the rate is divided at the end of this epoch, counted from 0."""
        return self.num_drops(epoch + 1) > self.num_drops(epoch)

    def __str__(self) -> str:
        warm = f'warm-up over {self.warmup_steps} steps, ' if self.warmup_steps else ''
        if self.kind != 'step':
            return f'{warm}{self.kind} to 0 over {self.epochs} epochs'
        if self.drops:
            return f'{warm}divided by 10 after epochs {" ".join(map(str, self.drops))}'
        return f'{warm}divided by 10 every {self.drop_every} epochs'


def make_schedule(args: Namespace, steps_per_epoch: int) -> Schedule:
    drops = sorted(args.lr_drop_epochs or [])
    epochs = 0 if args.lr_schedule == 'step' else args.epochs  # a step schedule has no end
    return Schedule(
        kind=args.lr_schedule,
        epochs=epochs,
        drop_every=args.lr_drop,
        drops=drops,
        warmup_steps=args.warmup_steps,
        steps_per_epoch=steps_per_epoch,
        warmup_start=args.warmup_start,
    )


def build_scheduler(
    optimizer: torch.optim.Optimizer, args: Namespace, steps_per_epoch: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """Build the schedule that the flags ask for; `util.run_state.set_step` moves it after every step."""
    schedule = make_schedule(args, steps_per_epoch)
    return torch.optim.lr_scheduler.LambdaLR(optimizer, [schedule] * len(optimizer.param_groups))


def rates_at(scheduler: torch.optim.lr_scheduler.LambdaLR, step: int) -> list[float]:
    """Return the learning rate of each parameter group at an optimizer step of the run."""
    return [base * scheduler.lr_lambdas[0](step) for base in scheduler.base_lrs]


def describe_rates(args: Namespace, scheduler: torch.optim.lr_scheduler.LambdaLR) -> str:
    """Describe the rates and the schedule."""
    schedule = scheduler.lr_lambdas[0]
    names = ('', 'backbone ', ' and '.join(args.lr_linear_proj_names) + ' ')
    if args.lr_layer_decay is not None:
        names = ('',)
    rates = [f'{name}{rate:g}' for name, rate in zip(names, scheduler.base_lrs, strict=False)]
    text = f'{", ".join(rates)}, {schedule}'
    if args.lr_layer_decay is not None:
        text = f'{text}, blocks of the backbone times {args.lr_layer_decay} each, counted from the last'
    return text


def train_one_epoch(
    model: nn.Module,
    criterion: nn.Module,
    data_loader: DataLoader,
    optimizer: torch.optim.Optimizer,
    title: str = 'train',
    max_norm: float = 0.0,
    accum_steps: int = 1,
    print_freq: int = 10,
    precision: Precision | None = None,
    state: EpochState | None = None,
    after_step: Callable[[EpochState, bool], None] = lambda state, made: None,
    black_box: BlackBox | None = None,
) -> dict[str, float]:
    """Train on every batch once.

    Args:
        max_norm: gradients are clipped to this total norm; 0 leaves them alone.
        accum_steps: batches whose gradients make one optimizer step; the gradient is that of one batch of all their images.
        print_freq: optimizer steps between two progress lines.
        state: how far an interrupted epoch had come; the loader begins there.
        after_step: called after each step, with whether the optimizer made one.
        black_box: what looks at steps that are left out because their gradient is not finite.

    Returns:
        Averages over epoch and processes: `loss`, every unweighted term, and for each kind of prediction `positives_KIND`
        (queries per object) and `share_KIND` (of the loss).

    Raises:
        UserError: too many steps in a row had to be left out.
    """
    model.train()
    criterion.train()
    device = next(model.parameters()).device
    precision = precision or Precision('off', device)
    state = state or EpochState()
    progress = Progress(title, len(data_loader) // accum_steps, print_freq, state.step)
    black_box, bare = black_box or BlackBox(), getattr(model, 'module', model)
    trained = [p for p in model.parameters() if p.requires_grad]
    black_box.watch(model)
    for batches in grouped(data_loader, accum_steps):
        step_targets = [targets for _, targets in batches]
        counted = criterion.tally.copy()
        optimizer.zero_grad(set_to_none=True)
        black_box.before()
        found = []
        for index, (samples, targets) in enumerate(batches):
            with local_gradients(model) if index + 1 < len(batches) else nullcontext():
                _, losses, loss = losses_of(model, criterion, precision, step_targets, samples, targets)
                precision.backward(loss / len(batches))
            found.append({'loss': loss.detach()} | {name: value.detach() for name, value in losses.items()})
        made, finite = precision.step(optimizer, trained, max_norm, [each['loss'] for each in found])
        again = partial(losses_of, bare, criterion, precision, step_targets)
        black_box.after(finite, bare, batches, again, f'{title} step {state.step + 1}')
        if not finite:
            criterion.tally = counted
        for each in found if finite else []:
            state.meter.update(each)
        state.step += 1
        progress.step(sum(len(targets) for targets in step_targets), state.meter)
        after_step(state, made)
    progress.close()
    averages = state.meter.averages()
    return averages | criterion.statistics(averages)


def losses_of(
    model: nn.Module,
    criterion: nn.Module,
    precision: Precision,
    step_targets: list[list[dict[str, Tensor]]],
    samples: NestedTensor,
    targets: list[dict[str, Tensor]],
) -> tuple[dict, dict[str, Tensor], Tensor]:
    """Return outputs, unweighted losses and their weighted sum for one of the batches of a step."""
    device = next(model.parameters()).device
    targets = targets_to(targets, device)
    with precision.autocast():
        outputs = model(samples.to(device, non_blocking=True), targets)
    losses = criterion(outputs, targets, step_targets)
    return outputs, losses, weighted_sum(losses, criterion.weight_dict)


def rehearse(
    model: nn.Module,
    criterion: nn.Module,
    precision: Precision,
    batch_size: int,
    size: tuple[int, int],
    num_objects: int,
) -> None:
    """Run forward and backward once on the largest batch that can come, beside memory for AdamW's two moments.

    Nothing changes: no step is made, and random numbers, statistics and counts are put back.

    Args:
        size: height and width of the images, pixels.

    Raises:
        UserError: the memory does not suffice.
    """
    model.train()
    device = next(model.parameters()).device
    devices = [device] if device.type == 'cuda' else []
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        with torch.random.fork_rng(devices):
            trained = [p for p in model.parameters() if p.requires_grad]
            moments = [torch.empty_like(p) for p in trained + trained]
            images = torch.zeros(batch_size, 3, *size, dtype=torch.uint8, device=device)
            boxes = torch.rand(num_objects, 4, device=device) * 0.2 + 0.3
            target = {'labels': torch.zeros(num_objects, dtype=torch.int64, device=device), 'boxes': boxes}
            if any('mask' in name for name in criterion.weight_dict):
                target['masks'] = torch.zeros(num_objects, *size, dtype=torch.uint8, device=device)
            targets = [target] * batch_size
            with precision.autocast():
                outputs = model(images, targets)
            weighted_sum(criterion(outputs, targets), criterion.weight_dict).backward()
            del moments
    except torch.OutOfMemoryError as error:
        height, width = size
        raise UserError(
            f'{batch_size} images of {height} x {width} pixels with {num_objects} objects each, the worst batch that can '
            'come, do not fit into the memory of the GPU: lower --batch_size (and keep --total_batch_size), or add --amp '
            'bf16, --batches size, --use_checkpoint, --fsdp'
        ) from error
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
    model.zero_grad(set_to_none=True)
    criterion.tally.clear()


@torch.no_grad()
def evaluate(
    model: nn.Module,
    postprocessors: dict[str, nn.Module],
    data_loader: DataLoader,
    evaluator: CocoEvaluator,
    title: str = 'evaluate',
    precision: Precision | None = None,
    after_batch: Callable[[], None] = lambda: None,
) -> dict[str, Summary]:
    """Return COCO metrics of a model on a data set; no targets go in, and no losses come out."""
    model.eval()
    device = next(model.parameters()).device
    precision = precision or Precision('off', device)
    progress = Progress(title, len(data_loader), every=max(len(data_loader) // 4, 1))
    for samples, targets in data_loader:
        with precision.autocast():
            outputs = model(samples.to(device, non_blocking=True))
        results = detections_of(postprocessors, outputs, targets, samples, device, encode_masks)
        evaluator.update(
            {int(t['image_id']): to_cpu(result) for t, result in zip(targets, results, strict=True)}
        )
        progress.step(len(targets))
        after_batch()
    progress.close()
    evaluator.synchronize_between_processes()
    return evaluator.summarize()


@torch.no_grad()
def draw_predictions(
    model: nn.Module,
    postprocessors: dict[str, nn.Module],
    dataset: Dataset,
    path: Path | None,
    count: int = 6,
) -> None:
    """Draw the first images of a data set, ground truth beside predictions.

    Args:
        path: image file to write; None: only detect, as other ranks must where weights are sharded.
    """
    model.eval()
    device = next(model.parameters()).device
    rows = []
    for index in range(min(count, len(dataset))):
        image, target = dataset[index]
        samples, _ = collate_fn([(image, target)])
        outputs, size = model(samples.to(device)), target['size'][None]
        results = postprocessors['bbox'](outputs, size.to(device))
        if 'segm' in postprocessors:
            results = postprocessors['segm'](results, outputs, size, size)
        height, width = target['size'].tolist()
        boxes = box_cxcywh_to_xyxy(target['boxes']) * torch.tensor([width, height, width, height])
        truth = {'labels': target['labels'], 'boxes': boxes}
        truth |= {'masks': target['masks']} if 'segm' in postprocessors and 'masks' in target else {}
        rows.append((image, to_cpu(results[0]), truth))
    if path is not None:
        contact_sheet(path, rows, dataset.class_map.names, score_threshold=DRAWN_SCORE)


def grouped(batches: Iterable, size: int) -> Iterator[list]:
    """Yield runs of `size` batches; drop an incomplete run at the end."""
    iterator = iter(batches)
    while len(run := list(islice(iterator, size))) == size:
        yield run


def targets_to(targets: list[dict[str, Tensor]], device: torch.device) -> list[dict[str, Tensor]]:
    """Copy labels, boxes and masks, which losses and query sources read, to the device."""
    keys = ('labels', 'boxes', 'masks')
    return [
        {key: target[key].to(device, non_blocking=True) for key in keys if key in target}
        for target in targets
    ]
