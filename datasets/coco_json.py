"""
Annotation files in COCO form: what is mended, and what is refused with a clear error at the start of a run.

Legal, as in the official pipeline: boxes of no size, boxes that leave the image, images without objects. docs/data.md
has the whole policy.
"""

import os
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from pycocotools import mask as coco_mask

from datasets.class_map import ClassMap
from datasets.json_stream import has_lists, list_blocks
from util.errors import FileError, UserError

Annotations = dict[str, list[dict]]
File = str | os.PathLike[str]
# What reads an annotation file, as lists of entries in COCO form with their names, in blocks.
Blocks = Callable[[File], Iterator[tuple[str, list]]]
LISTS = ('images', 'annotations', 'categories')
LARGEST = 1e6  # pixels; no image is larger, and float32 has no exact pixels beyond
EXAMPLES = 3


class Findings:
    """Odd things that are kept, mended or dropped: how many of each kind, and the first of them."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.examples: dict[str, list[str]] = {}

    def add(self, kind: str, example: str, number: int = 1) -> None:
        """Count one more of a kind."""
        self.counts[kind] += number
        examples = self.examples.setdefault(kind, [])
        if len(examples) < EXAMPLES:
            examples.append(example)

    def lines(self) -> list[str]:
        """Return a sentence for each kind."""
        return [
            f'{number} {kind} ({", ".join(self.examples[kind])}{", ..." if number > EXAMPLES else ""})'
            for kind, number in sorted(self.counts.items())
        ]


def read_annotations(file: File, blocks: Blocks = list_blocks) -> Annotations:
    """Return the file's lists, mended (`mend`), as evaluation needs them. Training reads `datasets.annotations`.

    blocks: what reads the file, in the format's own way.

    Raises:
        FileError: the file does not exist.
        UserError: it is not JSON, or lacks one of the lists.
    """
    data: Annotations = {}
    for name, block in blocks(file):
        if name in LISTS:
            mend(name, block, file, Findings())
            data.setdefault(name, []).extend(block)
    has_lists(file, data, LISTS)
    numbers = numbers_of([image['id'] for image in data['images']])
    if numbers:
        for image in data['images']:
            image['id'] = numbers[image['id']]
        for annotation in data['annotations']:
            annotation['image_id'] = numbers.get(annotation.get('image_id'))
    return data


def mend(name: str, block: list[dict], file: File, findings: Findings) -> None:
    """Mend entries of a list in place: numbers written as text or as 1.0, names and boxes that other fields give.

    Raises:
        UserError: an entry is no JSON object, or a segmentation or an iscrowd is none.
    """
    keys = ('image_id', 'category_id') if name == 'annotations' else ('id',)
    for entry in block:
        if not isinstance(entry, dict):
            raise UserError(f'{file}: "{name}" has {str(entry)[:40]!r}, which is no object in braces')
        for key in keys:
            if type(entry.get(key)) is not int and (number := as_id(entry.get(key))) is not None:
                findings.add(f'{key} of {name} not written as integers', repr(entry[key]))
                entry[key] = number
        if name == 'images' and not entry.get('file_name') and isinstance(entry.get('coco_url'), str):  # LVIS
            entry['file_name'] = '/'.join(urlparse(entry['coco_url']).path.split('/')[-2:])
        if name == 'annotations' and not entry.get('bbox') and entry.get('segmentation'):
            try:
                entry['bbox'] = box_around(entry['segmentation'])
            except (ValueError, TypeError, KeyError, IndexError) as error:
                raise UserError(
                    f'{file}: {title_of(entry)} has no bbox, and its segmentation gives none ({error}): correct one of them'
                ) from None
            findings.add('annotations without bbox, which was made from the segmentation', title_of(entry))
        if name == 'annotations' and entry.get('iscrowd') is not None:
            crowd = entry['iscrowd']
            if type(crowd) is not int:
                findings.add('iscrowd of annotations not written as integers', repr(crowd))
                entry['iscrowd'] = int(crowd) if isinstance(crowd, bool) else as_id(crowd)
            if entry['iscrowd'] not in (0, 1):
                raise UserError(
                    f'{file}: {title_of(entry)} has iscrowd {str(crowd)[:40]!r}: it must be 0 or 1'
                )


def as_id(value: Any) -> int | str | None:
    """Return the integer that a number or text means, other text as it is, and None for what can be no id."""
    if isinstance(value, float) and value.is_integer():
        return as_id(int(value))
    if isinstance(value, str) and value.strip():
        return as_id(int(value)) if value.strip().isdecimal() and len(value) < 30 else value
    whole = isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63
    return value if whole else None


def numbers_of(ids: list) -> dict | None:
    """Return a number for each image id, counted from 1, if some are text or negative; None if none is."""
    if all(isinstance(value, int) and value >= 0 for value in ids):
        return None
    return {value: number for number, value in enumerate(ids, start=1)}


def run_lengths(segmentation: dict) -> dict:
    """Return a run-length mask in compressed form; pycocotools would crash on one that does not cover its image exactly.

    Raises:
        ValueError, TypeError, KeyError: it is none.
    """
    height, width = segmentation['size']
    counts = segmentation['counts']
    whole = isinstance(height, int) and isinstance(width, int) and min(height, width) > 0
    if (
        not whole or max(height, width) > LARGEST or height * width >= 1 << 32
    ):  # the evaluators count in 32 bits
        raise ValueError(f'its size is {segmentation["size"]}')
    numbers = decompressed(counts) if isinstance(counts, str | bytes) else counts
    if not all(type(number) is int and number >= 0 for number in numbers) or sum(numbers) != height * width:
        raise ValueError(f'its run lengths do not cover {height} x {width} pixels')
    if numbers is counts:
        return coco_mask.frPyObjects(segmentation, height, width)
    return segmentation


def decompressed(counts: str | bytes) -> list[int]:
    """Decode COCO's text of run lengths: numbers of 5 bits a character, from the third on relative to the last but one."""
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


def title_of(annotation: dict) -> str:
    """Return how messages name an annotation. source: file and line, where these are not those of COCO's form."""
    if 'source' in annotation:
        return annotation['source']
    return f'annotation {annotation.get("id")} (image {annotation.get("image_id")})'


def check_categories(categories: dict[int, str], class_map: ClassMap) -> None:
    """Require every category in the class map (of the training part, or of a checkpoint), with the same id and name."""
    for category_id, name in categories.items():
        label = class_map.label_of.get(category_id)
        settled = None if label is None else class_map.names[label]
        if settled != name:
            raise UserError(
                f'category {category_id} is "{name}" here, and {f"{settled!r}" if settled else "unknown"} to the training '
                'data or checkpoint in use: their classes must agree (--pretrained fine-tunes on other classes)'
            )


def image_problem(image: dict) -> str | None:
    """Return what is wrong with the entry of an image, or None."""
    image_id = image.get('id')
    if as_id(image_id) is None:
        return f'image {str(image)[:80]} needs an id: a number, or a text'
    if not isinstance(image.get('file_name'), str):
        return f'image {image_id} needs a file_name'
    for key in ('height', 'width'):
        value = image.get(key) or 0
        if not is_finite(value) or not 0 <= value <= LARGEST or value != int(value):
            return f'image {image_id} has {key} {value!r}: it must be a number of pixels; left out, the file has it'
    return None


def place_problem(annotation: dict, image_ids: Collection, category_ids: Collection[int]) -> str:
    """Return what is wrong with an annotation whose image or category does not exist, and how to correct it."""
    if annotation.get('image_id') not in image_ids:
        return 'belongs to an image that "images" does not list: add the image or remove the annotation'
    category_id = annotation.get('category_id')
    return f'has category {category_id!r}, but the categories are {shorten(category_ids)}: add it or correct the id'


def box_problem(annotation: dict) -> str | None:
    """Return what is wrong with an annotation's box or area, or what its format's reader has found (`problem`), or None."""
    if 'problem' in annotation:
        return annotation['problem']
    bbox = annotation.get('bbox')
    if not (isinstance(bbox, list) and len(bbox) == 4 and all(map(is_finite, bbox)) and min(bbox[2:]) >= 0):
        return f'has bbox {str(bbox)[:80]}: it must be four finite numbers x, y, width, height (not negative), in pixels'
    if max(map(abs, bbox)) > LARGEST:
        return f'has bbox {bbox}: no image reaches {max(map(abs, bbox)):g} pixels; correct the numbers'
    area = annotation.get('area', 0)
    if not is_finite(area):
        return (
            f'has area {area}: it must be a finite number of pixels; without it, width times height is taken'
        )
    return None


def object_area(annotation: dict) -> float:
    """Return the file's own area (for COCO that of the segment), or that of the box if there is none."""
    _, _, width, height = annotation['bbox']
    return annotation.get('area', width * height)


def is_finite(value: object) -> bool:
    return isinstance(value, int | float) and abs(value) <= sys.float_info.max  # an integer may be beyond


def shorten(ids: Iterable[int], most: int = 10) -> str:
    ids = sorted(ids)
    return ', '.join(map(str, ids[:most])) + (', ...' if len(ids) > most else '')


def check_files(
    names: Iterable[str],
    image_dir: File,
    file: File,
    allow_outside: bool = False,
    problems: Findings | None = None,
) -> None:
    """Check that the image files are in the folder, each of whose folders is listed once.

    problems: where to count missing images.

    Raises:
        FileError: an image is missing, and problems is None.
        UserError: a name leads out of the folder, and allow_outside is not set.
    """
    image_dir = Path(image_dir)
    if not image_dir.is_dir():
        raise FileError(f'image folder {image_dir} does not exist: check the path')
    present: dict[str, set[str]] = {}
    missing, number_missing, number = '', 0, 0
    for path in names:
        number += 1
        folder, name = os.path.split(path)
        if folder not in present:
            if not allow_outside and (os.path.isabs(folder) or '..' in Path(folder).parts):
                raise UserError(
                    f'{file}: file_name {path!r} leads out of the image folder {image_dir}: correct it, or trust the file '
                    'with --allow_outside'
                )
            inside = image_dir / folder
            present[folder] = set(os.listdir(inside)) if inside.is_dir() else set()
        if name not in present[folder] and problems is not None:
            problems.add('images that are missing', path)
        elif name not in present[folder]:
            missing, number_missing = missing or path, number_missing + 1
    if number_missing:
        raise FileError(
            f'{number_missing} of {number} images of {file} are not in {image_dir}, the first is {missing}: '
            'fetch them, give the right folder, or remove them from the file'
        )
