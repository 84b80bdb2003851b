"""
The losses of all predictions of a model. One table says how each kind of prediction is supervised.

The criterion has no branch on the kind. A new scheme is a new row of the table.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from models.structures import Assignment, Prediction
from util.distributed.collectives import all_gather_object, all_reduce_sum, get_world_size
from util.precision import without_autocast

from .losses import BOX_LOSSES, MASK_LOSSES, box_losses, cardinality_error, class_error, mask_losses
from .matcher import merge, stack_predictions
from .report import epoch_statistics
from .structures import Stack, Supervision, Targets, from_host


def loss_suffix(kind: str, layer: int | None) -> str:
    """Return the end of an official loss name: layer, and kind except for the inference group's (`loss_ce_3_enc`)."""
    return ('' if layer is None else f'_{layer}') + ('' if kind == 'one2one' else f'_{kind}')


class SetCriterion(nn.Module):
    """The losses of a list of predictions.

    Training minimises the sum of `losses[name] * weight_dict[name]`.

    Args:
        table: supervision of each kind.
        weight_dict: coefficient of each loss by its official name; terms without one are only logged.
        eps: number added to every divisor, as in Co-DETR's official code.
    """

    def __init__(
        self, table: dict[str, Supervision], weight_dict: dict[str, float], eps: float = 0.0
    ) -> None:
        super().__init__()
        self.table = table
        self.eps = eps
        self.weight_dict = weight_dict
        # Number of pairs of each kind (mean over its layers) and of objects, since the last call of `statistics`.
        self.tally: Counter[str] = Counter()

    def forward(
        self, outputs: dict, targets: list[dict], step_targets: Sequence[list[dict]] | None = None
    ) -> dict[str, Tensor]:
        """Compute the unweighted loss terms, scalars by official name.

        Args:
            outputs: output of the model while training, or `pred_logits` and `pred_boxes` alone.
            targets: a dictionary of `labels` [T_i] and `boxes` [T_i, 4] cxcywh in [0, 1] per image, and for mask losses
                `masks` [T_i, H, W].
            step_targets: targets of all batches of this optimizer step, this batch included. Losses are divided by the
                average count of these batches, so that accumulated batches give the gradient of one large batch.
        """
        predictions = outputs.get('predictions') or [
            Prediction(outputs['pred_logits'], outputs['pred_boxes'])
        ]
        kinds = {
            name: [p for p in predictions if p.kind == name]
            for name in dict.fromkeys(p.kind for p in predictions)
        }
        step_sizes = [[len(target['labels']) for target in batch] for batch in step_targets or [targets]]
        stacks = self.assign(kinds, targets)
        denominators = self.denominators(stacks, step_sizes)
        losses = dict(outputs.get('losses', {}))
        asked = [term for term in BOX_LOSSES if any(term in self.table[kind].coef for kind in stacks)]
        boxes = box_losses(list(stacks.values()), asked)
        for (kind, stack), box_terms, divisors in zip(stacks.items(), boxes, denominators, strict=True):
            row = self.table[kind]
            suffixes = [loss_suffix(kind, prediction.layer) for prediction in kinds[kind]]
            if 'ce' in row.coef:
                names = [f'loss_ce{suffix}' for suffix in suffixes]
                losses |= zip(names, (row.class_loss(stack) / divisors[0]).unbind(), strict=True)
            places = [(term, suffix) for term in asked for suffix in suffixes]
            values = zip(places, (box_terms / divisors[1]).flatten().unbind(), strict=True)
            losses |= {f'loss_{term}{suffix}': x for (term, suffix), x in values if term in row.coef}
            if stack.masks is not None and any(term in row.coef for term in MASK_LOSSES):
                terms = mask_losses(stack, [target['masks'] for target in targets])
                losses |= {f'loss_{term}{suffixes[-1]}': value / divisors[1] for term, value in terms.items()}
            names = [f'cardinality_error{suffix}' for suffix in suffixes]
            losses |= zip(names, cardinality_error(stack, row.scale).unbind(), strict=True)
            if not row.class_agnostic:
                losses['class_error' + loss_suffix(kind, None)] = class_error(stack, row.scale)
        return losses

    def statistics(self, averages: dict[str, float]) -> dict[str, float]:
        """Return pairs per object and share of the loss of each kind, since the last call and over all ranks.

        averages: average of each loss term over that time.
        """
        tally: Counter[str] = Counter()
        for part in all_gather_object(self.tally):
            tally.update(part)
        self.tally = Counter()
        return epoch_statistics(self.table, self.weight_dict, tally, averages)

    def assign(self, kinds: dict[str, list[Prediction]], targets: list[dict]) -> dict[str, Stack]:
        """Match every kind. All costs are copied to the host at once, and so are all pairs back to the device."""
        objects = Targets.pack(targets)
        packed = {
            kind: objects.as_one_class() if self.table[kind].class_agnostic else objects for kind in kinds
        }
        stacked = {kind: stack_predictions(rows) for kind, rows in kinds.items()}
        matched = [kind for kind, rows in kinds.items() if rows[0].assignment is None]
        costs = [self.table[kind].matcher.cost(stacked[kind], packed[kind]) for kind in matched]
        assignments = {
            kind: self.table[kind].matcher.solve(cost, objects.sizes)
            for kind, cost in zip(matched, to_host(costs), strict=True)
        } | {kind: [p.assignment for p in rows] for kind, rows in kinds.items() if kind not in matched}
        for kind in kinds:
            if other := self.table[kind].merge:
                both = zip(assignments[kind], assignments[other], strict=True)
                assignments[kind] = [merge(*layer) for layer in both]
        self.tally['objects'] += sum(objects.sizes)
        self.tally.update(
            {kind: sum(len(a.query) for a in rows) / len(rows) for kind, rows in assignments.items()}
        )
        on_host = {kind: pack_pairs(assignments[kind]) for kind in kinds}
        on_device = torch.cat(list(on_host.values()), dim=1).to(objects.boxes.device, non_blocking=True)
        parts = on_device.split([part.shape[1] for part in on_host.values()], dim=1)
        stacks = {
            kind: self.make_stack(stacked[kind], part, packed[kind], assignments[kind])
            for kind, part in zip(kinds, parts, strict=True)
        }
        for kind, stack in stacks.items():
            stack.masks = kinds[kind][-1].masks
        return stacks

    def make_stack(
        self, stacked: Prediction, pairs: Tensor, packed: Targets, assignments: list[Assignment]
    ) -> Stack:
        """Collect predictions, pairs and objects of a kind. pairs: [5, N] of `pack_pairs`."""
        layer, batch, query, target, decides_class = pairs
        matcher = self.table[stacked.kind].matcher
        return Stack(
            logits=stacked.logits,
            boxes=stacked.boxes,
            index=(layer, batch, query),
            labels=packed.labels[target],
            target_boxes=packed.boxes[target],
            num_pairs=[len(a.query) for a in assignments],
            num_objects=packed.sizes if matcher is None else [matcher.count([size]) for size in packed.sizes],
            count=assignments[0].count,
            decides_class=None if assignments[0].decides_class is None else decides_class,
            target=target,
        )

    def denominators(self, stacks: dict[str, Stack], step_sizes: list[list[int]]) -> Tensor:
        """Return the divisors of class and box losses of each kind, [kinds, 2], averaged over ranks and a step's batches.

        A total count is at least 1. The official code clamps the average instead, which differs only if there is less
        than one object per rank; clamping the total keeps the gradient independent of the number of ranks. If only the
        model knows the assignments (positives of Co-DETR's heads), this batch's count stands for the step's other batches.
        """
        totals, smallest = [], []
        for kind, stack in stacks.items():
            row, num_queries = self.table[kind], stack.logits.shape[2]
            smallest.append([row.class_loss.smallest_denominator, 1.0])
            if row.matcher is None:
                counts = [stack.count if row.count is None else row.count(sizes) for sizes in step_sizes]
                totals.append([sum(counts)] * 2)
                continue
            classes = [row.class_loss.denominator(row.matcher, sizes, num_queries) for sizes in step_sizes]
            objects = sum(row.matcher.count(sizes) for sizes in step_sizes)
            totals.append([sum(classes), objects])
        like = next(iter(stacks.values())).logits
        totals = torch.maximum(all_reduce_sum(from_host(totals, like)), from_host(smallest, like))
        parts = get_world_size() * len(step_sizes)
        scales = from_host([[self.table[kind].scale] for kind in stacks], like)
        return (totals + self.eps) / (parts * scales)


def to_host(tensors: list[Tensor]) -> list[np.ndarray]:
    """Copy tensors to the host in one transfer."""
    if not tensors:
        return []
    flat = torch.cat([x.flatten() for x in tensors]).cpu()
    parts = flat.split([x.numel() for x in tensors])
    return [part.view(x.shape).numpy() for part, x in zip(parts, tensors, strict=True)]


def pack_pairs(assignments: list[Assignment]) -> Tensor:
    """Pack the pairs of all layers, one layer after the other, as [5, N]: layer, batch, query, target, decides_class."""
    num_pairs = torch.tensor([len(pairs.query) for pairs in assignments])
    layer = torch.arange(len(assignments)).repeat_interleave(num_pairs)
    if assignments[0].decides_class is None:
        decides_class = torch.ones_like(layer)
    else:
        decides_class = torch.cat([pairs.decides_class for pairs in assignments]).long()
    rows = [torch.cat([getattr(p, name) for p in assignments]) for name in ('batch', 'query', 'target')]
    return torch.stack([layer, *rows, decides_class])


def weighted_sum(losses: dict[str, Tensor], weight_dict: dict[str, float]) -> Tensor:
    """Sum the terms that have a coefficient, weighted by it: the number that training minimises."""
    names = [name for name in losses if name in weight_dict]
    values = torch.stack([losses[name] for name in names])
    with without_autocast(values):  # autocast would compute the matrix product in 16 bits
        return values @ from_host([weight_dict[name] for name in names], values)
