"""
Write a part of a dataset in Pascal VOC's or YOLO's format as an annotation file in COCO form.

  python tools/convert_dataset.py --dataset_file voc --coco_path VOCdevkit/VOC2012 --output train.json
  python tools/convert_dataset.py --dataset_file yolo --coco_path data.yaml --image_set val --output val.json

Training needs no such file (--dataset_file voc|yolo); other tools may.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from datasets.build import build_dataset, data_settings
from datasets.coco_json import object_area
from util.command_line import FlagParser, run_command
from util.errors import UserError
from util.files import save_atomically


def get_args_parser() -> argparse.ArgumentParser:
    parser = FlagParser(
        'convert_dataset.py', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--dataset_file', required=True, choices=('voc', 'yolo'), help='format to read')
    parser.add_argument(
        '--coco_path',
        required=True,
        metavar='DIR',
        help='folder of the dataset; for yolo also its data.yaml',
    )
    parser.add_argument(
        '--image_set', default='train', choices=('train', 'val'), help='part to write (default: %(default)s)'
    )
    parser.add_argument('--output', required=True, type=Path, metavar='FILE', help='JSON file to write')
    return parser


def convert(args: argparse.Namespace) -> str:
    """Write the file, and return a summary.

    Raises:
        UserError: the file exists, or the data are invalid.
    """
    if args.output.exists():
        raise UserError(f'{args.output} exists: choose another --output, or remove it')
    flags = {'dataset_file': args.dataset_file, 'coco_path': args.coco_path}
    dataset = build_dataset(args.image_set, data_settings(argparse.Namespace(**flags)))
    data = dataset.ground_truth
    for annotation in data['annotations']:
        annotation.pop('source')
        annotation |= {'iscrowd': annotation.get('iscrowd', 0), 'area': object_area(annotation)}
    save_atomically(args.output, lambda path: path.write_text(json.dumps(data)))
    numbers = ', '.join(f'{len(entries)} {name}' for name, entries in data.items())
    return f'{args.output}: {numbers}; the images are in {dataset.image_dir}'


if __name__ == '__main__':
    run_command(convert, get_args_parser())
