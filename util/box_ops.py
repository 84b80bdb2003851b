"""Conversions and overlaps of boxes. The format is cxcywh in [0, 1], or xyxy where a name says so."""

import torch
from torch import Tensor


def box_cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """Convert [..., 4] from centre and size to corners."""
    cx, cy, w, h = boxes.unbind(-1)
    half_w, half_h = 0.5 * w, 0.5 * h
    return torch.stack([cx - half_w, cy - half_h, cx + half_w, cy + half_h], dim=-1)


def box_xyxy_to_cxcywh(boxes: Tensor) -> Tensor:
    """Convert [..., 4] from corners to centre and size."""
    x0, y0, x1, y1 = boxes.unbind(-1)
    return torch.stack([(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0], dim=-1)


def box_area(boxes_xyxy: Tensor) -> Tensor:
    """Compute areas, [..., 4] to [...]."""
    x0, y0, x1, y1 = boxes_xyxy.unbind(-1)
    return (x1 - x0) * (y1 - y0)


def box_iou(boxes1_xyxy: Tensor, boxes2_xyxy: Tensor, eps: float = 0.0) -> tuple[Tensor, Tensor]:
    """Compute IoU and union of broadcast boxes: [..., 4] with [..., 4] to [...] twice.

    Pairs are element by element; a matrix of all pairs comes from `boxes1[:, None]` and `boxes2[None]`.
    Torchvision's functions only make matrices or add an epsilon, which would move the numbers. eps: the
    smallest union.
    """
    # Coordinate by coordinate: elementwise work over matrices of boxes then runs along their long sides.
    left1, top1, right1, bottom1 = boxes1_xyxy.unbind(-1)
    left2, top2, right2, bottom2 = boxes2_xyxy.unbind(-1)
    width = torch.minimum(right1, right2) - torch.maximum(left1, left2)
    height = torch.minimum(bottom1, bottom2) - torch.maximum(top1, top2)
    inter = width.clamp(min=0) * height.clamp(min=0)
    union = box_area(boxes1_xyxy) + box_area(boxes2_xyxy) - inter
    if eps:
        union = union.clamp(min=eps)
    return inter / union, union


def generalized_box_iou(boxes1_xyxy: Tensor, boxes2_xyxy: Tensor, eps: float = 0.0) -> Tensor:
    """Compute the generalised IoU (arXiv:1902.09630) of broadcast boxes, [..., 4] with [..., 4] to [...].

    Boxes of no size give NaN, unless `eps` is the smallest area that union and hull count as. Predictions are
    not checked here: the matcher reports numbers that are not finite.
    """
    iou, union = box_iou(boxes1_xyxy, boxes2_xyxy, eps)
    left1, top1, right1, bottom1 = boxes1_xyxy.unbind(-1)
    left2, top2, right2, bottom2 = boxes2_xyxy.unbind(-1)
    width = torch.maximum(right1, right2) - torch.minimum(left1, left2)
    height = torch.maximum(bottom1, bottom2) - torch.minimum(top1, top2)
    hull = width * height
    if eps:
        hull = hull.clamp(min=eps)
    return iou - (hull - union) / hull
