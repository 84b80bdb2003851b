"""
Annotation files in COCO form as columns: a few arrays, which loader workers share.

Millions of Python objects would take ten times the memory, and every worker would copy them. A file is therefore read
in blocks (`datasets.json_stream`) that become rows of the columns at once.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from datasets.class_map import ClassMap, names_by_id
from datasets.coco_json import (
    LARGEST,
    LISTS,
    Blocks,
    File,
    Findings,
    as_id,
    box_problem,
    check_categories,
    image_problem,
    mend,
    numbers_of,
    object_area,
    place_problem,
    title_of,
)
from datasets.json_stream import has_lists, list_blocks
from util.errors import UserError

NO_ID = np.iinfo(np.int64).min  # what is no integer; no file has it


class PackedList:
    """List of JSON values in one block of bytes.

    Reading it writes to no shared memory page, unlike counting the references of Python objects. Forked workers
    therefore go on sharing it.
    """

    def __init__(self, values: Iterable = (), data: bytearray | None = None) -> None:
        """Append values to data, which several lists may share."""
        rows = [json.dumps(value).encode() for value in values]
        self.data = bytearray() if data is None else data
        bounds = len(self.data) + np.cumsum([0, *map(len, rows)], dtype=np.int64)
        self.starts, self.stops = bounds[:-1], bounds[1:]
        self.data += b''.join(rows)

    @classmethod
    def joined(cls, lists: list['PackedList']) -> 'PackedList':
        """Return one list of the values of several that share their data."""
        whole = cls(data=lists[0].data)
        whole.starts = np.concatenate([one.starts for one in lists])
        whole.stops = np.concatenate([one.stops for one in lists])
        return whole

    def chosen(self, rows: np.ndarray | slice) -> 'PackedList':
        """Return the values of some rows, over the same bytes."""
        some = PackedList(data=self.data)
        some.starts, some.stops = self.starts[rows], self.stops[rows]
        return some

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, idx: int) -> Any:
        return json.loads(self.data[self.starts[idx] : self.stops[idx]])

    def __iter__(self) -> Iterator[Any]:
        return (self[idx] for idx in range(len(self)))


@dataclass
class Columns:
    """Columns of A annotations.

    image_ids, category_ids: [A] int64. boxes_xywh: [A, 4] float64 in pixels. areas: [A] float64, that of the box where
    the file has none. crowd, segmented: [A] bool. segmentations: polygons or run lengths, if asked for.
    """

    image_ids: np.ndarray
    category_ids: np.ndarray
    boxes_xywh: np.ndarray
    areas: np.ndarray
    crowd: np.ndarray
    segmented: np.ndarray
    segmentations: PackedList | None

    @classmethod
    def of(cls, annotations: list[dict], segmentations: bytearray | None = None) -> 'Columns':
        """Read annotations that are mended (`datasets.coco_json.mend`).

        segmentations: where to put these, if they are asked for.

        Raises:
            UserError: a box or an area is none.
        """
        boxes, areas = boxes_and_areas(annotations)
        return cls(
            id_column([a.get('image_id') for a in annotations]),
            id_column([a.get('category_id') for a in annotations]),
            boxes,
            areas,
            np.array([bool(a.get('iscrowd')) for a in annotations], dtype=bool),
            np.array([bool(a.get('segmentation')) for a in annotations], dtype=bool),
            None
            if segmentations is None
            else PackedList((a.get('segmentation') for a in annotations), segmentations),
        )

    @classmethod
    def joined(cls, blocks: list['Columns']) -> 'Columns':
        """Return the rows of all blocks; each column is made and its parts are freed before the next."""
        parts: dict[str, Any] = {}
        for field in fields(cls):
            columns = [block.__dict__.pop(field.name) for block in blocks]
            if field.name != 'segmentations':
                parts[field.name] = np.concatenate(columns)
            else:
                parts[field.name] = None if columns[0] is None else PackedList.joined(columns)
        return cls(**parts)

    def __len__(self) -> int:
        return len(self.areas)

    def __getitem__(self, rows: np.ndarray) -> 'Columns':
        """Return some rows, in this order."""
        columns = {field.name: getattr(self, field.name) for field in fields(self)}
        packed = columns.pop('segmentations')
        return Columns(
            **{name: column[rows] for name, column in columns.items()},
            segmentations=None if packed is None else packed.chosen(rows),
        )

    def labels(self, class_map: ClassMap) -> np.ndarray:
        """Return class indices [A] int64."""
        ids, inverse = np.unique(self.category_ids, return_inverse=True)
        labels = np.array([class_map.label_of[category_id] for category_id in ids.tolist()], dtype=np.int64)
        return labels[inverse]

    def tiny(self) -> np.ndarray:
        """Apply mmdetection's rule to the boxes before they are clamped; [A] bool."""
        return (self.boxes_xywh[:, 2:] < 1).any(axis=1) | (self.areas <= 0)


def boxes_and_areas(annotations: list[dict]) -> tuple[np.ndarray, np.ndarray]:
    """Return boxes [A, 4] and areas [A], float64. Only where numpy finds something odd is every annotation looked at.

    Raises:
        UserError: a box or an area is none; the message names the annotation.
    """
    boxes = numeric([a.get('bbox') for a in annotations], (4,))
    if boxes is not None and (np.abs(boxes) <= LARGEST).all() and (boxes[:, 2:] >= 0).all():
        areas = numeric([object_area(a) for a in annotations], ())
        if areas is not None and np.isfinite(areas).all():
            return boxes, areas
    for annotation in annotations:
        if problem := box_problem(annotation):
            raise UserError(f'{title_of(annotation)} {problem}')
    boxes = np.array([[float(value) for value in a['bbox']] for a in annotations])
    return boxes, np.array([float(object_area(a)) for a in annotations])


def numeric(values: list, shape: tuple[int, ...]) -> np.ndarray | None:
    """Return values as float64 [len(values), *shape], or None if they are not all numbers of this shape."""
    if not values:
        return np.zeros((0, *shape))
    try:
        array = np.array(values)
    except (ValueError, OverflowError):
        return None
    fits = array.dtype.kind in 'if' and array.shape[1:] == shape
    return array.astype(np.float64) if fits else None


def id_column(values: list) -> np.ndarray:
    """Return ids as int64, or as Python objects if some are text."""
    array = np.array(values) if values else np.zeros(0, dtype=np.int64)
    return array if array.dtype == np.int64 else np.array([*values, None], dtype=object)[:-1]


class AnnotationTable:
    """Content of an annotation file in COCO form, checked and sorted.

    categories: as the file has them. image_ids: [N] int64, ascending. file_names: their N files. sizes: [N, 2] height
    and width, 0 where the file has none. objects: columns of all annotations, in order of image and then of the file.
    starts: [N + 1]; image i has the objects starts[i] to starts[i + 1]. findings: what was mended.

    Args:
        blocks: what reads the file, in the format's own way.
        problems: where to count annotations that cannot be used, which are then left out; None: the first is an error.
    """

    categories: list[dict]

    def __init__(
        self,
        file: File,
        class_map: ClassMap | None = None,
        with_masks: bool = False,
        blocks: Blocks = list_blocks,
        problems: Findings | None = None,
    ) -> None:
        self.file, self.read, self.findings, self.problems = file, blocks, Findings(), problems
        found: set[str] = set()
        images: list[tuple] = []
        segmentations = bytearray() if with_masks else None
        self.categories, parts = [], [Columns.of([], segmentations)]
        for name, block in blocks(file):
            if name not in LISTS:
                continue
            found.add(name)
            mend(name, block, file, self.findings)
            if name == 'categories':
                self.categories.extend(block)
            elif name == 'images':
                images.extend(map(self.read_image, block))
            else:
                if self.problems is not None:
                    block = self.usable(block)
                parts.append(self.told(Columns.of, block, segmentations))
        has_lists(file, found, LISTS)
        names = self.told(names_by_id, self.categories)
        if class_map is not None:
            self.told(check_categories, names, class_map)
        numbers = self.place_images(images)
        del images
        self.place(Columns.joined(parts), numbers, names)

    def told(self, function: Callable, *arguments: Any) -> Any:
        """Call a function; its errors name the file."""
        try:
            return function(*arguments)
        except UserError as error:
            raise UserError(f'{self.file}: {error}') from error

    def read_image(self, image: dict) -> tuple:
        if problem := image_problem(image):
            raise UserError(f'{self.file}: {problem}')
        return image['id'], image['file_name'], int(image.get('height') or 0), int(image.get('width') or 0)

    def place_images(self, images: list[tuple]) -> dict | None:
        """Sort the images, and return the numbers of ids that are text.

        Raises:
            UserError: there is none, or an id occurs twice.
        """
        if not images:
            raise UserError(f'{self.file}: "images" is empty: there is nothing to train on or to evaluate')
        ids = [image[0] for image in images]
        if len(set(ids)) < len(ids):
            twice = Counter(ids).most_common(1)[0][0]
            raise UserError(f'{self.file}: image id {twice} occurs twice: give every image an id of its own')
        numbers = numbers_of(ids)
        if numbers:
            self.findings.add('image ids that are text or negative, numbered from 1', repr(ids[0]), len(ids))
        unsorted = np.array([numbers[value] for value in ids] if numbers else ids, dtype=np.int64)
        order = np.argsort(unsorted)
        self.image_ids = unsorted[order]
        self.file_names = PackedList(images[row][1] for row in order)
        self.sizes = np.array([image[2:] for image in images], dtype=np.int64)[order]
        return numbers

    def place(self, objects: Columns, numbers: dict | None, names: dict[int, str]) -> None:
        """Check that images and categories of all annotations exist, and sort them by image."""
        for ids, key in ((objects.image_ids, 'image_ids'), (objects.category_ids, 'category_ids')):
            if ids.dtype == object or (numbers and key == 'image_ids'):
                given = numbers if key == 'image_ids' else None
                values = [given.get(v) if given else as_id(v) for v in ids.tolist()]
                whole = [value if isinstance(value, int) else NO_ID for value in values]
                setattr(objects, key, np.array(whole, dtype=np.int64))
        rows = np.searchsorted(self.image_ids, objects.image_ids).clip(max=len(self.image_ids) - 1)
        bad = self.image_ids[rows] != objects.image_ids
        bad |= ~np.isin(objects.category_ids, np.array(list(names), dtype=np.int64))
        if bad.any() and self.problems is not None:
            no_image = int((self.image_ids[rows] != objects.image_ids).sum())
            for kind, number in (('image', no_image), ('category', int(bad.sum()) - no_image)):
                if number:
                    self.problems.add(f'annotations whose {kind} is not listed', str(self.file), number)
            objects, rows = objects[~bad], rows[~bad]
        elif bad.any():
            annotation = self.entry(int(bad.argmax()))
            problem = place_problem(annotation, numbers or set(self.image_ids.tolist()), names)
            raise UserError(f'{self.file}: {title_of(annotation)} {problem}')
        self.order = np.argsort(rows, kind='stable')
        self.objects = objects[self.order]
        self.starts = np.searchsorted(rows[self.order], np.arange(len(self.image_ids) + 1))

    def usable(self, block: list[dict]) -> list[dict]:
        """Return the annotations without a problem of their own, and count the others."""
        good = []
        for annotation in block:
            if problem := box_problem(annotation):
                assert self.problems is not None
                self.problems.add('annotations that cannot be used', f'{title_of(annotation)} {problem}')
            else:
                good.append(annotation)
        return good

    def entry(self, index: int) -> dict:
        """Return the annotation of this place in the file, which is read again: for messages."""
        for name, block in self.read(self.file):
            if name == 'annotations':
                if index < len(block):
                    mend(name, block[index : index + 1], self.file, Findings())
                    return block[index]
                index -= len(block)
        raise IndexError(f'{self.file} has fewer annotations than before')

    def check_segmentations(self, rows: np.ndarray) -> None:
        """Raise ValueError if one of these objects has neither polygons nor run lengths."""
        without = rows[~self.objects.segmented[rows]]
        if len(without):
            annotation = self.entry(int(self.order[without].min()))
            raise UserError(
                f'{self.file}: {title_of(annotation)} has no segmentation, which masks are made of: add polygons or '
                'run-length masks, or train without --masks'
            )


@dataclass
class Inventory:
    """The T objects of N images, as the annotations have them.

    boxes_xywh: [T, 4] in pixels. labels: [T]. counts: [N] objects of each image. sizes: [N, 2] height and width, 0 where
    they are not known. folder, names: where the image files are, and their names. findings: odd things that are kept,
    mended or left out. problems: what cannot be used, if it was counted.
    """

    boxes_xywh: np.ndarray
    labels: np.ndarray
    counts: np.ndarray
    sizes: np.ndarray
    folder: Path
    names: list[str]
    findings: Findings
    problems: Findings | None = None
