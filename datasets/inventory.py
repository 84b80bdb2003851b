"""What a dataset holds and what is unusual in it: a few lines at the start of every run, and --check_data."""

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
from util.errors import UserError

CLASSES_SHOWN = 8
MANY = 0.5  # share of the objects that is worth a warning


def print_inventory(datasets: Mapping[str, ImageDataset], **limits: Any) -> None:
    """Print what the data hold, and what is likely to spoil the run; arguments and errors are those of `find_warnings`."""
    for split, dataset in datasets.items():
        for line in describe(split, dataset):
            print(line)
    for line in find_warnings(datasets, **limits):
        print(f'warning: {line}', flush=True)


def describe(split: str, dataset: ImageDataset) -> list[str]:
    """Return lines about one part: images, objects, classes, unusual things."""
    found = dataset.inventory()
    if found is None:
        return []
    total, empty = len(found.labels), int((found.counts == 0).sum())
    names = dataset.class_map.names
    numbers = np.bincount(found.labels, minlength=len(names))
    classes = sorted((label for label, name in enumerate(names) if name), key=lambda label: -numbers[label])
    shown = [f'{names[label]} {numbers[label]:,}' for label in classes[:CLASSES_SHOWN]]
    if len(classes) > CLASSES_SHOWN:
        shown.append(f'... {names[classes[-1]]} {numbers[classes[-1]]:,}')
    lines = [
        f'{len(found.counts):,} images, {empty:,} of them without objects; {total:,} objects, {total / len(found.counts):.1f} an '
        f'image, at most {found.counts.max():,}',
        f'objects by class: {", ".join(shown)}',
        *found.issues.lines(),
    ]
    return [f'{split} {line}' for line in lines]


def find_warnings(
    datasets: Mapping[str, ImageDataset], num_queries: int, stride: int, img_size: int, max_size: int
) -> list[str]:
    """Return sentences about what is likely to spoil a run.

    Args:
        num_queries: the most objects that the model finds in an image.
        stride: pixels between neighbours in the finest map that the detector reads.
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
                f'the training data ({train.folder}) have no object to learn from: check the annotation file (crowd regions '
                'are not trained on)'
            )
        if more := int((train.counts > num_queries).sum()):
            texts.append(
                f'{more:,} training images have more objects than --num_queries {num_queries} (at most '
                f'{train.counts.max():,}): the rest cannot be found'
            )
        names = datasets['train'].class_map.names
        numbers = np.bincount(train.labels, minlength=len(names))
        if absent := [str(name) for name, number in zip(names, numbers, strict=True) if name and not number]:
            texts.append(
                f'{len(absent)} classes have no training object: {", ".join(absent[:3])}{", ..." if len(absent) > 3 else ""}'
            )
        small = small_share(train, stride, img_size, max_size)
        if small > MANY:
            texts.append(
                f'{small:.0%} of the training objects are narrower or lower than the finest stride of {stride} pixels '
                f'at --img_size {img_size}: a larger one finds more of them'
            )
    if train is not None and val is not None and train.folder.resolve() == val.folder.resolve():
        both = set(train.names).intersection(val.names)
        if both:
            texts.append(
                f'{len(both):,} images are in the training and in the validation part, such as {min(both)}: the metrics will '
                'look better than they are'
            )
    return texts


def small_share(found: Inventory, stride: int, img_size: int, max_size: int) -> float:
    """Return the share of objects with a side below the stride at the size of evaluation; 0 if sizes are unknown."""
    known: np.ndarray = found.sizes.min(axis=1) > 0
    if not known.any():
        return 0.0
    short, long = np.sort(found.sizes[known], axis=1).T
    scale = np.zeros(len(known))
    scale[known] = np.minimum(img_size / short, max_size / long)
    sides = found.boxes_xywh[:, 2:].min(axis=1) * np.repeat(scale, found.counts)
    small = np.logical_and(sides > 0, sides < stride)
    return float(small.sum() / max(np.repeat(known, found.counts).sum(), 1))


class Examined(Dataset):
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

    problems, twins = Issues(), Issues()
    seen: dict[str, tuple[str, int]] = {}
    for split, dataset in datasets.items():
        loader = DataLoader(Examined(dataset), batch_size=None, num_workers=num_workers)
        for idx, (checksum, error) in enumerate(tqdm(loader, desc=f'{split} images', disable=None)):
            if error:
                problems.add(f'{split} images or masks that cannot be read', error)
            elif seen.get(checksum, (split, dataset.ids[idx])) != (split, dataset.ids[idx]):
                other, image_id = seen[checksum]
                where = f'in {split}' if other == split else f'in {other} and {split}'
                twins.add(f'images that are twice {where}', f'image {image_id} and {dataset.ids[idx]}')
            else:
                seen[checksum] = split, dataset.ids[idx]
    return problems, twins


def sample_rows(dataset: ImageDataset, count: int = 12) -> list[tuple]:
    """Return images and objects from all over a dataset, as `util.visualize.contact_sheet` takes them: as they are stored,
    and as training sees them.
    """
    from util.box_ops import box_cxcywh_to_xyxy

    rows = []
    for idx in np.linspace(0, len(dataset) - 1, min(count, len(dataset))).astype(int).tolist():
        stored, target = dataset.untransformed(idx)
        image, seen = dataset[idx]
        height, width = seen['size'].tolist()
        boxes = box_cxcywh_to_xyxy(seen['boxes']) * torch.tensor([width, height, width, height])
        rows.append((stored, target, image, seen | {'boxes': boxes}))
    return rows


def check_data(
    datasets: Mapping[str, ImageDataset], num_workers: int, folder: str | None, **limits: Any
) -> int:
    """Read and decode all data of a run, print what is unusual, and draw some images (--check_data).

    Args:
        datasets: built with `check_data`, so that they count what is invalid.
        folder: where to draw images, data_SPLIT.png each; None: nowhere.
        limits: arguments of `find_warnings`.

    Returns:
        The number of training images.

    Raises:
        UserError: something would stop a run; all of it is counted, and the first of each kind is named.
    """
    from util.visualize import data_sheet

    print_inventory(datasets, **limits)
    problems, twins = examine(datasets, num_workers)
    found = [dataset.inventory() for dataset in datasets.values()]
    texts = [line for one in found if one is not None and one.problems for line in one.problems.lines()]
    texts += problems.lines()
    for line in twins.lines():
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
    return len(datasets['train'])


def find_unusual_boxes(issues: Issues, table: AnnotationTable, rows: np.ndarray) -> None:
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
