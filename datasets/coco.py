"""
Any data set in COCO form, read as DETR does (arXiv:2005.12872): crowd regions are dropped, boxes are clamped to the
image.

Keypoints are not read, because no model here uses them. Annotations are kept in a few arrays that loader workers
share. Millions of Python objects would be copied by every worker.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch import Tensor

from datasets.annotations import AnnotationTable, Columns, Inventory, PackedList, is_tiny, labels_of
from datasets.build import DataSettings, image_options
from datasets.class_map import ClassMap
from datasets.coco_json import (
    EXAMPLES,
    Annotations,
    File,
    Issues,
    Lists,
    check_files,
    polygons_of,
    read_annotations,
    read_lists,
    run_lengths,
)
from datasets.image_dataset import ImageDataset, Mix
from datasets.image_io import decode_file, naming, read_image, stored_size
from datasets.transforms import Target, Transform
from util.errors import FileError, UserError

MMDETECTION = ('co_detr', 'lsj')  # recipes whose annotations are read as mmdetection does
MIN_IMAGE_SIDE = 32


@dataclass(frozen=True)
class Reading:
    """Rules for reading an annotation file; the defaults are DETR's.

    class_ids: class indices of the categories, see `ClassMap.numbered`. drop_tiny: leave out objects narrower or lower
    than a pixel, and those without area. min_image_side: leave out images with a smaller side.
    """

    class_ids: str = 'auto'
    drop_tiny: bool = False
    min_image_side: int = 0


class CocoDetection(ImageDataset):
    """Images in COCO form. An item is a uint8 image [3, H, W] and its target.

    The target has, in this order: boxes [T, 4] float32 xyxy in pixels (cxcywh in [0, 1] after the transforms), labels
    [T], masks [T, H, W] if asked for, image_id [1], area [T] float32, iscrowd [T], orig_size and size [2] (height,
    width).

    Args:
        return_masks: None reads masks if every object has a segmentation.
        repeat_threshold: repeat images of rare classes (`repeats_of`); 0 repeats none.
        allow_outside: take file names that lead out of image_dir.
        problems: where to count what cannot be used, which is then left out; None: the first of it is an error.
    """

    @classmethod
    def read_lists(cls, annotation_file: File) -> Lists:
        """Return the lists of the annotation file in COCO form; other formats have their own way."""
        return read_lists(annotation_file)

    def __init__(
        self,
        image_dir: str | os.PathLike[str],
        annotation_file: str | os.PathLike[str],
        transforms: Transform | None = None,
        class_map: ClassMap | None = None,
        return_masks: bool | None = False,
        seed: int = 0,
        reading: Reading = Reading(),
        mix: Mix | None = None,
        repeat_threshold: float = 0.0,
        allow_outside: bool = False,
        problems: Issues | None = None,
    ) -> None:
        super().__init__(transforms, mix, seed)
        self.image_dir, self.annotation_file = Path(image_dir), Path(annotation_file)
        table = AnnotationTable(
            annotation_file, class_map, return_masks is not False, self.read_lists, problems
        )
        check_files(table.file_names, image_dir, annotation_file, allow_outside, problems)
        self.class_map = class_map or ClassMap.numbered(table.categories, reading.class_ids)
        kept = self._large_images(table, reading.min_image_side)
        self.ids: list[int] = table.image_ids[kept].tolist()
        self._file_names = table.file_names.chosen(kept)
        self._json_sizes = table.sizes[kept]
        rows, self._starts = objects_of(table, kept, reading)
        self.issues = table.issues
        self.problems = problems
        find_odd_boxes(self.issues, table, rows)
        self.most_objects = int(np.diff(self._starts).max(initial=0))
        if return_masks:
            table.check_segmentations(rows)
        elif return_masks is None:
            return_masks = bool(table.objects.segmented[rows].all())
        self.return_masks = return_masks
        segmentations = table.segmentations if return_masks else None
        self._objects = Objects.of(table.objects[rows], self.class_map, segmentations)
        # Row of the image behind each index; images of rare classes have several indices.
        self._rows = np.arange(len(self.ids))
        if repeat_threshold:
            repeats = repeats_of(self._objects.labels.numpy(), self._starts, repeat_threshold)
            self._rows = np.repeat(self._rows, repeats)
            self.ids = [self.ids[row] for row in self._rows]
        self._ground_truth: Annotations | None = None
        self._files: dict[Path, bytes] | None = None  # kept in memory, see keep_files

    def _large_images(self, table: AnnotationTable, min_side: int) -> np.ndarray:
        """Return the table's rows of images whose sides all have min_side pixels; headers are read where it has no size.

        Raises:
            UserError: there is none.
        """
        sizes = table.sizes.copy()
        if min_side:
            for row in np.flatnonzero((sizes <= 0).any(axis=1)).tolist():
                sizes[row] = stored_size(self.image_dir / table.file_names[row])
        kept = np.flatnonzero(sizes.min(axis=1) >= min_side)
        if not len(kept):
            raise UserError(
                f'all {len(sizes)} images of {self.image_dir} have a side of less than {min_side} pixels: this --aug needs '
                'larger ones'
            )
        return kept

    def inventory(self) -> Inventory:
        """Return all objects, before repetition of rare classes."""
        objects, rows = self._objects, np.unique(self._rows)
        return Inventory(
            objects.boxes_xywh.numpy(),
            objects.labels.numpy(),
            np.diff(self._starts),
            self._json_sizes,
            self.image_dir,
            [self._file_names[row] for row in rows.tolist()],
            self.issues,
            self.problems,
        )

    @property
    def ground_truth(self) -> Annotations:
        """Return the annotation file's content, which is read at the first call; training never calls this."""
        if self._ground_truth is None:
            self._ground_truth = read_annotations(self.annotation_file, self.read_lists)
            for image in self._ground_truth['images'] if self.return_masks else []:
                if not (image.get('height') and image.get('width')):  # masks need them
                    image['height'], image['width'] = stored_size(self.image_dir / image['file_name'])
        return self._ground_truth

    def __getstate__(self) -> dict:
        """Leave out the ground truth: spawned workers do not need it."""
        return {**self.__dict__, '_ground_truth': None}

    def untransformed(self, idx: int) -> tuple[Tensor, Target]:
        """Return the image as it is stored, and its objects."""
        row = int(self._rows[idx])
        image = self._image(row)
        objects = self._objects[self._starts[row] : self._starts[row + 1]]
        try:
            return image, make_target(objects, self.ids[idx], *image.shape[1:])
        except UserError as error:
            name = self._file_names[row]
            raise UserError(f'{self.annotation_file}: image {self.ids[idx]} ({name}) {error}') from error

    def _image(self, row: int) -> Tensor:
        path = self.image_dir / self._file_names[row]
        image = read_image(path) if self._files is None else decode_file(path, self._bytes(path))
        check_size(path, image.shape[1:], self._json_sizes[row], self.annotation_file)
        return image

    def image_sizes(self) -> np.ndarray:
        """Return height and width of all images, [N, 2]; only images without a size in the annotations are opened."""
        sizes = self._json_sizes.copy()
        for idx in np.flatnonzero((sizes <= 0).any(axis=1)).tolist():
            sizes[idx] = stored_size(self.image_dir / self._file_names[idx])
        return sizes[self._rows]

    def keep_files(self, local_rank: int, local_size: int) -> None:
        """Read this process's share of a node's files into memory, still compressed. Other files are added when they
        are first used.
        """
        self._files = {}
        for idx in range(local_rank, len(self), local_size):
            self._bytes(self.image_dir / self._file_names[int(self._rows[idx])])

    def _bytes(self, path: Path) -> bytes:
        assert self._files is not None
        if path not in self._files:
            with naming(path):
                self._files[path] = path.read_bytes()
        return self._files[path]


@dataclass(frozen=True)
class Objects:
    """T objects as the annotations have them.

    boxes_xywh: [T, 4] float32 in pixels. labels: [T] int64. areas: [T] float32. segmentations: polygons or run
    lengths; None if masks are not asked for.
    """

    boxes_xywh: Tensor
    labels: Tensor
    areas: Tensor
    segmentations: PackedList | list | None

    @classmethod
    def of(cls, columns: Columns, class_map: ClassMap, segmentations: bytearray | None) -> 'Objects':
        """Take COLUMNS, and the bytes of their segmentations if masks are asked for."""
        return cls(
            torch.from_numpy(columns.boxes_xywh.astype(np.float32)),
            torch.from_numpy(labels_of(columns, class_map)),
            torch.from_numpy(columns.areas.astype(np.float32)),
            None if segmentations is None else PackedList(segmentations, columns.starts, columns.stops),
        )

    def __getitem__(self, some: slice) -> 'Objects':
        """Return the objects of a slice."""
        rows = range(*some.indices(len(self.labels)))
        segmentations = None if self.segmentations is None else [self.segmentations[row] for row in rows]
        return Objects(self.boxes_xywh[some], self.labels[some], self.areas[some], segmentations)


def make_target(objects: Objects, image_id: int, height: int, width: int) -> Target:
    """Make the target (see `CocoDetection`) of the objects that have a box of positive size inside the image."""
    boxes_xyxy = objects.boxes_xywh.clone()
    boxes_xyxy[:, 2:] += boxes_xyxy[:, :2]
    boxes_xyxy[:, 0::2].clamp_(0, width)
    boxes_xyxy[:, 1::2].clamp_(0, height)
    keep = (boxes_xyxy[:, 2:] > boxes_xyxy[:, :2]).all(dim=1)
    target = {'boxes': boxes_xyxy[keep], 'labels': objects.labels[keep]}
    if objects.segmentations is not None:
        masks = torch.zeros(len(keep), height, width, dtype=torch.uint8)
        for mask, segmentation in zip(masks, objects.segmentations, strict=True):
            mask |= rasterize(segmentation, height, width)
        target['masks'] = masks[keep]
    target['image_id'] = torch.tensor([image_id])
    target['area'] = objects.areas[keep]
    # The official code has an empty float tensor here for an image without annotations.
    target['iscrowd'] = torch.zeros(len(target['boxes']), dtype=torch.int64 if len(keep) else torch.float32)
    target['orig_size'] = torch.tensor([height, width])
    target['size'] = torch.tensor([height, width])
    return target


def check_size(path: object, found: Sequence[int], annotated: Sequence[int], source: object) -> None:
    """Compare an image's (height, width) with that of its annotations, where 0 means unknown.

    Raises:
        UserError: the two differ.
    """
    (height, width), (expected_height, expected_width) = found, annotated
    if expected_height > 0 and expected_width > 0 and (height, width) != (expected_height, expected_width):
        raise UserError(
            f'{path} is {width} x {height} (width x height), but {source} says {expected_width} x {expected_height}: '
            'the boxes would be wrong; fetch the right image, or store it without EXIF rotation'
        )


def kept_by(reading: Reading, objects: Columns) -> np.ndarray:
    """Leave out crowd regions and, if the reading says so, tiny objects; [A] bool."""
    return ~objects.crowd & ~(is_tiny(objects) & reading.drop_tiny)


def objects_of(table: AnnotationTable, images: np.ndarray, reading: Reading) -> tuple[np.ndarray, np.ndarray]:
    """Return the table's rows of the objects in some images, in order, and bounds [len(images) + 1]: image i has the
    objects bounds[i] to bounds[i + 1].
    """
    counts = np.diff(table.starts)
    position = np.full(len(counts), -1)
    position[images] = np.arange(len(images))
    position = np.repeat(position, counts)  # of each object's image
    kept = (position >= 0) & kept_by(reading, table.objects)
    return np.flatnonzero(kept), np.searchsorted(position[kept], np.arange(len(images) + 1))


def find_odd_boxes(issues: Issues, table: AnnotationTable, rows: np.ndarray) -> None:
    """Count objects that training leaves out or changes."""
    objects = table.objects[rows]
    crowd = table.objects.image_ids[table.objects.crowd]
    count_all(
        issues, 'crowd regions, which training leaves out', np.searchsorted(table.image_ids, crowd), table
    )
    images = np.searchsorted(table.image_ids, objects.image_ids)
    height, width = table.sizes[images].T
    x, y, w, h = objects.boxes_xywh.T
    known, sized = (height > 0) & (width > 0), (w > 0) & (h > 0)
    outside = known & sized & ((x >= width) | (y >= height) | (x + w <= 0) | (y + h <= 0))
    over = known & sized & ~outside & ((x < -1) | (y < -1) | (x + w > width + 1) | (y + h > height + 1))
    for which, kind in (
        (~sized, 'boxes of no size, which training leaves out'),
        (outside, 'boxes wholly outside their image, which training leaves out'),
        (over, 'boxes that leave their image, which are cut off at its border'),
    ):
        count_all(issues, kind, images[which], table)


def count_all(issues: Issues, kind: str, images: np.ndarray, table: AnnotationTable) -> None:
    """Count objects of a kind by the table's rows of their images, the first of which are named."""
    for row in images[:EXAMPLES].tolist():
        issues.add(kind, f'in {table.file_names[row]}')
    if len(images) > EXAMPLES:
        issues.counts[kind] += len(images) - EXAMPLES


def repeats_of(labels: np.ndarray, starts: np.ndarray, threshold: float) -> np.ndarray:
    """Return how often each image is in an epoch, by its rarest class (LVIS, arXiv:1908.03195, Appendix B.2).

    A class in a share f of the images asks for sqrt(threshold / f) repetitions, at least 1. Numbers are rounded up, as
    mmdetection does.

    Args:
        labels: [T] class of each object. starts: [N + 1], image i has the objects starts[i] to starts[i + 1].
    """
    num_images = len(starts) - 1
    images = np.repeat(np.arange(num_images), np.diff(starts))
    pairs = (
        np.unique(np.stack([labels, images], axis=1), axis=0) if len(labels) else np.zeros((0, 2), dtype=int)
    )
    share = np.bincount(pairs[:, 0], minlength=1) / num_images
    wanted = np.maximum(1, np.sqrt(threshold / np.maximum(share, 1e-12)))
    repeats = np.ones(num_images)
    np.maximum.at(repeats, pairs[:, 1], wanted[pairs[:, 0]])
    return np.ceil(repeats).astype(np.int64)


def rasterize(segmentation: list | dict, height: int, width: int) -> Tensor:
    """Draw the union of polygons, or a run-length mask (compressed or not), as uint8 [height, width].

    Raises:
        UserError: it is neither, or of another size.
    """
    try:
        return drawn(segmentation, height, width)
    except Exception as error:  # pycocotools has its own for each kind of nonsense
        text = str(segmentation)[:60]
        raise UserError(
            f'has the segmentation {text}, which is no mask of {height} x {width} ({error})'
        ) from error


def drawn(segmentation: list | dict, height: int, width: int) -> Tensor:
    if isinstance(segmentation, dict):
        if list(segmentation['size']) != [height, width]:
            raise ValueError(f'it is a mask of {segmentation["size"]}')
        return torch.from_numpy(coco_mask.decode(run_lengths(segmentation)))
    polygons = polygons_of(segmentation)
    if not polygons:
        return torch.zeros(height, width, dtype=torch.uint8)
    parts = coco_mask.decode(coco_mask.frPyObjects(polygons, height, width))  # [height, width, parts]
    return torch.from_numpy(parts.max(axis=2))


def build_reading(part: str, settings: DataSettings) -> Reading:
    """Return the rules of reading that --aug and --class_ids ask for."""
    if settings.aug not in MMDETECTION:
        return Reading(settings.class_ids)
    return Reading(settings.class_ids, True, MIN_IMAGE_SIDE if part == 'train' else 0)


def build(part: str, settings: DataSettings, class_map: ClassMap | None = None) -> CocoDetection:
    """Build the 'train' or 'val' part; `find_files` says where its files are looked for."""
    files = find_files(part, settings.coco_path, settings.images(part), settings.annotations(part))
    return CocoDetection(*files, **coco_options(part, settings, class_map))


def coco_options(part: str, settings: DataSettings, class_map: ClassMap | None) -> dict[str, Any]:
    """Return the options of a `CocoDetection` that the settings ask for."""
    return image_options(part, settings) | {
        'class_map': class_map,
        'return_masks': needs_masks(part, settings),
        'reading': build_reading(part, settings),
        'problems': Issues() if settings.check_data else None,
        'allow_outside': settings.allow_outside,
        'repeat_threshold': settings.repeat_threshold if part == 'train' else 0.0,
    }


def needs_masks(part: str, settings: DataSettings) -> bool | None:
    """Return whether targets need masks; None: where all objects have one, for the copy-paste of --aug lsj."""
    if settings.masks:
        return True
    return None if part == 'train' and settings.aug == 'lsj' else False


def find_files(
    part: str, root: str | None, images: str | None = None, annotations: str | None = None
) -> tuple[Path, Path]:
    """Return image folder and annotation file of 'train' or 'val': explicit paths, else the first usual paths under root that
    exist.
    """
    names = (f'{part}2017', part)
    folders = [folder for name in names for folder in (name, f'images/{name}')]
    files = [f'annotations/instances_{name}.json' for name in names]
    annotation_file = find_path(root, annotations, files, f'--{part}_ann')
    return find_path(root, images, folders, f'--{part}_images'), annotation_file


def find_path(root: str | None, explicit: str | None, usual: list[str], option: str) -> Path:
    if explicit is not None:
        if not Path(explicit).exists():
            raise FileError(f'{option} {explicit} does not exist: check the path')
        return Path(explicit)
    if root is None:
        raise UserError(f'where is the data? Give --coco_path (a folder in a usual layout) or {option}')
    paths = [Path(root) / name for name in usual]
    for path in paths:
        if path.exists():
            return path
    tried = ', '.join(map(str, paths))
    raise FileError(f'none of {tried} exists: check --coco_path, or give {option}')
