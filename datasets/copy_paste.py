"""
Large-scale jitter with copy-paste (arXiv:2012.07177), as Co-DETR's LSJ recipes train. Evaluation uses
`datasets.transforms.FitSquare` instead.

If targets have masks, a box is the extent of an object's visible part. Without masks nothing is pasted, and
boxes are cut by the crop.
"""

import random
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from datasets.transforms import (
    OBJECT_FIELDS,
    RandomHorizontalFlip,
    Sample,
    Target,
    crop,
    image_size,
    keep_objects,
    pad_to_square,
    random_region,
    rescale,
)
from util.box_ops import box_area
from util.errors import UserError

SCALES = (0.1, 2.0)  # of the square
MIN_BOX_SIDE = 0.01  # pixels; smaller boxes are dropped
MAX_PASTED = 99  # objects
MOVED, STILL_VISIBLE = 10, 300  # pixels of a box side, and of a mask
TRIES = 100


class LargeScaleJitter:
    """Scaling, cropping, flipping and padding to size x size pixels, and pasting objects of a second image.

    keep_masks: return masks too, which only a detector with masks needs.
    """

    def __init__(self, size: int, keep_masks: bool = False) -> None:
        self.size, self.keep_masks = size, keep_masks

    def __call__(self, image: Tensor, target: Target, random_item: Callable[[], Sample]) -> Sample:
        """Jitter an image and paste objects into it.

        random_item: returns the second image, and a replacement for an image whose objects all vanish.
        """
        image, target = self.jittered(image, target, random_item)
        if 'masks' not in target:
            return image, target
        source, source_target = self.jittered(*random_item(), random_item)
        image, target = paste_objects(image, target, source, pick(source_target))
        return image, {key: value for key, value in target.items() if self.keep_masks or key != 'masks'}

    def jittered(self, image: Tensor, target: Target, random_item: Callable[[], Sample]) -> Sample:
        """Jitter an image, or a replacement if it loses all its objects.

        Raises:
            UserError: TRIES images in turn lose their objects.
        """
        for _ in range(TRIES):
            sample = jitter(image, target, self.size)
            if sample is not None:
                return sample
            image, target = random_item()
        raise UserError(
            f'{TRIES} images one after another lost all their objects when they were scaled for --aug lsj: '
            'are their segmentations empty?'
        )


def jitter(image: Tensor, target: Target, size: int) -> Sample | None:
    """Jitter one image into a square of size x size pixels.

    Returns None if the crop has objects, but none of them keeps a box. A crop without objects is a valid
    result.
    """
    limit = max(1, int(size * random.uniform(*SCALES)))
    image, target = rescale(image, target, limit, limit)
    height, width = (min(side, size) for side in image_size(image))
    image, target = crop(image, target, random_region(image, height, width))
    if 'masks' in target:
        target = fit_to_masks(target)
    sides = target['boxes'][:, 2:] - target['boxes'][:, :2]
    target = keep_objects(target, (sides > MIN_BOX_SIDE).all(dim=1))
    if len(sides) and not len(target['boxes']):
        return None
    return pad_to_square(*RandomHorizontalFlip()(image, target), size)


def fit_to_masks(target: Target) -> Target:
    """Copy the target with the boxes of its masks; areas are those of the boxes, as in `crop`."""
    boxes_xyxy = mask_extents(target['masks'])
    return {**target, 'boxes': boxes_xyxy, 'area': box_area(boxes_xyxy)}


def mask_extents(masks: Tensor) -> Tensor:
    """Return boxes [T, 4] float32 xyxy at pixel edges of masks [T, H, W] bool; zeros for an empty mask."""
    pixels = masks.view(torch.uint8)  # torch reduces bytes many times faster than bools
    sides = []
    for line in (pixels.amax(dim=1), pixels.amax(dim=2)):  # [T, W], [T, H]
        first, behind_last = line.argmax(dim=1), line.shape[1] - line.flip(1).argmax(dim=1)
        sides.append(torch.stack([first, behind_last], dim=1) * line.amax(dim=1, keepdim=True))
    return torch.stack(sides, dim=2).flatten(1).float()  # [T, 2, 2]: x0, y0, x1, y1


def pick(target: Target) -> Target:
    """Copy the target with 0 to MAX_PASTED of its objects, drawn at random."""
    objects = len(target['boxes'])
    count = random.randint(0, min(objects, MAX_PASTED))
    return keep_objects(target, torch.randperm(objects)[:count])


def paste_objects(image: Tensor, target: Target, source: Tensor, source_target: Target) -> Sample:
    """Paste all objects of a source of the same size over the image, by their masks.

    An object stays if no side of its box moves far, or if many of its pixels are left. It is dropped if no
    pixel is left; the official code would keep a small one with an empty box.
    """
    if not len(source_target['boxes']):
        return image, target
    covered = source_target['masks'].view(torch.uint8).amax(dim=0).bool()  # [S, S]
    visible = fit_to_masks({**target, 'masks': target['masks'] & ~covered})
    moved = (visible['boxes'] - target['boxes']).abs().amax(dim=1)
    pixels = torch.from_numpy(np.count_nonzero(visible['masks'].flatten(1).numpy(), axis=1))  # [T]
    visible = keep_objects(visible, ((moved <= MOVED) | (pixels > STILL_VISIBLE)) & (pixels > 0))
    merged = {key: torch.cat([visible[key], source_target[key]]) for key in OBJECT_FIELDS if key in visible}
    return torch.where(covered, source, image), {**visible, **merged}
