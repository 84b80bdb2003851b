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
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from torch import Tensor
from torchvision.io import encode_png

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from datasets.class_map import ClassMap
from datasets.coco_eval import encode_masks
from datasets.foreign import shown_box
from datasets.image_io import SUFFIXES, orientation, read_image
from models.detector import Detector, add_detector_args, check_detector_args, load_detector
from util.bounds import real, whole
from util.errors import UserError
from util.files import make_folder, save_atomically
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


def coco_results(
    name: str, image_id: int | str, result: dict[str, Tensor], class_map: ClassMap
) -> list[dict]:
    """Return detections in COCO's result form."""
    columns = [result[key].tolist() for key in ('scores', 'labels', 'boxes')]
    masks = encode_masks(result['masks']) if 'masks' in result else [None] * len(columns[0])
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


def select(result: dict[str, Tensor], threshold: float | Tensor) -> dict[str, Tensor]:
    """Keep detections from a score on. threshold: one for all, or one for each class [K]."""
    keep = result['scores'] >= (threshold[result['labels']] if isinstance(threshold, Tensor) else threshold)
    return {key: value[keep] for key, value in result.items()}


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
    folder.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(url, str(path), progress=False)
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f'{url} could not be fetched ({error}): check the address') from error
    return path


def write_results(
    folder: Path,
    rows: list[dict],
    formats: list[str],
    sizes: dict[str, tuple[int, int, int]],
    stems: dict[str, str],
    labels: dict[int, int],
) -> None:
    """Write detections.

    Args:
        sizes: height, width and orientation of each image by name.
        stems: what its label file is called.
        labels: class index of each category id.
    """
    if 'json' in formats:
        save_atomically(folder / 'predictions.json', lambda path: path.write_text(json.dumps(rows)))
    if 'csv' in formats:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator='\n')
        writer.writerow(COLUMNS)
        writer.writerows([*(row.get(name, '') for name in COLUMNS[:6]), *row['bbox']] for row in rows)
        save_atomically(folder / 'predictions.csv', lambda path: path.write_text(text.getvalue()))
    if 'yolo' in formats:
        lines: dict[str, list[str]] = {name: [] for name in sizes}
        for row in rows:
            height, width, turn = sizes[row['file_name']]
            x, y, w, h = row['bbox']
            box = shown_box(((x + w / 2) / width, (y + h / 2) / height, w / width, h / height), turn)
            values = ' '.join(f'{value:.6g}' for value in (*box, row['score']))
            lines[row['file_name']].append(f'{labels[row["category_id"]]} {values}\n')
        for name, found in lines.items():
            save_atomically(
                folder / 'labels' / f'{stems[name]}.txt', partial(Path.write_text, data=''.join(found))
            )


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
    detector: Detector, source: str, folder: Path, thresholds: Tensor, lowest: float, batch_size: int
) -> list[dict]:
    """Detect in every frame of a film or a webcam (of Linux), write the drawn film, and return rows with their `frame`, from 0.

    Raises:
        UserError: it is no film.
    """
    from tqdm import tqdm

    av = import_av()
    kind, _, number = source.partition(':')
    is_camera = kind == 'webcam'
    name = 'webcam' if is_camera else Path(source).name
    image_id = ids_of([name])[name]
    rows: list[dict] = []

    def write(path: Path) -> None:
        with av.open(str(path), 'w') as output:
            stream = film.streams.video[0]
            drawn_stream = None
            bar = tqdm(film.decode(stream), total=stream.frames or None, unit='frame', disable=None)
            images = (torch.from_numpy(frame.to_ndarray(format='rgb24')).permute(2, 0, 1) for frame in bar)
            pairs = (
                (image, result)
                for batch in in_batches(images, batch_size)
                for image, result in zip(batch, detector.detect_batch(batch), strict=True)
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
                    rows.extend(row | {'frame': count} for row in found)
            if drawn_stream is None:
                raise UserError(f'{source} has no frames')
            output.mux(drawn_stream.encode())

    try:
        with av.open(f'/dev/video{number or 0}', format='v4l2') if is_camera else av.open(source) as film:
            save_atomically(folder / f'{Path(name).stem}.mp4', write)
    except (av.error.FFmpegError, IndexError) as error:
        known = 'no webcam that Linux can read' if is_camera else 'not a readable film'
        raise UserError(f'--source {source} is {known} ({error})') from error
    return rows


def drawn_and_listed(
    class_map: ClassMap,
    image: Tensor,
    result: dict[str, Tensor],
    name: str,
    image_id: int | str,
    thresholds: Tensor,
    lowest: float,
) -> tuple[Tensor, list[dict]]:
    """Return the drawn image, and the detections as rows."""
    drawn = select(result, thresholds)
    drawing = draw_boxes(
        image, drawn['boxes'], drawn['labels'], class_map.names, drawn['scores'], drawn.get('masks')
    )
    return drawing, coco_results(name, image_id, select(result, lowest), class_map)


def main(args: Namespace) -> None:
    folder = Path(args.output_dir)
    is_camera = args.source.partition(':')[0] == 'webcam'
    is_film = is_camera or args.source.lower().endswith(FILMS)
    is_address = args.source.startswith(('http://', 'https://'))
    images = [] if is_film or is_address else find_images(args.source)
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
    class_map = detector.class_map
    thresholds = thresholds_of(class_map, args.score_thr, args.class_thresholds)
    if is_film:
        rows = detect_film(detector, args.source, folder, thresholds, args.json_score_thr, args.batch_size)
        write_results(folder, rows, args.formats, {}, {}, class_map.label_of)
        print(f'the drawn film and {len(rows)} detections lie in {folder}')
        return
    if is_address:
        images = [fetch_image(args.source, folder / 'fetched')]
    names, sizes, rows = names_below(images), {}, []
    stems, ids, paths = stems_of(names), ids_of(names), dict(zip(names, images, strict=True))
    left_out: list[str] = []
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
        results = detector.detect_batch(list(pixels.values())) if pixels else []
        for (name, image), result in zip(pixels.items(), results, strict=True):
            turn = orientation(paths[name]) if 'yolo' in args.formats else 1
            sizes[name] = (image.shape[1], image.shape[2], turn)
            drawing, found = drawn_and_listed(
                class_map, image, result, name, ids[name], thresholds, args.json_score_thr
            )
            rows += found
            save_atomically(folder / f'{stems[name]}.png', partial(write_png, drawing))
            number = len(select(result, thresholds)['scores'])
            print(f'{paths[name]}: {number} objects of score {args.score_thr} or more')
    if not sizes:
        raise UserError(f'no image could be read, the first because {left_out[0]}')
    write_results(folder, rows, args.formats, sizes, stems, class_map.label_of)
    print(f'{len(sizes)} drawn images and {", ".join(args.formats)} results lie in {folder}')
    if left_out:
        raise UserError(
            f'{len(left_out)} of {len(images)} images were left out, the first because {left_out[0]}'
        )


def write_png(image: Tensor, path: Path) -> None:
    path.write_bytes(encode_png(image).numpy().tobytes())


if __name__ == '__main__':
    run_command(main, get_args_parser())
