"""Segmentations in COCO form: polygons, and run-length masks, compressed or not."""

import sys

from pycocotools import mask as coco_mask

LARGEST = 1e6  # pixels; no image is larger, and float32 has no exact pixels beyond


def is_finite(value: object) -> bool:
    return isinstance(value, int | float) and abs(value) <= sys.float_info.max  # an integer may be beyond


def run_lengths(segmentation: dict) -> dict:
    """Return a run-length mask in compressed form; pycocotools crashes if it does not fit its image.

    Raises:
        ValueError, TypeError, KeyError: it is invalid.
    """
    height, width = segmentation['size']
    counts = segmentation['counts']
    are_positive = isinstance(height, int) and isinstance(width, int) and min(height, width) > 0
    # The evaluators count pixels in 32 bits.
    if not are_positive or max(height, width) > LARGEST or height * width >= 1 << 32:
        raise ValueError(f'its size is {segmentation["size"]}')
    numbers = decompressed(counts) if isinstance(counts, str | bytes) else counts
    if not all(type(number) is int and number >= 0 for number in numbers) or sum(numbers) != height * width:
        raise ValueError(f'its run lengths do not cover {height} x {width} pixels')
    if numbers is counts:
        return coco_mask.frPyObjects(segmentation, height, width)
    return segmentation


def decompressed(counts: str | bytes) -> list[int]:
    """Decode COCO's text of run lengths: 5 bits a character, numbers relative to the one before the last."""
    data = counts.encode('ascii') if isinstance(counts, str) else counts
    numbers: list[int] = []
    value = shift = 0
    for character in data:
        bits = character - 48
        if not 0 <= bits < 64 or shift > 30:
            raise ValueError('its text is not compressed run lengths')
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            value -= (1 << shift) if bits & 16 else 0
            numbers.append(value + (numbers[-2] if len(numbers) > 2 else 0))
            value = shift = 0
    if shift:
        raise ValueError('its text ends within a number')
    return numbers


def polygons_of(segmentation: list) -> list[list[float]]:
    """Return the polygons that cover something; those of fewer than three corners do not.

    Raises:
        ValueError, TypeError: they are no lists of numbers.
    """
    if not isinstance(segmentation, list) or not all(isinstance(polygon, list) for polygon in segmentation):
        raise TypeError('polygons are lists of numbers')
    for polygon in segmentation:
        if not all(map(is_finite, polygon)) or max(map(abs, polygon), default=0) > LARGEST:
            raise ValueError('its corners are not all pixels')
    return [polygon[: len(polygon) // 2 * 2] for polygon in segmentation if len(polygon) >= 6]


def box_around(segmentation: list | dict) -> list[float]:
    """Return x, y, width and height of polygons, or of a run-length mask."""
    if isinstance(segmentation, dict):
        return coco_mask.toBbox(run_lengths(segmentation)).tolist()
    xs = [float(x) for polygon in segmentation for x in polygon[0::2]]
    ys = [float(y) for polygon in segmentation for y in polygon[1::2]]
    return [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]
