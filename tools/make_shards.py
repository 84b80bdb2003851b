"""
Write tar shards of a dataset in COCO form, for --train_ann and --val_ann of main.py.

  python tools/make_shards.py --coco_path DATA --image_set train --output shards/train
  python tools/make_shards.py --images my/train --ann my/train.json --output shards/train --shard_size 500MB
  python tools/make_shards.py ... --url 'pipe:aws s3 cp s3://bucket/train/{file} -'    for shards elsewhere

For each image a shard holds its unchanged file, and a JSON with image_id, file_name, height, width and
annotations. The index, shards.json, and the annotation file are stored beside the shards. All is written, or
nothing.
"""

import argparse
import json
import random
import shutil
import sys
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from datasets.annotations import AnnotationTable
from datasets.build import data_settings, locate
from datasets.coco import find_files
from datasets.coco_json import Annotations, Issues, read_annotations
from datasets.headers import Survey, describe_headers, find_reading
from datasets.image_io import ImageReader
from datasets.image_names import find_images
from datasets.readers import add_reader_args, build_reader
from datasets.shard_index import ANNOTATIONS, INDEX, VERSION, check_shard_url, import_webdataset
from datasets.targets import Reading, check_size, is_trained_on
from util.command_line import FlagParser, run_command
from util.errors import UserError
from util.files import save_atomically

UNITS = {'MB': 10**6, 'GB': 10**9}


def get_args_parser() -> argparse.ArgumentParser:
    parser = FlagParser(
        'make_shards.py', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        '--coco_path', metavar='DIR', help='folder of a dataset in a usual layout, as in main.py'
    )
    parser.add_argument(
        '--image_set',
        default='train',
        choices=('train', 'val'),
        help='part of --coco_path (default: %(default)s)',
    )
    parser.add_argument('--images', metavar='DIR', help='images, instead of --coco_path')
    parser.add_argument('--ann', metavar='FILE', help='annotations, instead of --coco_path')
    add_reader_args(parser)
    parser.add_argument(
        '--allow_outside', action='store_true', help='take file names that lead out of the image folder'
    )
    parser.add_argument('--output', required=True, metavar='DIR', help='new folder for shards and index')
    parser.add_argument(
        '--shard_size',
        default='1000',
        metavar='SIZE',
        help='number of images per shard, or its size: 300MB, 1GB (default: %(default)s)',
    )
    parser.add_argument(
        '--shuffle',
        type=int,
        metavar='SEED',
        help='seed to shuffle the images, for data whose neighbours are alike (default: order of ids)',
    )
    parser.add_argument(
        '--url',
        default='{file}',
        help='URL of a shard in the index: a path relative to the index, an https URL, or "pipe:COMMAND", '
        'which runs only with --allow_pipe (default: %(default)s)',
    )
    return parser


def shard_limit(text: str) -> dict[str, float]:
    """Return WebDataset's limit of a shard, in images or bytes.

    Raises:
        UserError: the text is neither.
    """
    unit = UNITS.get(text[-2:].upper())
    number = text[:-2] if unit else text
    if not number.isdecimal() or int(number) < 1:
        raise UserError(f'--shard_size {text}: give a number of images, 1000, or a size, 300MB or 1GB')
    if unit:
        return {'maxcount': sys.maxsize, 'maxsize': int(number) * unit}
    return {'maxcount': int(number), 'maxsize': sys.maxsize}


def image_records(
    data: Annotations, folder: Path, file: Path, seed: int | None, reader: ImageReader
) -> Iterator[dict]:
    """Yield a record per image, as shards hold it, in order of id, or shuffled.

    Raises:
        UserError: an image's size differs from that of its annotations.
    """
    annotations: dict[int, list[dict]] = {image['id']: [] for image in data['images']}
    for annotation in data['annotations']:
        annotations[annotation['image_id']].append(annotation)
    images = sorted(data['images'], key=lambda image: image['id'])
    if seed is not None:
        random.Random(seed).shuffle(images)
    for image in images:
        path = folder / image['file_name']
        annotated = image.get('height') or 0, image.get('width') or 0
        height, width = reader.size(path, annotated)
        check_size(path, (height, width), annotated, file, reader.exif)
        record = {'image_id': image['id'], 'file_name': image['file_name'], 'height': height, 'width': width}
        yield record | {'annotations': annotations[image['id']]}


def write_shards(
    records: Iterator[dict], images: Path, output: Path, limit: dict[str, float], url: str
) -> tuple[list[dict], list[int], list[list[int]]]:
    """Write shards of the records, and return what the index has of them: shards, image ids and sizes."""
    counts: Counter[str] = Counter()
    image_ids, sizes = [], []
    writer = import_webdataset().ShardWriter(
        str(output).replace('%', '%%') + '/%06d.tar', **limit, verbose=0, encoder=False, mtime=0
    )
    with writer:
        for record in records:
            path = images / record['file_name']
            suffix = path.suffix[1:].lower()
            name = suffix if suffix.isalnum() and suffix != 'json' else 'image'
            key = f'{record["image_id"]:012d}'
            writer.write({'__key__': key, name: path.read_bytes(), 'json': json.dumps(record).encode()})
            counts[Path(writer.fname).name] += 1
            image_ids.append(record['image_id'])
            sizes.append([record['height'], record['width']])
    shards = [
        {'url': url.replace('{file}', name), 'images': count, 'bytes': (output / name).stat().st_size}
        for name, count in counts.items()
    ]
    return shards, image_ids, sizes


def find_part(args: Namespace) -> tuple[Path, Path]:
    """Return image folder and annotation file of the part.

    Raises:
        UserError: the data are not found, or not in COCO form.
    """
    part = args.image_set
    files = {f'{part}_images': args.images, f'{part}_ann': args.ann}
    settings = locate(data_settings(Namespace(coco_path=args.coco_path, **files)))
    if settings.dataset_file != 'coco':
        raise UserError(
            f'{settings.found}: shards are written of data in COCO form; write its annotations with '
            'tools/convert_dataset.py, and name them with --images and --ann'
        )
    return find_files(part, args.coco_path, settings.images(part), settings.annotations(part))


def make_shards(args: Namespace) -> str:
    """Write the folder, and return a summary.

    Raises:
        UserError: the folder exists, or the data cannot be trained on.
    """
    output, limit = Path(args.output), shard_limit(args.shard_size)
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise UserError(f'{output} exists: choose another --output, or remove it')
    if '{file}' not in args.url:
        raise UserError(f'--url {args.url} needs {{file}} where the name of a shard goes')
    check_shard_url(args.url, '--url', allow_pipe=True)
    folder, file = find_part(args)
    table, issues = AnnotationTable(file), Issues()
    names = find_images(table.file_names, folder, file, args.allow_outside, issues=issues)
    for line in issues.lines():
        print(line)
    names_by_id = dict(zip(table.image_ids.tolist(), names, strict=True))
    needs_segmentation = is_trained_on(Reading(drop_tiny=True), table.objects)
    unsegmented = table.objects.image_ids[needs_segmentation & ~table.objects.segmented]
    data = read_annotations(file)
    for image in data['images']:
        image['file_name'] = names_by_id[image['id']]
    survey = Survey.of([folder / name for name in names], table.sizes)
    reading = Namespace(**{'upright': None} | vars(args))
    reading = Namespace(**vars(reading) | find_reading(reading, [survey]))
    reader = build_reader(reading)
    for line in describe_headers(survey, reader).lines():
        print(line)

    def write(partial: Path) -> None:
        partial.mkdir()
        records = image_records(data, folder, file, args.shuffle, reader)
        shards, image_ids, sizes = write_shards(records, folder, partial, limit, args.url)
        index = {
            'version': VERSION,
            'categories': data['categories'],
            'annotations': len(data['annotations']),
            'images': len(image_ids),
            'bytes': sum(shard['bytes'] for shard in shards),
            'shards': shards,
            'upright': reader.exif == 'upright' if reader.exif != 'auto' else reading.upright,
            'pixel_range': reader.pixel_range,
            'unsegmented': np.unique(unsegmented).tolist(),
            'image_ids': image_ids,
            'sizes': sizes,
        }
        shutil.copyfile(file, partial / ANNOTATIONS)
        (partial / INDEX).write_text(json.dumps(index))

    save_atomically(output, write)
    index = json.loads((output / INDEX).read_bytes())
    return (
        f'{output}: {index["images"]} images in {len(index["shards"])} shards, {index["bytes"] / 1e6:.1f} MB'
    )


if __name__ == '__main__':
    run_command(make_shards, get_args_parser())
