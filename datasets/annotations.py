"""
Annotation files in COCO form as columns: a few arrays, which loader workers share.

Millions of Python objects would take ten times the memory, and every worker would copy them. Entries are
therefore decoded in blocks, which become rows of the columns at once.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
from msgspec import UNSET, Raw, UnsetType

from datasets.class_map import ClassMap, names_by_id
from datasets.coco_json import (
    File,
    Issues,
    Place,
    Read,
    as_id,
    box_problem,
    check_categories,
    check_image,
    decode_entry,
    encode,
    errors_in,
    numbers_of,
    places_of,
    read_lists,
    repair,
    shorten,
    title_of,
)
from datasets.segmentations import LARGEST
from util.errors import UserError

BLOCK = 1 << 12  # entries that are Python objects at a time
NO_ID = np.iinfo(np.int64).min  # in place of what is not an integer; no file has it
SHORTEST = 6  # bytes; a shorter segmentation may be empty
UNUSABLE = 'annotations that cannot be used'


class Annotation(msgspec.Struct, gc=False):
    """An annotation as the columns take it. A file's entry that has other types is repaired or refused.

    area: UNSET where the file has none. segmentation: as JSON.
    """

    image_id: int
    category_id: int
    bbox: tuple[float, float, float, float]
    area: float | UnsetType = UNSET
    iscrowd: Literal[0, 1] | None = None
    ignore: Literal[0, 1] | None = None
    segmentation: Raw = Raw(b'null')


BLOCK_DECODER = msgspec.json.Decoder(list[Annotation])
Columns = Any  # a record array of COLUMNS; the types of NumPy do not know its fields
# Of A annotations: boxes and areas in pixels, whether they have a segmentation, and its place in the bytes.
COLUMNS = np.dtype(
    [
        ('image_ids', np.int64),
        ('category_ids', np.int64),
        ('boxes_xywh', np.float64, 4),
        ('areas', np.float64),
        ('crowd', np.bool_),
        ('ignored', np.bool_),
        ('segmented', np.bool_),
        ('starts', np.int64),
        ('stops', np.int64),
    ],
    align=True,  # PyTorch takes no unaligned columns
)


class PackedList(Sequence):
    """JSON values in one block of bytes, the i-th from starts[i] to stops[i].

    Reading it writes to no shared memory page, unlike counting the references of Python objects. Forked
    workers therefore go on sharing it.
    """

    def __init__(self, data: bytes | bytearray, starts: np.ndarray, stops: np.ndarray) -> None:
        self.data, self.starts, self.stops = data, starts, stops

    @classmethod
    def of(cls, values: Iterable[object]) -> 'PackedList':
        """Pack values."""
        texts = encode(values)
        bounds = np.cumsum([0, *(len(memoryview(text)) for text in texts)])
        return cls(b''.join(texts), bounds[:-1], bounds[1:])

    def chosen(self, rows: np.ndarray | slice) -> 'PackedList':
        """Return the values of some rows, over the same bytes."""
        return PackedList(self.data, self.starts[rows], self.stops[rows])

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, idx: Any) -> Any:
        return decode_entry(Raw(bytes(self.data[self.starts[idx] : self.stops[idx]])))


def read_columns(
    raws: Sequence[Raw],
    issues: Issues,
    segmentations: bytearray | None = None,
    numbers: dict | None = None,
    problems: Issues | None = None,
) -> Columns:
    """Decode annotations into COLUMNS, a block at a time; those of a block are repaired where one needs it.

    Args:
        segmentations: where to append these as JSON, if they are asked for.
        numbers: of image ids that are text or negative, if there are any.
        problems: where to count invalid annotations, which are then left out; None: the first is an error.

    Raises:
        UserError: an annotation is invalid.
    """
    columns: Columns = np.zeros(len(raws), dtype=COLUMNS).view(np.recarray)
    size = 0
    for start in range(0, len(raws), BLOCK):
        block = raws[start : start + BLOCK]
        try:
            annotations = BLOCK_DECODER.decode(b'[' + b','.join(block) + b']')
            rows: Columns = columns[size : size + len(block)]
            fill_columns(rows, annotations)
            is_valid = numbers is None and are_pixels(rows)
        except (ValueError, OverflowError):  # one of them has another type
            is_valid = False
        if not is_valid:
            annotations = list(repaired(block, issues, numbers, problems))
            rows = columns[size : size + len(annotations)]
            fill_columns(rows, annotations)
        if segmentations is not None:
            lengths = [len(memoryview(annotation.segmentation)) for annotation in annotations]
            rows.stops = len(segmentations) + np.cumsum(lengths)
            rows.starts = rows.stops - lengths
            segmentations += b''.join(annotation.segmentation for annotation in annotations)
        size += len(annotations)
    return columns[:size]


def fill_columns(rows: Columns, annotations: list[Annotation]) -> None:
    """Write annotations into rows of COLUMNS; a missing area is that of the box."""
    rows.image_ids = [a.image_id for a in annotations]
    rows.category_ids = [a.category_id for a in annotations]
    rows.boxes_xywh = [a.bbox for a in annotations]
    rows.areas = [a.bbox[2] * a.bbox[3] if a.area is UNSET else a.area for a in annotations]
    rows.crowd = [a.iscrowd == 1 for a in annotations]
    rows.ignored = [a.ignore == 1 for a in annotations]
    texts = (a.segmentation for a in annotations)
    rows.segmented = [len(memoryview(text)) > SHORTEST or bool(decode_entry(text)) for text in texts]


def are_pixels(objects: Columns) -> bool:
    """Return whether all boxes and areas are numbers of pixels."""
    boxes = objects.boxes_xywh
    in_range = (np.abs(boxes) <= LARGEST).all() and (boxes[:, 2:] >= 0).all()
    return bool(in_range and np.isfinite(objects.areas).all())


def places_in(objects: Columns) -> Iterator[Place]:
    """Yield images and boxes of objects."""
    for each in objects:
        yield Place(int(each.image_ids), each.boxes_xywh.tolist())


def labels_of(objects: Columns, class_map: ClassMap) -> np.ndarray:
    """Return class indices [A] int64."""
    ids, inverse = np.unique(objects.category_ids, return_inverse=True)
    return np.array([class_map.label_of[number] for number in ids.tolist()], dtype=np.int64)[inverse]


def repaired(
    raws: Sequence[Raw], issues: Issues, numbers: dict | None, problems: Issues | None
) -> Iterator[Annotation]:
    """Yield annotations one by one; arguments and errors are those of `read_columns`."""
    for raw in raws:
        try:
            entry = repair('annotations', decode_entry(raw), issues)
        except UserError as error:
            if problems is None:
                raise
            problems.add(UNUSABLE, str(error))
            continue
        if problem := box_problem(entry):
            if problems is None:
                raise UserError(f'{title_of(entry)} {problem}')
            problems.add(UNUSABLE, f'{title_of(entry)} {problem}', places=places_of(entry))
            continue
        image_id, category_id = as_id(entry.get('image_id')), as_id(entry.get('category_id'))
        image_id = numbers.get(image_id) if numbers else image_id
        yield Annotation(
            image_id if isinstance(image_id, int) else NO_ID,
            category_id if isinstance(category_id, int) else NO_ID,
            tuple(map(float, entry['bbox'])),  # type: ignore[arg-type]  # four
            float(entry['area']) if 'area' in entry else UNSET,
            entry.get('iscrowd'),
            entry.get('ignore'),
            encode([entry.get('segmentation')])[0],
        )


class AnnotationTable:
    """Content of an annotation file in COCO form, checked and sorted.

    categories: as the file has them. image_ids: [N] int64, ascending. file_names: their N files.
    sizes: [N, 2] height and width, 0 where it has none. objects: COLUMNS of all annotations, in order
    of image and then of the file. segmentations: their bytes, if masks are asked for. starts: [N + 1]; image
    i has the objects starts[i] to starts[i + 1]. issues: what was repaired.

    Args:
        read: reads the format.
        problems: where to count invalid annotations, which are then left out; None: the first is an error.

    Raises:
        UserError: the content is invalid.
    """

    def __init__(
        self,
        file: File,
        class_map: ClassMap | None = None,
        with_masks: bool = False,
        read: Read = read_lists,
        problems: Issues | None = None,
    ) -> None:
        self.file, self.read, self.issues, self.problems = file, read, Issues(), problems
        lists = read(file, self.issues)
        with errors_in(file):
            self.categories = [
                repair('categories', decode_entry(raw), self.issues) for raw in lists['categories']
            ]
            names = names_by_id(self.categories)
            if class_map is not None:
                check_categories(names, class_map)
            numbers = self.set_images([self.read_image(raw) for raw in lists['images']])
            self.segmentations, raws = bytearray() if with_masks else None, lists['annotations']
            objects = read_columns(raws, self.issues, self.segmentations, numbers, problems)
            for found in (self.issues, problems):
                if numbers and found is not None:
                    found.renumber(numbers)
            self.set_objects(objects, raws, names)

    def read_image(self, raw: Raw) -> tuple:
        """Return id, file name, height and width, 0 where the file has none."""
        image = repair('images', decode_entry(raw), self.issues)
        check_image(image)
        return image['id'], image['file_name'], int(image.get('height') or 0), int(image.get('width') or 0)

    def set_images(self, images: list[tuple]) -> dict | None:
        """Sort the images, and return the numbers of ids if some are text or negative.

        Raises:
            UserError: there are no images, or an id occurs twice.
        """
        if not images:
            raise UserError('"images" is empty: there is nothing to train on or to evaluate')
        ids = [image[0] for image in images]
        if len(set(ids)) < len(ids):
            duplicate = Counter(ids).most_common(1)[0][0]
            raise UserError(f'image id {duplicate} occurs twice: give every image another id')
        numbers = numbers_of(ids)
        if numbers:
            self.issues.add('image ids that are text or negative, numbered from 1', repr(ids[0]), len(ids))
        unsorted = np.array([numbers[value] for value in ids] if numbers else ids, dtype=np.int64)
        order = np.argsort(unsorted)
        self.image_ids = unsorted[order]
        self.file_names = PackedList.of(images[row][1] for row in order)
        self.sizes = np.array([image[2:] for image in images], dtype=np.int64)[order]
        return numbers

    def set_objects(self, objects: Columns, raws: Sequence[Raw], names: dict[int, str]) -> None:
        """Check that images and categories of all annotations exist, and sort them by image.

        raws: the annotations in the file's order.
        """
        rows = np.searchsorted(self.image_ids, objects.image_ids).clip(max=len(self.image_ids) - 1)
        no_image = self.image_ids[rows] != objects.image_ids
        no_category = ~np.isin(objects.category_ids, np.array(list(names), dtype=np.int64)) & ~no_image
        invalid = no_image | no_category
        if invalid.any():
            if self.problems is None:
                first = int(invalid.argmax())
                annotation = repair('annotations', decode_entry(raws[first]), Issues())
                problem = (
                    'belongs to an image that "images" does not list: add the image or remove the annotation'
                )
                if no_category[first]:
                    category_id = annotation.get('category_id')
                    problem = (
                        f'has category {category_id!r}, but the categories are {shorten(names)}: add it or '
                        'correct the id'
                    )
                raise UserError(f'{title_of(annotation)} {problem}')
            for kind, which in (('image', no_image), ('category', no_category)):
                if which.any():
                    places = places_in(objects[which & ~no_image])
                    kind = f'annotations whose {kind} is not listed'
                    self.problems.add(kind, str(self.file), int(which.sum()), places)
            objects, rows = objects[~invalid], rows[~invalid]
        self.order = np.argsort(rows, kind='stable')
        self.objects = objects[self.order]
        self.starts = np.searchsorted(rows[self.order], np.arange(len(self.image_ids) + 1))

    def check_segmentations(self, rows: np.ndarray) -> None:
        """Raise a `UserError` if one of these objects has neither polygons nor run lengths."""
        without = rows[~self.objects.segmented[rows]]
        if len(without):
            first = decode_entry(
                self.read(self.file, Issues())['annotations'][int(self.order[without].min())]
            )
            raise UserError(
                f'{self.file}: {title_of(first)} has no segmentation, which masks are made of: add polygons '
                'or run-length masks, or train without --masks'
            )


@dataclass
class Inventory:
    """The T objects of N images, as the annotations have them.

    boxes_xywh: [T, 4] in pixels. labels: [T]. counts: [N] objects of each image. sizes: [N, 2] height and
    width, 0 where they are not known. folder, names: where the image files are, if there are files, and their
    names. issues: what is unusual and kept, repaired or left out. problems: what cannot be used, if it was
    counted.
    """

    boxes_xywh: np.ndarray
    labels: np.ndarray
    counts: np.ndarray
    sizes: np.ndarray
    folder: Path | None
    names: list[str]
    issues: Issues
    problems: Issues | None = None
