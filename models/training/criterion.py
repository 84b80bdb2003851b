"""
The losses of all predictions of a model. One table says how each kind of prediction is supervised.

A new scheme is a new row of the table; the criterion does not change.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from models.structures import Assignment, Prediction
from util.distributed.collectives import all_gather_object, all_reduce_sum, get_world_size
from util.precision import full_precision, without_autocast

from .losses import (
    BOX_LOSSES,
    MASK_LOSSES,
    ClassLoss,
    MatchedPredictions,
    box_losses,
    cardinality_error,
    class_error,
    mask_losses,
)
from .matcher import Matcher, Targets, from_host, merge_pairs


@dataclass(frozen=True)
class Supervision:
    """The supervision of one kind of prediction: a row of the table."""

    matcher: Matcher | None  # None: predictions have their assignment already
    coef: dict[str, float]  # coefficient of each loss term, such as {'ce': 2, 'bbox': 5, 'giou': 2}
    class_loss: ClassLoss
    class_agnostic: bool = False  # treat every object as class 0
    scale: float = 1.0  # factor of every term
    description: str = ''  # origin of the queries in words, unless they are learned queries of their own
    merge_pairs_from: str | None = None  # kind whose pairs are added where a query has none of this kind
    # Without a matcher: the number of pairs as a function of the numbers of objects of the images; None: only
    # the model knows it.
    count: Callable[[list[int]], float] | None = None


def loss_suffixes(kind: str, num_layers: int) -> list[str]:
    """Return the ends of official loss names, of each layer.

    They name the layer, except for the last, and the kind, except for 'one2one': `_3_o2m`.
    """
    end = '' if kind == 'one2one' else f'_{kind}'
    return [*(f'_{layer}{end}' for layer in range(num_layers - 1)), end]


class SetCriterion(nn.Module):
    """The losses of the predictions of a model.

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
        # Pairs of each kind (mean over its layers) and objects, counted since the last call of `statistics`.
        self.pair_counts: Counter[str] = Counter()

    def forward(
        self, outputs: dict, targets: list[dict], step_targets: Sequence[list[dict]] | None = None
    ) -> dict[str, Tensor]:
        """Compute the unweighted loss terms, scalars by official name.

        Args:
            outputs: output of the model while training, or `pred_logits` and `pred_boxes` alone.
            targets: a dictionary of `labels` [T_i] and `boxes` [T_i, 4] cxcywh in [0, 1] per image, and for
                mask losses `masks` [T_i, H, W].
            step_targets: targets of all batches of this optimizer step, this batch included. Losses are
                divided by the average count of these batches, so that accumulated batches give the gradient
                of one large batch.
        """
        predictions = outputs.get('predictions') or {
            'one2one': Prediction(outputs['pred_logits'][None], outputs['pred_boxes'][None])
        }
        step_sizes = [[len(target['labels']) for target in batch] for batch in step_targets or [targets]]
        matched = self.match(predictions, targets)
        divisors = self.divisors(matched, step_sizes)
        losses = dict(outputs.get('losses', {}))
        box_terms = [term for term in BOX_LOSSES if any(term in self.table[kind].coef for kind in matched)]
        box_sums = box_losses([*matched.values()], box_terms)
        for kind, sums, (class_divisor, box_divisor) in zip(matched, box_sums, divisors, strict=True):
            row, pairs = self.table[kind], matched[kind]
            suffixes = loss_suffixes(kind, len(pairs.logits))
            terms = {'loss_ce': row.class_loss(pairs) / class_divisor} if 'ce' in row.coef else {}
            values = zip(box_terms, (sums / box_divisor).unbind(), strict=True)
            terms |= {f'loss_{term}': value for term, value in values if term in row.coef}
            terms['cardinality_error'] = cardinality_error(pairs) * row.scale
            for name, layers in terms.items():
                losses |= zip([name + suffix for suffix in suffixes], layers.unbind(), strict=True)
            mask_terms = [term for term in MASK_LOSSES if term in row.coef and pairs.masks is not None]
            if mask_terms:
                values = mask_losses(pairs, [target['masks'] for target in targets], mask_terms)
                losses |= {f'loss_{term}{suffixes[-1]}': x / box_divisor for term, x in values.items()}
            if not row.class_agnostic:
                losses[f'class_error{suffixes[-1]}'] = class_error(pairs) * row.scale
        return losses

    def match(self, predictions: dict[str, Prediction], targets: list[dict]) -> dict[str, MatchedPredictions]:
        """Match every kind of prediction.

        The costs of all kinds are copied to the host at once, and so are all pairs back to the device.
        """
        objects = Targets.pack(targets)
        packed = {
            kind: objects.as_one_class() if self.table[kind].class_agnostic else objects
            for kind in predictions
        }
        exact = {
            kind: replace(p, logits=full_precision(p.logits), boxes=full_precision(p.boxes))
            for kind, p in predictions.items()
        }
        assignments = {kind: [p.assignment] * len(p.logits) for kind, p in predictions.items()}
        unknown = [kind for kind, prediction in predictions.items() if prediction.assignment is None]
        costs = to_host([self.table[kind].matcher.cost(exact[kind], packed[kind]) for kind in unknown])
        for kind, cost in zip(unknown, costs, strict=True):
            assignments[kind] = self.table[kind].matcher.solve(cost, objects.sizes)
        for kind in unknown:
            if other := self.table[kind].merge_pairs_from:
                assignments[kind] = list(map(merge_pairs, assignments[kind], assignments[other]))
        packed_pairs = [pack_pairs(layers) for layers in assignments.values()]
        on_device = torch.cat(packed_pairs, dim=1).to(objects.boxes.device, non_blocking=True)
        parts = on_device.split([part.shape[1] for part in packed_pairs], dim=1)
        matched = {}
        for (kind, layers), part in zip(assignments.items(), parts, strict=True):
            layer, batch, query, target, is_class_target = part
            num_pairs, matcher = [pairs.count for pairs in layers], self.table[kind].matcher
            matched[kind] = MatchedPredictions(
                logits=exact[kind].logits,
                boxes=exact[kind].boxes,
                index=(layer, batch, query),
                labels=packed[kind].labels[target],
                target_boxes=objects.boxes[target],
                num_pairs=num_pairs,
                num_objects=[(1 if matcher is None else matcher.repeats) * size for size in objects.sizes],
                is_class_target=None if layers[0].is_class_target is None else is_class_target,
                target=target,
                masks=exact[kind].masks,
            )
            self.pair_counts[kind] += sum(num_pairs) / len(layers)
        self.pair_counts['objects'] += sum(objects.sizes)
        return matched

    def divisors(self, matched: dict[str, MatchedPredictions], step_sizes: list[list[int]]) -> Tensor:
        """Return the divisors of class and box losses of each kind, [kinds, 2], averaged over ranks and a
        step's batches.

        A total count is at least 1. The official code clamps the average instead, which differs only if there
        is less than one object per rank. With a clamped total the gradient does not depend on the number of
        ranks. If only the model knows the assignments (positives of Co-DETR's heads), this batch's count
        stands for the step's other batches.
        """
        totals, smallest = [], []
        for kind, pairs in matched.items():
            row = self.table[kind]
            smallest.append([row.class_loss.smallest_divisor, 1.0])
            if row.matcher is None:
                counts = [row.count(sizes) if row.count else pairs.num_pairs[-1] for sizes in step_sizes]
                totals.append([sum(counts)] * 2)
                continue
            batches = [[row.matcher.repeats * size for size in sizes] for sizes in step_sizes]
            class_total = sum(row.class_loss.divisor(batch, pairs.logits.shape[2]) for batch in batches)
            totals.append([class_total, sum(map(sum, batches))])
        like = next(iter(matched.values())).logits
        totals = torch.maximum(all_reduce_sum(from_host(totals, like)), from_host(smallest, like))
        parts = get_world_size() * len(step_sizes)
        scales = from_host([[self.table[kind].scale] for kind in matched], like)
        return (totals + self.eps) / (parts * scales)

    def statistics(self, averages: dict[str, float]) -> dict[str, float]:
        """Return pairs per object, `positives_KIND`, and the share of the loss, `share_KIND`, of each kind.

        They are means over layers and ranks since the last call.

        averages: average of each loss term over that time.
        """
        counts: Counter[str] = Counter()
        for part in all_gather_object(self.pair_counts):
            counts.update(part)
        self.pair_counts = Counter()
        shares: Counter[str] = Counter()
        for name, coef in self.weight_dict.items():
            # A head's losses belong to the kind of the queries that are made from its positives.
            parts = name.replace('rpn', 'rcnn').split('_')
            kind = next((part for part in parts if part in self.table), 'one2one')
            shares[kind] += coef * averages.get(name, 0.0)
        total = sum(shares.values())
        kinds = [kind for kind in self.table if kind in counts]
        positives = {f'positives_{kind}': counts[kind] / max(counts['objects'], 1) for kind in kinds}
        return positives | {f'share_{kind}': shares[kind] / total if total else 0.0 for kind in kinds}


def to_host(tensors: list[Tensor]) -> list[np.ndarray]:
    """Copy tensors to the host in one transfer."""
    if not tensors:
        return []
    flat = torch.cat([x.flatten() for x in tensors]).cpu()
    parts = flat.split([x.numel() for x in tensors])
    return [part.view(x.shape).numpy() for part, x in zip(parts, tensors, strict=True)]


def pack_pairs(layers: list[Assignment]) -> Tensor:
    """Pack the pairs of all layers as [5, N]: layer, batch, query, target, is_class_target."""
    num_pairs = torch.tensor([pairs.count for pairs in layers])
    layer = torch.arange(len(layers)).repeat_interleave(num_pairs)
    if layers[0].is_class_target is None:
        is_class_target = torch.ones_like(layer)
    else:
        is_class_target = torch.cat([pairs.is_class_target for pairs in layers]).long()
    rows = [torch.cat([getattr(pairs, name) for pairs in layers]) for name in ('batch', 'query', 'target')]
    return torch.stack([layer, *rows, is_class_target])


def weighted_sum(losses: dict[str, Tensor], weight_dict: dict[str, float]) -> Tensor:
    """Sum the terms that have a coefficient, weighted by it: the number that training minimises."""
    names = [name for name in losses if name in weight_dict]
    values = torch.stack([losses[name] for name in names])
    with without_autocast(values):  # autocast would compute the matrix product in 16 bits
        return values @ from_host([weight_dict[name] for name in names], values)
