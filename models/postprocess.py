"""Turn outputs into detections in pixels. A detection is a score, a class index and a box."""

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import batched_nms

from util.box_ops import box_cxcywh_to_xyxy, box_iou
from util.nested_tensor import NestedTensor

Detections = list[dict[str, Tensor]]
Target = dict[str, Tensor]
Encode = Callable[[Tensor], list[dict]]
PIXELS_AT_A_TIME = 2**24  # of masks, which take a few bytes per pixel while they are computed

# Threshold of NMS between detections of an auxiliary head (IoU).
AUXILIARY_HEADS = {'faster_rcnn': 0.5, 'atss': 0.6}


def postprocess_batch(
    model: nn.Module,
    postprocessors: dict[str, nn.Module],
    outputs: dict,
    targets: list[Target],
    samples: NestedTensor,
    encode: Encode | None = None,
) -> list[dict]:
    """Return the detections of a batch in pixels of the original images, with masks if the model has them.

    Args:
        model: the model that computed the outputs, without a wrapper.
        targets: `size`, `orig_size` and perhaps `frame_size` of each image, from its preparation.
        samples: the batch.
        encode: function that makes run lengths of masks [n, 1, H, W]; these are `segmentation`, in place of
            `masks`.
    """
    device = next(model.parameters()).device
    frames = torch.stack([frame_size(target) for target in targets]).to(device, non_blocking=True)
    detections = postprocessors['bbox'](outputs, frames)
    if 'segm' not in postprocessors:
        return detections
    originals = torch.stack([target['orig_size'] for target in targets])
    shown = torch.stack([shown_size(target) for target in targets])
    if 'maps' in outputs:
        scales = (shown / originals).flip(-1).repeat(1, 2).to(detections[0]['boxes'])
        boxes = [one['boxes'] * scale for one, scale in zip(detections, scales, strict=True)]
        labels = [one['labels'] for one in detections]
        outputs = outputs | {'region_masks': model.detect_masks(outputs['maps'], boxes, labels)}
    canvas = tuple(samples.mask.shape[-2:])
    return postprocessors['segm'](detections, outputs, originals, shown, canvas, encode)


def frame_size(target: Target) -> Tensor:
    """Return the (height, width) [2], in pixels of the original image, that boxes in [0, 1] are relative to.

    It is the size of the image, or of the square around it that `datasets.transforms.FitSquare` makes.
    """
    return target.get('frame_size', target['orig_size'])


def shown_size(target: Target) -> Tensor:
    """Return the (height, width) [2] of the part of the network's input that shows the image."""
    return (target['size'] * target['orig_size'] / frame_size(target)).round().long()


def to_cpu(result: dict) -> dict:
    """Copy the tensors of an image's detections to the host, where run lengths are already."""
    return {key: value.cpu() if isinstance(value, Tensor) else value for key, value in result.items()}


def scale_boxes(boxes: Tensor, target_sizes: Tensor) -> Tensor:
    """Convert boxes [B, N, 4] from cxcywh in [0, 1] to xyxy in pixels. target_sizes: [B, 2] height, width."""
    if boxes.shape[0] != target_sizes.shape[0]:  # len() would fix the number of images in an exported program
        raise ValueError(f'{len(boxes)} images, but {len(target_sizes)} target sizes')
    scale = target_sizes.flip(-1).repeat(1, 2).to(boxes)  # [B, 4] W, H, W, H
    return box_cxcywh_to_xyxy(boxes) * scale[:, None]


class BoxPostProcess(nn.Module):
    """Postprocessing that returns equally many detections for each image, so that it can be exported."""

    @torch.no_grad()
    def forward(self, outputs: dict[str, Tensor], target_sizes: Tensor) -> Detections:
        """Return scores [N], labels [N] and boxes [N, 4] xyxy of each image; with masks also `query` [N].

        target_sizes: [B, 2] height and width in pixels.
        """
        names = ('scores', 'labels', 'boxes', *(('query',) if 'pred_masks' in outputs else ()))
        images = zip(*self.batched(outputs, target_sizes)[: len(names)], strict=True)
        return [dict(zip(names, values, strict=True)) for values in images]

    def batched(self, outputs: dict[str, Tensor], target_sizes: Tensor) -> tuple[Tensor, ...]:
        """Return scores, labels [B, N], boxes [B, N, 4] and queries [B, N]."""
        raise NotImplementedError


class SoftmaxPostProcess(BoxPostProcess):
    """One detection per query, in query order (DETR): the best class but the last, which is 'no object'."""

    def batched(self, outputs: dict[str, Tensor], target_sizes: Tensor) -> tuple[Tensor, ...]:
        scores, labels = outputs['pred_logits'].softmax(-1)[..., :-1].max(-1)
        boxes = scale_boxes(outputs['pred_boxes'], target_sizes)
        query = torch.arange(scores.shape[1], device=scores.device).expand_as(labels)
        return scores, labels, boxes, query


class TopKPostProcess(BoxPostProcess):
    """The best `num_select` pairs of query and class, best first (Conditional and Deformable DETR).

    clamp: clip boxes to the image (Co-DETR).
    """

    def __init__(self, num_select: int = 100, clamp: bool = False) -> None:
        super().__init__()
        self.num_select = num_select
        self.clamp = clamp

    def batched(self, outputs: dict[str, Tensor], target_sizes: Tensor) -> tuple[Tensor, ...]:
        probability = outputs['pred_logits'].sigmoid()  # [B, Q, K]
        num_classes = probability.shape[-1]
        scores, index = probability.flatten(1).topk(min(self.num_select, probability[0].numel()))  # [B, N]
        query = index.div(num_classes, rounding_mode='floor')
        boxes = scale_boxes(outputs['pred_boxes'], target_sizes)
        if self.clamp:
            boxes = clamp_boxes(boxes, target_sizes[:, None])
        boxes = boxes.gather(1, query[..., None].expand(-1, -1, 4))
        return scores, index % num_classes, boxes, query


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
        return [self.suppress(pairs) for pairs in self.best_pairs(outputs, target_sizes)]

    def suppress(self, pairs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the best `num_select` detections of an image that NMS leaves."""
        order = batched_nms(pairs['boxes'], pairs['scores'], pairs['labels'], self.iou_threshold)
        return {key: value[order[: self.num_select]] for key, value in pairs.items()}


class CandidatePostProcess(NMSPostProcess):
    """The best `num_select` candidates of an auxiliary head (`models.training.collaborative`) after NMS."""

    def __init__(self, iou_threshold: float) -> None:
        super().__init__(num_select=100, iou_threshold=iou_threshold)

    @torch.no_grad()
    def forward(self, outputs: dict[str, list[dict[str, Tensor]]], target_sizes: Tensor) -> Detections:
        """Return detections as `TopKPostProcess` does.

        outputs: `candidates`, a dictionary per image of scores, labels [N] and boxes [N, 4] cxcywh in [0, 1].
        """
        return [
            self.suppress(candidates | {'boxes': scale_boxes(candidates['boxes'][None], size[None])[0]})
            for candidates, size in zip(outputs['candidates'], target_sizes, strict=True)
        ]


class SoftNMSPostProcess(NMSPostProcess):
    """The best `num_select` pairs of query and class after linear soft-NMS within each class.

    Source: arXiv:1704.04503; Co-DINO. Scores are lowered, and boxes are clipped to the image.
    """

    smallest_score = 1e-3

    def __init__(self, num_select: int, iou_threshold: float, candidates: int) -> None:
        super().__init__(num_select, iou_threshold, clamp=True, candidates=candidates)

    def suppress(self, pairs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Apply soft-NMS to the pairs of an image, on the host: each step depends on the one before."""
        labels = pairs['labels']
        scores, boxes = (x.float() if x.element_size() < 4 else x for x in (pairs['scores'], pairs['boxes']))
        overlap, _ = box_iou(boxes[:, None], boxes[None])
        factor = torch.where(overlap >= self.iou_threshold, 1 - overlap, 1)
        factor = torch.where(labels[:, None] == labels, factor, 1).cpu().numpy()
        order, scores = soft_suppression(scores.cpu().numpy(), factor, self.smallest_score)
        order, scores = (torch.from_numpy(x[: self.num_select]).to(labels.device) for x in (order, scores))
        return {key: value[order] for key, value in (pairs | {'boxes': boxes}).items()} | {'scores': scores}


def soft_suppression(
    scores: np.ndarray, factor: np.ndarray, smallest: float
) -> tuple[np.ndarray, np.ndarray]:
    """Select the best remaining detection, lower the scores of the others, and repeat.

    Args:
        scores: [N].
        factor: [N, N]; selecting detection i multiplies the score of j by factor[i, j].
        smallest: detections with lower scores are removed.

    Returns:
        Indices and scores of the selected detections.
    """
    remaining, order, lowered = scores.copy(), [], []
    for _ in range(len(scores)):
        best = int(remaining.argmax())
        if remaining[best] < smallest:
            break
        order.append(best)
        lowered.append(remaining[best])
        remaining *= factor[best]
        remaining[best] = -1.0
    return np.array(order, dtype=np.int64), np.array(lowered, dtype=scores.dtype)


class MaskPostProcess(nn.Module):
    """Masks of detections in the original images (DETR)."""

    threshold = 0.5  # smallest probability of object pixels

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
        """Return the detections with `masks` [N, 1, H, W] uint8.

        Args:
            original_sizes: [B, 2] height and width of the original images.
            sizes: [B, 2] height and width of the part of the network's input that shows them.
            canvas: height and width of the network's input, the padded batch; None: the largest of `sizes`.
            encode: as in `postprocess_batch`.
        """
        canvas = canvas or tuple(sizes.amax(0).tolist())
        images = zip(detections, original_sizes.tolist(), sizes.tolist(), strict=True)
        results: list[dict] = []
        for index, (fields, original, shown) in enumerate(images):
            masks, fields = self.of_image(outputs, index, fields)
            # All masks of a large photograph take gigabytes, so only a few are made at once.
            number = max(1, PIXELS_AT_A_TIME // math.prod(original))
            parts = zip(masks.split(number), fields['boxes'].split(number), strict=True)
            pieces = (self.draw(*part, original, shown, canvas) for part in parts)
            if encode is None:
                results.append(fields | {'masks': torch.cat([*pieces])})
            else:
                results.append(
                    fields | {'segmentation': [each for piece in pieces for each in encode(piece)]}
                )
        return results

    def of_image(
        self, outputs: dict, index: int, fields: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return predicted masks [N, h, w] of an image's detections, and what describes these."""
        query = fields['query']
        return outputs['pred_masks'][index][query], {key: x for key, x in fields.items() if key != 'query'}

    def draw(
        self, masks: Tensor, boxes: Tensor, original: list[int], shown: list[int], canvas: tuple[int, int]
    ) -> Tensor:
        """Return predicted masks [n, h, w] of boxes [n, 4] as [n, 1, H, W] uint8 in the original image."""
        x = F.interpolate(masks[:, None], size=canvas, mode='bilinear', align_corners=False)
        inside = (x[..., : shown[0], : shown[1]].sigmoid() > self.threshold).float()
        return F.interpolate(inside, size=original, mode='nearest').byte()


class RegionMaskPostProcess(MaskPostProcess):
    """Masks of detections from their RoI features, in the original images (`models.refine_masks`).

    A mask has a score of its own, `mask_scores` [N]: that of the box times the predicted quality of the mask.
    outputs: `region_masks`, the result of `BaseDETR.detect_masks`.
    """

    def of_image(
        self, outputs: dict, index: int, fields: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        masks, quality = outputs['region_masks'][index]
        return masks, fields | {'mask_scores': fields['scores'] * quality.to(fields['scores'])}

    def draw(self, masks: Tensor, boxes: Tensor, original: list[int], *sizes: object) -> Tensor:
        return (paste_masks(masks, boxes, *original) >= self.threshold)[:, None].byte()


def paste_masks(masks: Tensor, boxes: Tensor, height: int, width: int) -> Tensor:
    """Draw masks [N, h, w] of boxes [N, 4] xyxy in pixels into images, [N, height, width], 0 outside."""
    x0, y0, x1, y1 = boxes.to(masks)[:, :, None].unbind(1)
    columns, rows = (torch.arange(side, device=masks.device) + 0.5 for side in (width, height))
    x = (columns - x0) / (x1 - x0).clamp(min=1e-6) * 2 - 1  # [N, width]
    y = (rows - y0) / (y1 - y0).clamp(min=1e-6) * 2 - 1
    grid = torch.stack([x[:, None].expand(-1, height, -1), y[..., None].expand(-1, -1, width)], dim=-1)
    return F.grid_sample(masks[:, None], grid.to(masks), align_corners=False)[:, 0]
