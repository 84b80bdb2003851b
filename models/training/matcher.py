"""
Which query answers for which object. Training only.

A matcher first builds the costs of all layers and pictures on the device (`cost`), then solves them on the
host (`solve`). Between the two, the criterion copies the costs of every kind of prediction at once: one
synchronisation a step.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from models.structures import Assignment, Prediction
from util.box_ops import box_cxcywh_to_xyxy, generalized_box_iou


@dataclass
class Targets:
    """The objects of a batch, one after the other and padded to the largest number of a picture, T_max."""

    labels: Tensor  # [T]
    boxes: Tensor  # [T, 4]
    padded_labels: Tensor  # [B, T_max]
    padded_boxes: Tensor  # [B, T_max, 4]
    sizes: list[int]  # objects of each picture

    @classmethod
    def pack(cls, targets: list[dict], class_agnostic: bool = False) -> 'Targets':
        """targets: dictionaries with `labels` [T_i] and `boxes` [T_i, 4]. class_agnostic: every object is
        class 0.
        """
        labels = [target['labels'] for target in targets]
        boxes = [target['boxes'] for target in targets]
        if class_agnostic:
            labels = [torch.zeros_like(label) for label in labels]
        return cls(
            torch.cat(labels),
            torch.cat(boxes),
            pad_sequence(labels, batch_first=True),
            pad_sequence(boxes, batch_first=True),
            [len(label) for label in labels],
        )


def stack_predictions(rows: list[Prediction]) -> Prediction:
    """The layers of one kind as one prediction with an axis [L] in front, in float32 at least."""
    fields = {
        name: torch.stack([full_precision(getattr(row, name)) for row in rows])
        for name in ('logits', 'boxes', 'anchors')
        if getattr(rows[0], name) is not None
    }
    return Prediction(**fields, kind=rows[0].kind)


def full_precision(x: Tensor) -> Tensor:
    """Costs and losses are never computed in 16 bit."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def focal_cost(logits: Tensor, labels: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """Class cost of sigmoid heads: what the focal loss would gain; logits [..., Q, K], labels [..., T] to
    [..., Q, T].

    alpha and gamma are fixed in the official code: `--focal_alpha` changes the loss only.
    """
    p = gather_classes(logits, labels).sigmoid()
    positive = alpha * (1 - p) ** gamma * -(p + 1e-8).log()
    negative = (1 - alpha) * p**gamma * -(1 - p + 1e-8).log()
    return positive - negative


def softmax_cost(logits: Tensor, labels: Tensor) -> Tensor:
    """Class cost of softmax heads: minus the probability; logits [..., Q, K], labels [..., T] to [..., Q, T]."""
    return -gather_classes(logits.softmax(-1), labels)


def gather_classes(scores: Tensor, labels: Tensor) -> Tensor:
    """[L, B, Q, K] and [B, T] to [L, B, Q, T]: only the columns that a cost needs."""
    num_layers, _, num_queries, _ = scores.shape
    return scores.gather(-1, labels[None, :, None].expand(num_layers, -1, num_queries, -1))


class HungarianMatcher:
    """One-to-one assignment of least total cost (DETR Sec. 3.1).

    repeats: times each object is to be answered for (hybrid matching); pairs are min(Q, repeats * T_i) a
    picture. on: what is compared with the objects, `boxes` or `anchors` (encoder proposals before
    refinement).
    """

    def __init__(
        self,
        cost_class: float = 1,
        cost_bbox: float = 1,
        cost_giou: float = 1,
        class_cost: Callable[[Tensor, Tensor], Tensor] = focal_cost,
        repeats: int = 1,
        on: str = 'boxes',
    ) -> None:
        if cost_class == 0 and cost_bbox == 0 and cost_giou == 0:
            raise ValueError(
                'all matching costs are 0: give --set_cost_class, --set_cost_bbox or --set_cost_giou'
            )
        self.weights = cost_class, cost_bbox, cost_giou
        self.class_cost = class_cost
        self.repeats = repeats
        self.on = on

    @torch.no_grad()
    def cost(self, stacked: Prediction, targets: Targets) -> Tensor:
        """Weighted matching costs, [L, B, Q, T_max]; columns of padding mean nothing.

        stacked: logits [L, B, Q, K] and boxes [L, B, Q, 4] cxcywh of all layers.
        """
        cost_class, cost_bbox, cost_giou = self.weights
        boxes = getattr(stacked, self.on)
        l1 = (boxes[..., None, :] - targets.padded_boxes[None, :, None]).abs().sum(-1)
        corners = (
            box_cxcywh_to_xyxy(boxes)[..., None, :],
            box_cxcywh_to_xyxy(targets.padded_boxes)[None, :, None],
        )
        cost = cost_class * self.class_cost(stacked.logits, targets.padded_labels)
        return cost + cost_bbox * l1 - cost_giou * generalized_box_iou(*corners)

    def solve(self, cost: np.ndarray, sizes: list[int]) -> list[Assignment]:
        """Costs [L, B, Q, T_max] on the host to one assignment a layer, indices on the host.

        Queries ascend within a picture. FloatingPointError: a cost is not finite; the message names layer and
        picture.
        """
        offsets = list(accumulate(sizes, initial=0))
        return [self.solve_layer(layer, cost[layer], sizes, offsets) for layer in range(len(cost))]

    def solve_layer(self, layer: int, cost: np.ndarray, sizes: list[int], offsets: list[int]) -> Assignment:
        pairs = [np.zeros((3, 0), dtype=np.int64)]
        for picture, (num_objects, offset) in enumerate(zip(sizes, offsets, strict=False)):
            block = np.tile(cost[picture, :, :num_objects], self.repeats)
            if not np.isfinite(block).all():
                raise FloatingPointError(
                    f'predictions of decoder layer {layer} for picture {picture} of the batch are not finite'
                )
            query, target = linear_sum_assignment(block)
            pairs.append(
                np.stack([np.full_like(query, picture), query, offset + target % max(num_objects, 1)])
            )
        batch, query, target = torch.from_numpy(np.concatenate(pairs, axis=1))
        return Assignment(batch, query, target, self.count(sizes))

    def count(self, sizes: list[int]) -> float:
        """What box losses are divided by, from the objects of each picture."""
        return float(self.repeats * sum(sizes))

    def num_pairs(self, sizes: list[int], num_queries: int) -> int:
        """Pairs that an assignment will have."""
        return sum(min(num_queries, self.repeats * num) for num in sizes)

    def __call__(self, prediction: Prediction, targets: list[dict]) -> Assignment:
        """Match one prediction with `targets` (dictionaries of `labels` and `boxes`); indices on the host."""
        packed = Targets.pack(targets)
        cost = self.cost(stack_predictions([prediction]), packed)
        return self.solve(cost.cpu().numpy(), packed.sizes)[0]
