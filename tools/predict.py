"""
Find objects in images with a trained checkpoint, or with published weights.

  python tools/predict.py --checkpoint output/quickstart/checkpoint.pth --source IMAGE --output_dir OUT
  python tools/predict.py --model detr_resnet50 --source IMAGE               a row of docs/zoo.md
  python tools/predict.py --model ms_detr_resnet50 --weights FILE --source IMAGE
  python tools/predict.py --checkpoint FILE --source film.mp4                needs PyAV (pip install av)

This draws every image, or film, and writes `predictions.json` in COCO's result form. The model's flags, the classes and
the image size come from the checkpoint, or from the row.
"""

import argparse
import contextlib
import csv
import glob
import io
import json
import os
import sys
from argparse import Namespace
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import compress, islice
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from torch import Tensor
from torchvision.io import encode_png

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from datasets.class_map import ClassMap
from datasets.coco_eval import decode_masks, encode_masks
from datasets.foreign import shown_box
from datasets.image_io import SUFFIXES, check_pixels, naming, orientation, read_image
from models.detector import Detector, add_detector_args, check_detector_args, load_detector
from util.bounds import real, whole
from util.download import fetch, is_url
from util.errors import UserError
from util.files import GrowingFile, make_folder, save_atomically
from util.flags import FlagParser, run_command
from util.visualize import draw_boxes

FILMS = ('.mp4', '.avi', '.mov', '.mkv', '.webm')
COLUMNS = (
    'image_id',
    'file_name',
    'frame',
    'category_id',
    'category_name',
    'score',
    'x',
    'y',
    'width',
    'height',
)


def get_args_parser() -> argparse.ArgumentParser:
    parser = FlagParser(
        'predict.py', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_detector_args(parser)
    parser.add_argument(
        '--source', required=True,
        help='an image, a folder of images, a pattern such as "*.jpg", the address of an image, a film '
        f'({", ".join(FILMS)}), or webcam (webcam:1 for the second), which Ctrl-C ends',
    )  # fmt: skip
    parser.add_argument(
        '--output_dir',
        default='output/predictions',
        metavar='DIR',
        help='output folder (default: %(default)s)',
    )
    parser.add_argument(
        '--score_thr', default=0.3, type=real(0, 1), help='lowest score drawn (default: %(default)s)'
    )
    parser.add_argument(
        '--json_score_thr', default=0.0, type=real(0, 1), help='lowest score written (default: %(default)s)'
    )
    parser.add_argument(
        '--class_thresholds',
        nargs='+',
        default=[],
        metavar='NAME=SCORE',
        help='lowest score drawn of single classes',
    )
    parser.add_argument(
        '--formats', nargs='+', default=['json'], choices=('json', 'csv', 'yolo'),
        help='what is written beside the drawings: predictions.json in COCO\'s result form, predictions.csv, labels/NAME.txt of '
        'YOLO with the score behind the box (default: json)',
    )  # fmt: skip
    parser.add_argument(
        '--batch_size', default=1, type=whole(1, 10**5), metavar='N',
        help='images, or frames of a film, that are computed at once; padding moves results a little (default: %(default)s)',
    )  # fmt: skip
    parser.add_argument(
        '--half', action='store_true', help='compute in 16 bits: fp16 on NVIDIA GPUs, bf16 elsewhere'
    )
    parser.add_argument('--device', default='auto', help='auto, cuda, mps or cpu (default: %(default)s)')
    return parser


def find_images(source: str) -> list[Path]:
    """Return image files of a path, folder or pattern, sorted; those of the latter two by their suffix.

    Raises:
        UserError: there is none, or a name that cannot be written into the results.
    """
    path = Path(source)
    if path.is_file():
        images = [path]
    else:
        found = path.iterdir() if path.is_dir() else map(Path, glob.glob(source, recursive=True))
        named = '*' not in path.suffix and path.suffix  # by the pattern: *.jfif
        images = sorted(
            file for file in found if (named or file.suffix.lower() in SUFFIXES) and not file.is_dir()
        )
    if not images:
        raise UserError(f'--source {source}: no image there ({", ".join(SUFFIXES)})')
    for image in images:
        try:
            str(image).encode()
        except UnicodeEncodeError:
            raise UserError(f'{str(image)!r} has a name that is not UTF-8: rename the file') from None
    return images


def check_outside(images: list[Path], folder: Path) -> None:
    """Refuse to write among the images: a drawing, a film or a label file could replace one of theirs.

    Raises:
        UserError: an image lies in the output folder.
    """
    whole = folder.resolve()
    for place in {image.parent.resolve() for image in images} | {image.resolve().parent for image in images}:
        if place.is_relative_to(whole):
            raise UserError(
                f'--output_dir {folder} holds {place}, where the source lies: choose a folder of its own'
            )


def names_below(images: list[Path]) -> list[str]:
    """Return each image's path below their common folder: no two are equal."""
    common = Path(os.path.commonpath([path.parent for path in images]))
    return [path.relative_to(common).as_posix() for path in images]


def stems_of(names: list[str]) -> dict[str, str]:
    """Return what each image's drawing and labels are called: NAME without suffix, or with it where two would be equal."""
    short = {name: str(Path(name).with_suffix('')) for name in names}
    often = Counter(short.values())
    return {name: stem if often[stem] == 1 and stem not in short else name for name, stem in short.items()}


def ids_of(names: list[str]) -> dict[str, int | str]:
    """Return the number that each image is named by, as COCO's are, else its name; all names if two have the same number."""
    stems = {name: Path(name).stem for name in names}
    ids = {name: int(stem) if stem.isdecimal() else name for name, stem in stems.items()}
    return ids if len(set(ids.values())) == len(ids) else {name: name for name in names}


def coco_results(name: str, image_id: int | str, result: dict, class_map: ClassMap) -> list[dict]:
    """Return detections in COCO's result form."""
    columns = [result[key].tolist() for key in ('scores', 'labels', 'boxes')]
    masks = result.get('segmentation', [None] * len(columns[0]))
    return [
        {
            'image_id': image_id,
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


def select(result: dict, threshold: float | Tensor) -> dict:
    """Keep detections from a score on. threshold: one for all, or one for each class [K]."""
    keep = result['scores'] >= (threshold[result['labels']] if isinstance(threshold, Tensor) else threshold)
    return {
        key: value[keep] if isinstance(value, Tensor) else list(compress(value, keep.tolist()))
        for key, value in result.items()
    }


def thresholds_of(class_map: ClassMap, usual: float, single: list[str]) -> Tensor:
    """Return the lowest score drawn of each class, [K]. single: `NAME=SCORE` for some.

    Raises:
        UserError: there is no such class, or no number from 0 to 1.
    """
    thresholds = torch.full((class_map.num_classes,), usual)
    for text in single:
        name, _, score = text.rpartition('=')
        if name not in class_map.names:
            known = ', '.join(str(each) for each in class_map.names if each is not None)[:300]
            raise UserError(f'--class_thresholds {text}: no class is named {name!r}; there are {known}')
        try:
            threshold = float(score)
        except ValueError:
            raise UserError(f'--class_thresholds {text}: {score!r} is no score') from None
        if problem := real(0, 1).problem(threshold):
            raise UserError(f'--class_thresholds {text}: a score {problem}')
        thresholds[class_map.names.index(name)] = threshold
    return thresholds


def fetch_image(url: str, folder: Path) -> Path:
    """Fetch an image into a folder.

    Raises:
        UserError: it cannot be fetched.
    """
    path = folder / (Path(urlparse(url).path).name or 'image')
    fetch(url, path)
    return path


class Results:
    """Detections in the chosen formats, written as they come: a program that is killed keeps what it has done.

    labels: class index of each category id.
    """

    def __init__(self, folder: Path, formats: list[str], labels: dict[int, int]) -> None:
        self.folder, self.formats, self.labels, self.number = folder, formats, labels, 0
        self.json = GrowingFile(folder / 'predictions.json', '[', ', ', ']')
        self.csv = GrowingFile(folder / 'predictions.csv', csv_line(COLUMNS))

    def add(self, rows: list[dict]) -> None:
        if 'json' in self.formats:
            self.json.add([json.dumps(row) for row in rows])
        if 'csv' in self.formats:
            self.csv.add(
                [csv_line([*(row.get(name, '') for name in COLUMNS[:6]), *row['bbox']]) for row in rows]
            )
        self.number += len(rows)

    def add_image(self, rows: list[dict], stem: str, size: tuple[int, int], path: Path) -> None:
        """Add all detections of an image. stem: what its label file is called. size: height and width, as stored in `path`."""
        self.add(rows)
        if 'yolo' in self.formats:
            (height, width), turn, text = size, orientation(path), ''
            for row in rows:
                x, y, w, h = row['bbox']
                box = shown_box(((x + w / 2) / width, (y + h / 2) / height, w / width, h / height), turn)
                values = ' '.join(f'{value:.6g}' for value in (*box, row['score']))
                text += f'{self.labels[row["category_id"]]} {values}\n'
            save_atomically(self.folder / 'labels' / f'{stem}.txt', partial(Path.write_text, data=text))

    def finish(self) -> None:
        for file in (self.json, self.csv):
            file.finish()


def csv_line(values: Sequence[object]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator='\n').writerow(values)
    return text.getvalue()


def import_av() -> Any:
    try:
        import av
    except ImportError as error:
        raise UserError('films need PyAV: pip install av') from error
    return av


def in_batches(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


def detect_film(
    detector: Detector, source: str, results: Results, thresholds: Tensor, lowest: float, batch_size: int
) -> None:
    """Detect in every frame of a film or a webcam (of Linux), and write the drawn film, and rows with their `frame`, from 0.

    Raises:
        UserError: it is no film.
    """
    from tqdm import tqdm

    av = import_av()
    kind, _, number = source.partition(':')
    is_camera = kind == 'webcam'
    name = 'webcam' if is_camera else Path(source).name
    image_id = ids_of([name])[name]

    def write(path: Path) -> None:
        with av.open(str(path), 'w') as output:
            stream = film.streams.video[0]
            drawn_stream = None
            bar = tqdm(film.decode(stream), total=stream.frames or None, unit='frame', disable=None)
            images = (pixels_of(frame, source) for frame in bar)
            pairs = (
                (image, result)
                for batch in in_batches(images, batch_size)
                for image, result in zip(batch, detector.detect_batch(batch, encode_masks), strict=True)
            )
            with contextlib.suppress(KeyboardInterrupt):
                for count, (image, result) in enumerate(pairs):
                    drawing, found = drawn_and_listed(
                        detector.class_map, image, result, name, image_id, thresholds, lowest
                    )
                    height, width = (side // 2 * 2 for side in drawing.shape[1:])  # codecs want even sides
                    if drawn_stream is None:
                        drawn_stream = output.add_stream('libx264', rate=stream.average_rate or 25)
                        drawn_stream.height, drawn_stream.width = height, width
                        drawn_stream.pix_fmt = 'yuv420p'
                    array = drawing[:, :height, :width].permute(1, 2, 0).contiguous().numpy()
                    output.mux(drawn_stream.encode(av.VideoFrame.from_ndarray(array, format='rgb24')))
                    results.add([row | {'frame': count} for row in found])
            if drawn_stream is None:
                raise UserError(f'{source} has no frames')
            output.mux(drawn_stream.encode())

    try:
        with av.open(f'/dev/video{number or 0}', format='v4l2') if is_camera else av.open(source) as film:
            save_atomically(results.folder / f'{Path(name).stem}.mp4', write)
    except (av.error.FFmpegError, IndexError) as error:
        known = 'no webcam that Linux can read' if is_camera else 'not a readable film'
        raise UserError(f'--source {source} is {known} ({error})') from error


def pixels_of(frame: Any, source: str) -> Tensor:
    """Return a frame of a film as uint8 [3, H, W]."""
    with naming(source):
        check_pixels(frame.height, frame.width)
    return torch.from_numpy(frame.to_ndarray(format='rgb24')).permute(2, 0, 1)


def drawn_and_listed(
    class_map: ClassMap,
    image: Tensor,
    result: dict,
    name: str,
    image_id: int | str,
    thresholds: Tensor,
    lowest: float,
) -> tuple[Tensor, list[dict]]:
    """Return the drawn image, and the detections as rows."""
    drawn = select(result, thresholds)
    masks = decode_masks(drawn['segmentation']) if 'segmentation' in drawn else None
    drawing = draw_boxes(image, drawn['boxes'], drawn['labels'], class_map.names, drawn['scores'], masks)
    return drawing, coco_results(name, image_id, select(result, lowest), class_map)


def main(args: Namespace) -> None:
    folder = Path(args.output_dir)
    is_camera = args.source.partition(':')[0] == 'webcam'
    is_film = is_camera or args.source.lower().endswith(FILMS)
    images = [] if is_film or is_url(args.source) else find_images(args.source)
    check_detector_args(args)
    if is_film:
        import_av()
        if 'yolo' in args.formats:
            raise UserError('--formats yolo is for images, not for a film: choose json or csv')
        if not is_camera and not Path(args.source).is_file():
            raise UserError(f'--source {args.source}: no film there')
    check_outside(
        [] if is_camera else [Path(args.source)] if is_film else images, make_folder(args.output_dir)
    )
    detector = load_detector(args.model, args.checkpoint, args.device, args.half)
    thresholds = thresholds_of(detector.class_map, args.score_thr, args.class_thresholds)
    results = Results(folder, args.formats, detector.class_map.label_of)
    if is_film:
        detect_film(detector, args.source, results, thresholds, args.json_score_thr, args.batch_size)
        results.finish()
        print(f'the drawn film and {results.number} detections lie in {folder}')
        return
    if is_url(args.source):
        images = [fetch_image(args.source, folder / 'fetched')]
    left_out = detect_images(detector, images, results, thresholds, args)
    print(f'{len(images) - len(left_out)} drawn images and {", ".join(args.formats)} results lie in {folder}')
    if left_out:
        raise UserError(
            f'{len(left_out)} of {len(images)} images were left out, the first because {left_out[0]}'
        )


def detect_images(
    detector: Detector, images: list[Path], results: Results, thresholds: Tensor, args: Namespace
) -> list[str]:
    """Detect in images, and write drawings and results; return why some could not be read.

    Raises:
        UserError: none could be read.
    """
    names, left_out = names_below(images), []
    stems, ids, paths = stems_of(names), ids_of(names), dict(zip(names, images, strict=True))
    for batch in in_batches(names, args.batch_size):
        pixels = {}
        for name in batch:
            try:
                pixels[name] = read_image(paths[name])
            except (UserError, OSError) as error:
                if len(names) == 1:
                    raise
                left_out.append(str(error))
                print(f'left out: {error}')
        detections = detector.detect_batch(list(pixels.values()), encode_masks) if pixels else []
        for (name, image), found in zip(pixels.items(), detections, strict=True):
            drawing, rows = drawn_and_listed(
                detector.class_map, image, found, name, ids[name], thresholds, args.json_score_thr
            )
            save_atomically(results.folder / f'{stems[name]}.png', partial(write_png, drawing))
            results.add_image(rows, stems[name], image.shape[1:], paths[name])
            number = len(select(found, thresholds)['scores'])
            print(f'{paths[name]}: {number} objects of score {args.score_thr} or more')
    if len(left_out) == len(images):
        raise UserError(f'no image could be read, the first because {left_out[0]}')
    results.finish()
    return left_out


def write_png(image: Tensor, path: Path) -> None:
    path.write_bytes(encode_png(image).numpy().tobytes())


if __name__ == '__main__':
    run_command(main, get_args_parser())
