"""
The losses of everything that a model predicts, by one table: kind of prediction -> how it is supervised.

The criterion has no branch on the kind. A new scheme is a new row.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from models.structures import Assignment, Prediction, Supervision
from util.dist import all_reduce_sum, get_world_size

from .losses import Stack, box_losses, cardinality_error, class_error, from_host
from .matcher import Targets, stack_predictions


def loss_suffix(kind: str, layer: int | None) -> str:
    """Official names: `loss_ce`, `loss_ce_3`, and `_{kind}` for every kind but the inference group's."""
    return ('' if layer is None else f'_{layer}') + ('' if kind == 'one2one' else f'_{kind}')


class SetCriterion(nn.Module):
    """Set losses of a list of predictions.

    table: supervision of each kind. weight_dict: coefficient of each loss by its official name; terms without
    one are logged only. The sum of `losses[name] * weight_dict[name]` is what is trained.
    """

    def __init__(self, table: dict[str, Supervision], weight_dict: dict[str, float]) -> None:
        super().__init__()
        self.table = table
        self.weight_dict = weight_dict

    def forward(
        self, outputs: dict, targets: list[dict], step_targets: Sequence[list[dict]] | None = None
    ) -> dict[str, Tensor]:
        """Unweighted loss terms, scalars by official name.

        outputs: what the model returns while training (or `pred_logits` and `pred_boxes` alone). targets: one
        dictionary a picture with `labels` [T_i] and `boxes` [T_i, 4] cxcywh in [0, 1]. step_targets: the
        targets of every batch that shares this optimizer step, this one among them; losses are then divided
        by the average of their counts, so that accumulated batches give the gradient of one large batch.
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
        for (kind, stack), (class_count, box_count) in zip(stacks.items(), denominators, strict=True):
            terms = {'loss_ce': self.table[kind].class_loss(stack) / class_count}
            terms |= {name: loss / box_count for name, loss in box_losses(stack).items()}
            terms['cardinality_error'] = cardinality_error(stack)
            for name, values in terms.items():
                for prediction, value in zip(kinds[kind], values.unbind(), strict=True):
                    losses[name + loss_suffix(kind, prediction.layer)] = value
            last = next(i for i, p in enumerate(kinds[kind]) if p.layer is None)
            if not self.table[kind].class_agnostic:
                losses['class_error' + loss_suffix(kind, None)] = class_error(stack)[last]
        return losses

    def assign(self, kinds: dict[str, list[Prediction]], targets: list[dict]) -> dict[str, Stack]:
        """Match every kind: costs of all of them cross to the host in one copy, the pairs come back in one."""
        stacked = {kind: stack_predictions(rows) for kind, rows in kinds.items()}
        packed = {kind: Targets.pack(targets, self.table[kind].class_agnostic) for kind in kinds}
        matched = [kind for kind, rows in kinds.items() if rows[0].assignment is None]
        costs = [self.table[kind].matcher.cost(stacked[kind], packed[kind]) for kind in matched]
        solved = {
            kind: self.table[kind].matcher.solve(cost, packed[kind].sizes)
            for kind, cost in zip(matched, to_host(costs), strict=True)
        }
        assignments = {kind: solved.get(kind) or [p.assignment for p in rows] for kind, rows in kinds.items()}
        pairs = [pack_pairs(rows) for rows in assignments.values()]  # [4, N] each
        on_device = torch.cat(pairs, dim=1).to(targets[0]['boxes'].device, non_blocking=True)
        parts = on_device.split([part.shape[1] for part in pairs], dim=1)
        return {
            kind: make_stack(stacked[kind], part, packed[kind], assignments[kind])
            for kind, part in zip(kinds, parts, strict=True)
        }

    def denominators(self, stacks: dict[str, Stack], step_sizes: list[list[int]]) -> Tensor:
        """[kinds, 2]: what class and box losses of each kind are divided by, averaged over processes and
        batches of a step.

        A total count of objects is at least 1 (the official code clamps the average; the difference shows
        only where there is less than one object a process, and this way the number of processes does not
        change the gradient). Where assignments are known in advance, the other batches of a step are taken to
        have the counts of this one.
        """
        totals, smallest = [], []
        for kind, stack in stacks.items():
            row, num_queries = self.table[kind], stack.logits.shape[2]
            smallest.append([row.class_loss.smallest_denominator, 1.0])
            if row.matcher is None:
                totals.append([stack.count * len(step_sizes)] * 2)
                continue
            classes = [row.class_loss.denominator(row.matcher, sizes, num_queries) for sizes in step_sizes]
            totals.append([sum(classes), sum(row.matcher.count(sizes) for sizes in step_sizes)])
        like = next(iter(stacks.values())).logits
        totals = all_reduce_sum(from_host(totals, like))
        return torch.maximum(totals, from_host(smallest, like)) / (get_world_size() * len(step_sizes))


def to_host(tensors: list[Tensor]) -> list[np.ndarray]:
    """Copy tensors to the host in one go."""
    if not tensors:
        return []
    flat = torch.cat([x.flatten() for x in tensors]).cpu()
    parts = flat.split([x.numel() for x in tensors])
    return [part.view(x.shape).numpy() for part, x in zip(parts, tensors, strict=True)]


def pack_pairs(assignments: list[Assignment]) -> Tensor:
    """[4, N]: layer, batch, query and target of the pairs of all layers, one layer after the other."""
    return torch.cat(
        [
            torch.stack([torch.full_like(pairs.query, layer), pairs.batch, pairs.query, pairs.target])
            for layer, pairs in enumerate(assignments)
        ],
        dim=1,
    )


def make_stack(stacked: Prediction, pairs: Tensor, packed: Targets, assignments: list[Assignment]) -> Stack:
    layer, batch, query, target = pairs
    return Stack(
        stacked.logits,
        stacked.boxes,
        (layer, batch, query),
        packed.labels[target],
        packed.boxes[target],
        [len(a.query) for a in assignments],
        packed.sizes,
        assignments[0].count,
    )


def weighted_sum(losses: dict[str, Tensor], weight_dict: dict[str, float]) -> Tensor:
    """The number that is minimised, over the terms that have a coefficient."""
    names = [name for name in losses if name in weight_dict]
    values = torch.stack([losses[name] for name in names])
    return values @ from_host([weight_dict[name] for name in names], values)
