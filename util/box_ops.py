"""Boxes as tensors: conversions and overlaps. House format: cxcywh in [0, 1]; xyxy where the name says so."""

import torch
from torch import Tensor


def box_cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """[..., 4] centre and size to corners."""
    cx, cy, w, h = boxes.unbind(-1)
    return torch.stack([cx - 0.5 * w, cy - 0.5 * h, cx + 0.5 * w, cy + 0.5 * h], dim=-1)


def box_xyxy_to_cxcywh(boxes: Tensor) -> Tensor:
    """[..., 4] corners to centre and size."""
    x0, y0, x1, y1 = boxes.unbind(-1)
    return torch.stack([(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0], dim=-1)


def box_area(boxes_xyxy: Tensor) -> Tensor:
    """[..., 4] to [...]."""
    return (boxes_xyxy[..., 2] - boxes_xyxy[..., 0]) * (boxes_xyxy[..., 3] - boxes_xyxy[..., 1])


def box_iou(boxes1_xyxy: Tensor, boxes2_xyxy: Tensor) -> tuple[Tensor, Tensor]:
    """Intersection over union, and the union, of broadcast boxes: [..., 4] with [..., 4] to [...] twice.

    Pairs are element by element; a matrix of all pairs comes from `boxes1[:, None]` and `boxes2[None]`.
    Torchvision's functions only make matrices or add an epsilon, which would move the numbers.
    """
    top_left = torch.maximum(boxes1_xyxy[..., :2], boxes2_xyxy[..., :2])
    bottom_right = torch.minimum(boxes1_xyxy[..., 2:], boxes2_xyxy[..., 2:])
    inter = (bottom_right - top_left).clamp(min=0).prod(-1)
    union = box_area(boxes1_xyxy) + box_area(boxes2_xyxy) - inter
    return inter / union, union


def generalized_box_iou(boxes1_xyxy: Tensor, boxes2_xyxy: Tensor) -> Tensor:
    """Generalised IoU (arXiv:1902.09630) of broadcast boxes, [..., 4] with [..., 4] to [...]; no epsilon.

    Boxes of no size give NaN. Nothing is asserted about predictions here: the matcher reports numbers that
    are not finite.
    """
    iou, union = box_iou(boxes1_xyxy, boxes2_xyxy)
    top_left = torch.minimum(boxes1_xyxy[..., :2], boxes2_xyxy[..., :2])
    bottom_right = torch.maximum(boxes1_xyxy[..., 2:], boxes2_xyxy[..., 2:])
    hull = (bottom_right - top_left).clamp(min=0).prod(-1)
    return iou - (hull - union) / hull
