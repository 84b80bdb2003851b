"""
Run one epoch of training, or one evaluation. These loops are the same for all methods.

A training step waits for the device twice: when the criterion copies the matching costs, and when the norm of
the gradient decides whether the optimizer makes the step. Denoising and the heads of Co-DETR add further
waits.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from functools import partial
from itertools import islice

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from datasets.coco_eval import encode_masks
from datasets.evaluation import Evaluation, Evaluator
from datasets.image_io import turned_sample
from models.postprocess import postprocess_batch, to_cpu
from models.training.criterion import weighted_sum
from util.box_ops import box_cxcywh_to_xyxy
from util.distributed.parallel import local_gradients
from util.errors import UserError
from util.logger import Progress
from util.nan_guard import NonFiniteGuard
from util.nested_tensor import NestedTensor, collate_fn
from util.optim import build_optimizer as build_optimizer
from util.precision import Precision
from util.run import EpochState


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
    end_step: Callable[[bool], None] = lambda made: None,
    guard: NonFiniteGuard | None = None,
) -> dict[str, float]:
    """Train on every batch once.

    Args:
        max_norm: largest norm of the gradient, which is clipped; 0 = no clipping.
        accum_steps: batches of one optimizer step; the gradient is that of one batch of all their images.
        print_freq: optimizer steps between two progress lines.
        state: progress of an interrupted epoch, where the loader starts.
        end_step: called after each step, with whether the optimizer made it.
        guard: handles steps that are not finite; too many in a row raise a UserError.

    Returns:
        Means over epoch and processes of `loss` and every unweighted term, and `SetCriterion.statistics`.
    """
    model.train()
    criterion.train()
    precision = precision or Precision('off', next(model.parameters()).device)
    state = state or EpochState()
    progress = Progress(title, len(data_loader) // accum_steps, print_freq, state.step)
    guard, bare_model = guard or NonFiniteGuard(), getattr(model, 'module', model)
    trained = [p for p in model.parameters() if p.requires_grad]
    for batches in grouped(data_loader, accum_steps):
        step_targets = [targets for _, targets in batches]
        pair_counts = criterion.pair_counts.copy()
        optimizer.zero_grad(set_to_none=True)
        guard.before_step(model)
        terms = []
        for index, (samples, targets) in enumerate(batches):
            with local_gradients(model) if index + 1 < len(batches) else nullcontext():
                _, losses, loss = losses_of(model, criterion, precision, step_targets, samples, targets)
                precision.backward(loss / len(batches))
            terms.append({'loss': loss.detach()} | {name: value.detach() for name, value in losses.items()})
        made, finite = precision.step(optimizer, trained, max_norm, [batch['loss'] for batch in terms])
        loss_of = partial(losses_of, bare_model, criterion, precision, step_targets)
        guard.after_step(finite, bare_model, batches, loss_of, f'{title} step {state.step + 1}')
        if finite:
            for batch_terms in terms:
                state.meter.update(batch_terms)
        else:
            criterion.pair_counts = pair_counts
        state.step += 1
        progress.step(sum(len(targets) for targets in step_targets), state.meter)
        end_step(made)
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


def try_largest_batch(
    model: nn.Module,
    criterion: nn.Module,
    precision: Precision,
    batch_size: int,
    size: tuple[int, int],
    num_objects: int,
) -> None:
    """Run forward and backward on the largest possible batch, with memory for the moments of AdamW.

    The optimizer makes no step. Random states, buffers and counts are restored.

    Args:
        size: height and width of the images, pixels.

    Raises:
        UserError: the batch does not fit into the memory.
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
            f'{batch_size} images of {height} x {width} pixels with {num_objects} objects each, the worst '
            'batch that can come, do not fit into the memory of the GPU: lower --batch_size (and keep '
            '--total_batch_size), or add --amp bf16, --batches size, --use_checkpoint, --fsdp'
        ) from error
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
    model.zero_grad(set_to_none=True)
    criterion.pair_counts.clear()


@torch.no_grad()
def evaluate(
    model: nn.Module,
    postprocessors: dict[str, nn.Module],
    data_loader: DataLoader,
    evaluator: Evaluator,
    title: str = 'evaluate',
    precision: Precision | None = None,
    after_batch: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Return the metrics of a model on a dataset. The model gets no targets, and no losses are computed."""
    model.eval()
    device = next(model.parameters()).device
    precision = precision or Precision('off', device)
    progress = Progress(title, len(data_loader), every=max(len(data_loader) // 4, 1))
    for samples, targets in data_loader:
        with precision.autocast():
            outputs = model(samples.to(device, non_blocking=True))
        results = postprocess_batch(model, postprocessors, outputs, targets, samples, encode_masks)
        evaluator.update(
            {int(t['image_id']): to_cpu(result) for t, result in zip(targets, results, strict=True)}
        )
        progress.step(len(targets))
        after_batch()
    progress.close()
    evaluator.synchronize()
    return evaluator.summarize()


@torch.no_grad()
def sample_detections(
    model: nn.Module, postprocessors: dict[str, nn.Module], dataset: Dataset, count: int = 6
) -> list[tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]]:
    """Return the first images of a dataset, upright, with their detections and their objects, for a drawing."""
    model.eval()
    device = next(model.parameters()).device
    rows = []
    for index in range(min(count, len(dataset))):
        image, target = dataset[index]
        samples, _ = collate_fn([(image, target)])
        outputs, size = model(samples.to(device)), target['size']
        shown = [{'size': size, 'orig_size': size}]  # detections in pixels of the prepared image
        results = postprocess_batch(model, postprocessors, outputs, shown, samples)
        height, width = size.tolist()
        boxes = box_cxcywh_to_xyxy(target['boxes']) * torch.tensor([width, height, width, height])
        truth = {'labels': target['labels'], 'boxes': boxes}
        truth |= {'masks': target['masks']} if 'segm' in postprocessors and 'masks' in target else {}
        turn = dataset.turn_left(index)
        shown, found = turned_sample(image, to_cpu(results[0]), turn)
        rows.append((shown, found, turned_sample(image, truth, turn)[1]))
    return rows


def grouped(batches: Iterable, size: int) -> Iterator[list]:
    """Yield lists of `size` batches; drop an incomplete list at the end."""
    iterator = iter(batches)
    while len(group := list(islice(iterator, size))) == size:
        yield group


def targets_to(targets: list[dict[str, Tensor]], device: torch.device) -> list[dict[str, Tensor]]:
    """Copy the entries of targets that losses and training branches read to the device."""
    keys = ('labels', 'boxes', 'masks')
    return [
        {key: target[key].to(device, non_blocking=True) for key in keys if key in target}
        for target in targets
    ]
