"""
What --aug chooses: a class for each of its values, with everything that depends on it.

An augmentation has the transforms of both parts, a step that mixes training images, the rules by which
annotations are read, and the sizes of images. A new one is a class here, an entry in `AUGMENTATIONS`, and its
name in `util.config.flags.AUGMENTATIONS`.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

from datasets.transforms import (
    Compose,
    FitSquare,
    Mix,
    NormalizeBoxes,
    RandomHorizontalFlip,
    RandomResize,
    RandomSelect,
    RandomSizeCrop,
    Transform,
    rescale,
    resize,
    size_after,
)
from util.errors import UserError

BASE_SIZE, BASE_MAX_SIZE = 800, 1333
SCALE_STEP = 32  # pixels between two short sides of training
BASE_SCALES = (480, 800)
BASE_CROP_SCALES = (400, 500, 600)
BASE_CROP_RANGE = (384, 600)
MMDETECTION_CROP_MAX_SIZE = 4200  # Co-DETR bounds the long side before its crop too
MMDETECTION_MIN_SIDE = 32


def scaled(size: int, img_size: int) -> int:
    """Scale a size of the 800-pixel recipe to img_size: at least one pixel, rounded half upwards."""
    return max(1, math.floor(size * img_size / BASE_SIZE + 0.5))


class NoAugmentation:
    """Training images as at evaluation, and what all augmentations share.

    Args:
        img_size: shorter side at evaluation, pixels; all other numbers of a recipe are in proportion to it.
        max_size: bound of the longer side; by default 1333 in proportion.
        train_scales: smallest and largest short side of training, in steps of 32; the other numbers of
            training are then those of an img_size of 800.
        train_max_size: bound of the longer side in training; by default max_size.
    """

    rule: Callable[..., Any] = staticmethod(resize)  # how an image gets a size, `resize` or `rescale`
    drop_tiny = False  # leave out objects narrower or lower than a pixel, and those without area
    min_image_side = 0  # leave out training images with a smaller side, pixels

    def __init__(
        self,
        img_size: int = BASE_SIZE,
        max_size: int | None = None,
        train_scales: Sequence[int] | None = None,
        train_max_size: int | None = None,
    ) -> None:
        if img_size < 1:
            raise UserError(
                f'--img_size {img_size} is not an image size: choose a positive number, for example 800'
            )
        self.img_size, self.train_scales = img_size, train_scales
        self.max_size = max_size or scaled(BASE_MAX_SIZE, img_size)
        self.train_max_size = train_max_size or self.max_size

    def train(self) -> list[Transform]:
        """Return the steps of a training image, after `mix`."""
        return self.val()

    def val(self) -> list[Transform]:
        """Return the steps of an image at evaluation."""
        return [RandomResize([self.img_size], self.max_size, self.rule)]

    def transforms(self, part: str) -> Compose:
        """Return the transforms of the part 'train' or 'val'."""
        return Compose([*(self.train() if part == 'train' else self.val()), NormalizeBoxes()])

    def mix(self, part: str, keep_masks: bool) -> Mix | None:
        """Return the step that mixes an image with further ones, before the transforms, or None.

        keep_masks: the targets keep their masks.
        """
        return None

    def evaluated_size(self, original: tuple[int, int]) -> tuple[int, int]:
        """Return the (height, width) at evaluation of an image of the (height, width) `original`, pixels."""
        return size_after(self.transforms('val'), original)

    def largest_size(self) -> tuple[int, int]:
        """Return bounds of the shorter and the longer side of a training image, pixels."""
        return max(self.train_scales or [self.img_size]), self.train_max_size


class FlipOnly(NoAugmentation):
    """A random flip."""

    def train(self) -> list[Transform]:
        return [RandomHorizontalFlip(), *self.val()]


class DETRAugmentation(NoAugmentation):
    """Flip, scale and crop (DETR, arXiv:2005.12872, Appendix A.4)."""

    height_first = False  # of a crop, the height is drawn before the width
    crop_max_size: int | None = None  # bound of the longer side before a crop, of the 800-pixel recipe

    def train(self) -> list[Transform]:
        size = BASE_SIZE if self.train_scales else self.img_size
        low, high = self.train_scales or BASE_SCALES
        scales = [scaled(short, size) for short in range(low, high + 1, SCALE_STEP)]
        whole = RandomResize(scales, self.train_max_size, self.rule)
        crop_max_size = self.crop_max_size and scaled(self.crop_max_size, size)
        smallest, largest = (scaled(side, size) for side in BASE_CROP_RANGE)
        zoomed: list[Transform] = [
            RandomResize([scaled(short, size) for short in BASE_CROP_SCALES], crop_max_size, self.rule),
            RandomSizeCrop(smallest, largest, self.height_first),
            whole,
        ]
        return [RandomHorizontalFlip(), RandomSelect(whole, Compose(zoomed))]


class CoDETRAugmentation(DETRAugmentation):
    """DETR's augmentation by mmdetection's rules of resizing and reading (Co-DETR, arXiv:2211.12860)."""

    rule = staticmethod(rescale)
    height_first = True
    crop_max_size = MMDETECTION_CROP_MAX_SIZE
    drop_tiny, min_image_side = True, MMDETECTION_MIN_SIDE


class SquareJitter(NoAugmentation):
    """Squares of img_size pixels: large-scale jitter and copy-paste (arXiv:2012.07177), as Co-DETR trains."""

    drop_tiny, min_image_side = True, MMDETECTION_MIN_SIDE

    def __init__(self, img_size: int = 1024, **others: object) -> None:
        super().__init__(img_size, max_size=img_size)

    def train(self) -> list[Transform]:
        return []  # `mix` makes squares

    def val(self) -> list[Transform]:
        return [FitSquare(self.img_size)]

    def mix(self, part: str, keep_masks: bool) -> Mix | None:
        from datasets.copy_paste import LargeScaleJitter  # detection alone does not load it

        return LargeScaleJitter(self.img_size, keep_masks) if part == 'train' else None


# Value of --aug -> its class; `util.config.flags.AUGMENTATIONS` describes them in words.
AUGMENTATIONS: dict[str, type[NoAugmentation]] = {
    'detr': DETRAugmentation,
    'flip': FlipOnly,
    'none': NoAugmentation,
    'co_detr': CoDETRAugmentation,
    'lsj': SquareJitter,
}
SIZES = ('img_size', 'max_size', 'train_scales', 'train_max_size')


def build_augmentation(settings: object) -> NoAugmentation:
    """Build the augmentation of flags, or of settings of the same names; missing ones have their defaults.

    Raises:
        UserError: --aug or --img_size has no meaning.
    """
    aug = getattr(settings, 'aug', 'detr')
    if aug not in AUGMENTATIONS:
        raise UserError(f'--aug {aug!r} is not known: choose one of {", ".join(AUGMENTATIONS)}')
    sizes = {name: getattr(settings, name, None) for name in SIZES}
    return AUGMENTATIONS[aug](**{name: value for name, value in sizes.items() if value is not None})
