"""
Find objects in images with a trained checkpoint, or with published weights.

  python tools/predict.py --checkpoint output/quickstart/checkpoint.pth --source IMAGE --output_dir OUT
  python tools/predict.py --model detr_resnet50 --source IMAGE               a row of docs/zoo.md
  python tools/predict.py --model ms_detr_resnet50 --weights FILE --source IMAGE
  python tools/predict.py --checkpoint FILE --source video.mp4               needs PyAV (pip install av)

It draws the objects into every image or frame, and writes `predictions.json` in COCO's result form. The flags
of the model, the classes and the image size come from the checkpoint, or from the row. Drawings stand upright;
boxes in files are those of the image as it was read (--exif).
"""

import argparse
import contextlib
import glob
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
from datasets.coco_eval import decode_masks, encode_masks
from datasets.image_io import SUFFIXES, check_pixels, naming, turned, turned_boxes
from datasets.readers import add_reader_args
from datasets.results import ResultFiles, coco_results, select
from models.detector import Detector, add_detector_args, load_from_flags
from util.command_line import FlagParser, float_range, int_range, run_command
from util.download import fetch, is_url
from util.errors import UserError
from util.files import make_folder, save_atomically
from util.visualize import draw_boxes

VIDEOS = ('.mp4', '.avi', '.mov', '.mkv', '.webm')


def get_args_parser() -> argparse.ArgumentParser:
    parser = FlagParser('predict.py', description=__doc__)
    add_detector_args(parser)
    add_reader_args(parser, 'as the weights were trained; else upright, and by the values of each image')
    flag = parser.add_argument
    flag(
        '--source',
        required=True,
        help='an image, a folder of images, a pattern such as "*.jpg", the URL of an image, a video '
        f'({", ".join(VIDEOS)}), or webcam (webcam:1 for the second), which Ctrl-C ends',
    )
    flag(
        '--output_dir',
        default='output/predictions',
        metavar='DIR',
        help='output folder (default: %(default)s)',
    )
    flag('--score_thr', default=0.3, type=float_range(0, 1), help='lowest score drawn (default: %(default)s)')
    flag(
        '--json_score_thr',
        default=0.0,
        type=float_range(0, 1),
        help='lowest score written (default: %(default)s)',
    )
    flag(
        '--class_thresholds',
        nargs='+',
        default=[],
        metavar='NAME=SCORE',
        help='lowest score drawn, by class',
    )
    flag(
        '--formats',
        nargs='+',
        default=['json'],
        choices=('json', 'csv', 'yolo'),
        help="files beside the drawings: predictions.json in COCO's result form, predictions.csv, "
        'labels/NAME.txt of YOLO with the score after the box (default: json)',
    )
    flag(
        '--batch_size',
        default=1,
        type=int_range(1, 10**5),
        metavar='N',
        help='images, or frames of a video, computed at once (default: 1); padding changes results slightly',
    )
    return parser


def find_images(source: str) -> list[Path]:
    """Return the image files of a path, a folder or a pattern, sorted.

    A folder, or a pattern without a suffix, gives the files with suffixes of images.

    Raises:
        UserError: there is no image, or a name that cannot be written into the results.
    """
    path = Path(source)
    if path.is_file():
        images = [path]
    else:
        files = path.iterdir() if path.is_dir() else map(Path, glob.glob(source, recursive=True))
        any_suffix = '*' not in path.suffix and path.suffix  # the pattern names it: *.jfif
        images = sorted(
            file for file in files if (any_suffix or file.suffix.lower() in SUFFIXES) and not file.is_dir()
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
    """Refuse to write among the images, where a drawing, a video or a label file could replace a file.

    Raises:
        UserError: an image lies in the output folder.
    """
    for place in {image.parent.resolve() for image in images} | {image.resolve().parent for image in images}:
        if place.is_relative_to(folder.resolve()):
            raise UserError(
                f'--output_dir {folder} holds {place}, where the source lies: choose a folder of its own'
            )


def names_below(images: list[Path]) -> list[str]:
    """Return each image's path below their common folder: no two are equal."""
    common = Path(os.path.commonpath([path.parent for path in images]))
    return [path.relative_to(common).as_posix() for path in images]


def stems_of(names: list[str]) -> dict[str, str]:
    """Return the name of each image's drawing and labels: without suffix unless two would be equal."""
    stems = {name: str(Path(name).with_suffix('')) for name in names}
    counts = Counter(stems.values())
    return {name: stem if counts[stem] == 1 and stem not in stems else name for name, stem in stems.items()}


def ids_of(names: list[str]) -> dict[str, int | str]:
    """Return the number in each name, as COCO has it, else the name; all names if two numbers are equal."""
    stems = {name: Path(name).stem for name in names}
    ids = {name: int(stem) if stem.isdecimal() else name for name, stem in stems.items()}
    return ids if len(set(ids.values())) == len(ids) else {name: name for name in names}


def class_thresholds(class_map: ClassMap, default: float, exceptions: list[str]) -> Tensor:
    """Return the lowest score drawn of each class, [K]. exceptions: `NAME=SCORE` for some classes.

    Raises:
        UserError: there is no such class, or the score is not a number from 0 to 1.
    """
    thresholds = torch.full((class_map.num_classes,), default)
    for text in exceptions:
        name, _, score = text.rpartition('=')
        if name not in class_map.names:
            known = ', '.join(str(each) for each in class_map.names if each is not None)[:300]
            raise UserError(f'--class_thresholds {text}: no class is named {name!r}; there are {known}')
        try:
            threshold = float(score)
        except ValueError:
            raise UserError(f'--class_thresholds {text}: {score!r} is not a score') from None
        if problem := float_range(0, 1).problem(threshold):
            raise UserError(f'--class_thresholds {text}: a score {problem}')
        thresholds[class_map.names.index(name)] = threshold
    return thresholds


def draw_detections(
    image: Tensor, result: dict, class_map: ClassMap, thresholds: Tensor, orientation: int = 1
) -> tuple[Tensor, int]:
    """Draw the detections of an image [3, H, W] that reach the thresholds [K]; also return their number.

    orientation: how the drawing is turned, see `datasets.image_io.turned`.
    """
    chosen = select(result, thresholds)
    boxes = turned_boxes(chosen['boxes'], orientation, image.shape[1:])
    masks = None
    if 'segmentation' in chosen:
        masks = (turned(mask[None], orientation) for mask in decode_masks(chosen['segmentation']))
    image, scores = turned(image, orientation), chosen['scores']
    return draw_boxes(image, boxes, chosen['labels'], class_map.names, scores, masks), len(scores)


def in_batches(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


def import_av() -> Any:
    try:
        import av
    except ImportError as error:
        raise UserError('videos need PyAV: pip install av') from error
    return av


def detect_video(detector: Detector, files: ResultFiles, thresholds: Tensor, args: Namespace) -> None:
    """Detect in every frame of a video or of a Linux webcam; write the drawn video, and rows with a `frame`.

    Raises:
        UserError: the video cannot be read.
    """
    av, source, class_map = import_av(), args.source, detector.class_map
    kind, _, number = source.partition(':')
    is_camera = kind == 'webcam'
    name = 'webcam' if is_camera else Path(source).name
    image_id = ids_of([name])[name]

    def write(path: Path) -> None:
        with av.open(str(path), 'w') as output:
            stream = None
            with contextlib.suppress(KeyboardInterrupt):
                for count, (image, result) in enumerate(detect_frames(detector, video, args)):
                    drawing, _ = draw_detections(image, result, class_map, thresholds)
                    height, width = (side // 2 * 2 for side in drawing.shape[1:])  # codecs need even sides
                    if stream is None:
                        stream = output.add_stream('libx264', rate=video.streams.video[0].average_rate or 25)
                        stream.height, stream.width, stream.pix_fmt = height, width, 'yuv420p'
                    array = drawing[:, :height, :width].permute(1, 2, 0).contiguous().numpy()
                    output.mux(stream.encode(av.VideoFrame.from_ndarray(array, format='rgb24')))
                    rows = coco_results(name, image_id, select(result, args.json_score_thr), class_map)
                    files.add([row | {'frame': count} for row in rows])
            if stream is None:
                raise UserError(f'{source} has no frames')
            output.mux(stream.encode())

    try:
        with av.open(f'/dev/video{number or 0}', format='v4l2') if is_camera else av.open(source) as video:
            save_atomically(files.folder / f'{Path(name).stem}.mp4', write)
    except (av.error.FFmpegError, IndexError) as error:
        problem = 'no webcam that Linux can read' if is_camera else 'not a readable video'
        raise UserError(f'--source {source} is {problem} ({error})') from error


def detect_frames(detector: Detector, video: Any, args: Namespace) -> Iterator[tuple[Tensor, dict]]:
    """Yield each frame of a video, uint8 [3, H, W], with its detections."""
    from tqdm import tqdm

    def pixels(frame: Any) -> Tensor:
        with naming(args.source):
            check_pixels(frame.height, frame.width)
        return torch.from_numpy(frame.to_ndarray(format='rgb24')).permute(2, 0, 1)

    stream = video.streams.video[0]
    frames = tqdm(video.decode(stream), total=stream.frames or None, unit='frame', disable=None)
    for images in in_batches(map(pixels, frames), args.batch_size):
        yield from zip(images, detector.detect_batch(images, encode_masks), strict=True)


def detect_images(
    detector: Detector, images: list[Path], files: ResultFiles, thresholds: Tensor, args: Namespace
) -> list[str]:
    """Detect in images, and write drawings and results; return the reasons why images could not be read.

    Raises:
        UserError: no image could be read.
    """
    names, left_out = names_below(images), []
    stems, ids, paths = stems_of(names), ids_of(names), dict(zip(names, images, strict=True))
    for batch in in_batches(names, args.batch_size):
        pixels = {}
        for name in batch:
            try:
                pixels[name] = detector.reader.read(paths[name])
            except (UserError, OSError) as error:
                if len(names) == 1:
                    raise
                left_out.append(str(error))
                print(f'left out: {error}')
        detections = detector.detect_batch(list(pixels.values()), encode_masks) if pixels else []
        for (name, image), result in zip(pixels.items(), detections, strict=True):
            turn = detector.reader.turn_left(paths[name])
            drawing, number = draw_detections(image, result, detector.class_map, thresholds, turn)
            save_atomically(files.folder / f'{stems[name]}.png', partial(write_png, drawing))
            rows = coco_results(name, ids[name], select(result, args.json_score_thr), detector.class_map)
            files.add_image(rows, stems[name], image.shape[1:])
            print(f'{paths[name]}: {number} objects of score {args.score_thr} or more')
    if len(left_out) == len(images):
        raise UserError(f'no image could be read, the first because {left_out[0]}')
    return left_out


def write_png(image: Tensor, path: Path) -> None:
    path.write_bytes(encode_png(image).numpy().tobytes())


def main(args: Namespace) -> None:
    folder, source = Path(args.output_dir), args.source
    is_camera = source.partition(':')[0] == 'webcam'
    is_video = is_camera or source.lower().endswith(VIDEOS)
    images = [] if is_video or is_url(source) else find_images(source)
    if is_video:
        import_av()
        if 'yolo' in args.formats:
            raise UserError('--formats yolo is for images, not for a video: choose json or csv')
        if not is_camera and not Path(source).is_file():
            raise UserError(f'--source {source}: no video there')
    check_outside([Path(source)] if is_video and not is_camera else images, folder)
    detector = load_from_flags(args)
    thresholds = class_thresholds(detector.class_map, args.score_thr, args.class_thresholds)
    files, left_out = ResultFiles(make_folder(folder), args.formats, detector.class_map), []
    if is_video:
        detect_video(detector, files, thresholds, args)
        print(f'the drawn video and {files.number} detections are in {folder}')
    else:
        if is_url(source):
            images = [folder / 'fetched' / (Path(urlparse(source).path).name or 'image')]
            fetch(source, images[0])
        left_out = detect_images(detector, images, files, thresholds, args)
        number = len(images) - len(left_out)
        print(f'{number} drawn images and {", ".join(args.formats)} results are in {folder}')
    files.finish()
    if left_out:
        raise UserError(
            f'{len(left_out)} of {len(images)} images were left out, the first because {left_out[0]}'
        )


if __name__ == '__main__':
    run_command(main, get_args_parser())
