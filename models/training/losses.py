"""
Loss terms of predictions, for all decoder layers of a kind at once.

A `Stack` holds the predictions of one kind, and their pairs with objects. Terms are sums or statistics for every layer,
[L], and the criterion divides them. Class losses have a method `denominator`, which computes the divisor of their sum
from the targets alone.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from util.box_ops import box_cxcywh_to_xyxy, box_iou, generalized_box_iou

from .matcher import HungarianMatcher
from .structures import Matcher, Stack, from_host


class FocalLoss:
    """Sigmoid focal loss over all queries and classes (RetinaNet Sec. 3), divided by the number of objects.

    It sums the loss of every logit as a negative, and then corrects the few positives. No mask of the size of the logits
    is needed.
    """

    smallest_denominator = 1.0

    def __init__(self, alpha: float = 0.25, gamma: float = 2.0) -> None:
        self.weights = (alpha, 1 - alpha) if alpha >= 0 else (1.0, 1.0)  # for positives and negatives
        self.gamma = gamma

    def __call__(self, stack: Stack) -> Tensor:
        negatives = self.unweighted(stack.logits).flatten(1).sum(1)
        change = self.correction(stack.logits[(*stack.index, stack.labels)])
        if stack.decides_class is not None:
            change = change * stack.decides_class
        return torch.add(stack.per_layer(change), negatives, alpha=self.weights[1])

    def unweighted(self, x: Tensor) -> Tensor:
        """Return the loss of a negative with logit x, or of a positive with logit -x."""
        return x.sigmoid() ** self.gamma * F.softplus(x)

    def correction(self, x: Tensor) -> Tensor:
        """Return the loss of logit x as a positive, minus its loss as a negative."""
        positive, negative = self.unweighted(torch.stack([-x, x]))
        return torch.sub(self.weights[0] * positive, negative, alpha=self.weights[1])

    def denominator(self, matcher: Matcher, sizes: list[int], num_queries: int) -> float:
        """Return the divisor of a batch. sizes: number of objects of each image; num_queries: queries of an image."""
        return matcher.count(sizes)


class QualityFocalLoss(FocalLoss):
    """Sigmoid focal loss in which the target of a positive is its box's IoU, not 1 (arXiv:2006.04388, Eq. 3)."""

    def __init__(self, beta: float = 2.0) -> None:
        super().__init__(alpha=-1, gamma=beta)

    def __call__(self, stack: Stack) -> Tensor:
        negatives = self.unweighted(stack.logits).flatten(1).sum(1)
        x = stack.logits[(*stack.index, stack.labels)]
        quality = box_quality(stack.boxes[stack.index].detach(), stack.target_boxes)
        positive = F.binary_cross_entropy_with_logits(x, quality, reduction='none')
        change = positive * (quality - x.sigmoid()).abs() ** self.gamma - self.unweighted(x)
        if stack.decides_class is not None:
            change = change * stack.decides_class
        return stack.per_layer(change) + negatives


def box_quality(boxes: Tensor, target_boxes: Tensor) -> Tensor:
    """Return the IoU of pairs of boxes cxcywh in [0, 1], [N, 4] to [N]. Unions are at least 1e-6 (official code)."""
    return box_iou(box_cxcywh_to_xyxy(boxes), box_cxcywh_to_xyxy(target_boxes), eps=1e-6)[0]


class SoftmaxLoss:
    """Cross-entropy over all queries, in which the last class is 'no object' with weight `eos_coef` (DETR Sec. 3.1).

    A query has at most one object. The loss is a weighted mean, divided by the sum of the weights.
    """

    smallest_denominator = 1e-12  # not 0, the weight of a batch without objects if `eos_coef` is 0

    def __init__(self, eos_coef: float = 0.1) -> None:
        self.eos_coef = eos_coef

    def __call__(self, stack: Stack) -> Tensor:
        no_object = stack.logits.shape[-1] - 1
        classes = stack.labels.new_full(stack.logits.shape[:3], no_object)
        classes[stack.index] = stack.labels
        weight = stack.logits.new_ones(no_object + 1)
        weight[-1] = self.eos_coef
        loss = F.cross_entropy(stack.logits.flatten(0, 2), classes.flatten(), weight, reduction='none')
        return loss.view(len(stack.logits), -1).sum(1)

    def denominator(self, matcher: HungarianMatcher, sizes: list[int], num_queries: int) -> float:
        """Return the divisor of a batch. sizes: number of objects of each image; num_queries: queries of an image."""
        num_pairs = matcher.num_pairs(sizes, num_queries)
        return num_pairs + self.eos_coef * (num_queries * len(sizes) - num_pairs)


def l1_loss(boxes: Tensor, target_boxes: Tensor) -> Tensor:
    """Sum the absolute differences of pairs of boxes cxcywh in [0, 1], [N, 4] to [N] (DETR Sec. 3.1)."""
    return (boxes - target_boxes).abs().sum(-1)


def giou_loss(boxes: Tensor, target_boxes: Tensor) -> Tensor:
    """Return 1 - GIoU of pairs of boxes cxcywh in [0, 1], [N, 4] to [N] (DETR Sec. 3.1)."""
    return 1 - generalized_box_iou(box_cxcywh_to_xyxy(boxes), box_cxcywh_to_xyxy(target_boxes))


# Names are those of `util.config.flags.BOX_TERMS`, which has the coefficients.
BOX_LOSSES = {'bbox': l1_loss, 'giou': giou_loss}


def box_losses(stacks: list[Stack], terms: list[str]) -> list[Tensor]:
    """Sum some of `BOX_LOSSES` over the pairs of every layer, [terms, L] for each stack."""
    if not terms:
        return [stack.logits.new_zeros(0, len(stack.logits)) for stack in stacks]
    boxes = torch.cat([stack.boxes[stack.index] for stack in stacks])  # [N, 4]
    target_boxes = torch.cat([stack.target_boxes for stack in stacks])
    values = torch.stack([BOX_LOSSES[term](boxes, target_boxes) for term in terms])  # [terms, N]
    parts = values.split([sum(stack.num_pairs) for stack in stacks], dim=1)
    return [stack.per_layer(part) for stack, part in zip(stacks, parts, strict=True)]


@torch.no_grad()
def cardinality_error(stack: Stack, scale: float = 1.0) -> Tensor:
    """Return `scale` times the cardinality error of each layer, [L], which is only logged (official code).

    It is the mean over images of |queries whose best class is not the last - objects|. With focal losses the last class
    is a real one, and the number is meaningless; it is kept for comparisons of logs.
    """
    not_last = (stack.logits.argmax(-1) != stack.logits.shape[-1] - 1).sum(-1)  # [L, B]
    errors = (not_last - from_host(stack.num_objects, not_last)).abs().sum(-1)
    return errors * (scale / not_last.shape[-1])


@torch.no_grad()
def class_error(stack: Stack, scale: float = 1.0) -> Tensor:
    """Return `scale` times the percentage of the last layer's pairs whose best class is wrong; 100 without objects.

    It is only logged.
    """
    pairs = stack.last_pairs()
    batch, query = (x[pairs] for x in stack.index[1:])
    right = stack.logits[-1, batch, query].argmax(-1) == stack.labels[pairs]
    return scale * 100 - right.sum() * (scale * 100 / max(stack.num_pairs[-1], 1))


MASK_LOSSES = ('mask', 'dice')


def mask_losses(stack: Stack, target_masks: list[Tensor]) -> dict[str, Tensor]:
    """Sum the focal and the Dice loss of the last layer's masks over its pairs (DETR Sec. 4.4; arXiv:1606.04797).

    Masks are compared at the size of the padded batch; padding counts as background.

    target_masks: masks [T_i, H_i, W_i] of each image.
    """
    pairs = stack.last_pairs()
    batch, query = (x[pairs] for x in stack.index[1:])
    size = [max(masks.shape[side] for masks in target_masks) for side in (1, 2)]
    padded = torch.cat(
        [F.pad(masks, (0, size[1] - masks.shape[2], 0, size[0] - masks.shape[1])) for masks in target_masks]
    )
    x = stack.masks[batch, query]
    x = F.interpolate(x[:, None], size=size, mode='bilinear', align_corners=False)[:, 0].flatten(1)
    wanted = padded[stack.target[pairs]].flatten(1).to(x)
    p = x.sigmoid()
    focal = F.binary_cross_entropy_with_logits(x, wanted, reduction='none')
    focal = focal * (1 - (p * wanted + (1 - p) * (1 - wanted))) ** 2
    focal = focal * (0.25 * wanted + 0.75 * (1 - wanted))
    dice = 1 - (2 * (p * wanted).sum(1) + 1) / (p.sum(1) + wanted.sum(1) + 1)
    return {'mask': focal.mean(1).sum(), 'dice': dice.sum()}
