"""Grey images of more than 8 bits a pixel: which of their values become black and white."""

import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
from PIL.TiffImagePlugin import BITSPERSAMPLE, IMAGEDESCRIPTION, PHOTOMETRIC_INTERPRETATION, SAMPLEFORMAT

Range = tuple[float, float]  # values that become 0 and 255
USED = 0.25  # share of a usual range that values must use to get it
WHOLE = 65535
# TIFF tags of the value of black and of white: those of DNG, then of any samples, then of unsigned ones.
BLACK, WHITE = (50714, 340, 280), (50717, 341, 281)
NO_DATA = 42113  # GDAL's TIFF tag: text of the value of pixels that have none


class Extremes(NamedTuple):
    """Lowest and highest value of images, and whether all values are integers."""

    low: float
    high: float
    integers: bool


def is_deep(image: PIL.Image.Image) -> bool:
    """Return whether an image is grey of more than 8 bits, from its header."""
    return image.mode.startswith(('I', 'F'))


def stated_range(image: PIL.Image.Image) -> Range | None:
    """Return the range that the file of a deep image says, from its header, in values as Pillow reads them.

    A range that is that of the file's type says nothing: many programs write it for cameras of fewer bits.
    """
    if image.format == 'JPEG2000':  # Pillow scales its precision to 16 bits
        return 0, WHOLE
    if image.format == 'PPM' and image.mode == 'I':  # Pillow scales maxval to 16 bits
        arguments = getattr(image, 'tile')[0].args  # noqa: B009  # of files alone
        return (0, WHOLE) if isinstance(arguments, tuple) and arguments[1] != WHOLE else None
    if image.format != 'TIFF':
        return None
    tags: Any = getattr(image, 'tag_v2')  # noqa: B009  # of TIFF alone
    bits = int(first_of(tags, (BITSPERSAMPLE,)) or 1)
    significant = re.search(r'SignificantBits="(\d+)"', str(tags.get(IMAGEDESCRIPTION, '')))  # OME-TIFF
    if image.mode != 'F' and significant:
        bits = min(bits, int(significant[1]))
    low, high = first_of(tags, BLACK) or 0.0, first_of(tags, WHITE)
    largest = 1.0 if image.mode == 'F' else 2.0**bits - 1
    if high is not None and low < high and (image.mode == 'F' or high < largest or bits < 16):
        return low, high
    return (0, largest) if image.mode != 'F' and 8 <= bits < 16 else None


def first_of(tags: Any, names: Iterable[int]) -> float | None:
    """Return the first number of the first of these tags that has a finite one."""
    for name in names:
        value = tags.get(name)
        value = value[0] if isinstance(value, tuple) and value else value
        try:
            if value is not None and np.isfinite(number := float(value)):
                return number
        except (TypeError, ValueError, ZeroDivisionError):  # text, and fractions of nothing
            continue
    return None


def deep_values(image: PIL.Image.Image) -> np.ma.MaskedArray:
    """Decode the values [H, W] of a deep image; those that are not finite or mean "no data" are masked."""
    tags = getattr(image, 'tag_v2', {})
    unsigned = image.format == 'TIFF' and image.mode == 'I' and tags.get(SAMPLEFORMAT, (1,))[0] == 1
    values = np.asarray(image)
    if unsigned and tags.get(BITSPERSAMPLE, (0,))[0] == 32:
        values = values.view(np.uint32)
    masked: Any = np.ma.masked_invalid(values) if image.mode == 'F' else np.ma.asarray(values)
    try:
        no_data = float(str(tags.get(NO_DATA, '')).strip('\0 '))
    except ValueError:
        return masked
    return np.ma.masked_where(values == no_data, masked)


def extremes_of(values: np.ma.MaskedArray) -> Extremes | None:
    """Return those of the values of an image; None if all are masked."""
    if not values.count():
        return None
    return Extremes(float(values.min()), float(values.max()), values.dtype.kind != 'f')


def fitting_range(extremes: Iterable[Extremes]) -> Range | None:
    """Return the range of images with these extremes; None if there are none.

    It is the smallest usual one (integers: 0 to 2^bits - 1 from 8 bits on; floats: 0 to 1, or to 255), unless
    the values use only a small part of it; then it is from the lowest value to the highest.
    """
    found = list(extremes)
    if not found:
        return None
    low, high = min(each.low for each in found), max(each.high for each in found)
    integers = all(each.integers for each in found)
    whites = [2.0**bits - 1 for bits in range(8, 33)] if integers else [1.0, 255.0]
    white = next((white for white in whites if high <= white), None)
    if low >= 0 and white is not None and high - low > USED * white:
        return 0.0, white
    return low, max(high, low + 1e-6 * max(1.0, abs(low)))


def as_bytes(image: PIL.Image.Image, pixel_range: Range | None) -> np.ndarray:
    """Decode a deep image as uint8 [H, W]: masked values become black.

    pixel_range: used if the file says no range; None: that of the image's own values.
    """
    stated, inverted = stated_range(image), False
    if image.format == 'TIFF':
        inverted = getattr(image, 'tag_v2').get(PHOTOMETRIC_INTERPRETATION) == 0  # noqa: B009
    values = deep_values(image)
    own = extremes_of(values)
    chosen = stated or pixel_range or fitting_range([own] if own else [])
    if chosen is None:
        return np.zeros(values.shape, dtype=np.uint8)
    if values.dtype.kind == 'u' and values.dtype.itemsize == 2:
        pixels = scaled(np.arange(WHOLE + 1, dtype=np.uint16), chosen)[values.data]
    else:
        pixels = scaled(values.filled(0), chosen)
    if inverted:
        pixels = 255 - pixels
    return np.where(np.ma.getmaskarray(values), np.uint8(0), pixels)


def scaled(values: np.ndarray, pixel_range: Range) -> np.ndarray:
    """Scale values to uint8: those of the range in equal parts, those beyond it are black or white."""
    low, high = pixel_range
    above = np.clip(values.astype(np.float64), low, high) - low
    levels = high + 1 - low
    if values.dtype.kind != 'f' and levels >= 256:  # as many integers for each byte, as an upper byte has
        return (above * 256 / levels).astype(np.uint8)
    return (above * 255 / (high - low) + 0.5).astype(np.uint8)
