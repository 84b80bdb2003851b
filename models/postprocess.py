"""From outputs to detections in pixels. A detection is a score, a class index and a box."""

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.ops import batched_nms

from util.box_ops import box_cxcywh_to_xyxy, box_iou

Detections = list[dict[str, Tensor]]


def scale_boxes(boxes: Tensor, target_sizes: Tensor) -> Tensor:
    """cxcywh in [0, 1] to xyxy in pixels; boxes: [B, N, 4], target_sizes: [B, 2] (height, width)."""
    if len(boxes) != len(target_sizes):
        raise ValueError(f'{len(boxes)} images, but {len(target_sizes)} target sizes')
    scale = target_sizes.flip(-1).repeat(1, 2).to(boxes)  # [B, 4] W, H, W, H
    return box_cxcywh_to_xyxy(boxes) * scale[:, None]


class SoftmaxPostProcess(nn.Module):
    """One detection a query, in query order (DETR): the best class other than 'no object', which is the last
    one.
    """

    @torch.no_grad()
    def forward(self, outputs: dict[str, Tensor], target_sizes: Tensor) -> Detections:
        """target_sizes: [B, 2] height and width in pixels. Returns scores, labels [Q] and boxes [Q, 4] xyxy a
        image.
        """
        scores, labels = outputs['pred_logits'].softmax(-1)[..., :-1].max(-1)
        boxes = scale_boxes(outputs['pred_boxes'], target_sizes)
        return [{'scores': s, 'labels': c, 'boxes': b} for s, c, b in zip(scores, labels, boxes, strict=True)]


class TopKPostProcess(nn.Module):
    """The best `num_select` pairs of query and class, best first (Conditional and Deformable DETR).

    clamp: boxes end at the edges of the image (Co-DETR).
    """

    def __init__(self, num_select: int = 100, clamp: bool = False) -> None:
        super().__init__()
        self.num_select = num_select
        self.clamp = clamp

    @torch.no_grad()
    def forward(self, outputs: dict[str, Tensor], target_sizes: Tensor) -> Detections:
        """target_sizes: [B, 2] height and width in pixels. Returns scores, labels [N] and boxes [N, 4] xyxy a
        image.
        """
        probability = outputs['pred_logits'].sigmoid()  # [B, Q, K]
        num_classes = probability.shape[-1]
        scores, index = probability.flatten(1).topk(min(self.num_select, probability[0].numel()))  # [B, N]
        query = index.div(num_classes, rounding_mode='floor')
        boxes = scale_boxes(outputs['pred_boxes'], target_sizes)
        if self.clamp:
            boxes = clamp_boxes(boxes, target_sizes[:, None])
        boxes = boxes.gather(1, query[..., None].expand(-1, -1, 4))
        labels = index % num_classes
        return [{'scores': s, 'labels': c, 'boxes': b} for s, c, b in zip(scores, labels, boxes, strict=True)]


def clamp_boxes(boxes: Tensor, sizes: Tensor) -> Tensor:
    """xyxy in pixels, cut off at the edges; sizes: [..., 2] height and width."""
    return torch.minimum(boxes.clamp(min=0), sizes.flip(-1).repeat(*[1] * (sizes.dim() - 1), 2).to(boxes))


class NMSPostProcess(nn.Module):
    """The best `num_select` pairs of query and class after suppression within each class (MS-DETR's option).

    Only the best `candidates` pairs of an image take part.
    """

    def __init__(
        self, num_select: int, iou_threshold: float, clamp: bool = False, candidates: int = 10000
    ) -> None:
        super().__init__()
        self.num_select = num_select
        self.iou_threshold = iou_threshold
        self.best_pairs = TopKPostProcess(candidates, clamp)

    @torch.no_grad()
    def forward(self, outputs: dict[str, Tensor], target_sizes: Tensor) -> Detections:
        """As `TopKPostProcess`; images may keep different numbers of detections."""
        return [
            suppress(pairs, self.iou_threshold, self.num_select)
            for pairs in self.best_pairs(outputs, target_sizes)
        ]


def suppress(pairs: dict[str, Tensor], iou_threshold: float, num_select: int) -> dict[str, Tensor]:
    """The best detections of an image of which none overlaps a better one of its class by more than the threshold."""
    kept = batched_nms(pairs['boxes'], pairs['scores'], pairs['labels'], iou_threshold)
    return {key: value[kept[:num_select]] for key, value in pairs.items()}


class CandidatePostProcess(nn.Module):
    """The best `num_select` candidates of an auxiliary head (`models.training.collaborative`) after suppression."""

    def __init__(self, iou_threshold: float, num_select: int = 100) -> None:
        super().__init__()
        self.iou_threshold = iou_threshold
        self.num_select = num_select

    @torch.no_grad()
    def forward(self, outputs: dict[str, list[dict[str, Tensor]]], target_sizes: Tensor) -> Detections:
        """outputs: `candidates`, scores and labels [N] and boxes [N, 4] cxcywh in [0, 1] an image."""
        detections = []
        for found, size in zip(outputs['candidates'], target_sizes, strict=True):
            scaled = scale_boxes(found['boxes'][None], size[None])[0]
            detections.append(suppress(found | {'boxes': scaled}, self.iou_threshold, self.num_select))
        return detections


class SoftNMSPostProcess(nn.Module):
    """The best `num_select` pairs of query and class after linear soft suppression within each class
    (arXiv:1704.04503; Co-DINO).

    Only the best `candidates` pairs of an image take part; boxes end at the edges of the image.
    """

    smallest_score = 1e-3

    def __init__(self, num_select: int, iou_threshold: float, candidates: int) -> None:
        super().__init__()
        self.num_select = num_select
        self.iou_threshold = iou_threshold
        self.best_pairs = TopKPostProcess(candidates, clamp=True)

    @torch.no_grad()
    def forward(self, outputs: dict[str, Tensor], target_sizes: Tensor) -> Detections:
        """As `TopKPostProcess`, with the lowered scores; images may keep different numbers of detections."""
        return [self.suppress(pairs) for pairs in self.best_pairs(outputs, target_sizes)]

    def suppress(self, pairs: dict[str, Tensor]) -> dict[str, Tensor]:
        """On the host: each step depends on the one before."""
        labels = pairs['labels']
        scores, boxes = (x.float() if x.element_size() < 4 else x for x in (pairs['scores'], pairs['boxes']))
        overlap, _ = box_iou(boxes[:, None], boxes[None])
        factor = torch.where(overlap >= self.iou_threshold, 1 - overlap, 1)
        factor = torch.where(labels[:, None] == labels, factor, 1).cpu().numpy()
        order, scores = soft_suppression(scores.cpu().numpy(), factor, self.smallest_score)
        order = torch.from_numpy(order[: self.num_select]).to(labels.device)
        scores = torch.from_numpy(scores[: self.num_select]).to(labels.device)
        return {'scores': scores, 'labels': labels[order], 'boxes': boxes[order]}


def soft_suppression(
    scores: np.ndarray, factor: np.ndarray, smallest: float
) -> tuple[np.ndarray, np.ndarray]:
    """Detections in the order in which they are the best that is left, and their scores then.

    scores: [N]; factor: [N, N] what a detection leaves of the score of another. Scores under `smallest` are dropped.
    """
    left, order, kept = scores.copy(), [], []
    for _ in range(len(scores)):
        best = int(left.argmax())
        if left[best] < smallest:
            break
        order.append(best)
        kept.append(left[best])
        left *= factor[best]
        left[best] = -1.0
    return np.array(order, dtype=np.int64), np.array(kept, dtype=scores.dtype)
