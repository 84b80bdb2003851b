"""From outputs to detections in pixels. A detection is a score, a class index and a box."""

import torch
from torch import Tensor, nn
from torchvision.ops import batched_nms

from util.box_ops import box_cxcywh_to_xyxy

Detections = list[dict[str, Tensor]]


def scale_boxes(boxes: Tensor, target_sizes: Tensor) -> Tensor:
    """cxcywh in [0, 1] to xyxy in pixels; boxes: [B, N, 4], target_sizes: [B, 2] (height, width)."""
    if len(boxes) != len(target_sizes):
        raise ValueError(f'{len(boxes)} pictures, but {len(target_sizes)} target sizes')
    scale = target_sizes.flip(-1).repeat(1, 2).to(boxes)  # [B, 4] W, H, W, H
    return box_cxcywh_to_xyxy(boxes) * scale[:, None]


class SoftmaxPostProcess(nn.Module):
    """One detection a query, in query order (DETR): the best class other than 'no object', which is the last
    one.
    """

    @torch.no_grad()
    def forward(self, outputs: dict[str, Tensor], target_sizes: Tensor) -> Detections:
        """target_sizes: [B, 2] height and width in pixels. Returns scores, labels [Q] and boxes [Q, 4] xyxy a
        picture.
        """
        scores, labels = outputs['pred_logits'].softmax(-1)[..., :-1].max(-1)
        boxes = scale_boxes(outputs['pred_boxes'], target_sizes)
        return [{'scores': s, 'labels': c, 'boxes': b} for s, c, b in zip(scores, labels, boxes, strict=True)]


class TopKPostProcess(nn.Module):
    """The best `num_select` pairs of query and class, best first (Conditional and Deformable DETR)."""

    def __init__(self, num_select: int = 100) -> None:
        super().__init__()
        self.num_select = num_select

    @torch.no_grad()
    def forward(self, outputs: dict[str, Tensor], target_sizes: Tensor) -> Detections:
        """target_sizes: [B, 2] height and width in pixels. Returns scores, labels [N] and boxes [N, 4] xyxy a
        picture.
        """
        probability = outputs['pred_logits'].sigmoid()  # [B, Q, K]
        num_classes = probability.shape[-1]
        scores, index = probability.flatten(1).topk(min(self.num_select, probability[0].numel()))  # [B, N]
        query = index.div(num_classes, rounding_mode='floor')
        boxes = scale_boxes(outputs['pred_boxes'], target_sizes).gather(1, query[..., None].expand(-1, -1, 4))
        labels = index % num_classes
        return [{'scores': s, 'labels': c, 'boxes': b} for s, c, b in zip(scores, labels, boxes, strict=True)]


class NMSPostProcess(nn.Module):
    """The best `num_select` pairs of query and class after suppression within each class (MS-DETR's option).

    Only the best `candidates` pairs of a picture take part.
    """

    def __init__(self, num_select: int, iou_threshold: float, candidates: int = 10000) -> None:
        super().__init__()
        self.num_select = num_select
        self.iou_threshold = iou_threshold
        self.best_pairs = TopKPostProcess(candidates)

    @torch.no_grad()
    def forward(self, outputs: dict[str, Tensor], target_sizes: Tensor) -> Detections:
        """As `TopKPostProcess`; pictures may keep different numbers of detections."""
        detections = []
        for pairs in self.best_pairs(outputs, target_sizes):
            kept = batched_nms(pairs['boxes'], pairs['scores'], pairs['labels'], self.iou_threshold)
            detections.append({key: value[kept[: self.num_select]] for key, value in pairs.items()})
        return detections
