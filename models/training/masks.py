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
from .matcher import from_host

STAGE_WEIGHTS = (0.5, 0.75, 0.75, 1.0)
BOUNDARY_WIDTH = 2
NUM_CONVOLUTIONS = 4


def mask_targets(masks: Tensor, rois: Tensor, sides: tuple[int, ...] = (14, 28, 56, 112)) -> list[Tensor]:
    """Crop the mask of each region's object and resize it, as [N, side, side] bool for each side.

    Args:
        masks: [N, H, W], the mask of each region's object.
        rois: [N, 4] boxes xyxy in pixels.
    """
    boxes = clip_boxes(rois, from_host([masks.shape[2], masks.shape[1]], rois))
    index = torch.arange(len(boxes), device=boxes.device).to(boxes)[:, None]
    boxes, images = torch.cat([index, boxes], dim=1), masks[:, None].to(boxes)
    return [
        roi_align(images, boxes, side, 1.0, sampling_ratio=0, aligned=True)[:, 0] >= 0.5 for side in sides
    ]


def refine_loss(logits: list[Tensor], targets: list[Tensor]) -> Tensor:
    """Return the loss of all stages; the last two count near the boundaries of mask and target only."""
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
    """Return the IoU [N] of predicted masks with their whole objects, which may be larger than their regions.

    It is 0 where prediction and target are empty, and for objects without pixels.

    Args:
        logits, targets: [N, 28, 28].
        masks: [N, H, W], the mask of each region's object.
        rois: [N, 4] boxes xyxy in pixels.
    """
    height, width = masks.shape[1:]
    x0, y0, x1, y1 = rois.int()[:, :, None].unbind(1)
    rows, columns = (torch.arange(side, device=masks.device) for side in (height, width))
    in_rows, in_columns = (rows >= y0) & (rows < y1), (columns >= x0) & (columns < x1)
    inside = masks.bool() & in_rows[:, :, None] & in_columns[:, None]
    # The share of the object in the region stays in float32 (official code).
    share = inside.sum((1, 2)).float() / masks.bool().sum((1, 2)).float().clamp(min=1)
    predicted = logits.sigmoid() > 0.5
    overlap = (predicted & targets).flatten(1).sum(1)
    whole = targets.flatten(1).sum(1).to(logits) / (share + 1e-7)
    union = predicted.flatten(1).sum(1) + whole - overlap
    return overlap / union.clamp(min=EPS)


def iou_loss(predicted: Tensor, targets: Tensor) -> Tensor:
    """Return the mean squared error over the masks that overlap their objects."""
    overlaps = targets > 0
    return ((predicted - targets) ** 2 * overlaps).sum() / overlaps.sum().clamp(min=1)


def zero_loss(module: nn.Module) -> Tensor:
    """Return 0 with a gradient of 0 for all parameters, for a batch without positives."""
    return sum(parameter.sum() for parameter in module.parameters()) * 0.0


class MaskTraining(TrainingBranch):
    """The training of the masks of detections (`--co_masks`).

    num_candidates: positives are chosen among so many best detections of an image, those of denoising queries
    included.
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
        with without_autocast(memory.tokens):
            maps, images = memory.maps(), Images.of(memory, targets)
            last = [predictions[kind] for kind in self.kinds if kind in predictions]
            scores = full_precision(torch.cat([p.logits[-1] for p in last], dim=1)).sigmoid().detach()
            boxes = full_precision(torch.cat([p.boxes[-1] for p in last], dim=1)).detach()
            regions, masks, labels = [], [], []
            for index, target in enumerate(targets):
                boxes_of_image, objects = self.positives(scores[index], boxes[index], images, index)
                regions.append(boxes_of_image)
                masks.append(target['masks'][objects])
                labels.append(target['labels'][objects])
            sizes = [len(x) for x in labels]
            if not sum(sizes):
                zero = zero_loss(detector.co_masks)
                return {'loss_comask': zero, 'loss_comask_iou': zero}
            logits, quality = detector.co_masks(maps, regions, torch.cat(labels))
            crops = [torch.cat(stage) for stage in zip(*map(mask_targets, masks, regions), strict=True)]
            second_stage = logits[1].detach().split(sizes), crops[1].split(sizes)
            ious = torch.cat([*map(iou_targets, *second_stage, masks, regions)])
            return {'loss_comask': refine_loss(logits, crops), 'loss_comask_iou': iou_loss(quality, ious)}

    def positives(self, scores: Tensor, boxes: Tensor, images: Images, index: int) -> tuple[Tensor, Tensor]:
        """Return boxes [N, 4] in pixels and the object of each, at most a quarter of the samples."""
        size, objects = images.sizes[index], images.boxes[index]
        best = scores.flatten().topk(min(self.num_candidates, scores.numel())).indices
        detections = box_cxcywh_to_xyxy(boxes[best // scores.shape[1]]) * size.repeat(2)
        rule = self.num_samples, self.positive_fraction, self.overlap
        regions, assigned, num_positives = sample_regions(clip_boxes(detections, size), objects, *rule)
        return regions[:num_positives], assigned[:num_positives]


class MaskBranch(nn.Module):
    """The mask branch of Mask R-CNN (arXiv:1703.06870, Sec. 3), of Co-DETR's RoI head (`--co_rcnn_masks`).

    It has four convolutions, a transposed one and a map of 28 x 28 logits for each class.

    strides: of the maps in pixels.
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
        x = roi_features(maps, self.strides, regions, ROI_SIZE, ROI_SIZE * self.strides[0])
        for convolution in self.convs:
            x = F.relu(convolution(x))
        logits = self.conv_logits(F.relu(self.upsample(x)))
        return logits[torch.arange(len(labels), device=labels.device), labels]

    def loss(self, maps: list[Tensor], regions: list[Tensor], labels: Tensor, masks: list[Tensor]) -> Tensor:
        """Return the mean binary cross-entropy of all pixels; masks: [N_i, H, W] of each region's object."""
        if not len(labels):
            return zero_loss(self)
        logits = self(maps, regions, labels)
        crops = [mask_targets(*pair, sides=(2 * ROI_SIZE,))[0] for pair in zip(masks, regions, strict=True)]
        return F.binary_cross_entropy_with_logits(logits, torch.cat(crops).to(logits))

    def detect(self, maps: list[Tensor], boxes: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return probabilities [N, 28, 28] for boxes xyxy in pixels of one image, and quality 1."""
        return self(maps, [boxes], labels).sigmoid(), torch.ones_like(boxes[:, 0])
