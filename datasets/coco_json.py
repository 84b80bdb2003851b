"""
Annotation files in COCO form: reading, what is repaired, and what is refused with a clear error at the start
of a run.

Legal, as in the official pipeline: boxes of no size, boxes that leave the image, images without objects.
docs/data.md has the whole policy.
"""

import json
import mmap
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlparse

import msgspec
from msgspec import Raw

from datasets.class_map import ClassMap
from datasets.segmentations import LARGEST, box_around, is_finite
from util.errors import FileError, UserError

Annotations = dict[str, list[dict]]
File = str | os.PathLike[str]
# The three lists of a file. An entry is a JSON text: memory never holds all entries as Python objects.
Lists = dict[str, Sequence[Raw]]
LISTS = ('images', 'annotations', 'categories')
EXAMPLES = 3  # of a kind, in a line
PLACES = 8  # of a kind, in the page of --check_data


class Place(NamedTuple):
    """Where something unusual is: an image, by its id, its file name, or its part and index; and a box there
    (x, y, width, height).
    """

    image: int | str | tuple[str, int]
    box: Sequence[float] | None = None


class Issues:
    """What is unusual in the data and kept, repaired or left out: the number and the first of each kind.

    examples: what the lines name. places: what the page of --check_data shows.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.examples: dict[str, list[str]] = {}
        self.places: dict[str, list[Place]] = {}

    def add(self, kind: str, example: str, number: int = 1, places: Iterable[Place] = ()) -> None:
        """Count more of a kind."""
        self.counts[kind] += number
        examples, known = self.examples.setdefault(kind, []), self.places.setdefault(kind, [])
        if len(examples) < EXAMPLES:
            examples.append(example)
        known.extend(islice(places, PLACES - len(known)))

    def renumber(self, numbers: dict) -> None:
        """Give the places the numbers of image ids that are text or negative."""
        for places in self.places.values():
            places[:] = [place._replace(image=numbers.get(place.image, place.image)) for place in places]

    def lines(self) -> list[str]:
        """Return a sentence for each kind."""
        return [
            f'{number} {kind} ({", ".join(self.examples[kind])}{", ..." if number > EXAMPLES else ""})'
            for kind, number in sorted(self.counts.items())
        ]


Read = Callable[[File, Issues], Lists]  # reads a format; Issues: where to count what it repairs or leaves out


@contextmanager
def errors_in(file: File) -> Iterator[None]:
    """Begin the message of a `UserError` with the name of a file."""
    try:
        yield
    except UserError as error:
        raise UserError(f'{file}: {error}') from error


class CocoFile(msgspec.Struct):
    """The lists of a file; other fields are skipped."""

    images: list[Raw] | None = None
    annotations: list[Raw] | None = None
    categories: list[Raw] | None = None


def read_lists(file: File, issues: Issues) -> Lists:
    """Return the lists of a file in COCO form.

    issues: not used here; see `Read`.

    Raises:
        FileError: the file does not exist, or is a folder.
        UserError: it is not JSON, or one of the lists is missing.
    """
    file = Path(file)
    if not file.exists():
        raise FileError(f'annotation file {file} does not exist: check the path')
    if not file.is_file():
        raise FileError(f'annotation file {file} is not a file: give the JSON file itself')
    try:
        lists = split(file)
    except RecursionError:
        raise UserError(f'{file} is nested too deep for annotations: write it again') from None
    except ValueError as error:
        raise UserError(f'{file} is not JSON ({error}): write it again, or fetch it again') from error
    for name in LISTS:
        if name not in lists:
            raise UserError(f'{file} has no list "{name}": annotations in COCO form need {", ".join(LISTS)}')
    return lists


def split(file: Path) -> Lists:
    """Split a file into the entries of its lists, which are parts of the file's pages and not copied."""
    if not file.stat().st_size:
        raise ValueError('it is empty')
    with file.open('rb') as stream:
        data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    try:
        lists = msgspec.structs.asdict(msgspec.json.decode(data, type=CocoFile))
        return {name: entries for name, entries in lists.items() if entries is not None}
    except msgspec.MsgspecError:  # json also reads NaN, other encodings, and lists that are something else
        text = data[:].decode(json.detect_encoding(data[:4]))
    content = json.loads(text)
    lists = {name: content.get(name) for name in LISTS} if isinstance(content, dict) else {}
    return {name: encode(entries) for name, entries in lists.items() if isinstance(entries, list)}


def encode(entries: Iterable[object]) -> list[Raw]:
    return [Raw(json.dumps(entry).encode()) for entry in entries]


def decode_entry(raw: Raw) -> Any:
    """Decode a JSON text as Python does, which knows NaN and integers of any size.

    Raises:
        UserError: it is not JSON.
    """
    try:
        return msgspec.json.decode(raw)
    except ValueError:
        pass
    try:
        return json.loads(bytes(raw))
    except ValueError as error:
        raise UserError(f'{bytes(raw)[:60]!r} is not JSON ({error}): write the file again') from error


def read_annotations(file: File, read: Read = read_lists) -> Annotations:
    """Return the file's lists, repaired, as evaluation needs them. Training reads `datasets.annotations`.

    Args:
        read: reads the format.

    Raises:
        FileError: the file does not exist.
        UserError: it is not JSON, or lacks one of the lists.
    """
    lists = read(file, Issues())
    with errors_in(file):
        data = {name: [repair(name, decode_entry(raw), Issues()) for raw in lists[name]] for name in LISTS}
    numbers = numbers_of([image['id'] for image in data['images']])
    if numbers:
        for image in data['images']:
            image['id'] = numbers[image['id']]
        for annotation in data['annotations']:
            annotation['image_id'] = numbers.get(annotation.get('image_id'))
    return data


def repair(name: str, entry: Any, issues: Issues) -> dict:
    """Repair an entry of a list in place: numbers written as text or as 1.0, and missing names and boxes.

    Raises:
        UserError: it is not a JSON object, or has an invalid segmentation, iscrowd or ignore.
    """
    if not isinstance(entry, dict):
        raise UserError(f'"{name}" has {str(entry)[:40]!r}, which is not an object in braces')
    for key in ('image_id', 'category_id') if name == 'annotations' else ('id',):
        if type(entry.get(key)) is not int and (number := as_id(entry.get(key))) is not None:
            issues.add(f'{key} of {name} not written as integers', repr(entry[key]), places=places_of(entry))
            entry[key] = number
    if name == 'images' and not entry.get('file_name') and isinstance(entry.get('coco_url'), str):  # LVIS
        entry['file_name'] = '/'.join(urlparse(entry['coco_url']).path.split('/')[-2:])
    if name == 'annotations':
        if not entry.get('bbox') and entry.get('segmentation'):
            repair_box(entry, issues)
        for key in ('iscrowd', 'ignore'):
            if entry.get(key) is not None:
                repair_mark(entry, key, issues)
    return entry


def repair_box(annotation: dict, issues: Issues) -> None:
    try:
        annotation['bbox'] = box_around(annotation['segmentation'])
    except (ValueError, TypeError, KeyError, IndexError) as error:
        raise UserError(
            f'{title_of(annotation)} has no bbox, and its segmentation gives none ({error}): correct one of '
            'them'
        ) from None
    kind = 'annotations without bbox, which was made from the segmentation'
    issues.add(kind, title_of(annotation), places=places_of(annotation))


def repair_mark(annotation: dict, key: str, issues: Issues) -> None:
    """Repair iscrowd or ignore."""
    mark = annotation[key]
    if type(mark) is not int:
        kind = f'{key} of annotations not written as integers'
        issues.add(kind, repr(mark), places=places_of(annotation))
        annotation[key] = int(mark) if isinstance(mark, bool) else as_id(mark)
    if annotation[key] not in (0, 1):
        raise UserError(f'{title_of(annotation)} has {key} {str(mark)[:40]!r}: it must be 0 or 1')


def as_id(value: Any) -> int | str | None:
    """Return the integer that a number or text means, other text as it is, else None."""
    if isinstance(value, float) and value.is_integer():
        return as_id(int(value))
    if isinstance(value, str) and value.strip():
        return as_id(int(value)) if value.strip().isdecimal() and len(value) < 30 else value
    whole = isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63
    return value if whole else None


def numbers_of(ids: list) -> dict | None:
    """Return a number for each image id, counted from 1, if some are text or negative, else None."""
    if all(isinstance(value, int) and value >= 0 for value in ids):
        return None
    return {value: number for number, value in enumerate(ids, start=1)}


def title_of(annotation: dict) -> str:
    """Return the name of an annotation for messages: its `source` (file and line), or else its ids."""
    if 'source' in annotation:
        return annotation['source']
    return f'annotation {annotation.get("id")} (image {annotation.get("image_id")})'


def places_of(entry: dict) -> Iterator[Place]:
    """Yield the place of an annotation; other entries have none."""
    image_id = as_id(entry.get('image_id'))
    if image_id is not None:
        yield Place(image_id, None if box_problem(entry) else entry['bbox'])


def check_categories(categories: dict[int, str], class_map: ClassMap) -> None:
    """Require every category in the class map of the training part or of a checkpoint, with the same name."""
    for category_id, name in categories.items():
        label = class_map.label_of.get(category_id)
        expected = None if label is None else class_map.names[label]
        if expected != name:
            raise UserError(
                f'category {category_id} is "{name}" here, and {repr(expected) if expected else "unknown"} '
                'to the training data or checkpoint in use: their classes must agree (--pretrained '
                'fine-tunes on other classes)'
            )


def check_image(image: dict) -> None:
    """Refuse the entry of an image without an id, a name, or with an invalid size."""
    image_id = image.get('id')
    if as_id(image_id) is None:
        raise UserError(f'image {str(image)[:80]} needs an id: a number, or a text')
    if not isinstance(image.get('file_name'), str):
        raise UserError(f'image {image_id} needs a file_name')
    for key in ('height', 'width'):
        value = image.get(key) or 0
        if not is_finite(value) or not 0 <= value <= LARGEST or value != int(value):
            raise UserError(f'image {image_id} has {key} {value!r}: give a number of pixels, or leave it out')


def box_problem(annotation: dict) -> str | None:
    """Return the problem of an annotation's box or area, or that which its format's reader found, or None."""
    if 'problem' in annotation:
        return annotation['problem']
    bbox = annotation.get('bbox')
    if not (isinstance(bbox, list) and len(bbox) == 4 and all(map(is_finite, bbox)) and min(bbox[2:]) >= 0):
        return (
            f'has bbox {str(bbox)[:80]}: it must be four finite numbers x, y, width, height (not negative), '
            'in pixels'
        )
    if max(map(abs, bbox)) > LARGEST:
        return f'has bbox {bbox}: no image reaches {max(map(abs, bbox)):g} pixels; correct the numbers'
    area = annotation.get('area', 0)
    if not is_finite(area):
        return (
            f'has area {area}: it must be a finite number of pixels; without it, width times height is taken'
        )
    return None


def unusable(problem: str) -> dict:
    """Return fields of an annotation that is refused, or counted by --check_data."""
    return {'bbox': None, 'segmentation': None, 'problem': problem}


def object_area(annotation: dict) -> float:
    """Return the file's own area (for COCO that of the segment), or that of the box if there is none."""
    _, _, width, height = annotation['bbox']
    return annotation.get('area', width * height)


def read_text_lines(file: Path) -> list[str]:
    if not file.is_file():
        raise FileError(f'{file} does not exist: check the path')
    return file.read_text(encoding='utf-8-sig', errors='replace').splitlines()


def shorten(ids: Iterable[int], most: int = 10) -> str:
    ids = sorted(ids)
    return ', '.join(map(str, ids[:most])) + (', ...' if len(ids) > most else '')
