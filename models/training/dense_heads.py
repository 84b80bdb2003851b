"""
Functions that dense detectors share: anchors, box offsets, assignment by IoU, and sampling.

Boxes are xyxy in pixels of the network's input. Constants are those of mmdetection 2, which Co-DETR is built
on. Random numbers come from torch's CPU generator.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.deformable_transformer import gather_rows, valid_sizes
from models.structures import Memory
from util.box_ops import box_cxcywh_to_xyxy, box_iou
from util.distributed.collectives import all_reduce_sum, get_world_size
from util.precision import full_precision

from .matcher import from_host

EPS = torch.finfo(torch.float32).eps  # added to every divisor, whatever the precision
SMALLEST_AREA = 1e-6  # in square pixels, of unions and of enclosing boxes
MAX_LOG_RATIO = abs(math.log(16 / 1000))  # a decoded box has at most 62.5 times the side of its anchor
STDS = (0.1, 0.1, 0.2, 0.2)  # standard deviations that box offsets of ATSS and of RoI heads are divided by
BACKGROUND = -1


class Tower(nn.Module):
    """A 3 x 3 convolution without bias, a group norm and a ReLU; official names `conv`, `gn`."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.gn = nn.GroupNorm(32, channels)
        nn.init.normal_(self.conv.weight, std=0.01)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.gn(self.conv(x)))


@dataclass
class Images:
    """The sizes and objects of a batch of images, in pixels."""

    sizes: Tensor  # [B, 2] width and height without the batch's padding
    boxes: list[Tensor]  # [T_i, 4]
    labels: list[Tensor]  # [T_i]
    masks: list[Tensor | None]  # [T_i, H, W], if the data have them

    @classmethod
    def of(cls, memory: Memory, targets: list[dict] | None) -> 'Images':
        """Convert targets, a dictionary of `labels` and `boxes` cxcywh in [0, 1] per image, or None."""
        sizes = valid_sizes(memory.pixel_mask).to(full_precision(memory.tokens).dtype)
        if targets is None:
            return cls(sizes, [], [], [])
        boxes = [
            undo_rounding(box_cxcywh_to_xyxy(target['boxes'].to(sizes)) * size.repeat(2))
            for target, size in zip(targets, sizes, strict=True)
        ]
        labels, masks = ([target.get(key) for target in targets] for key in ('labels', 'masks'))
        return cls(sizes, boxes, labels, masks)

    @cached_property
    def extents(self) -> list[list[float]]:
        """Width and height of each image on the host. The device is waited for once."""
        return self.sizes.tolist()

    def offsets(self) -> list[int]:
        """Return the index in the batch of each image's first object."""
        counts = [len(labels) for labels in self.labels]
        return [sum(counts[:index]) for index in range(len(counts))]


def undo_rounding(boxes: Tensor) -> Tensor:
    """Round coordinates to a fine grid (1/4096 pixel in float32).

    Boxes were divided by the image's size and multiplied by it again. Rounding restores the boxes of the
    annotations, so that anchors at equal distances from them keep equal distances.
    """
    steps = 2.0**12 if boxes.dtype == torch.float32 else 2.0**30
    return (boxes * steps).round() / steps


@dataclass
class Samples:
    """The boxes that an auxiliary head was trained on, and their objects."""

    boxes: Tensor  # [B, N, 4]
    target: Tensor  # [B, N] index of the object in the batch, or BACKGROUND
    features: Callable[[], Tensor]  # computes [B, N, C] where queries need it


def level_anchors(
    maps: list[Tensor], strides: list[int], scales: Sequence[float], ratios: Sequence[float]
) -> list[Tensor]:
    """Return the anchors of every cell of maps [B, C, H, W], [H W A, 4] for each level.

    They are centred on the upper left corner of their cell. The A anchors of a cell are in the order of the
    ratios (height / width), then of the scales (side in strides).
    """
    ratio, scale = (torch.tensor(numbers, dtype=torch.float32) for numbers in (ratios, scales))
    levels = []
    for x, stride in zip(maps, strides, strict=True):
        half_height = (0.5 * (stride * ratio.sqrt()[:, None] * scale)).flatten()
        half_width = (0.5 * (stride * (1 / ratio.sqrt())[:, None] * scale)).flatten()
        base = torch.stack([-half_width, -half_height, half_width, half_height], dim=-1)  # [A, 4]
        rows, columns = (torch.arange(side, dtype=x.dtype, device=x.device) * stride for side in x.shape[-2:])
        corners = torch.stack(torch.meshgrid(columns, rows, indexing='xy'), dim=-1).repeat(
            1, 1, 2
        )  # [H, W, 4]
        levels.append((corners[:, :, None] + base.to(x, non_blocking=True)).flatten(0, 2))
    return levels


def valid_anchors(
    extent: list[float], strides: list[int], maps: list[Tensor], per_cell: int = 1
) -> list[Tensor]:
    """Return the anchors of each level whose cells are not in the padding of an image.

    They are indices among the anchors of all levels.

    Args:
        extent: width and height of the image.
        maps: [B, C, H, W] of every level.
        per_cell: number of anchors of a cell.
    """
    levels, start = [], 0
    for stride, x in zip(strides, maps, strict=True):
        columns, rows = (math.ceil(side / stride) for side in extent)
        shape = *x.shape[-2:], per_cell
        index = torch.arange(start, start + math.prod(shape), device=x.device).view(shape)
        levels.append(index[:rows, :columns].flatten())
        start += index.numel()
    return levels


def encode_boxes(anchors: Tensor, boxes: Tensor, stds: Sequence[float] = (1, 1, 1, 1)) -> Tensor:
    """Return offsets of boxes from anchors, [N, 4], as Faster R-CNN (Sec. 3.1.2) defines them."""
    center, size = center_and_size(anchors)
    box_center, box_size = center_and_size(boxes)
    deltas = torch.cat([(box_center - center) / size, torch.log(box_size / size)], dim=-1)
    return deltas / from_host(stds, deltas)


def decode_boxes(anchors: Tensor, deltas: Tensor, stds: Sequence[float] = (1, 1, 1, 1)) -> Tensor:
    """Invert `encode_boxes`, [..., 4], with bounded sides."""
    center, size = center_and_size(anchors)
    deltas = deltas * from_host(stds, deltas)
    center = center + size * deltas[..., :2]
    half = 0.5 * size * deltas[..., 2:].clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    return torch.cat([center - half, center + half], dim=-1)


def center_and_size(boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Return centres and sizes of boxes [..., 4] xyxy, [..., 2] each."""
    return (boxes[..., :2] + boxes[..., 2:]) * 0.5, boxes[..., 2:] - boxes[..., :2]


def clip_boxes(boxes: Tensor, size: Tensor) -> Tensor:
    """Clip boxes to an image. size: [..., 2] width, height."""
    return torch.minimum(boxes.clamp(min=0), torch.cat([size, size], dim=-1))


def assign_by_iou(
    boxes: Tensor, objects: Tensor, positive: float, negative: float, low_quality: bool
) -> Tensor:
    """Assign boxes to their best objects by IoU, and return the object of each box, [N].

    Boxes whose best IoU is below `negative` are BACKGROUND. Those with an IoU between `negative` and
    `positive` are -2, which is ignored.

    Args:
        boxes: [N, 4].
        objects: [T, 4].
        low_quality: also give each object the boxes of its largest IoU, if that is at least `negative`. Later
            objects override earlier ones (Faster R-CNN Sec. 3.1.2).
    """
    if not len(objects):
        return torch.full((len(boxes),), BACKGROUND, device=boxes.device)
    iou, _ = box_iou(objects[:, None], boxes[None], SMALLEST_AREA)  # [T, N]
    best, assigned = iou.max(0)
    assigned = assigned.masked_fill(best < positive, BACKGROUND - 1).masked_fill(best < negative, BACKGROUND)
    if not low_quality:
        return assigned
    best_of_object = iou.amax(1, keepdim=True)
    is_best = (iou == best_of_object) & (best_of_object >= negative)
    # 16 bits take a quarter of the memory and of the time.
    numbers = torch.arange(len(objects), dtype=torch.int16, device=objects.device)[:, None]
    last = torch.where(is_best, numbers, -1).amax(0)  # -1: the best box of no object
    return torch.where(last >= 0, last, assigned)


def sample_regions(
    regions: Tensor, objects: Tensor, num: int, positive_fraction: float, overlap: float
) -> tuple[Tensor, Tensor, int]:
    """Sample regions of an image for an RoI head, positives first. The objects themselves are regions too,
    their own positives.

    Args:
        regions: [N, 4].
        objects: [T, 4].
        num, positive_fraction: as in `sample`.
        overlap: smallest IoU of a positive.

    Returns:
        Boxes [M, 4], the object of each or BACKGROUND [M], and the number of positives.
    """
    numbers = torch.arange(len(objects), device=objects.device)
    assigned = assign_by_iou(regions, objects, overlap, overlap, low_quality=False)
    assigned, boxes = torch.cat([numbers, assigned]), torch.cat([objects, regions])
    positives, negatives = sample(assigned, num, positive_fraction)
    index = torch.cat([positives, negatives])
    return boxes[index], assigned[index], len(positives)


def sample(assigned: Tensor, num: int, positive_fraction: float) -> tuple[Tensor, Tensor]:
    """Draw at most `num` positives and negatives at random, and return their indices in ascending order."""
    positives = draw_indices((assigned >= 0).nonzero()[:, 0], int(num * positive_fraction))
    negatives = draw_indices((assigned == BACKGROUND).nonzero()[:, 0], num - len(positives))
    return positives, negatives


def draw_indices(index: Tensor, num: int) -> Tensor:
    """Draw at most `num` entries of an ascending index, in order. Fewer need no random number."""
    return index if len(index) <= num else shuffled(index, num).sort().values


def shuffled(index: Tensor, num: int) -> Tensor:
    """Permute an index with torch's CPU generator, without a synchronisation; return the first `num`."""
    return index[torch.randperm(len(index))[:num].to(index.device, non_blocking=True)]


def best_boxes(
    logits: Tensor,
    deltas: Tensor,
    anchors: Tensor,
    sizes: Tensor,
    num: int,
    stds: Sequence[float] = (1, 1, 1, 1),
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Find the `num` highest scores of a level, and decode their boxes.

    Args:
        logits: [B, A K, H, W]. deltas: [B, 4 A, H, W]. anchors: [H W A, 4].
        sizes: width and height of the images [B, 2], which boxes are clipped to.
        stds: as in `decode_boxes`.

    Returns:
        Scores, labels, boxes and indices of their anchors: [B, N], [B, N], [B, N, 4], [B, N].
    """
    num_classes = logits[0].numel() // len(anchors)
    scores = anchor_major([logits], num_classes).sigmoid().flatten(1)  # [B, H W A K]
    scores, best = scores.topk(min(num, scores.shape[1]))
    index, labels = best // num_classes, best % num_classes
    boxes = decode_boxes(anchors[index], gather_rows(anchor_major([deltas], 4), index), stds)
    return scores, labels, clip_boxes(boxes, sizes[:, None]), index


def anchor_major(maps: list[Tensor], width: int) -> Tensor:
    """Concatenate outputs [B, A width, H, W] of all levels to [B, sum of H W A, width]."""
    return torch.cat([x.permute(0, 2, 3, 1).reshape(len(x), -1, width) for x in maps], dim=1)


def average(counts: Tensor) -> Tensor:
    """Average the divisors of losses over ranks, with totals of at least 1.

    The gradient then does not depend on the number of ranks. In the official code the mean is at least 1, and
    Faster R-CNN divides by the samples of each rank.
    """
    return all_reduce_sum(counts.detach()).clamp(min=1) / get_world_size()
