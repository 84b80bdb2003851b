"""Targets of images, as DETR reads annotations in COCO form (arXiv:2005.12872)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch import Tensor

from datasets.annotations import Columns, PackedList, labels_of
from datasets.class_map import ClassMap
from datasets.segmentations import polygons_of, run_lengths
from datasets.transforms import Target
from util.errors import UserError


@dataclass(frozen=True)
class Reading:
    """Rules for reading an annotation file; the defaults are DETR's.

    class_ids: class indices of the categories, see `ClassMap.numbered`. drop_tiny: leave out objects narrower
    or lower than a pixel, and those without area. min_image_side: leave out images with a smaller side
    (pixels).
    """

    class_ids: str = 'auto'
    drop_tiny: bool = False
    min_image_side: int = 0


AS_DETR = Reading()


@dataclass(frozen=True)
class Objects:
    """T objects as the annotations have them.

    boxes_xywh: [T, 4] float32 in pixels. labels: [T] int64. areas: [T] float32. segmentations: T polygons or
    run lengths; None if masks are not asked for.
    """

    boxes_xywh: Tensor
    labels: Tensor
    areas: Tensor
    segmentations: PackedList | None

    @classmethod
    def of(cls, columns: Columns, class_map: ClassMap, segmentations: bytearray | None) -> 'Objects':
        """Take COLUMNS, and the bytes of their segmentations if masks are asked for."""
        return cls(
            torch.from_numpy(columns.boxes_xywh.astype(np.float32)),
            torch.from_numpy(labels_of(columns, class_map)),
            torch.from_numpy(columns.areas.astype(np.float32)),
            None if segmentations is None else PackedList(segmentations, columns.starts, columns.stops),
        )

    def __getitem__(self, rows: slice) -> 'Objects':
        """Return the objects of a slice."""
        segmentations = None if self.segmentations is None else self.segmentations.chosen(rows)
        return Objects(self.boxes_xywh[rows], self.labels[rows], self.areas[rows], segmentations)


def make_target(objects: Objects, image_id: int, height: int, width: int) -> Target:
    """Make the target (see `CocoDetection`) of the objects with a box of positive size inside the image."""
    boxes_xyxy = objects.boxes_xywh.clone()
    boxes_xyxy[:, 2:] += boxes_xyxy[:, :2]
    boxes_xyxy[:, 0::2].clamp_(0, width)
    boxes_xyxy[:, 1::2].clamp_(0, height)
    keep = (boxes_xyxy[:, 2:] > boxes_xyxy[:, :2]).all(dim=1)
    target = {'boxes': boxes_xyxy[keep], 'labels': objects.labels[keep]}
    if objects.segmentations is not None:
        masks = torch.zeros(len(keep), height, width, dtype=torch.uint8)
        for mask, segmentation in zip(masks, objects.segmentations, strict=True):
            mask |= rasterize(segmentation, height, width)
        target['masks'] = masks[keep]
    target['image_id'] = torch.tensor([image_id])
    target['area'] = objects.areas[keep]
    # The official code has an empty float tensor here for an image without annotations.
    target['iscrowd'] = torch.zeros(len(target['boxes']), dtype=torch.int64 if len(keep) else torch.float32)
    target['orig_size'] = torch.tensor([height, width])
    target['size'] = torch.tensor([height, width])
    return target


def check_size(
    path: object, size: Sequence[int], annotated: Sequence[int], source: object, exif: str = 'auto'
) -> None:
    """Compare an image's (height, width) with that of its annotations, where 0 means unknown.

    exif: the flag --exif with which the image was read.

    Raises:
        UserError: the two differ.
    """
    (height, width), (expected_height, expected_width) = size, annotated
    if expected_height > 0 and expected_width > 0 and (height, width) != (expected_height, expected_width):
        is_turned = exif != 'auto' and (height, width) == (expected_width, expected_height)
        raise UserError(
            f'{path} is {width} x {height} (width x height), but {source} says {expected_width} x '
            f'{expected_height}: the boxes would be wrong; fetch the right image'
            f'{f", or give --exif auto instead of {exif}" if is_turned else ""}'
        )


def is_trained_on(reading: Reading, objects: Columns) -> np.ndarray:
    """Leave out crowd regions, ignored objects and, if the reading says so, tiny objects; [A] bool.

    An object is tiny by mmdetection's rule, which looks at its box before that is clamped.
    """
    tiny = (objects.boxes_xywh[:, 2:] < 1).any(axis=1) | (objects.areas <= 0)
    return ~objects.crowd & ~objects.ignored & ~(tiny & reading.drop_tiny)


def rasterize(segmentation: list | dict, height: int, width: int) -> Tensor:
    """Draw the union of polygons, or a run-length mask (compressed or not), as uint8 [height, width].

    Raises:
        UserError: it is neither, or of another size.
    """
    try:
        if isinstance(segmentation, dict):
            if list(segmentation['size']) != [height, width]:
                raise ValueError(f'it is a mask of {segmentation["size"]}')
            return torch.from_numpy(coco_mask.decode(run_lengths(segmentation)))
        polygons = polygons_of(segmentation)
        if not polygons:
            return torch.zeros(height, width, dtype=torch.uint8)
        parts = coco_mask.decode(coco_mask.frPyObjects(polygons, height, width))  # [height, width, parts]
        return torch.from_numpy(parts.max(axis=2))
    except Exception as error:  # pycocotools raises many kinds
        text = str(segmentation)[:60]
        raise UserError(
            f'has the segmentation {text}, which is not a mask of {height} x {width} ({error})'
        ) from error
