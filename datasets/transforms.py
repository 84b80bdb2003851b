"""
DETR's picture transforms on uint8 tensors [3, H, W] (arXiv:2005.12872, appendix; torchvision.transforms.v2
functions).

A transform takes (picture, target) and returns both; the target dict is copied, never changed in place, and
may be None. Boxes are xyxy in pixels until `NormalizeBoxes`. Random draws come from Python's `random` and
torch's generator in the official order, so that a seed gives the official picture. PIL pictures pass through
the same code. Scaling to [0, 1] and subtracting the mean is left to the model, on its device: uint8 is a
quarter of the traffic.
"""

import math
import random
from collections.abc import Callable, Sequence

import PIL.Image
import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.transforms.v2 import functional as F

from util.box_ops import box_area, box_xyxy_to_cxcywh

Picture = Tensor | PIL.Image.Image
Target = dict[str, Tensor]
Sample = tuple[Picture, Target | None]
Transform = Callable[[Picture, Target | None], Sample]

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

AUGMENTATIONS = ('detr', 'flip', 'none')
BASE_SIZE, BASE_MAX_SIZE = 800, 1333
BASE_SCALES = tuple(range(480, 801, 32))
BASE_CROP_SCALES = (400, 500, 600)
BASE_CROP_RANGE = (384, 600)

# What belongs to one object each. Keypoints are left alone, as in the official code.
OBJECT_FIELDS = ('boxes', 'labels', 'area', 'iscrowd', 'masks')


def picture_size(picture: Picture) -> tuple[int, int]:
    """(height, width)."""
    height, width = F.get_size(picture)
    return height, width


def crop(picture: Picture, target: Target | None, region: Sequence[int]) -> Sample:
    """Cut out region = (top, left, height, width); what lies outside the picture is zero.

    Objects keep what is left of their boxes, and `area` becomes that of the cut box. An object without a box
    of positive size (without boxes in the target: with an empty mask) is dropped.
    """
    top, left, height, width = region
    cropped = F.crop(picture, top, left, height, width)
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
    """Copy of the target with the objects where keep [T] is True."""
    return {key: value[keep] if key in OBJECT_FIELDS else value for key, value in target.items()}


def hflip(picture: Picture, target: Target | None) -> Sample:
    """Mirror left and right."""
    flipped = F.horizontal_flip(picture)
    if target is None:
        return flipped, None
    target = dict(target)
    if 'boxes' in target:
        _, width = picture_size(picture)
        x0, y0, x1, y1 = target['boxes'].unbind(-1)
        target['boxes'] = torch.stack([width - x1, y0, width - x0, y1], dim=-1)
    if 'masks' in target:
        target['masks'] = target['masks'].flip(-1)
    return flipped, target


def resized_size(
    picture_wh: tuple[int, int], size: int | Sequence[int], max_size: int | None = None
) -> tuple[int, int]:
    """(width, height) after resizing the short side to `size`, or to the pair (width, height) `size` itself.

    The long side is truncated, so it may miss max_size by a pixel or two; torchvision's rules give other
    sizes.
    """
    if not isinstance(size, int):
        width, height = size
        return width, height
    width, height = picture_wh
    short, long = min(width, height), max(width, height)
    if max_size is not None and long / short * size > max_size:
        size = max(1, round(max_size * short / long))
    if short == size:
        return width, height
    if width < height:
        return size, int(size * height / width)
    return int(size * width / height), size


def resize(
    picture: Picture, target: Target | None, size: int | Sequence[int], max_size: int | None = None
) -> Sample:
    """Bilinear with antialiasing, to `resized_size`. Masks: nearest, and bool afterwards."""
    old_height, old_width = picture_size(picture)
    width, height = resized_size((old_width, old_height), size, max_size)
    resized = F.resize(pixels_together(picture), [height, width], antialias=True)
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


def pixels_together(picture: Picture) -> Picture:
    """The same picture with the three values of a pixel side by side in memory: torch resizes that three
    times faster.
    """
    if not isinstance(picture, Tensor):
        return picture
    return picture.permute(1, 2, 0).contiguous().permute(2, 0, 1)


def pad(picture: Picture, target: Target | None, padding: tuple[int, int]) -> Sample:
    """Add (right, bottom) zero columns and rows. Boxes and areas stay."""
    sides = [0, 0, *padding]
    padded = F.pad(picture, sides)
    if target is None:
        return padded, None
    target = {**target, 'size': torch.tensor(picture_size(padded))}
    if 'masks' in target:
        target['masks'] = F.pad(target['masks'], sides)
    return padded, target


def center_crop(picture: Picture, target: Target | None, size: tuple[int, int]) -> Sample:
    """Cut (height, width) out of the middle."""
    (picture_h, picture_w), (height, width) = picture_size(picture), size
    top, left = round((picture_h - height) / 2), round((picture_w - width) / 2)
    return crop(picture, target, (top, left, height, width))


def random_region(picture: Picture, height: int, width: int) -> tuple[int, int, int, int]:
    """Place for a crop: top is drawn before left, from torch; nothing is drawn when the crop is the whole
    picture.
    """
    picture_h, picture_w = picture_size(picture)
    if (height, width) == (picture_h, picture_w):
        return 0, 0, height, width
    top = int(torch.randint(0, picture_h - height + 1, (1,)))
    left = int(torch.randint(0, picture_w - width + 1, (1,)))
    return top, left, height, width


class Compose:
    def __init__(self, transforms: Sequence[Transform]) -> None:
        self.transforms = list(transforms)

    def __call__(self, picture: Picture, target: Target | None) -> Sample:
        for transform in self.transforms:
            picture, target = transform(picture, target)
        return picture, target


class RandomSelect:
    """The first of two transforms with probability p, else the second."""

    def __init__(self, first: Transform, second: Transform, p: float = 0.5) -> None:
        self.first, self.second, self.p = first, second, p

    def __call__(self, picture: Picture, target: Target | None) -> Sample:
        chosen = self.first if random.random() < self.p else self.second
        return chosen(picture, target)


class RandomHorizontalFlip:
    def __init__(self, p: float = 0.5) -> None:
        self.p = p

    def __call__(self, picture: Picture, target: Target | None) -> Sample:
        return hflip(picture, target) if random.random() < self.p else (picture, target)


class RandomResize:
    """Short side to one of the sizes; a single size is drawn too, since the official code does."""

    def __init__(self, sizes: Sequence[int], max_size: int | None = None) -> None:
        self.sizes, self.max_size = list(sizes), max_size

    def __call__(self, picture: Picture, target: Target | None) -> Sample:
        return resize(picture, target, random.choice(self.sizes), self.max_size)


class RandomSizeCrop:
    """Crop with sides between min_size and max_size, both included, as far as the picture has them."""

    def __init__(self, min_size: int, max_size: int) -> None:
        self.min_size, self.max_size = min_size, max_size

    def __call__(self, picture: Picture, target: Target | None) -> Sample:
        picture_h, picture_w = picture_size(picture)
        width = self.draw_side(picture_w)  # the official code draws the width first
        height = self.draw_side(picture_h)
        return crop(picture, target, random_region(picture, height, width))

    def draw_side(self, picture_side: int) -> int:
        return random.randint(min(self.min_size, picture_side), min(self.max_size, picture_side))


class RandomCrop:
    """Crop of (height, width) anywhere in the picture."""

    def __init__(self, size: tuple[int, int]) -> None:
        self.size = size

    def __call__(self, picture: Picture, target: Target | None) -> Sample:
        return crop(picture, target, random_region(picture, *self.size))


class CenterCrop:
    """Crop of (height, width) in the middle."""

    def __init__(self, size: tuple[int, int]) -> None:
        self.size = size

    def __call__(self, picture: Picture, target: Target | None) -> Sample:
        return center_crop(picture, target, self.size)


class RandomPad:
    """Up to max_pad zero columns on the right, then up to max_pad rows below."""

    def __init__(self, max_pad: int) -> None:
        self.max_pad = max_pad

    def __call__(self, picture: Picture, target: Target | None) -> Sample:
        right, bottom = random.randint(0, self.max_pad), random.randint(0, self.max_pad)
        return pad(picture, target, (right, bottom))


class NormalizeBoxes:
    """Last step: the picture as a uint8 tensor [3, H, W], boxes as cxcywh relative to it. Area and size stay
    in pixels.
    """

    def __call__(self, picture: Picture, target: Target | None) -> tuple[Tensor, Target | None]:
        if not isinstance(picture, Tensor):
            picture = F.pil_to_tensor(picture.convert('RGB'))
        if picture.dtype != torch.uint8:
            raise ValueError(
                f'pictures stay uint8 until they reach the model, but this one is {picture.dtype}'
            )
        if target is None or 'boxes' not in target:
            return picture, target
        height, width = picture_size(picture)
        scale = torch.tensor([width, height, width, height], dtype=torch.float32)
        return picture, {**target, 'boxes': box_xyxy_to_cxcywh(target['boxes']) / scale}


def make_transforms(
    image_set: str, img_size: int = BASE_SIZE, max_size: int | None = None, aug: str = 'detr'
) -> Compose:
    """The official recipe; another img_size scales every number of it by img_size / 800.

    max_size: bound of the long side; by default 1333, scaled too. aug 'none' trains on the evaluation
    transform, 'flip' on that after a random flip.
    """
    if image_set not in ('train', 'val'):
        raise ValueError(f'image_set {image_set!r} has no transform: choose train or val')
    if aug not in AUGMENTATIONS:
        raise ValueError(f'--aug {aug!r} is not known: choose one of {", ".join(AUGMENTATIONS)}')
    if img_size < 1:
        raise ValueError(
            f'--img_size {img_size} is not a picture size: choose a positive number, for example 800'
        )
    max_size = max_size or scaled(BASE_MAX_SIZE, img_size)
    if image_set == 'val' or aug != 'detr':
        flip = [RandomHorizontalFlip()] if image_set == 'train' and aug == 'flip' else []
        return Compose([*flip, RandomResize([img_size], max_size), NormalizeBoxes()])
    final = RandomResize([scaled(size, img_size) for size in BASE_SCALES], max_size)
    zoomed = [
        RandomResize([scaled(size, img_size) for size in BASE_CROP_SCALES]),
        RandomSizeCrop(*(scaled(size, img_size) for size in BASE_CROP_RANGE)),
        final,
    ]
    return Compose([RandomHorizontalFlip(), RandomSelect(final, Compose(zoomed)), NormalizeBoxes()])


def scaled(size: int, img_size: int) -> int:
    """A size of the 800-pixel recipe for another img_size, at least one pixel; rounded, half upwards."""
    return max(1, math.floor(size * img_size / BASE_SIZE + 0.5))
