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
    Images,
    Samples,
    Tower,
    anchor_major,
    assign_by_iou,
    average,
    clip_boxes,
    decode_boxes,
    encode_boxes,
    level_anchors,
    owned_anchors,
    sample,
    sample_regions,
)
from .masks import MaskBranch
from .matcher import from_host

SCALES = tuple(4 * 2 ** (octave / 3) for octave in range(3))
RATIOS = (0.5, 1.0, 2.0)
ROI_STDS = (0.1, 0.1, 0.2, 0.2)
ROI_SIZE = 7


class RegionProposals(nn.Module):
    """An RPN, which predicts objectness and boxes of nine anchors per cell. strides: strides of the maps in
    pixels.

    Losses are sums over 256 sampled anchors per image, divided by their number.
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
        for index, objects in enumerate(images.boxes):
            owned = owned_anchors(images.extents[index], self.strides, logits, per_cell=logits[0].shape[1])
            place = torch.cat(owned)
            assigned = assign_by_iou(anchors[place], objects, 0.7, 0.3, low_quality=True)
            positives, negatives = sample(assigned, self.num_samples, self.positive_fraction)
            count += max(len(positives), 1) + max(len(negatives), 1)
            wanted = encode_boxes(anchors[place[positives]], objects[assigned[positives]])
            bbox = bbox + (flat_deltas[index, place[positives]] - wanted).abs().sum()
            cls = cls + F.softplus(-flat_logits[index, place[positives]]).sum()
            cls = cls + F.softplus(flat_logits[index, place[negatives]]).sum()
        divisor = average(from_host([count], cls)) + EPS
        return {'loss_rpn_cls': cls / divisor[0], 'loss_rpn_bbox': bbox / divisor[0]}

    @torch.no_grad()
    def proposals(
        self, logits: list[Tensor], deltas: list[Tensor], sizes: Tensor, num_candidates: int
    ) -> list[Tensor]:
        """Return up to 1,000 boxes per image, [N_i, 4], best first. num_candidates: of a level before NMS."""
        scores, boxes, levels = [], [], []
        for level, anchors in enumerate(self.anchors(logits)):
            score = anchor_major([logits[level]], 1)[..., 0].sigmoid()  # [B, H W 9]
            score, best = score.topk(min(num_candidates, score.shape[1]))
            delta = anchor_major([deltas[level]], 4).gather(1, best[..., None].expand(-1, -1, 4))
            scores.append(score)
            boxes.append(clip_boxes(decode_boxes(anchors[best], delta), sizes[:, None]))
            levels.append(torch.full_like(best, level))
        scores, boxes, levels = (torch.cat(parts, dim=1) for parts in (scores, boxes, levels))
        kept = []
        for score, box, level in zip(scores, boxes, levels, strict=True):
            real = (box[:, 2:] > box[:, :2]).all(-1).nonzero()[:, 0]
            score, box, level = score[real], box[real], level[real]
            kept.append(box[batched_nms(box, score, level, self.nms_threshold)[: self.num_proposals]])
        return kept


class RoIHead(nn.Module):
    """A head that predicts classes of regions, and boxes, from 7 x 7 RoI features.

    It has hidden layers of 4 x channels (1024 in the official code).

    kind: `2fc` has two hidden layers and a box for each class. `4conv1fc` has four convolutions, one hidden
        layer, and one box for all classes. strides: strides of the maps in pixels. Regions are read from the
        finest map up to sides of 28 of its strides.
    """

    def __init__(self, channels: int, num_classes: int, strides: list[int], kind: str = '2fc') -> None:
        super().__init__()
        hidden = 4 * channels
        self.strides = strides
        convolutional = kind == '4conv1fc'
        self.num_boxes = 1 if convolutional else num_classes
        self.stds = tuple(std / 2 for std in ROI_STDS) if convolutional else ROI_STDS
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
        features = self.align(maps, regions)
        x = features
        for convolution in self.shared_convs:
            x = convolution(x)
        x = x.flatten(1)
        for layer in self.shared_fcs:
            x = F.relu(layer(x))
        return features, self.fc_cls(x), self.fc_reg(x).unflatten(1, (self.num_boxes, 4))

    def align(self, maps: list[Tensor], regions: list[Tensor]) -> Tensor:
        return roi_features(maps, self.strides, regions, ROI_SIZE, 14 * self.strides[0])


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

    def forward(
        self, maps: list[Tensor], images: Images, with_features: bool = True
    ) -> tuple[dict[str, Tensor], Samples]:
        """Return unweighted losses, and the RoIs that the head was trained on. maps: [B, C, H, W]."""
        proposed = self.rpn(maps)
        losses = self.rpn.losses(*proposed, images)
        proposals = self.rpn.proposals(*proposed, images.sizes, self.train_candidates)
        rule = self.num_samples, self.positive_fraction, self.overlap
        sampled = [sample_regions(*pair, *rule) for pair in zip(proposals, images.boxes, strict=True)]
        regions, objects, num_positives = zip(*sampled, strict=True)
        features, logits, deltas = self.roi(maps, list(regions))
        target = [
            torch.where(found == BACKGROUND, found, found + offset)
            for found, offset in zip(objects, images.offsets(), strict=True)
        ]
        losses |= self.losses(logits, deltas, torch.cat(regions), torch.cat(target), images)
        if self.masks is not None:
            positives = [found[:number] for found, number in zip(objects, num_positives, strict=True)]
            losses['loss_rcnn_mask'] = self.masks.loss(
                maps,
                [boxes[:number] for boxes, number in zip(regions, num_positives, strict=True)],
                torch.cat([labels[found] for labels, found in zip(images.labels, positives, strict=True)]),
                [masks[found] for masks, found in zip(images.masks, positives, strict=True)],
            )
        shortest = min(len(boxes) for boxes in regions)
        means = features.mean((2, 3)).split([len(boxes) for boxes in regions]) if with_features else None
        return losses, Samples(
            *(
                None if parts is None else torch.stack([x[:shortest] for x in parts])
                for parts in (regions, target, means)
            )
        )

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
        right = (logits.detach().argmax(1) == classes).sum()
        return {
            'loss_rcnn_cls': F.cross_entropy(logits, classes, reduction='sum') / divisor,
            'loss_rcnn_bbox': (1 - generalized_box_iou(decoded, boxes, SMALLEST_AREA)).sum() / divisor,
            'rcnn_accuracy': right * (100 / max(len(classes), 1)),
        }

    @torch.no_grad()
    def detect(self, maps: list[Tensor], sizes: Tensor) -> list[dict[str, Tensor]]:
        """Return candidates of each image: scores [N], labels [N], and boxes [N, 4] in pixels."""
        proposals = self.rpn.proposals(*self.rpn(maps), sizes, self.test_candidates)
        _, logits, deltas = self.roi(maps, proposals)
        counts = [len(boxes) for boxes in proposals]
        found = []
        for boxes, score, delta, size in zip(
            proposals, logits.softmax(-1)[:, :-1].split(counts), deltas.split(counts), sizes, strict=True
        ):
            decoded = clip_boxes(decode_boxes(boxes[:, None], delta, self.roi.stds), size)  # [N, K or 1, 4]
            labels = torch.arange(score.shape[1], device=score.device).expand_as(score)
            decoded = decoded.expand(-1, score.shape[1], -1)
            candidates = {'scores': score, 'labels': labels, 'boxes': decoded}
            found.append({key: value.flatten(0, 1) for key, value in candidates.items()})
        return found
