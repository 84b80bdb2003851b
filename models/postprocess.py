"""Turn outputs into detections in pixels. A detection is a score, a class index and a box."""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import batched_nms

from util.box_ops import box_cxcywh_to_xyxy, box_iou

Detections = list[dict[str, Tensor]]
Encode = Callable[[Tensor], list[dict]]
PIXELS_AT_A_TIME = 2**24  # of masks, which take a few bytes a pixel while they are made

# Threshold of NMS between detections of an auxiliary head (IoU).
AUXILIARY_HEADS = {'faster_rcnn': 0.5, 'atss': 0.6}


def scale_boxes(boxes: Tensor, target_sizes: Tensor) -> Tensor:
    """Convert boxes [B, N, 4] from cxcywh in [0, 1] to xyxy in pixels. target_sizes: [B, 2] (height, width)."""
    if len(boxes) != len(target_sizes):
        raise ValueError(f'{len(boxes)} images, but {len(target_sizes)} target sizes')
    scale = target_sizes.flip(-1).repeat(1, 2).to(boxes)  # [B, 4] W, H, W, H
    return box_cxcywh_to_xyxy(boxes) * scale[:, None]


class SoftmaxPostProcess(nn.Module):
    """One detection per query, in query order (DETR): the best class other than the last, which is 'no object'."""

    @torch.no_grad()
    def forward(self, outputs: dict[str, Tensor], target_sizes: Tensor) -> Detections:
        """Return scores [Q], labels [Q] and boxes [Q, 4] xyxy of each image.

        target_sizes: [B, 2] height and width in pixels.
        """
        scores, labels = outputs['pred_logits'].softmax(-1)[..., :-1].max(-1)
        boxes = scale_boxes(outputs['pred_boxes'], target_sizes)
        query = torch.arange(scores.shape[1], device=scores.device).expand_as(labels)
        return detections_of(outputs, scores, labels, boxes, query)


def detections_of(
    outputs: dict[str, Tensor], scores: Tensor, labels: Tensor, boxes: Tensor, query: Tensor
) -> Detections:
    """Make a dictionary for each image; with masks it has the `query` of each detection too."""
    fields = {'scores': scores, 'labels': labels, 'boxes': boxes}
    if 'pred_masks' in outputs:
        fields['query'] = query
    return [dict(zip(fields, values, strict=True)) for values in zip(*fields.values(), strict=True)]


class TopKPostProcess(nn.Module):
    """The best `num_select` pairs of query and class, best first (Conditional and Deformable DETR).

    clamp: clip boxes to the image (Co-DETR).
    """

    def __init__(self, num_select: int = 100, clamp: bool = False) -> None:
        super().__init__()
        self.num_select = num_select
        self.clamp = clamp

    @torch.no_grad()
    def forward(self, outputs: dict[str, Tensor], target_sizes: Tensor) -> Detections:
        """Return scores [N], labels [N] and boxes [N, 4] xyxy of each image.

        target_sizes: [B, 2] height and width in pixels.
        """
        probability = outputs['pred_logits'].sigmoid()  # [B, Q, K]
        num_classes = probability.shape[-1]
        scores, index = probability.flatten(1).topk(min(self.num_select, probability[0].numel()))  # [B, N]
        query = index.div(num_classes, rounding_mode='floor')
        boxes = scale_boxes(outputs['pred_boxes'], target_sizes)
        if self.clamp:
            boxes = clamp_boxes(boxes, target_sizes[:, None])
        boxes = boxes.gather(1, query[..., None].expand(-1, -1, 4))
        return detections_of(outputs, scores, index % num_classes, boxes, query)


def clamp_boxes(boxes: Tensor, sizes: Tensor) -> Tensor:
    """Clip boxes xyxy in pixels to their images. sizes: [..., 2] height and width."""
    return torch.minimum(boxes.clamp(min=0), sizes.flip(-1).repeat(*[1] * (sizes.dim() - 1), 2).to(boxes))


class NMSPostProcess(nn.Module):
    """The best `num_select` pairs of query and class after NMS within each class (MS-DETR's option).

    NMS considers only the best `candidates` pairs of an image.
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
        """Return detections as `TopKPostProcess` does; images may have different numbers of them."""
        return [
            suppress(pairs, self.iou_threshold, self.num_select)
            for pairs in self.best_pairs(outputs, target_sizes)
        ]


def suppress(pairs: dict[str, Tensor], iou_threshold: float, num_select: int) -> dict[str, Tensor]:
    """Apply NMS within each class to the detections of an image, and return the best `num_select`."""
    kept = batched_nms(pairs['boxes'], pairs['scores'], pairs['labels'], iou_threshold)
    return {key: value[kept[:num_select]] for key, value in pairs.items()}


class CandidatePostProcess(nn.Module):
    """The best `num_select` candidates of an auxiliary head (`models.training.collaborative`) after NMS."""

    def __init__(self, iou_threshold: float, num_select: int = 100) -> None:
        super().__init__()
        self.iou_threshold = iou_threshold
        self.num_select = num_select

    @torch.no_grad()
    def forward(self, outputs: dict[str, list[dict[str, Tensor]]], target_sizes: Tensor) -> Detections:
        """Return detections as `TopKPostProcess` does.

        outputs: `candidates`, a dictionary per image of scores [N], labels [N] and boxes [N, 4] cxcywh in [0, 1].
        """
        detections = []
        for found, size in zip(outputs['candidates'], target_sizes, strict=True):
            scaled = scale_boxes(found['boxes'][None], size[None])[0]
            detections.append(suppress(found | {'boxes': scaled}, self.iou_threshold, self.num_select))
        return detections


class SoftNMSPostProcess(nn.Module):
    """The best `num_select` pairs of query and class after linear soft-NMS within each class (arXiv:1704.04503; Co-DINO).

    Soft-NMS considers only the best `candidates` pairs of an image. Boxes are clipped to the image.
    """

    smallest_score = 1e-3

    def __init__(self, num_select: int, iou_threshold: float, candidates: int) -> None:
        super().__init__()
        self.num_select = num_select
        self.iou_threshold = iou_threshold
        self.best_pairs = TopKPostProcess(candidates, clamp=True)

    @torch.no_grad()
    def forward(self, outputs: dict[str, Tensor], target_sizes: Tensor) -> Detections:
        """Return detections as `TopKPostProcess` does, with lowered scores; images may have different numbers of them."""
        return [self.suppress(pairs) for pairs in self.best_pairs(outputs, target_sizes)]

    def suppress(self, pairs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Apply soft-NMS to the pairs of an image, on the host because each step depends on the one before."""
        labels = pairs['labels']
        scores, boxes = (x.float() if x.element_size() < 4 else x for x in (pairs['scores'], pairs['boxes']))
        overlap, _ = box_iou(boxes[:, None], boxes[None])
        factor = torch.where(overlap >= self.iou_threshold, 1 - overlap, 1)
        factor = torch.where(labels[:, None] == labels, factor, 1).cpu().numpy()
        order, scores = soft_suppression(scores.cpu().numpy(), factor, self.smallest_score)
        order = torch.from_numpy(order[: self.num_select]).to(labels.device)
        scores = torch.from_numpy(scores[: self.num_select]).to(labels.device)
        rest = {key: pairs[key][order] for key in ('query',) if key in pairs}
        return {'scores': scores, 'labels': labels[order], 'boxes': boxes[order]} | rest


def soft_suppression(
    scores: np.ndarray, factor: np.ndarray, smallest: float
) -> tuple[np.ndarray, np.ndarray]:
    """Take the best detection that is left, lower the scores of the others, and repeat; return indices and scores.

    Args:
        scores: [N].
        factor: [N, N]; taking detection i multiplies the score of j by factor[i, j].
        smallest: detections with lower scores are dropped.
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


def with_masks(
    detections: dict[str, Tensor], size: Sequence[int], make: Callable[[slice], Tensor], encode: Encode | None
) -> dict:
    """Return detections with `masks` [N, 1, H, W] uint8, or with what `encode` makes of them, `segmentation`.

    Args:
        size: H and W, pixels.
        make: makes the masks [n, 1, H, W] uint8 of a slice of the detections. It is asked for few at a time, since those of a
            large photograph take gigabytes together.
        encode: turns such masks into a list of n run lengths.
    """
    number, some = len(detections['boxes']), max(1, PIXELS_AT_A_TIME // (size[0] * size[1]))
    pieces = (make(slice(start, start + some)) for start in range(0, max(number, 1), some))
    if encode is not None:
        return detections | {'segmentation': [each for piece in pieces for each in encode(piece)]}
    return detections | {'masks': torch.cat([*pieces])}


class MaskPostProcess(nn.Module):
    """Masks of detections in the original images (DETR). threshold: probability above which a pixel is object."""

    def __init__(self, threshold: float = 0.5) -> None:
        super().__init__()
        self.threshold = threshold

    @torch.no_grad()
    def forward(
        self,
        detections: Detections,
        outputs: dict[str, Tensor],
        original_sizes: Tensor,
        sizes: Tensor,
        canvas: tuple[int, int] | None = None,
        encode: Encode | None = None,
    ) -> list[dict]:
        """Return the detections with `masks` [N, 1, H, W] uint8 in place of `query`.

        Args:
            original_sizes: [B, 2] height and width of the original images.
            sizes: [B, 2] height and width of the part of the network's input that shows them.
            canvas: height and width of the network's input, the padded batch; None: the largest of `sizes`.
            encode: makes a list of run lengths of a few masks, which then are `segmentation`, and there are no `masks`.
        """
        canvas = canvas or tuple(sizes.amax(0).tolist())

        def pixels(masks: Tensor, original: list[int], seen: list[int], part: slice) -> Tensor:
            x = F.interpolate(masks[part, None], size=canvas, mode='bilinear', align_corners=False)
            shown = (x[..., : seen[0], : seen[1]].sigmoid() > self.threshold).float()
            return F.interpolate(shown, size=original, mode='nearest').byte()

        found = []
        for one, masks, original, seen in zip(
            detections, outputs['pred_masks'], original_sizes.tolist(), sizes.tolist(), strict=True
        ):
            make = partial(pixels, masks[one['query']], original, seen)
            rest = {key: value for key, value in one.items() if key != 'query'}
            found.append(with_masks(rest, original, make, encode))
        return found


class RegionMaskPostProcess(nn.Module):
    """Masks of detections from their RoI features, in the original images (`models.refine_masks`).

    threshold: probability from which on a pixel is object. A mask has a score of its own: that of the box times the mask's
    IoU, as far as the model can tell it.
    """

    def __init__(self, threshold: float = 0.5) -> None:
        super().__init__()
        self.threshold = threshold

    @torch.no_grad()
    def forward(
        self,
        detections: Detections,
        outputs: dict,
        original_sizes: Tensor,
        sizes: Tensor,
        canvas: tuple[int, int] | None = None,
        encode: Encode | None = None,
    ) -> list[dict]:
        """Return the detections with `masks` [N, 1, H, W] uint8 and `mask_scores` [N]; arguments as `MaskPostProcess`."""

        def pixels(masks: Tensor, boxes: Tensor, original: list[int], part: slice) -> Tensor:
            return (paste(masks[part], boxes[part], *original) >= self.threshold)[:, None].byte()

        found = []
        for index, (one, original, size) in enumerate(zip(detections, original_sizes, sizes, strict=True)):
            scale = (size / original).flip(0).repeat(2).to(one['boxes'])
            masks, quality = one['boxes'].new_zeros(0, 1, 1), one['scores']
            if len(one['boxes']):
                masks, quality = outputs['masks_of'](index, one['boxes'] * scale, one['labels'])
            rest = one | {'mask_scores': one['scores'] * quality.to(one['scores'])}
            make = partial(pixels, masks, one['boxes'], original.tolist())
            found.append(with_masks(rest, original.tolist(), make, encode))
        return found


def paste(masks: Tensor, boxes: Tensor, height: int, width: int) -> Tensor:
    """Draw masks [N, h, w] of boxes [N, 4] xyxy in pixels into images, [N, height, width]; outside they are 0."""
    x0, y0, x1, y1 = boxes.to(masks)[:, :, None].unbind(1)
    x = (torch.arange(width, device=masks.device) + 0.5 - x0) / (x1 - x0).clamp(
        min=1e-6
    ) * 2 - 1  # [N, width]
    y = (torch.arange(height, device=masks.device) + 0.5 - y0) / (y1 - y0).clamp(min=1e-6) * 2 - 1
    grid = torch.stack([x[:, None].expand(-1, height, -1), y[..., None].expand(-1, -1, width)], dim=-1)
    return F.grid_sample(masks[:, None], grid.to(masks), align_corners=False)[:, 0]
