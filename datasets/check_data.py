"""Reading all data of a run before it begins (--check_data): what is unusual, as lines and as a page."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from datasets.annotations import Inventory
from datasets.coco_json import Issues, Place
from datasets.data_page import Kind, Part, data_page
from datasets.headers import describe_headers
from datasets.image_dataset import ImageDataset
from datasets.image_io import UnreadableImage, is_flat
from datasets.inventory import print_inventory, take_inventories
from datasets.transforms import Sample
from util.errors import UserError
from util.files import save_atomically

Item = TypeVar('Item')
REPLACED = 'train images that cannot be read, in whose place a run takes others'
NO_BOXES, NO_LABELS = np.zeros((0, 4), dtype=np.float32), np.zeros(0, dtype=np.int64)


class Finding(NamedTuple):
    """What reading image `idx` shows.

    error: why it cannot be used; '' if it can. is_unreadable: its file is damaged or missing. Then: checksum of its pixels; is_flat: they are nearly of
    one value; size: height and width; boxes_xywh: [T, 4] in pixels, and labels [T] of its objects.
    """

    idx: int
    error: str = ''
    is_unreadable: bool = False
    checksum: bytes = b''
    is_flat: bool = False
    size: tuple[int, int] = (0, 0)
    boxes_xywh: np.ndarray = NO_BOXES
    labels: np.ndarray = NO_LABELS

    @classmethod
    def of(cls, idx: int, item: Sample | Exception) -> 'Finding':
        """Look at an item, or at the reason why it cannot be read."""
        if isinstance(item, Exception):
            return cls(idx, str(item), isinstance(item, UnreadableImage))
        image, target = item
        data = image.contiguous().numpy().tobytes()
        checksum = hashlib.sha1(data, usedforsecurity=False).digest()
        boxes = target['boxes'].numpy().copy()
        boxes[:, 2:] -= boxes[:, :2]
        height, width = image.shape[1:]
        return cls(idx, '', False, checksum, is_flat(image), (height, width), boxes, target['labels'].numpy())


class Findings(IterableDataset):
    """Findings of all images of a dataset. Each loader worker reads a run of its reading order."""

    def __init__(self, dataset: ImageDataset) -> None:
        self.dataset = dataset

    def __iter__(self) -> Iterator[Finding]:
        info = get_worker_info()
        workers, worker = (info.num_workers, info.id) if info else (1, 0)
        order = self.dataset.reading_order
        start, stop = len(order) * worker // workers, len(order) * (worker + 1) // workers
        for idx, item in self.dataset.read_items(order[start:stop]):
            yield Finding.of(idx, item)


def unchanged(item: Item) -> Item:
    """Pass on what a loader would make tensors of."""
    return item


def read_all(split: str, dataset: ImageDataset, num_workers: int) -> list[Finding]:
    """Decode every image and mask, and return a finding for each image, in order of their indices."""
    from tqdm import tqdm

    loader = DataLoader(Findings(dataset), batch_size=None, num_workers=num_workers, collate_fn=unchanged)
    total = len(dataset.reading_order)
    findings = tqdm(loader, f'{split} images', total, disable=None)
    found = {each.idx: each for each in findings}  # the last one of two, which is an error of a shard's end
    return [found[idx] for idx in sorted(found)]


def found_inventory(found: Sequence[Finding], names: list[str]) -> Inventory:
    """Return what a dataset holds, as its images show it."""
    return Inventory(
        np.concatenate([each.boxes_xywh for each in found]),
        np.concatenate([each.labels for each in found]),
        np.array([len(each.labels) for each in found]),
        np.array([each.size for each in found]),
        None,
        names,
        Issues(),
    )


def judge(
    parts: Mapping[str, Part], findings: Mapping[str, list[Finding]], most_unreadable: int
) -> tuple[Issues, Issues]:
    """Return what cannot be used, and what is only worth a warning.

    These are equal images, and those without contrast.
    """
    problems, warnings = Issues(), Issues()
    replaced = sum(each.is_unreadable for each in findings.get('train', [])) <= most_unreadable
    seen: dict[bytes, tuple[str, int]] = {}
    for split, found in findings.items():
        part = parts[split]
        for each in found:
            key = split, each.idx
            if each.error:
                is_replaced = each.is_unreadable and split == 'train' and replaced
                kind = REPLACED if is_replaced else f'{split} images or masks that cannot be read'
                problems.add(kind, each.error, places=[Place(key)])
                continue
            if each.is_flat:
                kind = f'{split} images that are nearly of one value'
                warnings.add(kind, part.name_of[each.idx], places=[Place(key)])
            other, first = seen.setdefault(each.checksum, key)
            if (other, first) != key:
                where = f'in {split}' if other == split else f'in {other} and {split}'
                text = f'image {parts[other].dataset.ids[first]} and {part.dataset.ids[each.idx]}'
                places = [Place((other, first)), Place(key)]
                warnings.add(f'images that are twice {where}', text, places=places)
    return problems, warnings


def crowded_images(part: Part, num_queries: int) -> Issues:
    """Count images with more objects than the model finds, of which a warning speaks, for the page."""
    issues, counts = Issues(), part.inventory.counts
    for row in np.flatnonzero(counts > num_queries).tolist():
        name = part.inventory.names[row]
        issues.add(f'images with more objects than --num_queries {num_queries}', name, places=[Place(name)])
    return issues


def check_data(
    datasets: Mapping[str, ImageDataset],
    num_workers: int,
    folder: str | None,
    most_unreadable: int = 0,
    **limits: Any,
) -> int | None:
    """Read and decode all data of a run, and print and show what is unusual (--check_data).

    Args:
        datasets: built with `check_data`, so that they count what is invalid.
        folder: where to write the page, data.html; None: nowhere.
        most_unreadable: number of unreadable training images that a run replaces.
        limits: arguments of `datasets.inventory.find_warnings`.

    Returns:
        The number of training images; None: there is no training part.

    Raises:
        UserError: something would stop a run. All problems are counted, and the first of each kind are named.
    """
    class_names = list(datasets.values())[-1].class_map.names
    inventories = take_inventories(datasets)
    is_known = len(inventories) == len(datasets)
    texts = print_inventory(inventories, class_names, **limits) if is_known else []
    findings = {split: read_all(split, dataset, num_workers) for split, dataset in datasets.items()}
    for split, dataset in datasets.items():
        if split not in inventories:
            names = [dataset.image_name(each.idx) for each in findings[split]]
            inventories[split] = found_inventory(findings[split], names)
    if not is_known:
        texts = print_inventory(inventories, class_names, **limits)
    parts = {
        split: Part(dataset, inventories[split], np.array([each.size for each in findings[split]]))
        for split, dataset in datasets.items()
    }
    problems, warnings = judge(parts, findings, most_unreadable)
    for line in warnings.lines():
        print(f'warning: {line}')
    kinds = [*Kind.of(problems, refused=True), *Kind.of(warnings)]
    for split, part in parts.items():
        if part.inventory.problems:
            kinds += Kind.of(part.inventory.problems, split, refused=True)
        kinds += Kind.of(part.inventory.issues, split)
        kinds += Kind.of(describe_headers(part.dataset.survey, part.dataset.reader), split)
        kinds += Kind.of(crowded_images(part, limits['num_queries']), split)
    if folder:
        path = Path(folder) / 'data.html'
        page = data_page(parts, kinds, texts)
        save_atomically(path, lambda partial: partial.write_text(page, encoding='utf-8'))
        print(f'{path}: samples as they are stored and as the run sees them, numbers, and what is unusual')
    counted = [issues for part in parts.values() if (issues := part.inventory.problems)] + [problems]
    lines = [line for issues in counted for line in issues.lines()]
    refused = list(dict.fromkeys(lines))  # a file that holds both parts counts for both
    if refused:
        stops = any(issues.counts.keys() - {REPLACED} for issues in counted)
        title = 'a run would stop at these data:' if stops else 'a run would leave out some of these data:'
        raise UserError('\n  '.join([title, *refused]))
    print('all images, boxes and masks can be read')
    return len(datasets['train']) if 'train' in datasets else None
