"""Training of masks of regions: those of detections (`models.refine_masks`), and the branch of Mask R-CNN."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import roi_align

from models.refine_masks import ROI_SIZE, Convolution, boundary, resized, roi_features
from models.structures import Memory, Prediction, TrainingBranch
from util.box_ops import box_cxcywh_to_xyxy
from util.precision import full_precision, without_autocast

from .dense_heads import EPS, Images, clip_boxes, sample_regions

STAGE_WEIGHTS = (0.5, 0.75, 0.75, 1.0)
BOUNDARY_WIDTH = 2
NUM_CONVOLUTIONS = 4


def mask_targets(masks: Tensor, rois: Tensor, sides: tuple[int, ...] = (14, 28, 56, 112)) -> list[Tensor]:
    """Crop the mask of each region's object and resize it, as [N, side, side] bool for each side.

    Args:
        masks: [N, H, W], the mask of each region's object.
        rois: [N, 4] boxes xyxy in pixels.
    """
    height, width = masks.shape[1:]
    boxes = rois.clone()
    boxes[:, 0::2].clamp_(0, width)
    boxes[:, 1::2].clamp_(0, height)
    index = torch.arange(len(boxes), device=boxes.device).to(boxes)[:, None]
    places, images = torch.cat([index, boxes], dim=1), masks[:, None].to(boxes)
    return [
        roi_align(images, places, side, 1.0, sampling_ratio=0, aligned=True)[:, 0] >= 0.5 for side in sides
    ]


def refine_loss(logits: list[Tensor], targets: list[Tensor]) -> Tensor:
    """Return the loss of all stages; the last two are judged near the boundaries of mask and target only."""
    total, merged = logits[0].new_zeros(()), None
    for stage, (x, target) in enumerate(zip(logits, targets, strict=True)):
        loss = F.binary_cross_entropy_with_logits(x, target.to(x), reduction='none')
        if stage < 2:
            value, merged = loss.mean(), x.sigmoid() > 0.5
        else:
            size = tuple(x.shape[-2:])
            region = boundary(merged, BOUNDARY_WIDTH) | boundary(targets[stage - 1], BOUNDARY_WIDTH)
            region = resized(region.to(x), size) >= 0.5
            value = (loss * region).sum() / region.sum().clamp(min=1)
            redrawn = resized(boundary(merged, 1).to(x), size) >= 0.5
            before = resized(logits[stage - 1].sigmoid(), size)
            merged = torch.where(redrawn, x.sigmoid(), before) > 0.5
        total = total + STAGE_WEIGHTS[stage] * value
    return total


def iou_targets(logits: Tensor, targets: Tensor, masks: Tensor, rois: Tensor) -> Tensor:
    """Return the IoU [N] of predicted masks with their whole objects, of which a region may hold a part only.

    It is 0 where prediction and target are empty, and for objects that have no pixel.

    Args:
        logits, targets: [N, 28, 28].
        masks: [N, H, W], the mask of each region's object.
        rois: [N, 4] boxes xyxy in pixels.
    """
    predicted, part = logits.sigmoid() > 0.5, targets
    share = torch.stack(
        [
            mask[y0:y1, x0:x1].sum() / mask.sum().clamp(min=1)
            for mask, (x0, y0, x1, y1) in zip(masks.float(), rois.int().tolist(), strict=True)
        ]
    )
    overlap = (predicted & part).flatten(1).sum(1)
    whole = part.flatten(1).sum(1).to(logits) / (share + 1e-7)  # the share stays in float32 (official code)
    union = predicted.flatten(1).sum(1) + whole - overlap
    return overlap / union.clamp(min=EPS)


def iou_loss(predicted: Tensor, targets: Tensor) -> Tensor:
    """Return the mean squared error over the masks that overlap their objects."""
    some = targets > 0
    return ((predicted - targets) ** 2 * some).sum() / some.sum().clamp(min=1)


class MaskTraining(TrainingBranch):
    """The training of the masks of detections (`--co_masks`).

    num_candidates: best detections of an image, denoising queries included, among which positives are looked
    for.
    """

    num_samples, positive_fraction, overlap = 512, 0.25, 0.5
    kinds = ('one2one', 'dn')

    def __init__(self, num_candidates: int) -> None:
        super().__init__()
        self.num_candidates = num_candidates

    def losses(
        self, detector: nn.Module, memory: Memory, predictions: dict[str, Prediction], targets: list[dict]
    ) -> dict[str, Tensor]:
        """Return the losses of masks on the positives among the detections and the objects themselves."""
        masks = detector.co_masks
        with without_autocast(memory.tokens):
            maps, images = memory.maps(), Images.of(memory, targets)
            last = [predictions[kind] for kind in self.kinds if kind in predictions]
            scores = full_precision(torch.cat([p.logits[-1] for p in last], dim=1)).sigmoid().detach()
            boxes = full_precision(torch.cat([p.boxes[-1] for p in last], dim=1)).detach()
            regions, labels, wanted = [], [], []
            for index, target in enumerate(targets):
                positives, found = self.positives(scores[index], boxes[index], images, index)
                regions.append(positives)
                labels.append(target['labels'][found])
                wanted.append(target['masks'][found])
            if not sum(map(len, regions)):
                zero = sum(parameter.sum() for parameter in masks.parameters()) * 0.0
                return {'loss_comask': zero, 'loss_comask_iou': zero}
            logits, quality = masks(maps, regions, torch.cat(labels))
            crops = [mask_targets(*pair) for pair in zip(wanted, regions, strict=True) if len(pair[1])]
            crops = [torch.cat(stage) for stage in zip(*crops, strict=True)]
            ious = torch.cat(
                [
                    iou_targets(*each)
                    for each in zip(
                        logits[1].detach().split([len(x) for x in regions]),
                        crops[1].split([len(x) for x in regions]),
                        wanted,
                        regions,
                        strict=True,
                    )
                    if len(each[3])
                ]
            )
            return {'loss_comask': refine_loss(logits, crops), 'loss_comask_iou': iou_loss(quality, ious)}

    def positives(self, scores: Tensor, boxes: Tensor, images: Images, index: int) -> tuple[Tensor, Tensor]:
        """Return boxes [N, 4] in pixels and the object of each, at most a quarter of the samples."""
        size, objects = images.sizes[index], images.boxes[index]
        best = scores.flatten().topk(min(self.num_candidates, scores.numel())).indices
        chosen = box_cxcywh_to_xyxy(boxes[best.div(scores.shape[1], rounding_mode='floor')]) * size.repeat(2)
        rule = self.num_samples, self.positive_fraction, self.overlap
        regions, assigned, number = sample_regions(clip_boxes(chosen, size), objects, *rule)
        return regions[:number], assigned[:number]


class MaskBranch(nn.Module):
    """The mask branch of Mask R-CNN (arXiv:1703.06870, Sec. 3), of Co-DETR's RoI head (`--co_rcnn_masks`).

    It has four convolutions, a transposed one and a map of 28 x 28 logits for each class. strides: of the
    maps in pixels.
    """

    def __init__(self, channels: int, num_classes: int, strides: list[int]) -> None:
        super().__init__()
        self.strides = strides
        self.convs = nn.ModuleList(Convolution(channels, 3) for _ in range(NUM_CONVOLUTIONS))
        self.upsample = nn.ConvTranspose2d(channels, channels, 2, stride=2)
        self.conv_logits = nn.Conv2d(channels, num_classes, 1)
        for layer in (*(convolution.conv for convolution in self.convs), self.upsample, self.conv_logits):
            nn.init.kaiming_normal_(layer.weight, mode='fan_out', nonlinearity='relu')
            nn.init.zeros_(layer.bias)

    def forward(self, maps: list[Tensor], regions: list[Tensor], labels: Tensor) -> Tensor:
        """Return logits [N, 28, 28] of the N regions of all images for their classes.

        Args:
            maps: [B, C, H, W] of each level.
            regions: boxes [N_i, 4] xyxy in pixels of each image.
            labels: [N].
        """
        x = roi_features(maps, self.strides, regions, ROI_SIZE, 14 * self.strides[0])
        for convolution in self.convs:
            x = F.relu(convolution(x))
        logits = self.conv_logits(F.relu(self.upsample(x)))
        return logits[torch.arange(len(labels), device=labels.device), labels]

    def loss(self, maps: list[Tensor], regions: list[Tensor], labels: Tensor, masks: list[Tensor]) -> Tensor:
        """Return the mean binary cross-entropy of all pixels; masks: [N_i, H, W] of each region's object."""
        if not len(labels):
            return sum(parameter.sum() for parameter in self.parameters()) * 0.0
        logits = self(maps, regions, labels)
        pairs = [pair for pair in zip(masks, regions, strict=True) if len(pair[1])]
        wanted = torch.cat([mask_targets(*pair, sides=(2 * ROI_SIZE,))[0] for pair in pairs])
        return F.binary_cross_entropy_with_logits(logits, wanted.to(logits))

    def detect(self, maps: list[Tensor], boxes: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return probabilities [N, 28, 28] for boxes xyxy in pixels of one image, and quality 1."""
        return self(maps, [boxes], labels).sigmoid(), torch.ones_like(boxes[:, 0])
