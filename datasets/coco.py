"""
Any dataset in COCO form, read as DETR does (arXiv:2005.12872): crowd regions are dropped, boxes are clamped.

Keypoints are not read, because no model here uses them.
"""

import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from datasets.annotations import AnnotationTable, Inventory, PackedList
from datasets.augmentations import build_augmentation
from datasets.build import DataSettings, image_options
from datasets.class_map import ClassMap
from datasets.coco_json import Annotations, File, Issues, Lists, read_annotations, read_lists
from datasets.headers import Survey
from datasets.image_dataset import ImageDataset, Mix
from datasets.image_io import DEFAULT_READER, ImageReader, UnreadableImage
from datasets.image_names import find_images
from datasets.inventory import find_unusual_boxes
from datasets.readers import build_reader
from datasets.split import Split
from datasets.targets import AS_DETR, Objects, Reading, check_size, is_trained_on, make_target
from datasets.transforms import Target, Transform
from util.errors import FileError, UserError

USUAL_SIZE = (480, 640)  # height and width in place of those of an unreadable image


class CocoDetection(ImageDataset):
    """Images in COCO form. An item is a uint8 image [3, H, W] and its target.

    The target has, in this order: boxes [T, 4] float32 xyxy in pixels (cxcywh in [0, 1] after the
    transforms), labels [T], masks [T, H, W] if asked for, image_id [1], area [T] float32, iscrowd [T],
    orig_size and size [2] (height, width).

    Args:
        return_masks: None reads masks if every object has a segmentation.
        repeat_threshold: repeat images of rare classes (`repeats_of`); 0 repeats no image.
        allow_outside: take file names that lead out of image_dir.
        problems: where to count what is invalid, which is then left out; None: the first problem is an error.
        split: the part of the file that this is; None: all of it.
    """

    def read_lists(self, annotation_file: File, issues: Issues) -> Lists:
        """Return the lists of the annotation file in COCO form; other formats override this.

        issues: where to count what is repaired or left out.
        """
        return read_lists(annotation_file, issues)

    def __init__(
        self,
        image_dir: str | os.PathLike[str],
        annotation_file: str | os.PathLike[str],
        transforms: Transform | None = None,
        class_map: ClassMap | None = None,
        return_masks: bool | None = False,
        seed: int = 0,
        reading: Reading = AS_DETR,
        mix: Mix | None = None,
        repeat_threshold: float = 0.0,
        allow_outside: bool = False,
        problems: Issues | None = None,
        reader: ImageReader = DEFAULT_READER,
        split: Split | None = None,
    ) -> None:
        super().__init__(transforms, mix, seed)
        self.use_reader(reader)
        self.image_dir, self.annotation_file = Path(image_dir), Path(annotation_file)
        table = AnnotationTable(
            annotation_file, class_map, return_masks is not False, self.read_lists, problems
        )
        names = find_images(
            table.file_names, image_dir, annotation_file, allow_outside, problems, table.issues
        )
        if names is not table.file_names:
            table.file_names = PackedList.of(names)
        self.class_map = class_map or ClassMap.numbered(table.categories, reading.class_ids)
        images = self._large_images(table, reading.min_image_side)
        self.is_divided = split is not None
        if split is not None:
            images = images[split.contains(table)[images]]
        self.ids: list[int] = table.image_ids[images].tolist()
        self._file_names = table.file_names.chosen(images)
        self._json_sizes = table.sizes[images]
        rows, self._starts = objects_of(table, images, reading)
        self.issues, self.problems = table.issues, problems
        find_unusual_boxes(self.issues, table, images, rows)
        self.most_objects = int(np.diff(self._starts).max(initial=0))
        if return_masks:
            table.check_segmentations(rows)
        elif return_masks is None:
            return_masks = bool(table.objects.segmented[rows].all())
        self.return_masks = return_masks
        segmentations = table.segmentations if return_masks else None
        self._objects = Objects.of(table.objects[rows], self.class_map, segmentations)
        # Row of the image of each index; images of rare classes have several indices.
        self._rows = np.arange(len(self.ids))
        if repeat_threshold:
            repeats = repeats_of(self._objects.labels.numpy(), self._starts, repeat_threshold)
            self._rows = np.repeat(self._rows, repeats)
            self.ids = [self.ids[row] for row in self._rows]

    def _large_images(self, table: AnnotationTable, min_side: int) -> np.ndarray:
        """Return the table's rows of images without a side of less than min_side pixels.

        Raises:
            UserError: there is no such image.
        """
        sizes = (
            self._known_sizes(table.sizes, table.file_names, keep_unreadable=True)
            if min_side
            else table.sizes
        )
        rows = np.flatnonzero(sizes.min(axis=1) >= min_side)
        if not len(rows):
            raise UserError(
                f'all {len(sizes)} images of {self.image_dir} have a side of less than {min_side} pixels: '
                'this --aug needs larger ones'
            )
        return rows

    def _known_sizes(self, sizes: np.ndarray, names: Sequence[str], keep_unreadable: bool) -> np.ndarray:
        """Copy sizes [N, 2]; where one is 0, it is read from the header of the image.

        keep_unreadable: give an image without a readable header a usual size.
        """
        sizes = sizes.copy()
        for idx in np.flatnonzero((sizes <= 0).any(axis=1)).tolist():
            try:
                sizes[idx] = self.reader.size(self.image_dir / names[idx])
            except UnreadableImage:
                if not keep_unreadable:
                    raise
                sizes[idx] = USUAL_SIZE
        return sizes

    @cached_property
    def survey(self) -> Survey:
        """Return the headers of the images, each once."""
        paths = [self.image_dir / name for name in self._file_names]
        return Survey.of(paths, self._json_sizes)

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
    def reading_order(self) -> Sequence[int]:
        """Return an index of each image: rare ones have several."""
        return np.unique(self._rows, return_index=True)[1].tolist()

    @cached_property
    def ground_truth(self) -> Annotations:
        """Return the annotation file's content, of its part if it is divided; training never reads it."""
        content = read_annotations(self.annotation_file, self.read_lists)
        names = {self.ids[idx]: self._file_names[row] for idx, row in enumerate(self._rows.tolist())}
        for key, entries in (('id', 'images'), ('image_id', 'annotations')) if self.is_divided else ():
            content[entries] = [entry for entry in content[entries] if entry.get(key) in names]
        for image in content['images']:
            image['file_name'] = names.get(image['id'], image['file_name'])
        for image in content['images'] if self.return_masks else []:
            if not (image.get('height') and image.get('width')):  # masks need them
                image['height'], image['width'] = self.reader.size(self.image_dir / image['file_name'])
        return content

    def pixels(self, idx: int) -> Tensor:
        """Return the image as its file has it."""
        row = int(self._rows[idx])
        return self.reader.read(self.image_dir / self._file_names[row], self._json_sizes[row])

    def image_name(self, idx: int) -> str:
        return str(self.image_dir / self._file_names[int(self._rows[idx])])

    def untransformed(self, idx: int) -> tuple[Tensor, Target]:
        """Return the image as its file has it, and its objects."""
        row = int(self._rows[idx])
        name = self._file_names[row]
        file, size = self.image_dir / name, self._json_sizes[row]
        image = self.pixels(idx)
        check_size(file, image.shape[1:], size, self.annotation_file, self.reader.exif)
        objects = self._objects[self._starts[row] : self._starts[row + 1]]
        try:
            return image, make_target(objects, self.ids[idx], *image.shape[1:])
        except UserError as error:
            raise UserError(f'{self.annotation_file}: image {self.ids[idx]} ({name}) {error}') from error

    def turn_left(self, idx: int) -> int:
        """Return the orientation with which `image_io.turned` makes image idx upright, for drawings of it."""
        row = int(self._rows[idx])
        return self.reader.turn_left(self.image_dir / self._file_names[row], self._json_sizes[row])

    def image_sizes(self) -> np.ndarray:
        """Return height and width of all images, [N, 2]."""
        is_replaced = self.unreadable is not None
        return self._known_sizes(self._json_sizes, self._file_names, is_replaced)[self._rows]


def objects_of(table: AnnotationTable, images: np.ndarray, reading: Reading) -> tuple[np.ndarray, np.ndarray]:
    """Return the table's rows of the objects to train on in some images, in order.

    Returns:
        The rows, and bounds [len(images) + 1]: image i has the objects bounds[i] to bounds[i + 1].
    """
    counts = np.diff(table.starts)
    position = np.full(len(counts), -1)
    position[images] = np.arange(len(images))
    position = np.repeat(position, counts)  # of each object's image
    used = (position >= 0) & is_trained_on(reading, table.objects)
    return np.flatnonzero(used), np.searchsorted(position[used], np.arange(len(images) + 1))


def repeats_of(labels: np.ndarray, starts: np.ndarray, threshold: float) -> np.ndarray:
    """Return how often each image is in an epoch, by its rarest class (LVIS, arXiv:1908.03195, Appendix B.2).

    A class in a share f of the images asks for sqrt(threshold / f) repetitions, at least 1. Numbers are
    rounded up, as mmdetection does.

    Args:
        labels: [T] class of each object. starts: [N + 1], image i has the objects starts[i] to starts[i + 1].
    """
    num_images = len(starts) - 1
    images = np.repeat(np.arange(num_images), np.diff(starts))
    pairs = (
        np.unique(np.stack([labels, images], axis=1), axis=0) if len(labels) else np.zeros((0, 2), dtype=int)
    )
    share = np.bincount(pairs[:, 0], minlength=1) / num_images
    repeats_of_class = np.maximum(1, np.sqrt(threshold / np.maximum(share, 1e-12)))
    repeats = np.ones(num_images)
    np.maximum.at(repeats, pairs[:, 1], repeats_of_class[pairs[:, 0]])
    return np.ceil(repeats).astype(np.int64)


def build(part: str, settings: DataSettings, class_map: ClassMap | None = None) -> CocoDetection:
    """Build the 'train' or 'val' part; `find_files` says where its files are looked for."""
    source = settings.source(part)
    files = find_files(source, settings.coco_path, settings.images(part), settings.annotations(part))
    return CocoDetection(*files, **coco_options(part, settings, class_map))


def coco_options(part: str, settings: DataSettings, class_map: ClassMap | None) -> dict[str, Any]:
    """Return the options of a `CocoDetection` that the settings ask for."""
    share = settings.val_share
    return annotation_options(part, settings, class_map) | {
        'split': Split(part, share, settings.split_seed) if share else None,
        'problems': Issues() if settings.check_data else None,
        'allow_outside': settings.allow_outside,
        'repeat_threshold': settings.repeat_threshold if part == 'train' else 0.0,
    }


def annotation_options(part: str, settings: DataSettings, class_map: ClassMap | None) -> dict[str, Any]:
    """Return the options of a dataset in COCO form, in files or in shards."""
    augmentation, options = build_augmentation(settings), image_options(part, settings)
    min_side = augmentation.min_image_side if part == 'train' else 0
    return_masks: bool | None = settings.masks
    if options['mix'] and not settings.masks:
        return_masks = None  # mixing pastes objects if all of them have a mask
    return options | {
        'class_map': class_map,
        'reading': Reading(settings.class_ids, augmentation.drop_tiny, min_side),
        'return_masks': return_masks,
        'reader': build_reader(settings),
    }


def find_files(
    part: str, root: str | None, images: str | None = None, annotations: str | None = None
) -> tuple[Path, Path]:
    """Return image folder and annotation file of 'train' or 'val'.

    They are the explicit paths, else the first usual paths under root that exist.
    """
    names = (f'{part}2017', part)
    folders = [folder for name in names for folder in (name, f'images/{name}')]
    files = [f'annotations/instances_{name}.json' for name in names]
    annotation_file = find_path(root, annotations, files, f'--{part}_ann')
    return find_path(root, images, folders, f'--{part}_images'), annotation_file


def given_root(root: str | os.PathLike[str] | None, dataset_file: str) -> Path:
    """Return --coco_path, which this --dataset_file needs."""
    if root is None:
        raise UserError(f'where is the data? Give --coco_path, the folder of --dataset_file {dataset_file}')
    return Path(root)


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
