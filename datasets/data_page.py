"""The page of --check_data: samples, classes, boxes, and all that is unusual, with its images."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from datasets.annotations import Inventory
from datasets.coco_json import Issues, Place
from datasets.image_dataset import ImageDataset
from datasets.transforms import Sample, Target
from util.box_ops import box_cxcywh_to_xyxy
from util.errors import UserError
from util.page import build_page, thumbnail
from util.visualize import class_colour, paint_masks

SAMPLES = 12  # images of a part
Key = tuple[str, int]  # part and index of an image
# Title -> inner bounds of the bins, and their names.
SIZES = (
    (0.02, 0.05, 0.1, 0.2, 0.4, 0.7),
    ('under 2 %', '2 to 5', '5 to 10', '10 to 20', '20 to 40', '40 to 70', '70 or more'),
)
SHAPES = (
    (1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8),
    ('under 1:8', '1:8', '1:4', '1:2', '1:1', '2:1', '4:1', '8:1 or more'),
)
COUNTS = (
    (1, 2, 3, 5, 9, 17, 33, 65),
    ('0', '1', '2', '3 to 4', '5 to 8', '9 to 16', '17 to 32', '33 to 64', 'more'),
)


@dataclass
class Part:
    """A part of the data. sizes: [N, 2] height and width of its images, in order of index; 0 if unreadable."""

    dataset: ImageDataset
    inventory: Inventory
    sizes: np.ndarray

    @cached_property
    def name_of(self) -> dict[int, str]:
        """Return the name of each index."""
        return dict(zip(sorted(self.dataset.reading_order), self.inventory.names, strict=False))

    @cached_property
    def index_of(self) -> dict[int | str, int]:
        """Return the index of each name and id."""
        ids = {self.dataset.ids[idx]: idx for idx in self.name_of}
        return {name: idx for idx, name in self.name_of.items()} | ids


class Kind(NamedTuple):
    """What is unusual in a part, or if `split` is '', in any of them: see `Issues`."""

    title: str
    number: int
    examples: list[str]
    places: list[Place]
    split: str
    refused: bool

    @classmethod
    def of(cls, issues: Issues, split: str = '', refused: bool = False) -> list['Kind']:
        """Return the kinds of some issues."""
        return [
            cls(f'{split} {kind}'.strip(), number, issues.examples[kind], issues.places[kind], split, refused)
            for kind, number in sorted(issues.counts.items())
        ]

    def keys(self, parts: Mapping[str, Part]) -> list[tuple[Key, Sequence[float] | None]]:
        """Return the images of the places that exist, and the boxes there."""
        found: list[tuple[Key, Sequence[float] | None]] = []
        for image, box in self.places:
            if isinstance(image, tuple):
                found.append((image, box))
            elif (idx := parts[self.split].index_of.get(image)) is not None:
                found.append(((self.split, idx), box))
        return found


def data_page(parts: Mapping[str, Part], kinds: Iterable[Kind], warnings: list[str]) -> str:
    """Return the page. warnings: sentences of `datasets.inventory.find_warnings`."""
    names = list(parts.values())[-1].dataset.class_map.names
    shown = [(kind, kind.keys(parts)) for kind in kinds]
    samples = {split: sample_indices(part) for split, part in parts.items()}
    wanted = {(split, idx) for split, indices in samples.items() for idx in indices}
    wanted.update(key for _, found in shown for key, _ in found)
    pictures: dict[str, dict] = {}
    seen: list[dict] = []
    for split, part in parts.items():
        drawn, trained = draw_part(part, {idx for other, idx in wanted if other == split}, samples[split])
        pictures |= {f'{split} {idx}': picture for idx, picture in drawn.items()}
        seen += [
            {'part': split, 'stored': f'{split} {idx}', 'seen': trained[idx]}
            for idx in samples[split]
            if idx in trained
        ]
    content = {
        'names': [str(name) for name in names],
        'colours': [f'rgb{class_colour(label)}' for label in range(len(names))],
        'parts': {split: count_part(part.inventory) for split, part in parts.items()},
        'classes': [[str(name), *numbers] for name, *numbers in count_classes(parts, names)],
        'histograms': count_bins(parts),
        'warnings': warnings,
        'kinds': [
            kind._asdict() | {'places': [[f'{split} {idx}', box] for (split, idx), box in found]}
            for kind, found in shown
        ],
        'pictures': pictures,
        'samples': seen,
    }
    return build_page('data', content)


def sample_indices(part: Part) -> list[int]:
    """Return indices of readable images from the whole part."""
    readable = np.array(sorted(part.dataset.reading_order))[part.sizes.min(axis=1) > 0]
    chosen = np.linspace(0, len(readable) - 1, min(SAMPLES, len(readable))).astype(int)
    return readable[chosen].tolist()


def draw_part(
    part: Part, indices: set[int], samples: Sequence[int]
) -> tuple[dict[int, dict], dict[int, dict]]:
    """Return pictures of images as they are stored, and of the samples as the run sees them.

    Images that cannot be read are left out. Those whose objects are invalid have no boxes.
    """
    dataset, stored, seen = part.dataset, {}, {}
    for idx, item in dataset.read_items([idx for idx in dataset.reading_order if idx in indices]):
        with suppress(UserError, OSError):
            image, target = (dataset.pixels(idx), {}) if isinstance(item, Exception) else item
            stored[idx] = {'name': part.name_of[idx]} | draw(image, target)
            if idx in samples and not isinstance(item, Exception):
                seen[idx] = draw_as_seen(dataset, idx, item)
    return stored, seen


def draw_as_seen(dataset: ImageDataset, idx: int, item: Sample) -> dict:
    """Return the picture of an item after mix and transforms."""
    image, target = dataset.transformed(idx, lambda: item, dataset.random_item)
    height, width = target['size'].tolist()
    boxes = box_cxcywh_to_xyxy(target['boxes']) * torch.tensor([width, height, width, height])
    return draw(image, target | {'boxes': boxes})


def draw(image: Tensor, target: Target) -> dict:
    """Return the thumbnail of an image [3, H, W], and its marks: boxes [x, y, width, height] with labels.

    target: may have boxes, xyxy in pixels, labels, and masks, which are painted.
    """
    labels = target['labels'].tolist() if target else []
    if 'masks' in target:
        image = paint_masks(image, target['masks'], labels)
    boxes = target['boxes'].clone() if target else torch.zeros(0, 4)
    boxes[:, 2:] -= boxes[:, :2]
    marks = zip(boxes.double().numpy().round(1).tolist(), labels, strict=True)
    return thumbnail(image) | {'marks': list(marks)}


def count_part(inventory: Inventory) -> list[int | float]:
    """Return the numbers of images, of those without objects, of objects, the mean and the largest number."""
    counts = inventory.counts
    mean = round(float(counts.mean()), 1)
    return [len(counts), int((counts == 0).sum()), int(counts.sum()), mean, int(counts.max())]


def count_classes(parts: Mapping[str, Part], names: Sequence[str | None]) -> list[list]:
    """Return the name of each class in use, and of each part the numbers of objects and of images with it."""
    columns: list = []
    for part in parts.values():
        labels = part.inventory.labels
        images = np.repeat(np.arange(len(part.inventory.counts)), part.inventory.counts)
        pairs = np.unique(np.stack([labels, images]), axis=1)
        columns += [np.bincount(each, minlength=len(names)).tolist() for each in (labels, pairs[0])]
    rows = zip(names, *columns, strict=True)
    return [list(row) for row in rows if row[0] is not None]


def count_bins(parts: Mapping[str, Part]) -> list[dict]:
    """Return histograms of the sizes and shapes of boxes, and of the numbers of objects."""
    titles = (
        ('Size of boxes', 'side of a square of the same area, in % of that of the image', SIZES),
        ('Shape of boxes', 'width to height', SHAPES),
        ('Objects of an image', 'number', COUNTS),
    )
    values = [measure(part) for part in parts.values()]
    return [
        {
            'title': title,
            'unit': unit,
            'bins': names,
            'counts': [
                np.bincount(np.searchsorted(bounds, each[row], side='right'), minlength=len(names)).tolist()
                for each in values
            ],
        }
        for row, (title, unit, (bounds, names)) in enumerate(titles)
    ]


def measure(part: Part) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the sizes of boxes relative to their images, width to height, and the numbers of objects."""
    inventory = part.inventory
    width, height = inventory.boxes_xywh[:, 2:].astype(np.float64).T
    known = np.where(inventory.sizes > 0, inventory.sizes, part.sizes)
    areas = np.repeat(known.prod(axis=1), inventory.counts)
    sized = (width > 0) & (height > 0)
    has_area = sized & (areas > 0)
    relative = np.sqrt((width * height)[has_area] / areas[has_area])
    return relative, width[sized] / height[sized], inventory.counts
