"""What a dataset holds and what is unusual in it: some lines at the start of every run."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from datasets.annotations import AnnotationTable, Inventory, places_in
from datasets.coco_json import EXAMPLES, Issues
from datasets.image_dataset import ImageDataset
from util.errors import UserError

CLASSES_SHOWN = 8
MANY = 0.5  # share of the objects that is worth a warning


def take_inventories(datasets: Mapping[str, ImageDataset]) -> dict[str, Inventory]:
    """Return the inventories of the parts that have one."""
    inventories = {split: dataset.inventory() for split, dataset in datasets.items()}
    return {split: inventory for split, inventory in inventories.items() if inventory is not None}


def print_inventory(
    inventories: Mapping[str, Inventory], names: Sequence[str | None], **limits: Any
) -> list[str]:
    """Print what the parts hold, and warnings, which are also returned.

    Args:
        names: of the class indices.
        limits: arguments of `find_warnings`, whose errors are raised.
    """
    for split, inventory in inventories.items():
        for line in describe_part(split, inventory, names):
            print(line)
    warnings = find_warnings(inventories, names, **limits)
    for line in warnings:
        print(f'warning: {line}', flush=True)
    return warnings


def describe_part(split: str, inventory: Inventory, names: Sequence[str | None]) -> list[str]:
    """Return lines about one part: images, objects, classes, unusual things."""
    counts, total = inventory.counts, len(inventory.labels)
    numbers = np.bincount(inventory.labels, minlength=len(names))
    classes = sorted((label for label, name in enumerate(names) if name), key=lambda label: -numbers[label])
    shown = [f'{names[label]} {numbers[label]:,}' for label in classes[:CLASSES_SHOWN]]
    if len(classes) > CLASSES_SHOWN:
        shown.append(f'... {names[classes[-1]]} {numbers[classes[-1]]:,}')
    lines = [
        f'{len(counts):,} images, {(counts == 0).sum():,} of them without objects; {total:,} objects, '
        f'{total / len(counts):.1f} an image, at most {counts.max():,}',
        f'objects by class: {", ".join(shown)}',
        *inventory.issues.lines(),
    ]
    return [f'{split} {line}' for line in lines]


def find_warnings(
    inventories: Mapping[str, Inventory],
    names: Sequence[str | None],
    num_queries: int,
    stride: int,
    img_size: int,
    max_size: int,
) -> list[str]:
    """Return sentences about what is likely to spoil a run.

    Args:
        names: of the class indices.
        num_queries: the most objects that the model finds in an image.
        stride: of the finest feature map that the detector reads, in pixels.
        img_size: short side of an image at evaluation, in pixels.
        max_size: bound of its long side, in pixels.

    Raises:
        UserError: the training part has no object.
    """
    train, val, texts = inventories.get('train'), inventories.get('val'), []
    if train is not None:
        if not len(train.labels):
            folder = f' ({train.folder})' if train.folder else ''
            raise UserError(
                f'the training data{folder} have no object to learn from: check the annotation file '
                '(crowd regions and objects with ignore 1 are not trained on)'
            )
        if crowded := int((train.counts > num_queries).sum()):
            texts.append(
                f'{crowded:,} training images have more objects than --num_queries {num_queries} (at most '
                f'{train.counts.max():,}): the rest cannot be found'
            )
        numbers = np.bincount(train.labels, minlength=len(names))
        if absent := [str(name) for name, number in zip(names, numbers, strict=True) if name and not number]:
            more = ', ...' if len(absent) > 3 else ''
            texts.append(f'{len(absent)} classes have no training object: {", ".join(absent[:3])}{more}')
        small = small_share(train, stride, img_size, max_size)
        if small > MANY:
            texts.append(
                f'{small:.0%} of the training objects are narrower or lower than the finest stride of '
                f'{stride} pixels at --img_size {img_size}: a larger one finds more of them'
            )
    if train and val and train.folder and val.folder and train.folder.resolve() == val.folder.resolve():
        shared = set(train.names).intersection(val.names)
        if shared:
            texts.append(
                f'{len(shared):,} images are in the training and in the validation part, such as '
                f'{min(shared)}: the metrics will look better than they are'
            )
    return texts


def small_share(inventory: Inventory, stride: int, img_size: int, max_size: int) -> float:
    """Return the share of objects with a side below the stride at evaluation; 0 if no image size is known."""
    known: np.ndarray = inventory.sizes.min(axis=1) > 0
    if not known.any():
        return 0.0
    short, long = np.sort(inventory.sizes[known], axis=1).T
    scale = np.zeros(len(known))
    scale[known] = np.minimum(img_size / short, max_size / long)
    sides = inventory.boxes_xywh[:, 2:].min(axis=1) * np.repeat(scale, inventory.counts)
    small = np.logical_and(sides > 0, sides < stride)
    return float(small.sum() / max(np.repeat(known, inventory.counts).sum(), 1))


def find_unusual_boxes(issues: Issues, table: AnnotationTable, used: np.ndarray, rows: np.ndarray) -> None:
    """Count objects that training leaves out or changes.

    used, rows: rows of the images of a dataset, and of its objects, in the table.
    """
    objects = table.objects[rows]
    is_used = np.isin(table.objects.image_ids, table.image_ids[used])
    crowd, ignored = table.objects.crowd & is_used, table.objects.ignored & is_used
    images = np.searchsorted(table.image_ids, objects.image_ids)
    height, width = table.sizes[images].T
    x, y, w, h = objects.boxes_xywh.T
    known, sized = (height > 0) & (width > 0), (w > 0) & (h > 0)
    outside = known & sized & ((x >= width) | (y >= height) | (x + w <= 0) | (y + h <= 0))
    over = known & sized & ~outside & ((x < -1) | (y < -1) | (x + w > width + 1) | (y + h > height + 1))
    for kind, found in (
        ('crowd regions, which training leaves out', table.objects[crowd]),
        (
            'objects with ignore 1, which training leaves out, and evaluation treats as the official code',
            table.objects[ignored & ~crowd],
        ),
        ('boxes of no size, which training leaves out', objects[~sized]),
        ('boxes wholly outside their image, which training leaves out', objects[outside]),
        ('boxes that leave their image, which are cut off at its border', objects[over]),
    ):
        if len(found):
            first = np.searchsorted(table.image_ids, found.image_ids[:EXAMPLES])
            names = ', '.join(f'in {table.file_names[row]}' for row in first.tolist())
            issues.add(kind, names, len(found), places_in(found))
