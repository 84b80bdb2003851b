"""
Find objects in images with a trained checkpoint, or with published weights.

  python tools/predict.py --checkpoint output/quickstart/checkpoint.pth --source IMAGE --output_dir OUT
  python tools/predict.py --model detr_resnet50 --source IMAGE               a row of docs/zoo.md
  python tools/predict.py --model ms_detr_resnet50 --weights FILE --source IMAGE

This draws every image and writes `predictions.json` in COCO's result form. The model's flags, the classes and the
image size come from the checkpoint, or from the row.
"""

import argparse
import glob
import json
import os
import sys
from argparse import Namespace
from functools import partial
from pathlib import Path

from torch import Tensor
from torchvision.io import write_png

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from datasets.class_map import ClassMap
from datasets.coco_eval import encode_masks
from datasets.image_io import read_image
from models.detector import load_detector
from util.files import save_atomically
from util.flags import run_command
from util.visualize import draw_boxes

SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp', '.webp', '.tif', '.tiff')


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        'predict.py', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        '--checkpoint', '--weights', default='', metavar='FILE',
        help='path or address of weights: of a run of main.py or any file that tells its flags, of any other file with --model',
    )  # fmt: skip
    parser.add_argument(
        '--model', default='', metavar='NAME',
        help='hub entry or recipe whose model to build, with its published weights if no file is named',
    )  # fmt: skip
    parser.add_argument(
        '--source', required=True, help='an image, a folder of images, or a pattern such as "*.jpg"'
    )
    parser.add_argument(
        '--output_dir',
        default='output/predictions',
        metavar='DIR',
        help='output folder (default: %(default)s)',
    )
    parser.add_argument(
        '--score_thr', default=0.3, type=float, help='lowest score drawn (default: %(default)s)'
    )
    parser.add_argument(
        '--json_score_thr', default=0.0, type=float, help='lowest score written (default: %(default)s)'
    )
    parser.add_argument('--device', default='auto', help='auto, cuda, mps or cpu (default: %(default)s)')
    return parser


def find_images(source: str) -> list[Path]:
    """Return image files of a path, folder or pattern, sorted.

    Raises:
        ValueError: there is none.
    """
    path = Path(source)
    if path.is_dir():
        images = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
    else:
        images = [path] if path.is_file() else sorted(map(Path, glob.glob(source, recursive=True)))
    if not images:
        raise ValueError(f'--source {source}: no image there ({", ".join(SUFFIXES)})')
    return images


def names_below(images: list[Path]) -> list[str]:
    """Return each image's path below their common folder: no two are equal."""
    common = Path(os.path.commonpath([path.parent for path in images]))
    return [path.relative_to(common).as_posix() for path in images]


def drawing_name(name: str, names: list[str]) -> str:
    """Return NAME.png, or NAME.jpg.png if another image differs in the suffix only."""
    stem = str(Path(name).with_suffix(''))
    alone = sum(str(Path(other).with_suffix('')) == stem for other in names) == 1
    return f'{stem}.png' if alone else f'{name}.png'


def coco_results(name: str, result: dict[str, Tensor], class_map: ClassMap) -> list[dict]:
    """Return detections in COCO's result form.

    The id of an image is the number that its file is named by, as COCO's are, else its name.
    """
    stem = Path(name).stem
    columns = [result[key].tolist() for key in ('scores', 'labels', 'boxes')]
    masks = encode_masks(result['masks']) if 'masks' in result else [None] * len(columns[0])
    return [
        {
            'image_id': int(stem) if stem.isdecimal() else name,
            'file_name': name,
            'category_id': class_map.category_ids[label],
            'category_name': class_map.names[label],
            'bbox': [round(v, 2) for v in (x0, y0, x1 - x0, y1 - y0)],
            'score': round(score, 5),
            **({'segmentation': mask} if mask else {}),
        }
        for score, label, (x0, y0, x1, y1), mask in zip(*columns, masks, strict=True)
        if class_map.names[label] is not None
    ]


def select(result: dict[str, Tensor], threshold: float) -> dict[str, Tensor]:
    keep = result['scores'] >= threshold
    return {key: value[keep] for key, value in result.items()}


def main(args: Namespace) -> None:
    images, folder = find_images(args.source), Path(args.output_dir)
    if not (args.model or args.checkpoint):
        raise ValueError('give --checkpoint FILE, or --model NAME for published weights')
    detector = load_detector(args.model, args.checkpoint, args.device)
    class_map = detector.class_map
    names = names_below(images)
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for path, name in zip(images, names, strict=True):
        image = read_image(path)
        result = detector.detect(image)
        rows += coco_results(name, select(result, args.json_score_thr), class_map)
        drawn = select(result, args.score_thr)
        drawing = draw_boxes(
            image, drawn['boxes'], drawn['labels'], class_map.names, drawn['scores'], drawn.get('masks')
        )
        save_atomically(folder / drawing_name(name, names), partial(write_png_file, drawing))
        print(f'{path}: {len(drawn["scores"])} objects of score {args.score_thr} or more')
    save_atomically(folder / 'predictions.json', lambda path: path.write_text(json.dumps(rows)))
    print(f'{len(images)} drawn images and predictions.json lie in {folder}')


def write_png_file(image: Tensor, path: Path) -> None:
    write_png(image, str(path))


if __name__ == '__main__':
    run_command(main, get_args_parser())
