"""
Datasets in Pascal VOC's format, read as COCO form: the same checks, targets and metrics.

Categories get the ids 1 to K. They are the names in the training part in alphabetical order.
"""

import os
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from datasets.build import DataSettings
from datasets.class_map import ClassMap
from datasets.coco import CocoDetection, coco_options, given_root
from datasets.coco_json import File, Issues, Lists, box_problem, encode, read_text_lines, unusable
from datasets.layouts import find_list
from util.errors import FileError, UserError


class VocDetection(CocoDetection):
    """Images with annotations in Pascal VOC's XML, one file each; the annotation file lists their names.

    Pixels are counted from 1 and corners belong to the box, as VOC's development kit says. Objects marked
    `difficult` become crowd regions: not trained on, and ignored in evaluation.
    """

    def read_lists(self, annotation_file: File, issues: Issues) -> Lists:
        """Return images, annotations and categories of a list in ImageSets/Main."""
        return read_voc_lists(annotation_file)


def read_voc_lists(annotation_file: File) -> Lists:
    """Return images, annotations and categories of a list in ImageSets/Main."""
    file = Path(annotation_file)
    folder = file.parents[2] / 'Annotations'
    training = find_list(file.parents[2], 'train') or file
    files = voc_files(file, folder)
    contents = trained_on = [read_voc(path) for path in files]
    if training != file:
        trained_on = [read_voc(path) for path in voc_files(training, folder)] or contents
    classes = sorted({each['class'] for _, objects in trained_on for each in objects})
    ids = {name: number for number, name in enumerate(classes, start=1)}
    images: list[dict] = []
    annotations: list[dict] = []
    for number, (path, (image, objects)) in enumerate(zip(files, contents, strict=True), start=1):
        images.append(image | {'id': number})
        for each in objects:
            label = each.pop('class')
            if label not in ids:
                each |= unusable(
                    f'has the class {label!r}, which no image of {training} has: correct it, or add an '
                    'image with it there'
                )
            numbers = {'id': len(annotations) + 1, 'image_id': number, 'category_id': ids.get(label)}
            annotations.append(each | numbers | {'source': str(path)})
    categories = [{'id': number, 'name': name} for name, number in ids.items()]
    return {
        'images': encode(images),
        'annotations': encode(annotations),
        'categories': encode(categories),
    }


def voc_files(file: Path, folder: Path) -> list[Path]:
    """Return the annotation files of a list.

    A line is a name if such a file exists, else its first word is a name: VOC's own lists of a class say
    after it whether the image has the class.
    """
    files = []
    for line in filter(None, map(str.strip, read_text_lines(file))):
        path = folder / f'{line}.xml'
        files.append(path if path.is_file() else folder / f'{line.split()[0]}.xml')
    return files


def read_voc(file: Path) -> tuple[dict, list[dict]]:
    """Return an image, and its objects with class, bbox and iscrowd.

    Raises:
        UserError: the file is not an annotation of VOC; the message names it.
    """
    if not file.is_file():
        raise FileError(f'{file} does not exist: write it, or take its name out of the list')
    try:
        tree = ElementTree.parse(file).getroot()
    except (ElementTree.ParseError, ValueError) as error:
        raise UserError(f'{file} is not XML ({error}): write it again') from error
    name = tree.findtext('filename') or ''
    image: dict[str, Any] = {'file_name': name}
    if not Path(name).suffix:
        raise UserError(f'{file} has the filename {name!r}: it must name the image file')
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
            objects.append({'class': label, 'bbox': box, 'iscrowd': int(each.findtext('difficult') or 0)})
            if box_problem(objects[-1]):
                objects[-1] |= unusable(f'has an object of the corners {corners}: correct them')
    except (ValueError, OverflowError) as error:
        raise UserError(f'{file} is not an annotation of VOC ({error}): correct it') from error
    return image, objects


def build(part: str, settings: DataSettings, class_map: ClassMap | None = None) -> VocDetection:
    """Build the 'train' or 'val' part of --dataset_file voc in --coco_path."""
    return VocDetection(
        *find_files(settings.source(part), settings.coco_path), **coco_options(part, settings, class_map)
    )


def find_files(part: str, root: str | os.PathLike[str] | None) -> tuple[Path, Path]:
    """Return the image folder, and the list of the part's images.

    Raises:
        UserError: there is no root.
    """
    folder = given_root(root, 'voc')
    usual = folder / f'ImageSets/Main/{part}.txt'
    return folder / 'JPEGImages', find_list(folder, part) or usual
