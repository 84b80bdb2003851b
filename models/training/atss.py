"""
ATSS (arXiv:1912.02424) on the encoder's output, as Co-DETR (arXiv:2211.12860) trains it beside the decoder.

Each cell has one square anchor. Positives are chosen by statistics of the IoUs. Every box has a centerness.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from util.box_ops import box_iou, generalized_box_iou

from .dense_heads import (
    BACKGROUND,
    EPS,
    SMALLEST_AREA,
    STDS,
    Images,
    Samples,
    Tower,
    anchor_major,
    average,
    best_boxes,
    center_and_size,
    decode_boxes,
    level_anchors,
    valid_anchors,
)
from .losses import FocalLoss
from .matcher import from_host

ANCHOR_STRIDES = 8.0  # side of an anchor in strides
PADDING = BACKGROUND - 1  # in place of an object, for cells that are not in their image
NEAREST = 9  # number of candidates per object and level
INSIDE = 0.01  # smallest distance in pixels of a positive's centre from the edges of its object


class Scale(nn.Module):
    """A factor that is learned."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class ATSS(nn.Module):
    """A dense head that predicts class, box and centerness of every cell.

    Losses are averages over the positives of all ranks. Box losses are weighted by the target's centerness.

    strides: of the maps in pixels.
    """

    coef = {'atss_cls': 1.0, 'atss_bbox': 2.0, 'atss_centerness': 1.0}
    kind = 'atss'  # kind of the decoder queries made from its positives
    num_candidates = 1000
    focal = FocalLoss()
    masks = None  # has no mask branch

    def __init__(self, channels: int, num_classes: int, strides: list[int]) -> None:
        super().__init__()
        self.num_classes, self.strides = num_classes, strides
        self.cls_convs = nn.ModuleList([Tower(channels)])
        self.reg_convs = nn.ModuleList([Tower(channels)])
        self.atss_cls = nn.Conv2d(channels, num_classes, 3, padding=1)
        self.atss_reg = nn.Conv2d(channels, 4, 3, padding=1)
        self.atss_centerness = nn.Conv2d(channels, 1, 3, padding=1)
        self.scales = nn.ModuleList(Scale() for _ in strides)
        for layer in (self.atss_cls, self.atss_reg, self.atss_centerness):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)
        nn.init.constant_(self.atss_cls.bias, -math.log(99))

    def read(self, maps: list[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Return class logits [B, K, H, W], offsets [B, 4, H, W] and centerness [B, 1, H, W] of every level.

        maps: [B, C, H, W] of every level.
        """
        classes, offsets, centerness = [], [], []
        for x, scale in zip(maps, self.scales, strict=True):
            classes.append(self.atss_cls(self.cls_convs[0](x)))
            hidden = self.reg_convs[0](x)
            offsets.append(scale(self.atss_reg(hidden)))
            centerness.append(self.atss_centerness(hidden))
        return classes, offsets, centerness

    def anchors(self, maps: list[Tensor]) -> list[Tensor]:
        """Return the anchors of every level, [H W, 4]."""
        return level_anchors(maps, self.strides, [ANCHOR_STRIDES], [1.0])

    def forward(self, maps: list[Tensor], images: Images) -> tuple[dict[str, Tensor], Samples]:
        """Return unweighted losses, and every anchor with its object. Anchors in the padding are 0."""
        anchors = torch.cat(self.anchors(maps))
        assigned = torch.full((len(images.boxes), len(anchors)), PADDING, device=anchors.device)
        for row, extent, objects in zip(assigned, images.extents, images.boxes, strict=True):
            valid = valid_anchors(extent, self.strides, maps)
            row[torch.cat(valid)] = assign_adaptively([anchors[index] for index in valid], objects)
        offsets = from_host(images.offsets(), assigned)[:, None]
        target = torch.where(assigned >= 0, assigned + offsets, BACKGROUND)
        valid = assigned != PADDING
        losses = self.losses(self.read(maps), anchors, valid, target, images)
        return losses, Samples(
            anchors * valid[..., None],
            target,
            lambda: torch.cat([x.flatten(2).transpose(1, 2) for x in maps], dim=1),
        )

    def losses(
        self,
        outputs: tuple[list[Tensor], list[Tensor], list[Tensor]],
        anchors: Tensor,
        valid: Tensor,
        target: Tensor,
        images: Images,
    ) -> dict[str, Tensor]:
        """Compute the losses.

        Args:
            outputs: those of `read`.
            anchors: [S, 4].
            valid: [B, S] whether a cell is not padding.
            target: [B, S] index of the object in the batch, or BACKGROUND.
        """
        logits, deltas, centerness = (
            anchor_major(maps, width) for maps, width in zip(outputs, (self.num_classes, 4, 1), strict=True)
        )
        batch, index = (target != BACKGROUND).nonzero().unbind(1)
        objects = target[batch, index]
        boxes, labels = torch.cat(images.boxes)[objects], torch.cat(images.labels)[objects]
        quality = target_centerness(anchors[index], boxes)
        counts = (target != BACKGROUND).sum(1).clamp(min=1).sum()
        count, weight = average(torch.stack([counts.to(quality), quality.sum()]))
        negatives = (self.focal.unweighted(logits).sum(-1) * valid).sum()
        cls = self.focal.weights[1] * negatives + self.focal.correction(logits[batch, index, labels]).sum()
        decoded = decode_boxes(anchors[index], deltas[batch, index], STDS)
        bbox = (quality * (1 - generalized_box_iou(decoded, boxes, SMALLEST_AREA))).sum()
        center = F.binary_cross_entropy_with_logits(centerness[batch, index, 0], quality, reduction='sum')
        return {
            'loss_atss_cls': cls / (count + EPS),
            'loss_atss_bbox': bbox / (1 + EPS) / weight,
            'loss_atss_centerness': center / (count + EPS),
        }

    @torch.no_grad()
    def detect(self, maps: list[Tensor], sizes: Tensor) -> list[dict[str, Tensor]]:
        """Return candidates of each image: scores [N], labels [N], and boxes [N, 4] in pixels."""
        levels = []
        for anchors, logits, deltas, centerness in zip(self.anchors(maps), *self.read(maps), strict=True):
            scores, labels, boxes, index = best_boxes(
                logits, deltas, anchors, sizes, self.num_candidates, STDS
            )
            scores = scores * anchor_major([centerness], 1)[..., 0].sigmoid().gather(1, index)
            levels.append((scores, labels, boxes))
        images = zip(*(torch.cat(parts, dim=1) for parts in zip(*levels, strict=True)), strict=True)
        return [dict(zip(('scores', 'labels', 'boxes'), image, strict=True)) for image in images]


def target_centerness(anchors: Tensor, boxes: Tensor) -> Tensor:
    """Return the centerness [N] of anchors in boxes, both [N, 4]: 1 in the middle, 0 at edges (FCOS)."""
    center, _ = center_and_size(anchors)
    near, far = center - boxes[:, :2], boxes[:, 2:] - center
    return (torch.minimum(near, far) / torch.maximum(near, far)).prod(-1).sqrt()


@torch.no_grad()
def assign_adaptively(anchors: list[Tensor], objects: Tensor) -> Tensor:
    """Return the object of each anchor or BACKGROUND, [S] (ATSS, Algorithm 1).

    Candidates of an object are the nearest anchors of every level. A candidate is positive if its centre is
    inside, and its IoU is at least the mean plus the standard deviation of all candidates' IoUs.

    Args:
        anchors: [S_l, 4] of every level.
        objects: [T, 4].
    """
    flat = torch.cat(anchors)
    if not len(objects):
        return torch.full((len(flat),), BACKGROUND, device=flat.device)
    object_center, _ = center_and_size(objects)
    candidates, start = [], 0
    for level in anchors:
        center, _ = center_and_size(level)
        distance = (center[:, None] - object_center[None]).pow(2).sum(-1).sqrt()  # [S_l, T]
        candidates.append(start + distance.topk(min(NEAREST, len(level)), dim=0, largest=False).indices)
        start += len(level)
    candidates = torch.cat(candidates)  # [N, T]
    overlap, _ = box_iou(flat[candidates], objects[None], SMALLEST_AREA)
    threshold = overlap.mean(0) + overlap.std(0)
    center, _ = center_and_size(flat[candidates])
    margin = torch.cat([center - objects[:, :2], objects[:, 2:] - center], dim=-1).amin(-1)
    positive = (overlap >= threshold) & (margin > INSIDE)
    best = overlap.new_full((len(objects), len(flat)), -1.0)
    best.scatter_(1, candidates.T, torch.where(positive.T, overlap.T, -1.0))
    overlap, assigned = best.max(0)
    return assigned.masked_fill(overlap < 0, BACKGROUND)
