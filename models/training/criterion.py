"""
The losses of everything that a model predicts, by one table: kind of prediction -> how it is supervised.

The criterion has no branch on the kind. A new scheme is a new row.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from models.structures import Assignment, Prediction, Supervision
from util.dist import all_reduce_sum, get_world_size

from .losses import Pairs, Stack, box_losses, cardinality_error, class_error, from_host
from .matcher import Targets, merge, stack_predictions


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
        self.tally: Counter[str] = (
            Counter()
        )  # pairs of each kind (mean of its layers) and objects, since the last reading

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
            if self.table[kind].scale != 1:
                terms = {name: values * self.table[kind].scale for name, values in terms.items()}
            for name, values in terms.items():
                for prediction, value in zip(kinds[kind], values.unbind(), strict=True):
                    losses[name + loss_suffix(kind, prediction.layer)] = value
            last = next(i for i, p in enumerate(kinds[kind]) if p.layer is None)
            if not self.table[kind].class_agnostic:
                losses['class_error' + loss_suffix(kind, None)] = (
                    class_error(stack)[last] * self.table[kind].scale
                )
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
        for kind in kinds:
            if other := self.table[kind].merge:
                both = zip(assignments[kind], assignments[other], strict=True)
                assignments[kind] = [merge(*layer) for layer in both]
        for kind, rows in assignments.items():
            self.tally[kind] += sum(len(a.query) for a in rows) / len(rows)
        self.tally['objects'] += sum(packed[kind].sizes)
        pairs, deciding = place_pairs(assignments, packed)
        return {
            kind: Stack(
                stacked[kind].logits,
                stacked[kind].boxes,
                pairs[kind],
                deciding.get(kind, pairs[kind]),
                packed[kind].sizes,
                assignments[kind][0].count,
            )
            for kind in kinds
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


def place_pairs(
    assignments: dict[str, list[Assignment]], packed: dict[str, Targets]
) -> tuple[dict[str, Pairs], dict[str, Pairs]]:
    """Pairs of all layers of every kind on the device, in one copy; and, of kinds in which a query may have
    several objects, those that decide its class.
    """
    deciding = {
        kind: [keep_deciding(layer) for layer in rows]
        for kind, rows in assignments.items()
        if rows[0].deciding is not None
    }
    lists = [*assignments.items(), *deciding.items()]
    on_host = [pack_pairs(rows) for _, rows in lists]
    device = next(iter(packed.values())).boxes.device
    on_device = torch.cat(on_host, dim=1).to(device, non_blocking=True)
    parts = on_device.split([part.shape[1] for part in on_host], dim=1)
    placed = [make_pairs(part, packed[kind], rows) for (kind, rows), part in zip(lists, parts, strict=True)]
    return dict(zip(assignments, placed, strict=False)), dict(
        zip(deciding, placed[len(assignments) :], strict=True)
    )


def keep_deciding(pairs: Assignment) -> Assignment:
    kept = pairs.deciding
    return Assignment(pairs.batch[kept], pairs.query[kept], pairs.target[kept], pairs.count)


def make_pairs(part: Tensor, packed: Targets, rows: list[Assignment]) -> Pairs:
    """part: [4, N] of `pack_pairs`."""
    layer, batch, query, target = part
    counts = [len(a.query) for a in rows]
    return Pairs((layer, batch, query), packed.labels[target], packed.boxes[target], counts)


def weighted_sum(losses: dict[str, Tensor], weight_dict: dict[str, float]) -> Tensor:
    """The number that is minimised, over the terms that have a coefficient."""
    names = [name for name in losses if name in weight_dict]
    values = torch.stack([losses[name] for name in names])
    return values @ from_host([weight_dict[name] for name in names], values)
