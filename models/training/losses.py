"""
Loss terms of one kind of prediction, for all its decoder layers at once.

Each function takes a `Stack` and returns a sum (or a statistic) for every layer, [L]; the criterion divides.
Class losses are objects with a `denominator`: what their sum is divided by, known from the targets alone.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from models.structures import Matcher
from util.box_ops import box_cxcywh_to_xyxy, generalized_box_iou

from .matcher import HungarianMatcher


def from_host(values: list, like: Tensor) -> Tensor:
    """Numbers of the host as a tensor beside `like`, without waiting for the device."""
    return torch.tensor(values, dtype=like.dtype).to(like.device, non_blocking=True)


@dataclass
class Stack:
    """Predictions of one kind stacked over their layers, and their pairs with objects."""

    logits: Tensor  # [L, B, Q, K]
    boxes: Tensor  # [L, B, Q, 4]
    pairs: 'Pairs'
    deciding: 'Pairs'  # those that decide the class of their query: no query has two
    num_objects: list[int]  # objects of each picture
    count: float = 0.0  # of the assignments


@dataclass
class Pairs:
    """N pairs (query, object), one layer after the other."""

    index: tuple[Tensor, Tensor, Tensor]  # layer, batch, query of each pair, [N] each
    labels: Tensor  # [N] class of the pair's object
    boxes: Tensor  # [N, 4] its box
    counts: list[int]  # pairs of each layer

    def per_layer(self, values: Tensor) -> Tensor:
        """Sums of one value a pair, [N] to [L]."""
        if len(set(self.counts)) == 1:
            return values.view(len(self.counts), -1).sum(1)
        return torch.stack([part.sum() for part in values.split(self.counts)])


class FocalLoss:
    """Sigmoid focal loss over all queries and classes (RetinaNet Sec. 3), divided by the number of objects.

    Every logit is taken as a negative first; then the few positives are put right. Nearly all are negatives, and
    nothing of the size of the logits has to be built to say which are not.
    """

    smallest_denominator = 1.0

    def __init__(self, alpha: float = 0.25, gamma: float = 2.0) -> None:
        self.weights = (alpha, 1 - alpha) if alpha >= 0 else (1.0, 1.0)  # of positives and negatives
        self.gamma = gamma

    def __call__(self, stack: Stack) -> Tensor:
        negatives = self.negative(stack.logits).flatten(1).sum(1)
        x = stack.logits[(*stack.deciding.index, stack.deciding.labels)]  # [N]
        return negatives + stack.deciding.per_layer(self.positive(x) - self.negative(x))

    def positive(self, x: Tensor) -> Tensor:
        return self.weights[0] * (1 - x.sigmoid()) ** self.gamma * F.softplus(-x)

    def negative(self, x: Tensor) -> Tensor:
        return self.weights[1] * x.sigmoid() ** self.gamma * F.softplus(x)

    def denominator(self, matcher: Matcher, sizes: list[int], num_queries: int) -> float:
        """sizes: objects of each picture of a batch; num_queries: of a picture."""
        return matcher.count(sizes)


class SoftmaxLoss:
    """Cross-entropy over all queries, the last class being 'no object' with weight `eos_coef` (DETR Sec.
    3.1).

    It is a weighted mean: divided by the sum of the weights, not by the number of objects.
    """

    smallest_denominator = 0.0

    def __init__(self, eos_coef: float = 0.1) -> None:
        self.eos_coef = eos_coef

    def __call__(self, stack: Stack) -> Tensor:
        no_object = stack.logits.shape[-1] - 1
        classes = stack.deciding.labels.new_full(stack.logits.shape[:3], no_object)
        classes[stack.deciding.index] = stack.deciding.labels
        weight = stack.logits.new_ones(no_object + 1)
        weight[-1] = self.eos_coef
        loss = F.cross_entropy(stack.logits.flatten(0, 2), classes.flatten(), weight, reduction='none')
        return loss.view(len(stack.logits), -1).sum(1)

    def denominator(self, matcher: HungarianMatcher, sizes: list[int], num_queries: int) -> float:
        """sizes: objects of each picture of a batch; num_queries: of a picture."""
        num_pairs = matcher.num_pairs(sizes, num_queries)
        return num_pairs + self.eos_coef * (num_queries * len(sizes) - num_pairs)


def box_losses(stack: Stack) -> dict[str, Tensor]:
    """L1 distance (cxcywh) and 1 - GIoU of the pairs (DETR Sec. 3.1); [L] each."""
    pairs = stack.pairs
    boxes = stack.boxes[pairs.index]  # [N, 4]
    giou = generalized_box_iou(box_cxcywh_to_xyxy(boxes), box_cxcywh_to_xyxy(pairs.boxes))
    return {
        'loss_bbox': pairs.per_layer((boxes - pairs.boxes).abs().sum(-1)),
        'loss_giou': pairs.per_layer(1 - giou),
    }


@torch.no_grad()
def cardinality_error(stack: Stack) -> Tensor:
    """[L] mean over pictures of |queries whose best class is not the last - objects|; a log entry of the
    official code.

    With focal losses the last class is a real one, so the number says nothing there. It is kept as it was for
    comparing logs.
    """
    not_last = (stack.logits.argmax(-1) != stack.logits.shape[-1] - 1).sum(-1)  # [L, B]
    return (not_last - from_host(stack.num_objects, not_last)).abs().float().mean(-1)


@torch.no_grad()
def class_error(stack: Stack) -> Tensor:
    """[L] share of pairs, in per cent, whose best class is wrong; 100 without objects. A log entry."""
    pairs = stack.pairs
    right = stack.logits[pairs.index].argmax(-1) == pairs.labels
    num_pairs = from_host([max(num, 1) for num in pairs.counts], stack.logits)
    return 100 - pairs.per_layer(right.float()) * (100 / num_pairs).float()
