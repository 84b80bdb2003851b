"""
Data sets in the formats of other tools, Pascal VOC and YOLO, read as COCO form: the same checks, targets and metrics.

Categories get the ids 1 to K. Of VOC they are the names in the training part in alphabetical order, of YOLO those of
data.yaml.
"""

import argparse
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from datasets.class_map import ClassMap
from datasets.coco import CocoDetection, options_of
from datasets.coco_json import File
from datasets.image_io import stored_size

SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp', '.webp', '.tif', '.tiff')


class VocDetection(CocoDetection):
    """Images with annotations in Pascal VOC's XML, one file for each; the annotation file is a list of their names.

    Pixels are counted from 1 and corners belong to the box, as VOC's development kit says. Objects marked `difficult`
    become crowd regions: not trained on, and ignored in evaluation.
    """

    @classmethod
    def blocks(cls, annotation_file: File) -> Iterator[tuple[str, list]]:
        """Yield images, annotations and categories of a list in ImageSets/Main."""
        file = Path(annotation_file)
        folder = file.parents[2] / 'Annotations'
        names = [line.split()[0] for line in read_lines(file) if line.strip()]
        found = [read_voc(folder / f'{name}.xml') for name in names]
        training = file.with_name('train.txt')
        more = read_lines(training) if training != file and training.is_file() else []
        trained = [read_voc(folder / f'{line.split()[0]}.xml') for line in more if line.strip()]
        classes = sorted({each['class'] for _, objects in (trained or found) for each in objects})
        ids = {name: number for number, name in enumerate(classes, start=1)}
        yield 'categories', [{'id': number, 'name': name} for name, number in ids.items()]
        yield 'images', [image | {'id': number} for number, (image, _) in enumerate(found, start=1)]
        annotations = [
            {
                'image_id': number,
                'bbox': each['bbox'],
                'iscrowd': each['difficult'],
                'category_id': each['class'],
            }
            for number, (_, objects) in enumerate(found, start=1)
            for each in objects
        ]
        for number, annotation in enumerate(annotations, start=1):
            annotation |= {
                'id': number,
                'category_id': ids.get(annotation['category_id'], annotation['category_id']),
            }
        yield 'annotations', annotations


def read_lines(file: Path) -> list[str]:
    if not file.is_file():
        raise FileNotFoundError(f'{file} does not exist: check the path')
    return file.read_text(encoding='utf-8', errors='replace').splitlines()


def read_voc(file: Path) -> tuple[dict, list[dict]]:
    """Return an image, and its objects with class, bbox and difficult.

    Raises:
        ValueError: the file is no annotation of VOC; the message names it.
    """
    if not file.is_file():
        raise FileNotFoundError(f'{file} does not exist: write it, or take its name out of the list')
    try:
        tree = ElementTree.parse(file).getroot()
    except (ElementTree.ParseError, ValueError) as error:
        raise ValueError(f'{file} is not XML ({error}): write it again') from error
    name = tree.findtext('filename') or ''
    image: dict[str, Any] = {'file_name': name}
    if not Path(name).suffix:
        raise ValueError(f'{file} has the filename {name!r}: it must name the image file')
    objects = []
    try:
        for key in ('height', 'width'):
            image[key] = int(float(tree.findtext(f'size/{key}') or 0))
        for each in tree.findall('object'):
            corners = [
                float(each.findtext(f'bndbox/{key}') or 'nan') for key in ('xmin', 'ymin', 'xmax', 'ymax')
            ]
            left, top, right, bottom = corners
            box = [left - 1, top - 1, right - left + 1, bottom - top + 1]
            label = (each.findtext('name') or '').strip()
            if not label:
                raise ValueError('an object without a name')
            objects.append({'class': label, 'bbox': box, 'difficult': int(each.findtext('difficult') or 0)})
    except ValueError as error:
        raise ValueError(f'{file} is no annotation of VOC ({error}): correct it') from error
    return image, objects


class YoloDetection(CocoDetection):
    """Images with annotations as ultralytics' tools write them; the annotation file is data.yaml, image_dir its images.

    A line of a label file is a class and a box (centre, size), or a class and a polygon, in shares of the image. Images
    without a label file have no objects.
    """

    @classmethod
    def blocks(cls, annotation_file: File) -> Iterator[tuple[str, list]]:
        """Yield images, annotations and categories of one part; the part is named behind a '#'."""
        place, _, split = str(annotation_file).rpartition('#')
        settings = read_yaml(Path(place))
        names = names_of(settings, Path(place))
        yield 'categories', [{'id': number + 1, 'name': name} for number, name in names.items()]
        folder = yolo_images(settings, Path(place), split)
        files = sorted(file for file in folder.rglob('*') if file.suffix.lower() in SUFFIXES)
        count = 0
        for number, file in enumerate(files, start=1):
            height, width = stored_size(file)
            yield (
                'images',
                [
                    {
                        'id': number,
                        'file_name': file.relative_to(folder).as_posix(),
                        'height': height,
                        'width': width,
                    }
                ],
            )
            annotations = [
                {'id': count + place, 'image_id': number, **each}
                for place, each in enumerate(read_yolo(labels_of(file, folder), height, width), start=1)
            ]
            count += len(annotations)
            yield 'annotations', annotations
        if not files:
            yield 'images', []
            yield 'annotations', []


def read_yaml(file: Path) -> dict:
    """Read data.yaml.

    Raises:
        ValueError: it is none, or PyYAML is not installed.
    """
    try:
        import yaml
    except ImportError as error:
        raise ValueError('--dataset_file yolo reads data.yaml with PyYAML: pip install pyyaml') from error
    if not file.is_file():
        raise FileNotFoundError(
            f'{file} does not exist: --coco_path must be the folder of data.yaml, or that file'
        )
    try:
        found = yaml.safe_load(file.read_text(encoding='utf-8'))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f'{file} is not YAML ({str(error).splitlines()[0]}): write it again') from error
    if not isinstance(found, dict):
        raise ValueError(f'{file} must have names, train and val')
    return found


def names_of(settings: dict, file: Path) -> dict[int, str]:
    """Return class names by number; data.yaml has a list, or a mapping."""
    names = settings.get('names')
    if isinstance(names, list):
        names = dict(enumerate(names))
    if not isinstance(names, dict) or not all(isinstance(key, int) for key in names):
        raise ValueError(f'{file} has names {names!r}: it must list the class names')
    return {key: str(name) for key, name in sorted(names.items())}


def yolo_images(settings: dict, file: Path, split: str) -> Path:
    """Return the folder of images of a part.

    Raises:
        ValueError: data.yaml names none, or it does not exist.
    """
    place = settings.get(split)
    if not isinstance(place, str):
        raise ValueError(f'{file} has {split} {place!r}: it must name one folder of images')
    root = Path(settings.get('path') or '.')
    candidates = [file.parent / root / place, root / place, file.parent / place]
    for folder in candidates:
        if folder.is_dir():
            return folder
    raise FileNotFoundError(
        f'{file}: the {split} images {place!r} are in none of {", ".join(map(str, candidates))}'
    )


def labels_of(image: Path, folder: Path) -> Path:
    """Return the label file of an image: below `labels` in place of the last `images` of its path."""
    parts = list(image.with_suffix('.txt').parts)
    places = [index for index, part in enumerate(parts[:-1]) if part == 'images']
    if places:
        parts[places[-1]] = 'labels'
        return Path(*parts)
    return folder.parent / 'labels' / image.with_suffix('.txt').relative_to(folder)


def read_yolo(file: Path, height: int, width: int) -> list[dict]:
    """Return category_id and bbox, and with polygons segmentation, of each line.

    Raises:
        ValueError: a line is none; the message names file and line.
    """
    if not file.is_file():
        return []
    found = []
    for number, line in enumerate(read_lines(file), start=1):
        words = line.split()
        if not words:
            continue
        try:
            label, values = int(words[0]), [float(word) for word in words[1:]]
            if len(values) != 4 and (len(values) < 6 or len(values) % 2):
                raise ValueError(f'{len(values)} numbers behind the class')
        except ValueError as error:
            raise ValueError(
                f'{file}, line {number}: {line[:60]!r} is no box or polygon ({error}): correct it'
            ) from error
        if len(values) == 4:
            x, y, w, h = values
            box = [(x - w / 2) * width, (y - h / 2) * height, w * width, h * height]
            found.append({'category_id': label + 1, 'bbox': box})
        else:
            polygon = [value * (height if index % 2 else width) for index, value in enumerate(values)]
            found.append({'category_id': label + 1, 'segmentation': [polygon]})
    return found


def build(image_set: str, args: argparse.Namespace, class_map: ClassMap | None = None) -> CocoDetection:
    """Build the 'train' or 'val' part of --dataset_file voc or yolo in --coco_path.

    Raises:
        ValueError: --coco_path is missing.
    """
    if args.coco_path is None:
        raise ValueError(
            f'where is the data? Give --coco_path, the folder of --dataset_file {args.dataset_file}'
        )
    kind, image_dir, annotation_file = places_of(image_set, args.dataset_file, args.coco_path)
    return kind(image_dir, annotation_file, **options_of(image_set, args, class_map))


def places_of(
    image_set: str, dataset_file: str, root: str | os.PathLike
) -> tuple[type[CocoDetection], Path, Path]:
    """Return class, image folder and annotation file of a part of VOC's or YOLO's folder."""
    folder = Path(root)
    if dataset_file == 'voc':
        return VocDetection, folder / 'JPEGImages', folder / f'ImageSets/Main/{image_set}.txt'
    file = folder if folder.suffix in ('.yaml', '.yml') else folder / 'data.yaml'
    return YoloDetection, yolo_images(read_yaml(file), file, image_set), Path(f'{file}#{image_set}')
