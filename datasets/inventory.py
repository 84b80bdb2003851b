"""What a dataset holds and what is unusual in it: some lines at the start of every run, and --check_data."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from datasets.annotations import AnnotationTable, Inventory
from datasets.coco_json import EXAMPLES, Issues
from datasets.image_dataset import ImageDataset
from util.box_ops import box_cxcywh_to_xyxy
from util.errors import UserError

CLASSES_SHOWN = 8
MANY = 0.5  # share of the objects that is worth a warning


def print_inventory(datasets: Mapping[str, ImageDataset], **limits: Any) -> None:
    """Print what the data hold, and warnings; arguments and errors are those of `find_warnings`."""
    for split, dataset in datasets.items():
        for line in describe_part(split, dataset):
            print(line)
    for line in find_warnings(datasets, **limits):
        print(f'warning: {line}', flush=True)


def describe_part(split: str, dataset: ImageDataset) -> list[str]:
    """Return lines about one part: images, objects, classes, unusual things."""
    inventory = dataset.inventory()
    if inventory is None:
        return []
    counts, total = inventory.counts, len(inventory.labels)
    names = dataset.class_map.names
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
    datasets: Mapping[str, ImageDataset], num_queries: int, stride: int, img_size: int, max_size: int
) -> list[str]:
    """Return sentences about what is likely to spoil a run.

    Args:
        num_queries: the most objects that the model finds in an image.
        stride: of the finest feature map that the detector reads, in pixels.
        img_size: short side of an image at evaluation, in pixels.
        max_size: bound of its long side, in pixels.

    Raises:
        UserError: the training part has no object.
    """
    parts = {split: dataset.inventory() for split, dataset in datasets.items()}
    train, val, texts = parts.get('train'), parts.get('val'), []
    if train is not None:
        if not len(train.labels):
            raise UserError(
                f'the training data ({train.folder}) have no object to learn from: check the annotation file '
                '(crowd regions and objects with ignore 1 are not trained on)'
            )
        if crowded := int((train.counts > num_queries).sum()):
            texts.append(
                f'{crowded:,} training images have more objects than --num_queries {num_queries} (at most '
                f'{train.counts.max():,}): the rest cannot be found'
            )
        names = datasets['train'].class_map.names
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
    if train is not None and val is not None and train.folder.resolve() == val.folder.resolve():
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


class Checksums(Dataset):
    """The checksum of each image of a dataset, or why it cannot be used."""

    def __init__(self, dataset: ImageDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, idx: int) -> tuple[str, str]:
        try:
            image, _ = self.dataset.untransformed(idx)
        except (UserError, OSError) as error:
            return '', str(error)
        return hashlib.sha1(image.contiguous().numpy().tobytes(), usedforsecurity=False).hexdigest(), ''


def examine(datasets: Mapping[str, ImageDataset], num_workers: int) -> tuple[Issues, Issues]:
    """Decode every image and mask.

    Returns:
        What cannot be used, and images that are the same.
    """
    from tqdm import tqdm

    problems, duplicates = Issues(), Issues()
    seen: dict[str, tuple[str, int]] = {}
    for split, dataset in datasets.items():
        loader = DataLoader(Checksums(dataset), batch_size=None, num_workers=num_workers)
        for idx, (checksum, error) in enumerate(tqdm(loader, desc=f'{split} images', disable=None)):
            if error:
                problems.add(f'{split} images or masks that cannot be read', error)
            elif seen.get(checksum, (split, dataset.ids[idx])) != (split, dataset.ids[idx]):
                other, image_id = seen[checksum]
                where = f'in {split}' if other == split else f'in {other} and {split}'
                duplicates.add(f'images that are twice {where}', f'image {image_id} and {dataset.ids[idx]}')
            else:
                seen[checksum] = split, dataset.ids[idx]
    return problems, duplicates


def sample_rows(dataset: ImageDataset, count: int = 12) -> list[tuple]:
    """Return images and objects from the whole dataset, as `util.visualize.data_sheet` takes them.

    A row holds an image as it is stored, and as training sees it.
    """
    rows = []
    for idx in np.linspace(0, len(dataset) - 1, min(count, len(dataset))).astype(int).tolist():
        stored, target = dataset.untransformed(idx)
        image, transformed = dataset[idx]
        height, width = transformed['size'].tolist()
        boxes = box_cxcywh_to_xyxy(transformed['boxes']) * torch.tensor([width, height, width, height])
        rows.append((stored, target, image, transformed | {'boxes': boxes}))
    return rows


def check_data(
    datasets: Mapping[str, ImageDataset], num_workers: int, folder: str | None, **limits: Any
) -> int | None:
    """Read and decode all data of a run, print what is unusual, and draw some images (--check_data).

    Args:
        datasets: built with `check_data`, so that they count what is invalid.
        folder: where to draw images, data_SPLIT.png each; None: draw nothing.
        limits: arguments of `find_warnings`.

    Returns:
        The number of training images; None: there is no training part.

    Raises:
        UserError: something would stop a run. All problems are counted, and the first of each kind are named.
    """
    from util.visualize import data_sheet

    print_inventory(datasets, **limits)
    problems, duplicates = examine(datasets, num_workers)
    inventories = [dataset.inventory() for dataset in datasets.values()]
    texts = [
        line for each in inventories if each is not None and each.problems for line in each.problems.lines()
    ]
    texts += problems.lines()
    for line in duplicates.lines():
        print(f'warning: {line}')
    if texts:
        raise UserError('\n  '.join(['a run would stop at these data:', *texts]))
    if folder:
        for split, dataset in datasets.items():
            path = Path(folder) / f'data_{split}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            data_sheet(path, sample_rows(dataset), dataset.class_map.names)
            print(f'{path}: images as they are stored, and as the {split} part of a run sees them')
    print('all images, boxes and masks can be read')
    return len(datasets['train']) if 'train' in datasets else None


def find_unusual_boxes(issues: Issues, table: AnnotationTable, used: np.ndarray, rows: np.ndarray) -> None:
    """Count objects that training leaves out or changes.

    used, rows: rows of the images of a dataset, and of its objects, in the table.
    """
    objects = table.objects[rows]
    all_images = np.searchsorted(table.image_ids, table.objects.image_ids)
    is_used = np.isin(all_images, used)
    crowd = all_images[is_used & table.objects.crowd]
    ignored = all_images[is_used & table.objects.ignored & ~table.objects.crowd]
    images = np.searchsorted(table.image_ids, objects.image_ids)
    height, width = table.sizes[images].T
    x, y, w, h = objects.boxes_xywh.T
    known, sized = (height > 0) & (width > 0), (w > 0) & (h > 0)
    outside = known & sized & ((x >= width) | (y >= height) | (x + w <= 0) | (y + h <= 0))
    over = known & sized & ~outside & ((x < -1) | (y < -1) | (x + w > width + 1) | (y + h > height + 1))
    for kind, rows_of_images in (
        ('crowd regions, which training leaves out', crowd),
        (
            'objects with ignore 1, which training leaves out, and evaluation treats as the official code',
            ignored,
        ),
        ('boxes of no size, which training leaves out', images[~sized]),
        ('boxes wholly outside their image, which training leaves out', images[outside]),
        ('boxes that leave their image, which are cut off at its border', images[over]),
    ):
        if len(rows_of_images):
            names = [f'in {table.file_names[row]}' for row in rows_of_images[:EXAMPLES].tolist()]
            issues.add(kind, ', '.join(names), len(rows_of_images))
