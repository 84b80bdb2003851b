"""
Reading and checking annotation files in COCO form, so that bad data gives a clear error at the start of a run.

Legal, as in the official pipeline: boxes of no size, boxes that leave the image, images without objects.
"""

import json
import math
import os
from collections.abc import Collection, Iterable
from pathlib import Path

from datasets.class_map import ClassMap, names_by_id

Annotations = dict[str, list[dict]]


def read_annotations(file: str | os.PathLike[str]) -> Annotations:
    """Return the file's content after checking that its three lists are present."""
    file = Path(file)
    if not file.is_file():
        raise FileNotFoundError(f'annotation file {file} does not exist: check the path')
    try:
        data = json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f'{file} is not JSON ({error}): write it again, or fetch it again') from error
    for key in ('images', 'annotations', 'categories'):
        if not isinstance(data, dict) or not isinstance(data.get(key), list):
            raise ValueError(
                f'{file} has no list "{key}": COCO-form annotations need images, annotations, categories'
            )
    return data


def check_annotations(
    data: Annotations, file: str | os.PathLike[str], class_map: ClassMap | None = None
) -> None:
    """Check that the annotations can be trained on and evaluated.

    Raises:
        ValueError: something cannot; the message names the file and the first problem.
    """
    try:
        categories = names_by_id(data['categories'])
        if class_map is not None:
            check_categories(categories, class_map)
        image_ids = check_images(data['images'])
        for annotation in data['annotations']:
            problem = annotation_problem(annotation, image_ids, categories)
            if problem:
                name = f'annotation {annotation.get("id")} (image {annotation.get("image_id")})'
                raise ValueError(f'{name} {problem}')
    except ValueError as error:
        raise ValueError(f'{file}: {error}') from error


def check_categories(categories: dict[int, str], class_map: ClassMap) -> None:
    """Require every category in the class map (of the training part, or of a checkpoint), with the same id and name."""
    for category_id, name in categories.items():
        label = class_map.label_of.get(category_id)
        settled = None if label is None else class_map.names[label]
        if settled != name:
            raise ValueError(
                f'category {category_id} is "{name}" here, and {f"{settled!r}" if settled else "unknown"} to the training '
                'data or checkpoint in use: their classes must agree (--pretrained fine-tunes on other classes)'
            )


def check_images(images: list[dict]) -> set[int]:
    """Check the list of images and return their ids."""
    if not images:
        raise ValueError('"images" is empty: there is nothing to train on or to evaluate')
    ids: set[int] = set()
    for image in images:
        image_id = image.get('id')
        if isinstance(image_id, bool) or not isinstance(image_id, int):
            raise ValueError(f'image {image} needs an integer id')
        if image_id in ids:
            raise ValueError(f'image id {image_id} occurs twice: give every image an id of its own')
        if not isinstance(image.get('file_name'), str):
            raise ValueError(f'image {image_id} needs a file_name')
        ids.add(image_id)
    return ids


def annotation_problem(annotation: dict, image_ids: set[int], category_ids: Collection[int]) -> str | None:
    """Return what is wrong with an annotation and how to correct it, or None."""
    if annotation.get('image_id') not in image_ids:
        return 'belongs to an image that "images" does not list: add the image or remove the annotation'
    category_id = annotation.get('category_id')
    if category_id not in category_ids:
        return f'has category {category_id}, but the categories are {shorten(category_ids)}: add it or correct the id'
    bbox = annotation.get('bbox')
    if not (isinstance(bbox, list) and len(bbox) == 4 and all(map(is_finite, bbox)) and min(bbox[2:]) >= 0):
        return (
            f'has bbox {bbox}: it must be four finite numbers x, y, width, height (not negative), in pixels'
        )
    area = annotation.get('area', 0)
    if not is_finite(area):
        return (
            f'has area {area}: it must be a finite number of pixels; without it, width times height is taken'
        )
    return None


def is_finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def shorten(ids: Iterable[int], most: int = 10) -> str:
    ids = sorted(ids)
    return ', '.join(map(str, ids[:most])) + (', ...' if len(ids) > most else '')


def check_segmentations(annotations: list[dict], file: str | os.PathLike[str]) -> None:
    """Raise ValueError for an object without polygons or run lengths."""
    for annotation in annotations:
        if not annotation.get('segmentation'):
            raise ValueError(
                f'{file}: annotation {annotation.get("id")} (image {annotation["image_id"]}) has no segmentation, '
                'which masks are made of: add polygons or run-length masks, or train without --masks'
            )


def check_files(images: list[dict], image_dir: str | os.PathLike[str], file: str | os.PathLike[str]) -> None:
    """Raise FileNotFoundError if an image of the file is not in the folder; each folder is listed once."""
    image_dir = Path(image_dir)
    if not image_dir.is_dir():
        raise FileNotFoundError(f'image folder {image_dir} does not exist: check the path')
    present: dict[str, set[str]] = {}
    missing = []
    for image in images:
        folder, name = os.path.split(image['file_name'])
        if folder not in present:
            path = image_dir / folder
            present[folder] = set(os.listdir(path)) if path.is_dir() else set()
        if name not in present[folder]:
            missing.append(image['file_name'])
    if missing:
        raise FileNotFoundError(
            f'{len(missing)} of {len(images)} images of {file} are not in {image_dir}, the first is {missing[0]}: '
            'fetch them, give the right folder, or remove them from the file'
        )
