"""
DETR's image transforms on uint8 tensors [3, H, W] (arXiv:2005.12872, appendix; torchvision.transforms.v2
functions).

A transform takes (image, target) and returns both. The target dict is copied, never changed in place, and may
be empty. Boxes are xyxy in pixels until `NormalizeBoxes`. Random draws come from Python's `random` and
torch's generator in the official order, so that a seed gives the official image. The model scales to [0, 1]
and subtracts the mean on its device, because uint8 is a quarter of the traffic.
"""

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.transforms.v2 import functional as F

from util.box_ops import box_area, box_xyxy_to_cxcywh

Target = dict[str, Tensor]
Sample = tuple[Tensor, Target]
# Mixes an image and its target with other images, which the function argument draws at random, untransformed.
Mix = Callable[[Tensor, Target, Callable[[], Sample]], Sample]


class Transform(Protocol):
    """Callable that changes an image and its target together."""

    def __call__(self, image: Tensor, target: Target) -> Sample: ...


GREY = 114  # around images in a square (mmdetection)

# Fields with one entry per object. Keypoints are left alone, as in the official code.
OBJECT_FIELDS = ('boxes', 'labels', 'area', 'iscrowd', 'masks')


def image_size(image: Tensor) -> tuple[int, int]:
    """Return (height, width)."""
    height, width = image.shape[-2:]
    return height, width


def crop(image: Tensor, target: Target, region: Sequence[int]) -> Sample:
    """Cut out region = (top, left, height, width); pixels outside the image are zero.

    Boxes are cut too, and `area` becomes that of the cut box. An object without a box of positive size (if
    the target has no boxes: with an empty mask) is dropped.
    """
    top, left, height, width = region
    cropped = F.crop(image, top, left, height, width)
    target = {**target, 'size': torch.tensor([height, width])}
    if 'masks' in target:
        target['masks'] = F.crop(target['masks'], top, left, height, width)
    if 'boxes' in target:
        boxes_xyxy = target['boxes'] - torch.tensor([left, top, left, top], dtype=torch.float32)
        boxes_xyxy = boxes_xyxy.min(torch.tensor([width, height] * 2, dtype=torch.float32)).clamp(min=0)
        target['boxes'] = boxes_xyxy
        target['area'] = box_area(boxes_xyxy)
        return cropped, keep_objects(target, (boxes_xyxy[:, 2:] > boxes_xyxy[:, :2]).all(dim=1))
    if 'masks' in target:
        return cropped, keep_objects(target, target['masks'].flatten(1).any(dim=1))
    return cropped, target


def keep_objects(target: Target, keep: Tensor) -> Target:
    """Copy the target with the objects where keep [T] is True, or with the numbers keep."""
    return {key: value[keep] if key in OBJECT_FIELDS else value for key, value in target.items()}


def hflip(image: Tensor, target: Target) -> Sample:
    """Mirror left and right."""
    flipped = F.horizontal_flip(image)
    target = dict(target)
    if 'boxes' in target:
        _, width = image_size(image)
        x0, y0, x1, y1 = target['boxes'].unbind(-1)
        target['boxes'] = torch.stack([width - x1, y0, width - x0, y1], dim=-1)
    if 'masks' in target:
        target['masks'] = target['masks'].flip(-1)
    return flipped, target


def resized_size(
    image_wh: tuple[int, int], size: int | Sequence[int], max_size: int | None = None
) -> tuple[int, int]:
    """Return (width, height) after resizing the short side to `size`, or `size` itself if it is such a pair.

    The long side is truncated, so it may miss max_size by a pixel or two; torchvision's rules give other
    sizes.
    """
    if not isinstance(size, int):
        width, height = size
        return width, height
    width, height = image_wh
    short, long = min(width, height), max(width, height)
    if max_size is not None and long / short * size > max_size:
        size = max(1, round(max_size * short / long))
    if short == size:
        return width, height
    if width < height:
        return size, int(size * height / width)
    return int(size * width / height), size


def resize(image: Tensor, target: Target, size: int | Sequence[int], max_size: int | None = None) -> Sample:
    """Resize to `resized_size`, bilinear with antialiasing. Masks are resized to the nearest pixel, and
    become bool.
    """
    height, width = image_size(image)
    return resize_to(image, target, resized_size((width, height), size, max_size), antialias=True)


def rescale(image: Tensor, target: Target, size: int, max_size: int) -> Sample:
    """Resize to `rescaled_size`, bilinear without antialiasing as OpenCV, and clip boxes (mmdetection)."""
    height, width = image_size(image)
    new_width, new_height = rescaled_size((width, height), size, max_size)
    resized, target = resize_to(image, target, (new_width, new_height), antialias=False)
    if 'boxes' in target:
        borders = torch.tensor([new_width, new_height] * 2, dtype=torch.float32)
        target['boxes'] = target['boxes'].clamp(min=0).min(borders)
    return resized, target


def rescaled_size(image_wh: tuple[int, int], size: int, max_size: int) -> tuple[int, int]:
    """Return the largest (width, height) with a short side of at most `size` and a long one of at most
    `max_size`.

    Each side is rounded on its own, half upwards (mmdetection; other pixels than `resized_size`).
    """
    short, long = min(image_wh), max(image_wh)
    scale = min(max_size / long, size / short)
    width, height = (max(1, int(side * scale + 0.5)) for side in image_wh)
    return width, height


def resize_to(image: Tensor, target: Target, new_wh: tuple[int, int], antialias: bool) -> Sample:
    """Resize to (width, height), bilinear. Masks are resized to the nearest pixel, and become bool."""
    (old_height, old_width), (width, height) = image_size(image), new_wh
    resized = F.resize(channels_last(image), [height, width], antialias=antialias)
    target = {**target, 'size': torch.tensor([height, width])}
    ratio_w, ratio_h = width / old_width, height / old_height
    if 'boxes' in target:
        target['boxes'] = target['boxes'] * torch.tensor([ratio_w, ratio_h] * 2, dtype=torch.float32)
    if 'area' in target:
        target['area'] = target['area'] * (ratio_w * ratio_h)
    if 'masks' in target:
        masks = target['masks'].to(torch.uint8)[:, None]
        target['masks'] = interpolate(masks, (height, width), mode='nearest')[:, 0].bool()
    return resized, target


def channels_last(image: Tensor) -> Tensor:
    """Store the three values of a pixel next to each other: torch resizes the image three times faster."""
    return image.permute(1, 2, 0).contiguous().permute(2, 0, 1)


def pad(image: Tensor, target: Target, padding: tuple[int, int], fill: int = 0) -> Sample:
    """Add (right, bottom) columns and rows of the value `fill`. Boxes and areas stay."""
    sides = [0, 0, *padding]
    padded = F.pad(image, sides, fill=fill)
    target = {**target, 'size': torch.tensor(image_size(padded))}
    if 'masks' in target:
        target['masks'] = F.pad(target['masks'], sides)
    return padded, target


def pad_to_square(image: Tensor, target: Target, size: int) -> Sample:
    """Pad with grey on the right and below, to size x size pixels."""
    height, width = image_size(image)
    return pad(image, target, (size - width, size - height), GREY)


def random_region(image: Tensor, height: int, width: int) -> tuple[int, int, int, int]:
    """Draw a region for `crop`, top before left, from torch; nothing if the crop is the whole image."""
    image_h, image_w = image_size(image)
    if (height, width) == (image_h, image_w):
        return 0, 0, height, width
    top = int(torch.randint(0, image_h - height + 1, (1,)))
    left = int(torch.randint(0, image_w - width + 1, (1,)))
    return top, left, height, width


@dataclass
class Compose:
    transforms: Sequence[Transform]

    def __call__(self, image: Tensor, target: Target) -> Sample:
        for transform in self.transforms:
            image, target = transform(image, target)
        return image, target


@dataclass
class RandomSelect:
    """Choice of the first of two transforms with probability p, else the second."""

    first: Transform
    second: Transform
    p: float = 0.5

    def __call__(self, image: Tensor, target: Target) -> Sample:
        chosen = self.first if random.random() < self.p else self.second
        return chosen(image, target)


@dataclass
class RandomHorizontalFlip:
    p: float = 0.5

    def __call__(self, image: Tensor, target: Target) -> Sample:
        return hflip(image, target) if random.random() < self.p else (image, target)


@dataclass
class RandomResize:
    """Resizing of the short side to one of the sizes. A single size is drawn too, as in the official code.

    rule: `resize` or `rescale`.
    """

    sizes: Sequence[int]
    max_size: int | None = None
    rule: Callable[..., Any] = resize

    def __call__(self, image: Tensor, target: Target) -> Sample:
        return self.rule(image, target, random.choice(self.sizes), self.max_size)


@dataclass
class RandomSizeCrop:
    """Crop with sides between min_size and max_size, both included, but not beyond the image.

    height_first: draw the height before the width, as mmdetection does.
    """

    min_size: int
    max_size: int
    height_first: bool = False

    def __call__(self, image: Tensor, target: Target) -> Sample:
        sides = image_size(image)
        if self.height_first:
            height, width = map(self.draw_side, sides)
        else:
            width, height = map(self.draw_side, reversed(sides))
        return crop(image, target, random_region(image, height, width))

    def draw_side(self, image_side: int) -> int:
        return random.randint(min(self.min_size, image_side), min(self.max_size, image_side))


@dataclass
class FitSquare:
    """Largest copy of the image that fits a square of size x size pixels, in its upper left corner, with grey
    around.

    `frame_size` is the square's size in original pixels. It is larger than the image, and a box may reach
    beyond the image.
    """

    size: int

    def __call__(self, image: Tensor, target: Target) -> Sample:
        image, target = rescale(image, target, self.size, self.size)
        fitted = torch.tensor(image_size(image))
        image, target = pad_to_square(image, target, self.size)
        if 'orig_size' in target:
            target['frame_size'] = self.size * target['orig_size'] / fitted
        return image, target


def size_after(transform: Transform, original: Iterable[int]) -> tuple[int, int]:
    """Return the (height, width) that an image of the (height, width) `original` gets.

    The transform acts on an image without pixels, and draws the random numbers that it would draw for the
    image.
    """
    image, _ = transform(torch.empty(3, *map(int, original), dtype=torch.uint8, device='meta'), {})
    return image_size(image)


@dataclass
class ImageOnly:
    """A change of colours, such as a transform of torchvision.transforms.v2, that leaves the target alone."""

    change: Callable[[Any], Any]

    def __call__(self, image: Tensor, target: Target) -> Sample:
        return self.change(image), target


class NormalizeBoxes:
    """Last step: uint8 tensor [3, H, W], and boxes as cxcywh relative to it. Area and size stay in pixels."""

    def __call__(self, image: Tensor, target: Target) -> Sample:
        if image.dtype != torch.uint8:
            raise ValueError(f'images stay uint8 until they reach the model, but this one is {image.dtype}')
        if 'boxes' not in target:
            return image, target
        height, width = image_size(image)
        scale = torch.tensor([width, height, width, height], dtype=torch.float32)
        return image, {**target, 'boxes': box_xyxy_to_cxcywh(target['boxes']) / scale}
