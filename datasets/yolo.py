"""
Datasets in YOLO's format, as ultralytics' tools write it, read as COCO form: the same checks, targets and metrics.

Categories get the ids 1 to K, in the order of data.yaml.
"""

import math
import os
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from msgspec import Raw

from datasets.build import DataSettings
from datasets.class_map import ClassMap
from datasets.coco import CocoDetection, coco_options, given_root
from datasets.coco_json import File, Issues, Lists, encode, read_text_lines, shorten, unusable
from datasets.image_io import SUFFIXES, orientation
from util.errors import FileError, UserError


class YoloDetection(CocoDetection):
    """Images with annotations as ultralytics' tools write them; the annotation file is data.yaml.

    A line of a label file is a class and a box (centre, size), or a class and a polygon, in shares of the
    image as it is shown: turned as its EXIF data say, while pixels are read as they are stored. Images
    without a label file have no objects.
    """

    def read_lists(self, annotation_file: File, issues: Issues) -> Lists:
        """Return images, annotations and categories of one part, whose name follows a '#'."""
        yaml_file, _, part = str(annotation_file).rpartition('#')
        settings = read_yaml(Path(yaml_file))
        names = names_of(settings, Path(yaml_file))
        folder = yolo_images(settings, Path(yaml_file), part)
        files = sorted(file for file in folder.rglob('*') if file.suffix.lower() in SUFFIXES)
        labels = [label_file(file, folder) for file in files]
        if part == 'train' and files and not any(label.is_file() for label in labels):
            raise FileError(
                f'{yaml_file}: none of the {len(files)} training images has a label file; that of {files[0]} '
                f'would be {labels[0]}'
            )
        images: list[Raw] = []
        annotations: list[Raw] = []
        for number, (file, label) in enumerate(zip(files, labels, strict=True), start=1):
            (height, width), turn = self.reader.size(file), orientation(file)
            image = {'id': number, 'file_name': file.relative_to(folder).as_posix()}
            images += encode([image | {'height': height, 'width': width}])
            objects = enumerate(read_yolo(label, height, width, names, turn), start=len(annotations) + 1)
            annotations += encode({'id': row, 'image_id': number, **each} for row, each in objects)
        categories = encode({'id': number + 1, 'name': name} for number, name in names.items())
        return {'images': images, 'annotations': annotations, 'categories': categories}


def read_yaml(file: Path) -> dict:
    """Read data.yaml.

    Raises:
        UserError: it is invalid, or PyYAML is not installed.
    """
    try:
        import yaml
    except ImportError as error:
        raise UserError('--dataset_file yolo reads data.yaml with PyYAML: pip install pyyaml') from error
    if not file.is_file():
        raise FileError(f'{file} does not exist: --coco_path must be the folder of data.yaml, or that file')
    try:
        settings = yaml.safe_load(file.read_text(encoding='utf-8-sig'))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f'{file} is not YAML ({str(error).splitlines()[0]}): write it again') from error
    if not isinstance(settings, dict):
        raise UserError(f'{file} must have names, train and val')
    return settings


def names_of(settings: dict, file: Path) -> dict[int, str]:
    """Return class names by number; data.yaml has a list, or a mapping."""
    names = settings.get('names')
    if isinstance(names, list):
        names = dict(enumerate(names))
    if not isinstance(names, dict) or not all(isinstance(key, int) for key in names):
        raise UserError(f'{file} has names {names!r}: it must list the class names')
    return {key: str(name) for key, name in sorted(names.items())}


def yolo_images(settings: dict, file: Path, part: str) -> Path:
    """Return the folder of images of a part.

    Raises:
        UserError: data.yaml does not name it, or it does not exist.
    """
    place = settings.get(part)
    if not isinstance(place, str):
        raise UserError(f'{file} has {part} {place!r}: it must name one folder of images')
    root = Path(settings.get('path') or '.')
    inside = place.removeprefix('../')  # Roboflow writes ../train/images for train/images
    candidates = [file.parent / root / place, root / place, file.parent / place, file.parent / inside]
    for folder in candidates:
        if folder.is_dir():
            return folder
    raise FileError(f'{file}: the {part} images {place!r} are in none of {", ".join(map(str, candidates))}')


def label_file(image: Path, folder: Path) -> Path:
    """Return the first label file of an image that exists, or the first of these candidates.

    They are below `labels` in place of the last `images` of its path, in `labels` beside the folder of
    images, and beside the image.
    """
    file = image.with_suffix('.txt')
    parts = list(file.absolute().parts)
    places = [index for index, part in enumerate(parts[:-1]) if part == 'images']
    near = folder.parent / 'labels' / file.relative_to(folder)
    if places:
        parts[places[-1]] = 'labels'
    candidates = [Path(*parts), near, file] if places else [near, file]
    return next((path for path in candidates if path.is_file()), candidates[0])


def read_yolo(file: Path, height: int, width: int, names: Collection[int], turn: int = 1) -> list[dict]:
    """Return category_id and bbox, or segmentation for a polygon, or `problem`, of each line.

    Args:
        height, width: of the stored image, in pixels.
        names: the valid class numbers.
        turn: orientation of the image.
    """
    if not file.is_file():
        return []
    objects: list[dict] = []
    for number, line in enumerate(read_text_lines(file), start=1):
        words = line.split()
        if not words:
            continue
        try:
            label, values = int(words[0]), [float(word) for word in words[1:]]
            if len(values) != 4 and (len(values) < 6 or len(values) % 2):
                raise ValueError(f'{len(values)} numbers after the class')
            if label not in names:
                raise ValueError(f'the classes are {shorten(names)}')
            if not all(map(math.isfinite, values)) or (len(values) == 4 and min(values[2:]) < 0):
                raise ValueError('a size is negative or a number not finite')
        except ValueError as error:
            problem = f'is {line[:60]!r}, which is neither a box nor a polygon ({error}): correct it'
            objects.append(unusable(problem))
        else:
            objects.append({'category_id': label + 1, **shape_of(values, height, width, turn)})
        objects[-1]['source'] = f'{file}, line {number}'
    return objects


def shape_of(values: list[float], height: int, width: int, turn: int) -> dict:
    """Return bbox or segmentation, in pixels, of a box or a polygon in shares."""
    if len(values) == 4:
        x, y, w, h = turned_box(values, turn)
        return {'bbox': [(x - w / 2) * width, (y - h / 2) * height, w * width, h * height]}
    corners = [TURNS[turn](*corner) for corner in zip(values[::2], values[1::2], strict=True)]
    return {'segmentation': [[value for x, y in corners for value in (x * width, y * height)]]}


# EXIF tag Orientation -> place in the stored image of a point (x, y) of the shown one, in shares of sides.
TURNS: dict[int, Callable[[float, float], tuple[float, float]]] = {
    1: lambda x, y: (x, y),
    2: lambda x, y: (1 - x, y),
    3: lambda x, y: (1 - x, 1 - y),
    4: lambda x, y: (x, 1 - y),
    5: lambda x, y: (y, x),
    6: lambda x, y: (y, 1 - x),
    7: lambda x, y: (1 - y, 1 - x),
    8: lambda x, y: (1 - y, x),
}


def turned_box(box: Sequence[float], turn: int) -> list[float]:
    """Return the stored box (centre, size) of one in the image as it is shown."""
    x, y, w, h = box
    return [*TURNS[turn](x, y), *((h, w) if turn >= 5 else (w, h))]


def shown_box(box: Sequence[float], turn: int) -> list[float]:
    """Invert `turned_box`."""
    return turned_box(box, {6: 8, 8: 6}.get(turn, turn))


def build(part: str, settings: DataSettings, class_map: ClassMap | None = None) -> YoloDetection:
    """Build the 'train' or 'val' part of --dataset_file yolo in --coco_path."""
    return YoloDetection(*find_files(settings.source(part), settings.coco_path), **coco_options(part, settings, class_map))


def has_part(part: str, root: str | os.PathLike[str]) -> bool:
    """Return whether data.yaml names a place for a part."""
    return bool(read_yaml(Path(root)).get(part))


def find_files(part: str, root: str | os.PathLike[str] | None) -> tuple[Path, Path]:
    """Return the image folder of a part, and data.yaml with the name of the part after a '#'.

    Raises:
        UserError: there is no root, or it lacks the part.
    """
    folder = given_root(root, 'yolo')
    file = folder if folder.suffix in ('.yaml', '.yml') else folder / 'data.yaml'
    return yolo_images(read_yaml(file), file, part), Path(f'{file}#{part}')
