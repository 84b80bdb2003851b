"""
Loss terms of predictions, for all decoder layers of a kind at once.

Terms are sums or statistics for every layer, [L], and the criterion divides them. The tables `CLASS_LOSSES`,
`BOX_LOSSES` and `MASK_LOSSES` name all of them. Letters in shapes: L decoder layers, B images, Q queries, K
classes, N pairs of query and object.
"""

from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss

from util.box_ops import box_cxcywh_to_xyxy, box_iou, generalized_box_iou

from .matcher import from_host


@dataclass
class MatchedPredictions:
    """The predictions of one kind, and their N pairs with objects, one layer after the other."""

    logits: Tensor  # [L, B, Q, K]
    boxes: Tensor  # [L, B, Q, 4]
    index: tuple[Tensor, Tensor, Tensor]  # layer, batch, query of each pair, [N] each
    labels: Tensor  # [N] class of the pair's object
    target_boxes: Tensor  # [N, 4]
    num_pairs: list[int]  # number of pairs of each layer
    num_objects: list[int]  # number of objects of each image, times `Matcher.repeats`
    is_class_target: Tensor | None = None  # [N] 1 if the pair sets its query's class, else 0; None: all do
    target: Tensor | None = None  # [N] index of the pair's object in the whole batch
    masks: Tensor | None = None  # [B, Q, h, w] logits of the last layer

    def last_pairs(self) -> slice:
        """Return the range of the last layer's pairs."""
        total = sum(self.num_pairs)
        return slice(total - self.num_pairs[-1], total)

    def per_layer(self, values: Tensor) -> Tensor:
        """Sum values of pairs over each layer, [..., N] to [..., L]."""
        if len(set(self.num_pairs)) == 1:
            return values.unflatten(-1, (len(self.num_pairs), -1)).sum(-1)
        return torch.stack([part.sum(-1) for part in values.split(self.num_pairs, dim=-1)], dim=-1)


class ClassLoss(Protocol):
    """The interface of class losses. `smallest_divisor` bounds what the sums are divided by."""

    smallest_divisor: float

    def __call__(self, matched: MatchedPredictions) -> Tensor:
        """Return the sum of each layer, [L]."""

    def divisor(self, num_objects: list[int], num_queries: int) -> float:
        """Return the divisor of a batch, from the targets alone.

        Args:
            num_objects: number of objects of each image, times `Matcher.repeats`.
            num_queries: number of queries of an image.
        """


class FocalLoss:
    """Sigmoid focal loss over all queries and classes (RetinaNet Sec. 3), divided by the number of objects.

    It sums the loss of every logit as a negative, and then corrects the few positives. This needs no mask of
    the size of the logits.
    """

    smallest_divisor = 1.0

    def __init__(self, alpha: float = 0.25, gamma: float = 2.0) -> None:
        self.weights = (alpha, 1 - alpha) if alpha >= 0 else (1.0, 1.0)  # for positives and negatives
        self.gamma = gamma

    def __call__(self, matched: MatchedPredictions) -> Tensor:
        negatives = self.unweighted(matched.logits).flatten(1).sum(1)
        change = self.correction(matched.logits[(*matched.index, matched.labels)], matched)
        if matched.is_class_target is not None:
            change = change * matched.is_class_target
        return torch.add(matched.per_layer(change), negatives, alpha=self.weights[1])

    def unweighted(self, x: Tensor) -> Tensor:
        """Return the loss of a negative with logit x, or of a positive with logit -x."""
        return x.sigmoid() ** self.gamma * F.softplus(x)

    def correction(self, x: Tensor, matched: MatchedPredictions | None = None) -> Tensor:
        """Return the loss of logits x [N] of pairs as positives, minus their loss as negatives."""
        positive, negative = self.unweighted(torch.stack([-x, x]))
        return torch.sub(self.weights[0] * positive, negative, alpha=self.weights[1])

    def divisor(self, num_objects: list[int], num_queries: int) -> float:
        return sum(num_objects)


class QualityFocalLoss(FocalLoss):
    """Sigmoid focal loss whose target of a positive is its box's IoU, not 1 (arXiv:2006.04388, Eq. 3)."""

    def __init__(self, beta: float = 2.0) -> None:
        super().__init__(alpha=-1, gamma=beta)

    def correction(self, x: Tensor, matched: MatchedPredictions | None = None) -> Tensor:
        boxes = matched.boxes[matched.index].detach()
        quality, _ = box_iou(box_cxcywh_to_xyxy(boxes), box_cxcywh_to_xyxy(matched.target_boxes), eps=1e-6)
        positive = F.binary_cross_entropy_with_logits(x, quality, reduction='none')
        return positive * (quality - x.sigmoid()).abs() ** self.gamma - self.unweighted(x)


class SoftmaxLoss:
    """Cross-entropy over all queries, in which the last class is 'no object' with weight `eos_coef` (DETR
    Sec. 3.1).

    A query has at most one object. The loss is a weighted mean, divided by the sum of the weights.
    """

    smallest_divisor = 1e-12  # not 0, the weight of a batch without objects if `eos_coef` is 0

    def __init__(self, eos_coef: float = 0.1) -> None:
        self.eos_coef = eos_coef

    def __call__(self, matched: MatchedPredictions) -> Tensor:
        no_object = matched.logits.shape[-1] - 1
        classes = matched.labels.new_full(matched.logits.shape[:3], no_object)
        classes[matched.index] = matched.labels
        weight = matched.logits.new_ones(no_object + 1)
        weight[-1] = self.eos_coef
        loss = F.cross_entropy(matched.logits.flatten(0, 2), classes.flatten(), weight, reduction='none')
        return loss.view(len(classes), -1).sum(1)

    def divisor(self, num_objects: list[int], num_queries: int) -> float:
        num_pairs = sum(min(num_queries, number) for number in num_objects)
        return num_pairs + self.eos_coef * (num_queries * len(num_objects) - num_pairs)


# --class_loss -> what builds the loss from the flags.
CLASS_LOSSES: dict[str, Callable[[Namespace], ClassLoss]] = {
    'focal': lambda args: FocalLoss(args.focal_alpha),
    'quality_focal': lambda args: QualityFocalLoss(),
    'softmax': lambda args: SoftmaxLoss(args.eos_coef),
}


def l1_loss(boxes: Tensor, target_boxes: Tensor) -> Tensor:
    """Sum the absolute differences of pairs of boxes cxcywh in [0, 1], [N, 4] to [N] (DETR Sec. 3.1)."""
    return (boxes - target_boxes).abs().sum(-1)


def giou_loss(boxes: Tensor, target_boxes: Tensor) -> Tensor:
    """Return 1 - GIoU of pairs of boxes cxcywh in [0, 1], [N, 4] to [N] (DETR Sec. 3.1)."""
    return 1 - generalized_box_iou(box_cxcywh_to_xyxy(boxes), box_cxcywh_to_xyxy(target_boxes))


# Names are those of `util.config.flags.BOX_TERMS`, which has the coefficients.
BOX_LOSSES = {'bbox': l1_loss, 'giou': giou_loss}


def box_losses(kinds: list[MatchedPredictions], terms: list[str]) -> list[Tensor]:
    """Sum some of `BOX_LOSSES` over the pairs of every layer, [terms, L] for each kind."""
    if not terms:
        return [matched.logits.new_zeros(0, len(matched.logits)) for matched in kinds]
    boxes = torch.cat([matched.boxes[matched.index] for matched in kinds])  # [N, 4]
    target_boxes = torch.cat([matched.target_boxes for matched in kinds])
    values = torch.stack([BOX_LOSSES[term](boxes, target_boxes) for term in terms])  # [terms, N]
    parts = values.split([sum(matched.num_pairs) for matched in kinds], dim=1)
    return [matched.per_layer(part) for matched, part in zip(kinds, parts, strict=True)]


@torch.no_grad()
def cardinality_error(matched: MatchedPredictions) -> Tensor:
    """Return the cardinality error of each layer, [L], which is only logged (official code).

    It is the mean over images of |queries whose best class is not the last - objects|. With focal losses the
    last class is a real one, and the number is meaningless; it is kept for comparisons of logs.
    """
    not_last = (matched.logits.argmax(-1) != matched.logits.shape[-1] - 1).sum(-1)  # [L, B]
    return (not_last - from_host(matched.num_objects, not_last)).abs().sum(-1) / not_last.shape[-1]


@torch.no_grad()
def class_error(matched: MatchedPredictions) -> Tensor:
    """Return the percentage of the last layer's pairs with a wrong class, 100 without any; only logged."""
    pairs = matched.last_pairs()
    batch, query = (x[pairs] for x in matched.index[1:])
    right = matched.logits[-1, batch, query].argmax(-1) == matched.labels[pairs]
    return 100 - right.sum() * (100 / max(matched.num_pairs[-1], 1))


def focal_mask_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Return the mean sigmoid focal loss of masks with P pixels, [N, P] to [N] (DETR Sec. 4.4)."""
    return sigmoid_focal_loss(logits, target, reduction='none').mean(1)


def dice_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Return the Dice loss of masks with P pixels, [N, P] to [N] (arXiv:1606.04797)."""
    p = logits.sigmoid()
    return 1 - (2 * (p * target).sum(1) + 1) / (p.sum(1) + target.sum(1) + 1)


MASK_LOSSES = {'mask': focal_mask_loss, 'dice': dice_loss}


def mask_losses(
    matched: MatchedPredictions, target_masks: list[Tensor], terms: list[str]
) -> dict[str, Tensor]:
    """Sum some of `MASK_LOSSES` over the last layer's pairs.

    Masks are compared at the size of the padded batch; padding counts as background.

    target_masks: masks [T_i, H_i, W_i] of each image.
    """
    pairs = matched.last_pairs()
    batch, query = (x[pairs] for x in matched.index[1:])
    size = [max(masks.shape[side] for masks in target_masks) for side in (1, 2)]
    padded = torch.cat(
        [F.pad(masks, (0, size[1] - masks.shape[2], 0, size[0] - masks.shape[1])) for masks in target_masks]
    )
    logits = matched.masks[batch, query]
    logits = F.interpolate(logits[:, None], size=size, mode='bilinear', align_corners=False)[:, 0].flatten(1)
    target = padded[matched.target[pairs]].flatten(1).to(logits)
    return {term: MASK_LOSSES[term](logits, target).sum() for term in terms}
