"""
Faster R-CNN (arXiv:1506.01497) on the encoder's output, as Co-DETR (arXiv:2211.12860) trains it beside the
decoder.

A region proposal network (RPN) finds boxes, which an RoI head classifies and refines from their RoI features.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import batched_nms

from models.refine_masks import roi_features
from util.box_ops import generalized_box_iou

from .dense_heads import (
    BACKGROUND,
    EPS,
    SMALLEST_AREA,
    STDS,
    Images,
    Samples,
    Tower,
    anchor_major,
    assign_by_iou,
    average,
    best_boxes,
    clip_boxes,
    decode_boxes,
    encode_boxes,
    level_anchors,
    sample,
    sample_regions,
    valid_anchors,
)
from .masks import MaskBranch
from .matcher import from_host

SCALES = tuple(4 * 2 ** (octave / 3) for octave in range(3))
RATIOS = (0.5, 1.0, 2.0)
ROI_SIZE = 7


class RegionProposals(nn.Module):
    """An RPN, which predicts objectness and boxes of nine anchors per cell.

    Losses are sums over 256 sampled anchors per image, divided by their number.

    strides: of the maps in pixels.
    """

    num_samples, positive_fraction = 256, 0.5
    nms_threshold, num_proposals = 0.7, 1000

    def __init__(self, channels: int, strides: list[int]) -> None:
        super().__init__()
        self.strides = strides
        num_anchors = len(SCALES) * len(RATIOS)
        self.rpn_conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.rpn_cls = nn.Conv2d(channels, num_anchors, 1)
        self.rpn_reg = nn.Conv2d(channels, 4 * num_anchors, 1)
        for convolution in self.children():
            nn.init.normal_(convolution.weight, std=0.01)
            nn.init.zeros_(convolution.bias)

    def forward(self, maps: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return logits [B, 9, H, W] and offsets [B, 36, H, W] of every level. maps: [B, C, H, W]."""
        hidden = [F.relu(self.rpn_conv(x)) for x in maps]
        return [self.rpn_cls(x) for x in hidden], [self.rpn_reg(x) for x in hidden]

    def anchors(self, maps: list[Tensor]) -> list[Tensor]:
        """Return the anchors of every level, [H W 9, 4]."""
        return level_anchors(maps, self.strides, SCALES, RATIOS)

    def losses(self, logits: list[Tensor], deltas: list[Tensor], images: Images) -> dict[str, Tensor]:
        anchors = torch.cat(self.anchors(logits))
        flat_logits, flat_deltas = anchor_major(logits, 1)[..., 0], anchor_major(deltas, 4)
        cls = bbox = flat_logits.new_zeros(())
        count = 0
        for image, objects in enumerate(images.boxes):
            valid = valid_anchors(images.extents[image], self.strides, logits, per_cell=logits[0].shape[1])
            index = torch.cat(valid)
            assigned = assign_by_iou(anchors[index], objects, 0.7, 0.3, low_quality=True)
            positives, negatives = sample(assigned, self.num_samples, self.positive_fraction)
            count += max(len(positives), 1) + max(len(negatives), 1)
            target = encode_boxes(anchors[index[positives]], objects[assigned[positives]])
            bbox = bbox + (flat_deltas[image, index[positives]] - target).abs().sum()
            cls = cls + F.softplus(-flat_logits[image, index[positives]]).sum()
            cls = cls + F.softplus(flat_logits[image, index[negatives]]).sum()
        divisor = average(from_host([count], cls)) + EPS
        return {'loss_rpn_cls': cls / divisor[0], 'loss_rpn_bbox': bbox / divisor[0]}

    @torch.no_grad()
    def proposals(
        self, logits: list[Tensor], deltas: list[Tensor], sizes: Tensor, num_candidates: int
    ) -> list[Tensor]:
        """Return up to 1,000 boxes per image, [N_i, 4], best first. num_candidates: of a level before NMS."""
        levels = []
        for level, anchors in enumerate(self.anchors(logits)):
            scores, _, boxes, index = best_boxes(logits[level], deltas[level], anchors, sizes, num_candidates)
            levels.append((scores, boxes, torch.full_like(index, level)))
        images = zip(*(torch.cat(parts, dim=1) for parts in zip(*levels, strict=True)), strict=True)
        proposals = []
        for scores, boxes, level in images:
            solid = (boxes[:, 2:] > boxes[:, :2]).all(-1).nonzero()[:, 0]
            best = batched_nms(boxes[solid], scores[solid], level[solid], self.nms_threshold)
            proposals.append(boxes[solid[best[: self.num_proposals]]])
        return proposals


class RoIHead(nn.Module):
    """A head that predicts classes of regions, and boxes, from 7 x 7 RoI features.

    Hidden layers have 4 x channels (1024 in the official code).

    Args:
        strides: strides of the maps in pixels. Regions with sides of up to 28 strides of the finest map are
            read from it.
        kind: `2fc` has two hidden layers and a box for each class. `4conv1fc` has four convolutions, one
            hidden layer, and one box for all classes.
    """

    def __init__(self, channels: int, num_classes: int, strides: list[int], kind: str = '2fc') -> None:
        super().__init__()
        hidden = 4 * channels
        self.strides = strides
        convolutional = kind == '4conv1fc'
        self.num_boxes = 1 if convolutional else num_classes
        self.stds = tuple(std / 2 for std in STDS) if convolutional else STDS
        self.shared_convs = nn.ModuleList(Tower(channels) for _ in range(4 if convolutional else 0))
        for layer in self.shared_convs:
            nn.init.kaiming_normal_(layer.conv.weight, mode='fan_out', nonlinearity='relu')
        sizes = [channels * ROI_SIZE**2, *[hidden] * (1 if convolutional else 2)]
        self.shared_fcs = nn.ModuleList(nn.Linear(*pair) for pair in pairwise(sizes))
        self.fc_cls = nn.Linear(hidden, num_classes + 1)  # the last is the background
        self.fc_reg = nn.Linear(hidden, 4 * self.num_boxes)
        for layer in self.shared_fcs:
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        for layer, std in ((self.fc_cls, 0.01), (self.fc_reg, 0.001)):
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)

    def forward(self, maps: list[Tensor], regions: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return features [N, C, 7, 7], class logits [N, K + 1] and offsets [N, K or 1, 4] of the N regions
        of all images.

        regions: [N_i, 4] of each image.
        """
        features = roi_features(maps, self.strides, regions, ROI_SIZE, 2 * ROI_SIZE * self.strides[0])
        x = features
        for convolution in self.shared_convs:
            x = convolution(x)
        x = x.flatten(1)
        for layer in self.shared_fcs:
            x = F.relu(layer(x))
        return features, self.fc_cls(x), self.fc_reg(x).unflatten(1, (self.num_boxes, 4))


class FasterRCNN(nn.Module):
    """An RPN on all maps, and an RoI head on all but the coarsest.

    Losses are sums over samples, divided by the mean over ranks of the number of samples. Box losses of the
    RoI head are divided by the number of all RoIs too.
    """

    num_samples, positive_fraction, overlap = 512, 0.25, 0.5
    train_candidates, test_candidates = 4000, 1000
    coef = {'rpn_cls': 1.0, 'rpn_bbox': 1.0, 'rcnn_cls': 1.0, 'rcnn_bbox': 10.0, 'rcnn_mask': 1.0}
    kind = 'rcnn'  # kind of the decoder queries made from its positives

    def __init__(
        self, channels: int, num_classes: int, strides: list[int], head: str = '2fc', masks: bool = False
    ) -> None:
        super().__init__()
        self.rpn = RegionProposals(channels, strides)
        self.roi = RoIHead(channels, num_classes, strides[:-1], head)
        self.masks = MaskBranch(channels, num_classes, strides[:-1]) if masks else None
        self.coef = {term: coef for term, coef in self.coef.items() if masks or term != 'rcnn_mask'}

    def forward(self, maps: list[Tensor], images: Images) -> tuple[dict[str, Tensor], Samples]:
        """Return unweighted losses, and the RoIs that the head was trained on. maps: [B, C, H, W]."""
        proposed = self.rpn(maps)
        losses = self.rpn.losses(*proposed, images)
        proposals = self.rpn.proposals(*proposed, images.sizes, self.train_candidates)
        rule = self.num_samples, self.positive_fraction, self.overlap
        sampled = [sample_regions(*pair, *rule) for pair in zip(proposals, images.boxes, strict=True)]
        regions, objects, num_positives = zip(*sampled, strict=True)
        features, logits, deltas = self.roi(maps, list(regions))
        target = [
            torch.where(assigned == BACKGROUND, assigned, assigned + offset)
            for assigned, offset in zip(objects, images.offsets(), strict=True)
        ]
        losses |= self.losses(logits, deltas, torch.cat(regions), torch.cat(target), images)
        if self.masks is not None:
            positives = [assigned[:num] for assigned, num in zip(objects, num_positives, strict=True)]
            losses['loss_rcnn_mask'] = self.masks.loss(
                maps,
                [boxes[:num] for boxes, num in zip(regions, num_positives, strict=True)],
                torch.cat([labels[index] for labels, index in zip(images.labels, positives, strict=True)]),
                [masks[index] for masks, index in zip(images.masks, positives, strict=True)],
            )
        means = features.mean((2, 3)).split([len(boxes) for boxes in regions])
        smallest = min(len(boxes) for boxes in regions)
        boxes, target, means = (
            torch.stack([x[:smallest] for x in part]) for part in (regions, target, means)
        )
        return losses, Samples(boxes, target, lambda: means)

    def losses(
        self, logits: Tensor, deltas: Tensor, regions: Tensor, target: Tensor, images: Images
    ) -> dict[str, Tensor]:
        """Compute losses and accuracy of the RoI head. target: [N] object of each RoI or BACKGROUND."""
        positive = (target != BACKGROUND).nonzero()[:, 0]
        boxes = torch.cat(images.boxes)[target[positive]]
        classes = torch.full_like(target, logits.shape[1] - 1)
        classes[positive] = torch.cat(images.labels)[target[positive]]
        box_of_class = classes[positive].clamp(max=deltas.shape[1] - 1)  # 0 where all classes share a box
        decoded = decode_boxes(regions[positive], deltas[positive, box_of_class], self.roi.stds)
        divisor = average(from_host([len(classes)], logits))[0] + EPS
        correct = (logits.detach().argmax(1) == classes).sum()
        return {
            'loss_rcnn_cls': F.cross_entropy(logits, classes, reduction='sum') / divisor,
            'loss_rcnn_bbox': (1 - generalized_box_iou(decoded, boxes, SMALLEST_AREA)).sum() / divisor,
            'rcnn_accuracy': correct * (100 / max(len(classes), 1)),
        }

    @torch.no_grad()
    def detect(self, maps: list[Tensor], sizes: Tensor) -> list[dict[str, Tensor]]:
        """Return candidates of each image: scores [N], labels [N], and boxes [N, 4] in pixels."""
        proposals = self.rpn.proposals(*self.rpn(maps), sizes, self.test_candidates)
        _, logits, deltas = self.roi(maps, proposals)
        counts = [len(boxes) for boxes in proposals]
        detections = []
        for boxes, scores, delta, size in zip(
            proposals, logits.softmax(-1)[:, :-1].split(counts), deltas.split(counts), sizes, strict=True
        ):
            decoded = clip_boxes(decode_boxes(boxes[:, None], delta, self.roi.stds), size)  # [N, K or 1, 4]
            labels = torch.arange(scores.shape[1], device=scores.device).expand_as(scores)
            decoded = decoded.expand(-1, scores.shape[1], -1)
            candidates = {'scores': scores, 'labels': labels, 'boxes': decoded}
            detections.append({key: value.flatten(0, 1) for key, value in candidates.items()})
        return detections
