"""
Formats of annotations that only tools/convert_dataset.py reads, as COCO form: CVAT, LabelMe, DOTA, Open Images.

hotcoco reads CVAT and DOTA too. It takes rotated boxes of CVAT as if they were not rotated, leaves out masks
and ellipses, and takes a file that is not XML for one without images; boxes of DOTA that are no rectangles
come out moved. So these two are read here.
"""

import base64
import io
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from datasets.coco_json import (
    File,
    Issues,
    Lists,
    encode,
    errors_in,
    read_text_lines,
    unusable,
)
from datasets.image_io import MAX_PIXELS, SUFFIXES, ImageReader
from datasets.segmentations import box_around
from util.errors import FileError, UserError

ROUND = np.linspace(0, 2 * math.pi, 64, endpoint=False)  # corners of the polygon of an ellipse
ROTATED = 'rotated boxes, kept as the upright boxes around them'
ROUNDING = 0.01  # by which a share of the image may be below 0 or above 1
CROWD = 'kept as crowd regions, which training leaves out'


def coco_lists(images: list[dict], objects: Iterable[dict], names: Sequence[str]) -> Lists:
    """Return lists in COCO form. An object has the name of its `class`, and the number of its image from 1."""
    ids = {name: number for number, name in enumerate(names, start=1)}
    annotations = [
        {'id': number, 'category_id': ids.get(each.pop('class', None)), **each}
        for number, each in enumerate(objects, start=1)
    ]
    return {
        'images': encode({'id': number, **image} for number, image in enumerate(images, start=1)),
        'annotations': encode(annotations),
        'categories': encode({'id': number, 'name': name} for name, number in ids.items()),
    }


def polygon_object(*polygons: Sequence[float]) -> dict[str, Any]:
    """Return the segmentation of polygons (x1, y1, x2, y2, ...) with its box and area."""
    area = 0.0
    for polygon in polygons:
        if len(polygon) < 6 or len(polygon) % 2:
            raise ValueError(f'a polygon of {len(polygon)} numbers')
        x, y = np.array(polygon[::2]), np.array(polygon[1::2])
        area += abs(float(x @ np.roll(y, 1) - y @ np.roll(x, 1))) / 2
    segmentation = [list(map(float, polygon)) for polygon in polygons]
    return {'segmentation': segmentation, 'bbox': box_around(segmentation), 'area': area}


def mask_object(mask: np.ndarray, left: int, top: int, height: int, width: int) -> dict[str, Any]:
    """Return run lengths, box and area of a mask [h, w] whose corner is at (left, top) of an image."""
    inside = left >= 0 and top >= 0 and top + mask.shape[0] <= height and left + mask.shape[1] <= width
    if not inside or height * width > MAX_PIXELS:
        raise ValueError(f'a mask of {mask.shape} at {left}, {top} in an image of {height} x {width}')
    whole = np.zeros((height, width), dtype=np.uint8, order='F')
    whole[top : top + mask.shape[0], left : left + mask.shape[1]] = mask
    runs = coco_mask.encode(whole)
    segmentation = {'size': [height, width], 'counts': runs['counts'].decode('ascii')}
    return {'segmentation': segmentation, 'bbox': coco_mask.toBbox(runs).tolist(), 'area': float(mask.sum())}


def ellipse_object(numbers: Sequence[float], degrees: float = 0.0) -> dict[str, Any]:
    """Return the polygon of an ellipse, turned around its centre. numbers: x and y of it, and two radii."""
    x, y, across, down = numbers
    return polygon_object(turned(across * np.cos(ROUND), down * np.sin(ROUND), x, y, degrees))


def turned(across: np.ndarray, down: np.ndarray, x: float, y: float, degrees: float) -> list[float]:
    """Return corners x1, y1, x2, ... around (x, y), turned clockwise as one sees them."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return np.stack([x + across * cos - down * sin, y + across * sin + down * cos], axis=1).ravel().tolist()


# CVAT ----


def read_cvat(file: File, issues: Issues) -> Lists:
    """Read "CVAT for images 1.1": annotations.xml, or its folder."""
    path = Path(file) / 'annotations.xml' if Path(file).is_dir() else Path(file)
    if not path.is_file():
        raise FileError(f'{path} does not exist: check the path')
    try:
        root = ElementTree.parse(path).getroot()
    except (ElementTree.ParseError, ValueError) as error:
        raise UserError(f'{path} is not XML ({error}): export it again') from error
    if root.tag != 'annotations' or root.find('track') is not None or root.find('image') is None:
        raise UserError(f'{path} has no images: export the task as "CVAT for images 1.1"')
    listed = [each.findtext('name') or '' for each in root.iterfind('.//labels/label')]
    images: list[dict] = []
    objects: list[dict] = []
    for number, element in enumerate(root.iter('image'), start=1):
        with errors_in(path):
            images.append(cvat_image(element))
        for shape in element:
            source = f'{path}, image {images[-1]["file_name"]}, shape {len(objects) + 1}'
            found = cvat_object(shape, images[-1], issues)
            if found is not None:
                objects.append(found | {'image_id': number, 'source': source})
    others = sorted({each['class'] for each in objects} - {*listed, None})
    for name in others if listed else ():
        issues.add('labels that the list of labels lacks, added to it', name)
    return coco_lists(images, objects, [*dict.fromkeys(listed), *others])


def cvat_image(element: ElementTree.Element) -> dict:
    """Return file_name, height and width of an image."""
    name = element.get('name')
    try:
        sides = {side: int(float(element.get(side) or 0)) for side in ('height', 'width')}
    except (ValueError, OverflowError) as error:
        raise UserError(f'image {name!r} has no size ({error}): export the task again') from error
    if not name:
        raise UserError('an image has no name: export the task again')
    return {'file_name': name} | sides


def cvat_object(shape: ElementTree.Element, image: dict, issues: Issues) -> dict | None:
    """Return class, box and segmentation of a shape, or None if it is no region."""
    if shape.tag not in ('box', 'polygon', 'ellipse', 'mask'):
        issues.add(f'shapes of the kind {shape.tag}, which are left out', f'in {image["file_name"]}')
        return None
    try:
        found = cvat_region(shape, image)
    except (ValueError, TypeError, OverflowError) as error:
        found = unusable(f'is not a {shape.tag} of CVAT ({error}): correct it')
    if found.pop('rotated', False):
        issues.add(ROTATED, f'in {image["file_name"]}')
    attributes = {each.get('name'): each.text or '' for each in shape.iter('attribute')}
    return {'class': shape.get('label')} | found | ({'attributes': attributes} if attributes else {})


def cvat_region(shape: ElementTree.Element, image: dict) -> dict:
    """Return bbox, and segmentation and area unless it is a box.

    Raises:
        ValueError, TypeError: a number is missing or wrong.
    """

    def numbers(*names: str) -> list[float]:
        missing = [name for name in names if shape.get(name) is None]
        if missing:
            raise ValueError(f'it has no {missing[0]}')
        return [float(shape.get(name) or 'nan') for name in names]

    if shape.get('label') is None:
        raise ValueError('it has no label')
    rotation = float(shape.get('rotation') or 0)
    if shape.tag == 'polygon':
        return polygon_object([float(word) for word in re.split('[;,]', shape.get('points') or '')])
    if shape.tag == 'ellipse':
        return ellipse_object(numbers('cx', 'cy', 'rx', 'ry'), rotation)
    if shape.tag == 'mask':
        left, top, width, height = (int(number) for number in numbers('left', 'top', 'width', 'height'))
        runs = [int(word) for word in (shape.get('rle') or '').split(',')]
        if sum(runs) != width * height:
            raise ValueError(f'run lengths of {sum(runs)} pixels')
        pixels = np.repeat(np.arange(len(runs)) % 2, runs).reshape(height, width)
        return mask_object(pixels, left, top, image['height'], image['width'])
    x0, y0, x1, y1 = numbers('xtl', 'ytl', 'xbr', 'ybr')
    box = [x0, y0, x1 - x0, y1 - y0]
    if not rotation:
        return {'bbox': box}
    across, down = np.array([-1, 1, 1, -1]) * box[2] / 2, np.array([-1, -1, 1, 1]) * box[3] / 2
    corners = turned(across, down, (x0 + x1) / 2, (y0 + y1) / 2, rotation)
    return {'bbox': box_around([corners]), 'rotated': True}


# LabelMe ----


def read_labelme(file: File, issues: Issues) -> Lists:
    """Read a folder of LabelMe's files, one for each image, or one such file."""
    folder = Path(file) if Path(file).is_dir() else Path(file).parent
    files = sorted(folder.rglob('*.json')) if Path(file).is_dir() else [Path(file)]
    if not files:
        raise FileError(f'{folder} has no .json file of LabelMe: check the path')
    images: list[dict] = []
    objects: list[dict] = []
    for number, path in enumerate(files, start=1):
        content = read_labelme_file(path)
        name = str(content['imagePath']).replace('\\', '/')
        beside = os.path.normpath(path.parent.relative_to(folder) / name).replace('\\', '/')
        image = {'file_name': beside if (folder / beside).is_file() else name}
        images.append(
            image | {side: content.get(f'image{side.title()}') or 0 for side in ('height', 'width')}
        )
        for each in labelme_objects(content['shapes'], images[-1], path, issues):
            objects.append(each | {'image_id': number})
    return coco_lists(images, objects, sorted({each['class'] for each in objects}))


def read_labelme_file(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding='utf-8-sig'))
    except OSError as error:
        raise FileError(f'{path} cannot be read ({error.strerror}): check the path') from error
    except (ValueError, RecursionError) as error:
        raise UserError(f'{path} is not JSON ({error}): write it again') from error
    is_known = isinstance(content, dict) and isinstance(content.get('imagePath'), str)
    if not is_known or not isinstance(content.get('shapes'), list):
        raise UserError(
            f'{path} is no file of LabelMe, which has imagePath and shapes: take it out of the folder'
        )
    return content


def labelme_objects(shapes: list, image: dict, path: Path, issues: Issues) -> Iterator[dict]:
    """Yield the objects of an image. Shapes of one label and one group_id are one object."""
    groups: dict[tuple, list[tuple[str, dict]]] = {}
    for number, shape in enumerate(shapes, start=1):
        source = f'{path}, shape {number}'
        if not isinstance(shape, dict) or not isinstance(shape.get('label'), str):
            raise UserError(f'{source} has no label: correct it')
        kind, group = shape.get('shape_type') or 'polygon', shape.get('group_id')
        if kind not in LABELME_SHAPES:
            issues.add(f'shapes of the kind {kind}, which are left out', f'in {image["file_name"]}')
            continue
        try:
            points = np.array(shape.get('points'), dtype=np.float64).reshape(-1, 2)
            found = LABELME_SHAPES[kind](points, shape, image)
        except (ValueError, TypeError, KeyError, OSError, OverflowError) as error:
            found = unusable(f'is not a {kind} of LabelMe ({error}): correct it')
        whole = group is None or not isinstance(found['segmentation'], list)
        key = (number,) if whole else (shape['label'], group, '')
        groups.setdefault(key, []).append((source, {'class': shape['label'], 'kind': kind} | found))
    for members in groups.values():
        source, found = members[0]
        if len(members) > 1:
            found |= polygon_object(*(each for _, member in members for each in member['segmentation']))
        elif found['kind'] == 'rectangle':
            found['segmentation'] = None
        yield {name: value for name, value in found.items() if name != 'kind'} | {'source': source}


def rectangle_object(points: np.ndarray, shape: dict, image: dict) -> dict:
    if len(points) < 2:
        raise ValueError('it has fewer than two corners')
    (left, top), (right, bottom) = points.min(axis=0).tolist(), points.max(axis=0).tolist()
    return polygon_object([left, top, right, top, right, bottom, left, bottom])


def circle_object(points: np.ndarray, shape: dict, image: dict) -> dict:
    """Points are the centre and one on the circle."""
    centre, edge = points
    radius = float(np.linalg.norm(edge - centre))
    return ellipse_object([*centre.tolist(), radius, radius])


def painted_object(points: np.ndarray, shape: dict, image: dict) -> dict:
    """Points are two corners of the mask, which is a PNG in base64."""
    pixels = np.array(Image.open(io.BytesIO(base64.b64decode(shape['mask'])), formats=['PNG'])) > 0
    left, top = np.floor(points.min(axis=0)).astype(int).tolist()
    return mask_object(pixels, left, top, image['height'], image['width'])


LABELME_SHAPES = {
    'polygon': lambda points, shape, image: polygon_object(points.ravel().tolist()),
    'rectangle': rectangle_object,
    'circle': circle_object,
    'mask': painted_object,
}


# DOTA and Open Images, whose annotations have neither the sizes nor the full names of images ----


def images_by_stem(folder: Path | None, file: File) -> dict[str, str]:
    """Return the names of images below a folder by their last part without suffix."""
    if folder is None:
        raise UserError(f'{file} has no sizes of images: give --images, the folder with the images')
    if not folder.is_dir():
        raise FileError(f'image folder {folder} does not exist: check the path')
    names: dict[str, str] = {}
    for path in sorted(path for path in folder.rglob('*') if path.suffix.lower() in SUFFIXES):
        if path.stem in names:
            raise UserError(
                f'{folder} has {names[path.stem]} and {path.name}: annotations name {path.stem} alone'
            )
        names[path.stem] = path.relative_to(folder).as_posix()
    return names


def read_dota(file: File, issues: Issues, images: Path | None, reader: ImageReader) -> Lists:
    """Read a folder of DOTA's files, as upright boxes around the four corners of each object."""
    folder = Path(file)
    files = sorted(folder.rglob('*.txt'))
    if not files:
        raise FileError(f'{folder} has no .txt file of DOTA: check the path')
    names = images_by_stem(images, file)
    entries, objects = [], []
    for number, path in enumerate(files, start=1):
        if path.stem not in names:
            raise FileError(f'{path} has no image in {images}: fetch it, or remove the file')
        height, width = reader.size(Path(images or '') / names[path.stem])
        entries.append({'file_name': names[path.stem], 'height': height, 'width': width})
        for row, line in enumerate(read_text_lines(path), start=1):
            if line.strip() and not re.match('(imagesource|gsd) *:', line.strip()):
                found = dota_object(line, names[path.stem], issues)
                objects.append(found | {'image_id': number, 'source': f'{path}, line {row}'})
    count_unlisted(names, {path.stem for path in files}, issues)
    return coco_lists(entries, objects, sorted({each['class'] for each in objects}))


def dota_object(line: str, image: str, issues: Issues) -> dict:
    """Return class, bbox and iscrowd of a line: four corners, class, and how difficult it is."""
    words = line.split()
    difficult = words.pop() if len(words) > 9 and words[-1].isdecimal() else '0'
    label = ' '.join(words[8:])
    try:
        corners = [float(word) for word in words[:8]]
        if not label:
            raise ValueError('eight numbers and a class are needed')
    except ValueError as error:
        return {'class': label} | unusable(
            f'is {line[:60]!r}, which is not an object of DOTA ({error}): correct it'
        )
    found = {'class': label, 'bbox': box_around([corners]), 'iscrowd': int(difficult != '0')}
    if len(set(corners[::2])) > 2 or len(set(corners[1::2])) > 2:
        issues.add(ROTATED, f'in {image}')
    if found['iscrowd']:
        issues.add(f'difficult objects, {CROWD}', f'in {image}')
    return found


def read_oid(
    file: File, issues: Issues, images: Path | None, reader: ImageReader, class_names: Path | None
) -> Lists:
    """Read boxes of Open Images through hotcoco. class_names: file of the names of its classes."""
    import hotcoco

    names = images_by_stem(images, file)
    try:
        data = hotcoco.COCO.from_oid(
            str(file), class_descriptions=str(class_names) if class_names else None
        ).dataset
    except (OSError, ValueError) as error:
        raise UserError(f'{file} has no boxes of Open Images ({error}): check the files') from error
    sizes: dict[int, tuple[int, int]] = {}
    for image in data['images']:
        stem = image['file_name']
        if stem not in names:
            raise FileError(f'{file}: image {stem} is not in {images}: fetch it, or remove its boxes')
        image['file_name'] = names[stem]
        sizes[image['id']] = image['height'], image['width'] = reader.size(Path(images or '') / names[stem])
    for row, each in enumerate(data['annotations'], start=2):
        height, width = sizes[each['image_id']]
        x, y, w, h = each['bbox']  # shares of the sides
        if min(x, y) < -ROUNDING or max(x + w, y + h) > 1 + ROUNDING:
            raise UserError(
                f'{file}, line {row} has a box that is not in shares of the image, from 0 to 1: divide pixels by '
                'its width and height'
            )
        each |= {'bbox': [x * width, y * height, w * width, h * height], 'source': f'{file}, line {row}'}
        each['iscrowd'] = int(each.pop('is_group_of', False))
        each['area'] = each['bbox'][2] * each['bbox'][3]
        if each['iscrowd']:
            issues.add(f'groups of objects, {CROWD}', f'image {each["image_id"]}')
    for category in data['categories'] if class_names else ():
        if category['name'].startswith('/m/'):
            issues.add(f'classes without a name in {class_names}', category['name'])
    count_unlisted(names, {Path(image['file_name']).stem for image in data['images']}, issues)
    return {name: encode(data[name]) for name in ('images', 'annotations', 'categories')}


def count_unlisted(names: dict[str, str], listed: set[str], issues: Issues) -> None:
    """Count the images that annotations do not name."""
    for stem in sorted(names.keys() - listed):
        issues.add('images without annotations, which are left out', names[stem])
