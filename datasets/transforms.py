"""
DETR's image transforms on uint8 tensors [3, H, W] (arXiv:2005.12872, appendix; torchvision.transforms.v2 functions).

A transform takes (image, target) and returns both. The target dict is copied, never changed in place, and may be None.
Boxes are xyxy in pixels until `NormalizeBoxes`. Random draws come from Python's `random` and torch's generator in the
official order, so that a seed gives the official image. PIL images pass through the same code. The model scales to [0,
1] and subtracts the mean on its device, because uint8 is a quarter of the traffic.
"""

import argparse
import math
import random
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import PIL.Image
import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.transforms.v2 import functional as F

from util.box_ops import box_area, box_xyxy_to_cxcywh
from util.config.flags import AUGMENTATIONS
from util.errors import UserError

Image = Tensor | PIL.Image.Image
Target = dict[str, Tensor]
Sample = tuple[Tensor, Target]
ImageT = TypeVar('ImageT', Tensor, Image)
TargetT = TypeVar('TargetT', Target, Target | None)


class Transform(Protocol):
    """Callable that changes an image and its target together."""

    def __call__(self, image: ImageT, target: TargetT) -> tuple[ImageT, TargetT]: ...


MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

BASE_SIZE, BASE_MAX_SIZE = 800, 1333
SCALE_STEP = 32  # pixels between two short sides of training
BASE_SCALES = tuple(range(480, 801, SCALE_STEP))
BASE_CROP_SCALES = (400, 500, 600)
BASE_CROP_RANGE = (384, 600)
LSJ_SIZE = 1024
GREY = 114  # around images in a square (mmdetection)
BASE_CROP_MAX_SIZE = 4200  # Co-DETR bounds the long side before its crop too

# Fields with one entry per object. Keypoints are left alone, as in the official code.
OBJECT_FIELDS = ('boxes', 'labels', 'area', 'iscrowd', 'masks')


def image_size(image: Image) -> tuple[int, int]:
    """Return (height, width)."""
    height, width = F.get_size(image)
    return height, width


def crop(image: ImageT, target: TargetT, region: Sequence[int]) -> tuple[ImageT, TargetT]:
    """Cut out region = (top, left, height, width); pixels outside the image are zero.

    Boxes are cut too, and `area` becomes that of the cut box. An object without a box of positive size (if the target
    has no boxes: with an empty mask) is dropped.
    """
    top, left, height, width = region
    cropped = F.crop(image, top, left, height, width)
    if target is None:
        return cropped, None
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


def hflip(image: ImageT, target: TargetT) -> tuple[ImageT, TargetT]:
    """Mirror left and right."""
    flipped = F.horizontal_flip(image)
    if target is None:
        return flipped, None
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

    The long side is truncated, so it may miss max_size by a pixel or two; torchvision's rules give other sizes.
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


def resize(
    image: ImageT, target: TargetT, size: int | Sequence[int], max_size: int | None = None
) -> tuple[ImageT, TargetT]:
    """Resize to `resized_size`, bilinear with antialiasing. Masks are resized to the nearest pixel, and become bool."""
    height, width = image_size(image)
    return resize_to(image, target, resized_size((width, height), size, max_size), antialias=True)


def rescale(image: ImageT, target: TargetT, size: int, max_size: int) -> tuple[ImageT, TargetT]:
    """Resize to `rescaled_size`, bilinear without antialiasing as OpenCV does, and clip boxes (mmdetection)."""
    height, width = image_size(image)
    new_width, new_height = rescaled_size((width, height), size, max_size)
    resized, target = resize_to(image, target, (new_width, new_height), antialias=False)
    if target is not None and 'boxes' in target:
        borders = torch.tensor([new_width, new_height] * 2, dtype=torch.float32)
        target['boxes'] = target['boxes'].clamp(min=0).min(borders)
    return resized, target


def rescaled_size(image_wh: tuple[int, int], size: int, max_size: int) -> tuple[int, int]:
    """Return the largest (width, height) with a short side of at most `size` and a long one of at most `max_size`.

    Each side is rounded on its own, half upwards (mmdetection; other pixels than `resized_size`).
    """
    short, long = min(image_wh), max(image_wh)
    scale = min(max_size / long, size / short)
    width, height = (max(1, int(side * scale + 0.5)) for side in image_wh)
    return width, height


def resize_to(
    image: ImageT, target: TargetT, new_wh: tuple[int, int], antialias: bool
) -> tuple[ImageT, TargetT]:
    """Resize to (width, height), bilinear. Masks are resized to the nearest pixel, and become bool."""
    (old_height, old_width), (width, height) = image_size(image), new_wh
    resized = F.resize(channels_last(image), [height, width], antialias=antialias)
    if target is None:
        return resized, None
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


def channels_last(image: ImageT) -> ImageT:
    """Store the three values of a pixel next to each other: torch resizes such an image three times faster."""
    if not isinstance(image, Tensor):
        return image
    return image.permute(1, 2, 0).contiguous().permute(2, 0, 1)


def pad(image: ImageT, target: TargetT, padding: tuple[int, int], fill: int = 0) -> tuple[ImageT, TargetT]:
    """Add (right, bottom) columns and rows of the value `fill`. Boxes and areas stay."""
    sides = [0, 0, *padding]
    padded = F.pad(image, sides, fill=fill)
    if target is None:
        return padded, None
    target = {**target, 'size': torch.tensor(image_size(padded))}
    if 'masks' in target:
        target['masks'] = F.pad(target['masks'], sides)
    return padded, target


def pad_to_square(image: ImageT, target: TargetT, size: int) -> tuple[ImageT, TargetT]:
    """Pad with grey on the right and below, to size x size pixels."""
    height, width = image_size(image)
    return pad(image, target, (size - width, size - height), GREY)


def seen_size(target: Target) -> Tensor:
    """Return the (height, width) [2] of the part of the prepared image that shows the original, pixels.

    It is the whole prepared image, or the part of the square of `FitSquare` that is not grey.
    """
    return (target['size'] * target['orig_size'] / frame_size(target)).round().long()


def frame_size(target: Target) -> Tensor:
    """Return the (height, width) [2], in pixels of the original image, that boxes in [0, 1] and detections are
    relative to.

    It is the size of the image itself, or of the square around it that `FitSquare` makes.
    """
    return target.get('frame_size', target['orig_size'])


def center_crop(image: ImageT, target: TargetT, size: tuple[int, int]) -> tuple[ImageT, TargetT]:
    """Cut (height, width) out of the middle."""
    (image_h, image_w), (height, width) = image_size(image), size
    top, left = round((image_h - height) / 2), round((image_w - width) / 2)
    return crop(image, target, (top, left, height, width))


def random_region(image: Image, height: int, width: int) -> tuple[int, int, int, int]:
    """Draw a region for `crop`: top before left, from torch. Nothing is drawn if the crop is the whole image."""
    image_h, image_w = image_size(image)
    if (height, width) == (image_h, image_w):
        return 0, 0, height, width
    top = int(torch.randint(0, image_h - height + 1, (1,)))
    left = int(torch.randint(0, image_w - width + 1, (1,)))
    return top, left, height, width


class Compose:
    def __init__(self, transforms: Sequence[Transform]) -> None:
        self.transforms = list(transforms)

    def __call__(self, image: ImageT, target: TargetT) -> tuple[ImageT, TargetT]:
        for transform in self.transforms:
            image, target = transform(image, target)
        return image, target


class RandomSelect:
    """Choice of the first of two transforms with probability p, else the second."""

    def __init__(self, first: Transform, second: Transform, p: float = 0.5) -> None:
        self.first, self.second, self.p = first, second, p

    def __call__(self, image: ImageT, target: TargetT) -> tuple[ImageT, TargetT]:
        chosen = self.first if random.random() < self.p else self.second
        return chosen(image, target)


class RandomHorizontalFlip:
    def __init__(self, p: float = 0.5) -> None:
        self.p = p

    def __call__(self, image: ImageT, target: TargetT) -> tuple[ImageT, TargetT]:
        return hflip(image, target) if random.random() < self.p else (image, target)


class RandomResize:
    """Resizing of the short side to one of the sizes. A single size is drawn too, as in the official code.

    rule: `resize` or `rescale`.
    """

    def __init__(
        self, sizes: Sequence[int], max_size: int | None = None, rule: Callable[..., Any] = resize
    ) -> None:
        self.sizes, self.max_size, self.rule = list(sizes), max_size, rule

    def __call__(self, image: ImageT, target: TargetT) -> tuple[ImageT, TargetT]:
        return self.rule(image, target, random.choice(self.sizes), self.max_size)


class RandomSizeCrop:
    """Crop with sides between min_size and max_size, both included, but not beyond the image."""

    def __init__(self, min_size: int, max_size: int) -> None:
        self.min_size, self.max_size = min_size, max_size

    def __call__(self, image: ImageT, target: TargetT) -> tuple[ImageT, TargetT]:
        image_h, image_w = image_size(image)
        width = self.draw_side(image_w)  # the official code draws the width first
        height = self.draw_side(image_h)
        return crop(image, target, random_region(image, height, width))

    def draw_side(self, image_side: int) -> int:
        return random.randint(min(self.min_size, image_side), min(self.max_size, image_side))


class HeightFirstSizeCrop(RandomSizeCrop):
    """Random crop of `RandomSizeCrop`, but with the height drawn before the width (mmdetection)."""

    def __call__(self, image: ImageT, target: TargetT) -> tuple[ImageT, TargetT]:
        height, width = map(self.draw_side, image_size(image))
        return crop(image, target, random_region(image, height, width))


class FitSquare:
    """Largest copy of the image that fits a square of size x size pixels, in its upper left corner, with grey around.

    `frame_size` is the square's size in original pixels. It is larger than the image, and a box may reach beyond the
    image.
    """

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, image: ImageT, target: TargetT) -> tuple[ImageT, TargetT]:
        image, target = rescale(image, target, self.size, self.size)
        fitted = torch.tensor(image_size(image))
        image, target = pad_to_square(image, target, self.size)
        if target is not None:
            target['frame_size'] = self.size * target['orig_size'] / fitted
        return image, target


class NormalizeBoxes:
    """Last step: uint8 tensor [3, H, W], and boxes as cxcywh relative to it. Area and size stay in pixels."""

    def __call__(self, image: ImageT, target: TargetT) -> tuple[ImageT, TargetT]:
        pixels: Tensor = image if isinstance(image, Tensor) else F.pil_to_tensor(image.convert('RGB'))
        if pixels.dtype != torch.uint8:
            raise ValueError(f'images stay uint8 until they reach the model, but this one is {pixels.dtype}')
        if target is None or 'boxes' not in target:
            return pixels, target
        height, width = image_size(pixels)
        scale = torch.tensor([width, height, width, height], dtype=torch.float32)
        return pixels, {**target, 'boxes': box_xyxy_to_cxcywh(target['boxes']) / scale}


def make_transforms(
    image_set: str,
    img_size: int = BASE_SIZE,
    max_size: int | None = None,
    aug: str = 'detr',
    lsj_size: int = LSJ_SIZE,
    train_scales: Sequence[int] | None = None,
    train_max_size: int | None = None,
) -> Compose:
    """Make the official recipe; another img_size scales all its numbers by img_size / 800.

    Args:
        max_size: bound of the long side; by default 1333, scaled too.
        aug: 'none' trains on the evaluation transform, 'flip' adds a random flip. 'co_detr' is the recipe by
            mmdetection's rules: `rescale` in training and evaluation, and crops whose height is drawn first. 'lsj'
            fits images into squares of lsj_size pixels for evaluation; in training
            datasets.copy_paste.LargeScaleJitter has made squares already.
        train_scales: smallest and largest short side of training, in steps of 32; the other numbers of training are then
            those of the recipe, whatever img_size is.
        train_max_size: bound of the long side in training; by default max_size.
    """
    if image_set not in ('train', 'val'):
        raise ValueError(f'image_set {image_set!r} has no transform: choose train or val')
    if aug not in AUGMENTATIONS:
        raise UserError(f'--aug {aug!r} is not known: choose one of {", ".join(AUGMENTATIONS)}')
    if img_size < 1:
        raise UserError(
            f'--img_size {img_size} is not an image size: choose a positive number, for example 800'
        )
    if aug == 'lsj':
        return Compose(
            [NormalizeBoxes()] if image_set == 'train' else [FitSquare(lsj_size), NormalizeBoxes()]
        )
    max_size = max_size or scaled(BASE_MAX_SIZE, img_size)
    size_crop: type[RandomSizeCrop] = RandomSizeCrop
    crop_max_size: int | None = None
    rule: Callable[..., Any] = resize
    if aug == 'co_detr':
        size_crop, crop_max_size, rule = HeightFirstSizeCrop, scaled(BASE_CROP_MAX_SIZE, img_size), rescale
    if image_set == 'val' or aug in ('flip', 'none'):
        flip = [RandomHorizontalFlip()] if image_set == 'train' and aug == 'flip' else []
        return Compose([*flip, RandomResize([img_size], max_size, rule), NormalizeBoxes()])
    scales = [scaled(size, img_size) for size in BASE_SCALES]
    if train_scales:
        scales, img_size = list(range(train_scales[0], train_scales[1] + 1, SCALE_STEP)), BASE_SIZE
        crop_max_size = BASE_CROP_MAX_SIZE if aug == 'co_detr' else None
    final = RandomResize(scales, train_max_size or max_size, rule)
    zoomed: list[Transform] = [
        RandomResize([scaled(size, img_size) for size in BASE_CROP_SCALES], crop_max_size, rule),
        size_crop(*(scaled(size, img_size) for size in BASE_CROP_RANGE)),
        final,
    ]
    return Compose([RandomHorizontalFlip(), RandomSelect(final, Compose(zoomed)), NormalizeBoxes()])


def transforms_of(image_set: str, args: argparse.Namespace) -> Compose:
    """Make the recipe of the arguments, or of a checkpoint's."""
    lsj_size = getattr(args, 'lsj_size', LSJ_SIZE)  # older checkpoints have none
    scales, train_max_size = (getattr(args, name, None) for name in ('train_scales', 'train_max_size'))
    return make_transforms(
        image_set, args.img_size, args.max_size, args.aug, lsj_size, scales, train_max_size
    )


def scaled(size: int, img_size: int) -> int:
    """Scale a size of the 800-pixel recipe to img_size: at least one pixel, rounded half upwards."""
    return max(1, math.floor(size * img_size / BASE_SIZE + 0.5))
