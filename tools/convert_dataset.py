"""
Convert annotations of a dataset between formats, and divide them into parts.

  python tools/convert_dataset.py --dataset_file voc --coco_path VOCdevkit/VOC2012 --output train.json
  python tools/convert_dataset.py --dataset_file yolo --coco_path data.yaml --image_set val --output val.json
  python tools/convert_dataset.py --dataset_file cvat --coco_path annotations.xml --split 0.9 0.1 --output OUT
  python tools/convert_dataset.py --dataset_file coco --coco_path train.json --to yolo --output OUT

Images are neither copied nor changed. Training reads COCO form, VOC and YOLO itself. hotcoco writes the formats
other than COCO form; what they cannot hold is counted and said.
"""

import argparse
import json
import os
import sys
from argparse import Namespace
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from datasets.annotations import AnnotationTable
from datasets.build import build_dataset, data_settings, locate
from datasets.class_map import names_by_id
from datasets.coco import find_files
from datasets.coco_json import (
    Annotations,
    File,
    Issues,
    Lists,
    Read,
    as_id,
    object_area,
    read_annotations,
    read_lists,
)
from datasets.exchange import read_cvat, read_dota, read_labelme, read_oid
from datasets.image_io import ImageReader
from datasets.image_names import find_images
from datasets.segmentations import polygons_of
from datasets.split import choose_images, classes_of
from util.command_line import FlagParser, float_range, int_range, run_command
from util.errors import UserError
from util.files import save_atomically

SOURCES = ('coco', 'voc', 'yolo', 'cvat', 'labelme', 'dota', 'oid')
PARTS = ('train', 'val', 'test')
KEPT = frozenset(('id', 'image_id', 'category_id', 'bbox', 'area', 'iscrowd'))


@dataclass(frozen=True)
class Target:
    """What a format holds.

    suffix: of its file; '' for a folder. digits: to what boxes are rounded. crowd: what crowd regions and
    ignored objects become; '' if they are left out. masks: which segmentations it holds, if it holds any.
    relative: boxes are shares of their image, so none may leave it. empty: it has images and classes without
    objects. images: where images belong, below its folder.
    """

    suffix: str
    digits: str = ''
    crowd: str = ''
    masks: str = ''
    relative: bool = False
    empty: bool = True
    images: str = ''


TARGETS = {
    'coco': Target('.json', crowd='crowd regions', masks='all'),
    'voc': Target('', 'whole pixels', 'difficult objects', images='JPEGImages'),
    'yolo': Target('', 'millionths of the sides of their image', relative=True, images='images/PART'),
    'cvat': Target('.xml', 'hundredths of a pixel', masks='polygons'),
    'dota': Target('', 'tenths of a pixel', 'difficult objects', empty=False),
    'oid': Target('.csv', 'millionths of the sides of their image', 'groups', relative=True, empty=False),
}


def get_args_parser() -> argparse.ArgumentParser:
    parser = FlagParser('convert_dataset.py', description=__doc__)
    flag = parser.add_argument
    text = 'format to read: COCO form, VOC, YOLO, "CVAT for images", LabelMe, DOTA, or Open Images'
    flag('--dataset_file', required=True, choices=SOURCES, help=text)
    text = 'what to read: the folder of the dataset; for yolo also its data.yaml, for coco, cvat and oid the file'
    flag('--coco_path', required=True, metavar='PATH', help=text)
    text = 'part of coco, voc and yolo to read, and name of what is written (default: %(default)s)'
    flag('--image_set', default='train', choices=PARTS[:2], help=text)
    text = 'folder of the images: needed by dota and oid, and where annotations lack the sizes of images'
    flag('--images', type=Path, metavar='DIR', help=text)
    flag('--class_names', type=Path, metavar='FILE', help='names of the classes of oid, as its CSV file')
    flag('--to', default='coco', choices=TARGETS, help='format to write (default: %(default)s)')
    text = 'shares of train, val and, if there is a third, test; each class is divided so too'
    flag('--split', nargs='+', type=float_range(0, 1), metavar='SHARE', help=text)
    flag('--seed', default=0, type=int_range(0), help='seed of --split (default: %(default)s)')
    flag('--output', required=True, type=Path, metavar='PATH', help='new file, or folder, to write')
    return parser


def check_flags(args: Namespace) -> None:
    """Raise a `UserError` for flags that contradict each other, or an output that exists."""
    if args.output.exists():
        raise UserError(f'{args.output} exists: choose another --output, or remove it')
    suffix = '' if args.split else TARGETS[args.to].suffix
    if args.split and (
        len(args.split) not in (2, 3) or min(args.split) <= 0 or abs(sum(args.split) - 1) > 1e-6
    ):
        shares = ' '.join(f'{share:g}' for share in args.split)
        raise UserError(f'--split {shares}: give two or three shares above 0 that sum to 1, such as 0.9 0.1')
    if args.output.suffix.lower() != suffix and (
        suffix or args.output.suffix.lower() in ('.json', '.xml', '.csv')
    ):
        kind = f'a file that ends in {suffix}' if suffix else 'a folder'
        raise UserError(
            f'--output {args.output}: --to {args.to}{" with --split" * bool(args.split)} writes {kind}'
        )
    if args.class_names and args.dataset_file != 'oid':
        raise UserError(f'--class_names is for --dataset_file oid: leave it out for {args.dataset_file}')


def find_source(args: Namespace) -> tuple[File, Path | None, Read]:
    """Return the annotation file, the folder of its images if it is known, and what reads the file."""
    kind, path = args.dataset_file, Path(args.coco_path)
    if kind in ('voc', 'yolo'):
        flags = {'dataset_file': kind, 'coco_path': args.coco_path}
        dataset = build_dataset(args.image_set, data_settings(Namespace(**flags)))
        return dataset.annotation_file, dataset.image_dir, dataset.read_lists
    if kind == 'coco':
        if path.is_dir():
            settings = locate(data_settings(Namespace(dataset_file=kind, coco_path=args.coco_path)))
            places = settings.images(args.image_set), settings.annotations(args.image_set)
            folder, file = find_files(args.image_set, args.coco_path, *places)
            return file, args.images or folder, read_lists
        return path, args.images, read_lists
    if kind == 'labelme':
        return path, args.images or (path if path.is_dir() else path.parent), read_labelme
    if kind == 'cvat':
        return path, args.images, read_cvat
    where = {'images': args.images, 'reader': ImageReader()}
    if kind == 'dota':
        return path, args.images, partial(read_dota, **where)
    return path, args.images, partial(read_oid, **where, class_names=args.class_names)


def read_source(args: Namespace) -> tuple[Annotations, AnnotationTable, Path | None]:
    """Return the annotations, checked and complete, and where the images are; print what was repaired.

    Raises:
        UserError: the annotations are invalid, or images are missing.
    """
    file, folder, read = find_source(args)
    issues = Issues()
    lists = read(file, issues)

    def read_again(_file: File, _issues: Issues) -> Lists:
        return lists

    table = AnnotationTable(file, read=read_again)
    data = read_annotations(file, read_again)
    if folder is not None:
        names = [image['file_name'] for image in data['images']]
        for image, name in zip(data['images'], find_images(names, folder, file, issues=issues), strict=True):
            image['file_name'] = name
    for line in [*issues.lines(), *table.issues.lines()]:
        print(line)
    classes = names_by_id(data['categories'])
    data['categories'] = [each | {'name': classes[each['id']]} for each in data['categories']]
    for image in data['images']:
        if folder is not None and not (image.get('height') and image.get('width')):
            image['height'], image['width'] = ImageReader().size(folder / image['file_name'])
    ids = {as_id(annotation.get('id')) for annotation in data['annotations']}
    are_unique = len(ids) == len(data['annotations']) and all(
        isinstance(each, int) and each > 0 for each in ids
    )
    for number, annotation in enumerate(data['annotations'], start=1):
        annotation.pop('source', None)
        annotation |= {'iscrowd': annotation.get('iscrowd') or 0, 'area': object_area(annotation)}
        annotation['id'] = as_id(annotation['id']) if are_unique else number
    return data, table, folder


def divide(
    data: Annotations, table: AnnotationTable, shares: list[float], seed: int
) -> dict[str, Annotations]:
    """Divide the images into train, val and perhaps test, each class about by these shares.

    Raises:
        UserError: a part would have no image.
    """
    classes, left = classes_of(table), np.arange(len(table.image_ids))
    parts: dict[str, Annotations] = {}
    chosen: dict[str, np.ndarray] = {}
    for name, share in list(zip(PARTS, shares, strict=False))[:0:-1]:
        total = sum(shares[: len(shares) - len(chosen)])
        inside = choose_images([classes[row] for row in left], share / total, seed)
        chosen[name], left = left[inside], left[~inside]
    for name, rows in {PARTS[0]: left, **dict(reversed(chosen.items()))}.items():
        if not len(rows):
            raise UserError(f'--split: {len(table.image_ids)} images leave {name} empty: give other shares')
        ids = set(table.image_ids[rows].tolist())
        parts[name] = {
            'images': [image for image in data['images'] if image['id'] in ids],
            'annotations': [each for each in data['annotations'] if each['image_id'] in ids],
            'categories': data['categories'],
        }
    return parts


def fit(data: Annotations, to: str) -> tuple[Annotations, Counter[str]]:
    """Return what a format can hold, with the fields that hotcoco writes, and the numbers of what is lost.

    Raises:
        UserError: the size of an image is not known.
    """
    target, lost = TARGETS[to], Counter[str]()
    sizes = {image['id']: (image.get('width') or 0, image.get('height') or 0) for image in data['images']}
    unknown = [image['file_name'] for image in data['images'] if min(sizes[image['id']]) <= 0]
    if unknown and to != 'dota':
        raise UserError(f'{unknown[0]} has no height and width, which --to {to} needs: give --images')
    annotations = []
    for each in data['annotations']:
        kept = fit_object(each, target, sizes[each['image_id']], lost)
        if kept is not None:
            annotations.append(kept)
    if to == 'dota':
        lost['classes have spaces in their names, which other readers may refuse'] += sum(
            ' ' in each['name'] for each in data['categories']
        )
    fitted = data | {'annotations': annotations}
    for name, key in (('images', 'image_id'), ('categories', 'category_id')):
        if not target.empty and (name == 'categories' or to == 'oid'):
            used = {each[key] for each in annotations}
            fitted[name] = [entry for entry in data[name] if entry['id'] in used]
            lost[f'{name} without objects are left out'] += len(data[name]) - len(fitted[name])
    return fitted, +lost


def fit_object(annotation: dict, target: Target, size: tuple[int, int], lost: Counter[str]) -> dict | None:
    """Return an annotation as hotcoco writes it; None if the format cannot hold it."""
    is_crowd = bool(annotation['iscrowd'] or annotation.get('ignore'))
    fate = f'written as {target.crowd}' if target.crowd else 'left out'
    lost[f'crowd regions and ignored objects are {fate}'] += is_crowd
    if is_crowd and not target.crowd:
        return None
    x, y, w, h = annotation['bbox']
    if target.relative:
        left, top, right, bottom = max(x, 0), max(y, 0), min(x + w, size[0]), min(y + h, size[1])
        is_seen = right >= left and bottom >= top and (right > left or not w) and (bottom > top or not h)
        if not is_seen:
            lost['boxes outside of their image are left out'] += 1
            return None
        cut = max(left - x, top - y, x + w - right, y + h - bottom)
        lost['boxes are cut off at the border of their image'] += cut > 0.01
        x, y, w, h = left, top, right - left, bottom - top
    fields = {'iscrowd': int(is_crowd), 'is_group_of': is_crowd, 'bbox': [x, y, w, h]}
    fields |= {'obb': [x + w / 2, y + h / 2, w, h, 0.0]}
    masks = annotation.get('segmentation') or []
    polygons = polygons_of(masks) if target.masks == 'polygons' and isinstance(masks, list) else []
    if polygons:
        fields['segmentation'] = polygons
        lost['objects of several polygons become an object for each'] += len(polygons) > 1
    elif masks:
        lost['masks are left out, and only their boxes are written'] += 1
    lost['annotations have other fields, which are left out'] += bool(
        annotation.keys() - KEPT - {'segmentation', 'ignore'}
    )
    return {name: annotation[name] for name in KEPT} | fields


def write_parts(parts: dict[str, Annotations], to: str, is_divided: bool, output: Path) -> None:
    """Write parts into one file, or into a folder.

    Raises:
        UserError: the format cannot hold the name of a class.
    """
    categories = sorted(next(iter(parts.values()))['categories'], key=lambda category: category['id'])
    names = [category['name'] for category in categories]
    for name in names if to not in ('coco', 'yolo') else ():
        if not name.isprintable() or not name.strip() or name != name.strip():
            raise UserError(f'--to {to}: the class {name!r} would have another name there: rename it')
    if is_divided or not TARGETS[to].suffix:
        output.mkdir()
    if to == 'voc':
        whole = {
            name: [each for data in parts.values() for each in data[name]]
            for name in ('images', 'annotations')
        }
        write(next(iter(parts.values())) | whole, to, output)
        (output / 'ImageSets/Main').mkdir(parents=True)
    for part, data in parts.items():
        if to == 'voc':
            stems = [Path(image['file_name']).stem for image in data['images']]
            (output / f'ImageSets/Main/{part}.txt').write_text('\n'.join([*stems, '']), encoding='utf-8')
        elif to == 'yolo':
            write_texts(data, to, output / 'labels' / part)
            os.remove(output / 'labels' / part / 'data.yaml')  # which has names without quotes, such as no
            lines = [f'{name}: images/{name}\n' for name in parts]
            lines += [f'nc: {len(names)}\n', 'names:\n']
            lines += [f'  {row}: {json.dumps(name, ensure_ascii=False)}\n' for row, name in enumerate(names)]
            (output / 'data.yaml').write_text(''.join(lines), encoding='utf-8')
        elif to == 'dota':
            write_texts(data, to, output / part if is_divided else output)
        else:
            write(data, to, output / f'{part}{TARGETS[to].suffix}' if is_divided else output)


def write(data: Annotations, to: str, path: Path) -> None:
    if to == 'coco':
        path.write_text(json.dumps(data), encoding='utf-8')
        return
    import hotcoco

    try:
        numbers = getattr(hotcoco.COCO(data), f'to_{to}')(str(path))
    except ValueError as error:
        raise UserError(f'--to {to}: {error}') from error
    for kind, number in numbers.items():
        if number and kind.startswith('skipped'):
            print(f'{number} annotations are left out ({kind})')


def write_texts(data: Annotations, to: str, folder: Path) -> None:
    """Write a text for each image, in the folders that the images have; hotcoco knows only one folder.

    Raises:
        UserError: two images would have the same text.
    """
    names = {image['id']: Path(image['file_name']).with_suffix('.txt') for image in data['images']}
    if len(set(names.values())) < len(names):
        twice = Counter(names.values()).most_common(1)[0][0]
        raise UserError(f'--to {to}: two images would have the labels {twice}: rename one of them')
    outside = [name for name in names.values() if name.is_absolute() or '..' in name.parts]
    if outside:
        raise UserError(
            f'--to {to}: the labels {outside[0]} would be outside of {folder}: correct the name of the image'
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    numbered = [image | {'file_name': f'.{image["id"]}.jpg'} for image in data['images']]
    write(data | {'images': numbered}, to, folder)
    for number, name in names.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / f'.{number}.txt').rename(folder / name)


def convert(args: Namespace) -> str:
    """Write the file or the folder, and return a summary.

    Raises:
        UserError: the output exists, or the data are invalid.
    """
    check_flags(args)
    data, table, folder = read_source(args)
    lost = Counter[str]()
    if args.to != 'coco':
        data, lost = fit(data, args.to)
    parts = divide(data, table, args.split, args.seed) if args.split else {args.image_set: data}
    save_atomically(args.output, partial(write_parts, parts, args.to, bool(args.split)))
    for text, number in sorted(lost.items()):
        print(f'{number} {text}')
    target = TARGETS[args.to]
    if target.digits:
        print(f'boxes are rounded to {target.digits}')
    if target.images:
        places = dict.fromkeys(target.images.replace('PART', part) for part in parts)
        print(f'images belong into {" and ".join(f"{args.output}/{place}" for place in places)}')
    names = ('images', 'annotations', 'categories')
    numbers = [', '.join(f'{len(each[name])} {name}' for name in names) for each in parts.values()]
    texts = (
        [f'{part} with {text}' for part, text in zip(parts, numbers, strict=True)] if args.split else numbers
    )
    place = f'; the images are in {folder}' if folder else ''
    return f'{args.output}: {"; ".join(texts)}{place}'


if __name__ == '__main__':
    run_command(convert, get_args_parser())
