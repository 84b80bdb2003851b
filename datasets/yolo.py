"""
Datasets in YOLO's format, as ultralytics' tools write it, read as COCO form: the same checks, targets and metrics.

Categories get the ids 1 to K, in the order of data.yaml.
"""

import math
import os
from collections.abc import Collection
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from msgspec import Raw
from torch import Tensor

from datasets.build import DataSettings
from datasets.class_map import ClassMap
from datasets.coco import CocoDetection, coco_options, given_root
from datasets.coco_json import (
    Annotations,
    File,
    Issues,
    Lists,
    Place,
    as_id,
    encode,
    read_text_lines,
    shorten,
    unusable,
)
from datasets.image_io import SUFFIXES, ImageReader, UnreadableImage
from datasets.image_names import find_images, parts_of
from datasets.transforms import Target
from util.errors import FileError, UserError

PARTS = {'train': ('train',), 'val': ('val', 'valid', 'validation')}  # their names in data.yaml
MOST_CLASSES = 10**5
ROUNDING = 0.01  # by which a share of the image may be below 0 or above 1, as in ultralytics' code


class YoloDetection(CocoDetection):
    """Images with annotations as ultralytics' tools write them; the annotation file is data.yaml.

    A line of a label file is a class and a box (centre, size), or a class and a polygon, in shares of the
    image as it is read: upright, unless the reader has `exif='stored'`. Images without a label file have no
    objects. A training image without a readable header is kept: reading it is an error, which
    --skip_unreadable handles.
    """

    def use_reader(self, reader: ImageReader) -> None:
        """Read images by this reader, upright instead of 'auto': labels have no sizes."""
        super().use_reader(replace(reader, exif='upright') if reader.exif == 'auto' else reader)

    def read_lists(self, annotation_file: File, issues: Issues) -> Lists:
        """Return images, annotations and categories of one part, whose name follows a '#'."""
        yaml_file, _, part = str(annotation_file).rpartition('#')
        data = DataYaml(Path(yaml_file))
        names, files = data.names(issues), data.images(part, issues)
        labels = [label_file(file, folder) for file, folder in files.items()]
        if part == 'train' and files and not any(label.is_file() for label in labels):
            raise FileError(
                f'{yaml_file}: none of the {len(files)} training images has a label file; that of '
                f'{next(iter(files))} would be {labels[0]}'
            )
        images: list[Raw] = []
        annotations: list[Raw] = []
        for number, (file, label) in enumerate(zip(files, labels, strict=True), start=1):
            try:
                height, width = self.reader.size(file)
            except UnreadableImage:
                if part != 'train':
                    raise
                height = width = 0
            name = Path(os.path.relpath(file, self.image_dir)).as_posix()
            if not label.is_file():
                issues.add('images without a label file, taken as images without objects', name)
            images += encode([{'id': number, 'file_name': name, 'height': height, 'width': width}])
            sides = height or 1, width or 1
            objects = read_yolo(label, *sides, names, issues, data.num_keypoint_values, name)
            rows = enumerate(objects, start=len(annotations) + 1)
            annotations += encode({'id': row, 'image_id': number, **each} for row, each in rows)
        categories = encode({'id': number + 1, 'name': name} for number, name in names.items())
        return {'images': images, 'annotations': annotations, 'categories': categories}

    def untransformed(self, idx: int) -> tuple[Tensor, Target]:
        """Return the image as its file has it, and its objects."""
        self.check_size_known(int(self._rows[idx]))
        return super().untransformed(idx)

    @cached_property
    def ground_truth(self) -> Annotations:
        """Return the content of the label files in COCO form."""
        for row in range(len(self._json_sizes)):
            self.check_size_known(row)
        return super().ground_truth

    def check_size_known(self, row: int) -> None:
        """Raise UnreadableImage if the size of an image, and so its boxes, could not be read."""
        if not self._json_sizes[row].all():
            path = self.image_dir / self._file_names[row]
            self.reader.size(path)
            raise UnreadableImage(f'{path} was not readable when this program began: start it again')


class DataYaml:
    """Content of data.yaml: the classes, and where the images of each part are."""

    def __init__(self, file: Path) -> None:
        """Read the file; errors are those of `read_yaml`."""
        self.file, self.settings = file, read_yaml(file)
        path = self.settings.get('path') or '.'
        if not isinstance(path, str):
            raise UserError(
                f'{file} has path {path!r}: it must name the folder of the dataset, or be missing'
            )
        self.path, self.folder = path, Path(os.path.abspath(file)).parent
        self.roots = [self.folder / path, Path(path), self.folder]  # below which places are looked for

    def names(self, issues: Issues) -> dict[int, str]:
        """Return class names by number; the file has a list, or a mapping, or only how many there are."""
        names, count = self.settings.get('names'), as_id(self.settings.get('nc'))
        if not names and isinstance(count, int) and 0 < count <= MOST_CLASSES:
            names = range(count)
        if isinstance(names, list | range):
            names = dict(enumerate(names))
        pairs = names.items() if isinstance(names, dict) else ()
        numbers = {number: str(name) for key, name in pairs if isinstance(number := as_id(key), int)}
        if not numbers or len(numbers) < len(pairs) or min(numbers) < 0:
            raise UserError(f'{self.file} has names {str(names)[:80]}: it must list the class names')
        if 'nc' in self.settings and count not in (len(numbers), max(numbers) + 1):
            issues.add(
                'number of classes (nc) that differs from the names, which count',
                f'{self.file} has nc {self.settings["nc"]} and {len(numbers)} names',
            )
        return dict(sorted(numbers.items()))

    @property
    def num_keypoint_values(self) -> int:
        """Return how many numbers behind a box are keypoints: kpt_shape is [points, values of each]."""
        shape = self.settings.get('kpt_shape')
        if not isinstance(shape, list) or not all(isinstance(value, int) for value in shape):
            return 0
        return math.prod(shape)

    def texts(self, part: str) -> list:
        """Return the places of a part as they are written, [] if it has none."""
        value: Any = next((self.settings[name] for name in PARTS[part] if self.settings.get(name)), [])
        return value if isinstance(value, list) else [value]

    def places(self, part: str) -> list[Path]:
        """Return the folders of images and the list files of a part.

        Raises:
            UserError: the file does not name them, or they do not exist.
        """
        texts = self.texts(part)
        if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
            raise UserError(
                f'{self.file} has {part} {self.settings.get(part)!r}: it must name a folder of images, a list '
                'file (.txt), or several of them'
            )
        return [self.place(text, part) for text in texts]

    def place(self, text: str, part: str) -> Path:
        """Return the folder or the list file that a text of a part means, which is below one of the roots.

        `path` and places may be those of another machine, and Roboflow writes ../train/images for
        train/images: then it is the longest tail that exists below the folder of the file.
        """
        candidates = [without_dots(root / text.strip()) for root in self.roots]
        found = next(filter(os.path.exists, candidates), None) or self.tail(text)
        if found is None:
            raise FileError(
                f'{self.file}: the {part} images {text!r} are in none of {", ".join(map(str, dict.fromkeys(candidates)))}, '
                f'and {self.folder} has no tail of these: correct path and {part} in it'
            )
        others = [other for name in PARTS for other in self.texts(name) if str(other).strip() != text.strip()]
        if found not in candidates and found in [self.tail(str(other)) for other in others]:
            raise UserError(
                f'{self.file}: {text!r} does not exist, and {found} could be it or another place: correct '
                'path, train and val in it'
            )
        if found.is_file() and found.suffix.lower() != '.txt':
            raise UserError(f'{self.file}: {part} {text!r} is neither a folder nor a list file (.txt)')
        return found

    def tail(self, text: str) -> Path | None:
        """Return the longest tail of a place that exists below the folder of the file."""
        parts = [*parts_of(self.path), *parts_of(text)]
        paths = (self.folder.joinpath(*parts[start:]) for start in range(len(parts)))
        return next(filter(os.path.exists, paths), None)

    def image_folders(self, part: str) -> list[Path]:
        """Return the folders of a part's images, each once."""
        places = self.places(part)
        lists = (self.listed(place, Issues()) for place in places if place.is_file())
        parents = {path.parent: 0 for paths in lists for path in paths}
        return [*dict.fromkeys(place for place in places if place.is_dir()), *parents]

    def images(self, part: str, issues: Issues) -> dict[Path, Path]:
        """Return the image files of a part, each once, and the folder of images of each."""
        found: dict[Path, Path] = {}
        for place in self.places(part):
            is_list = place.is_file()
            files = self.listed(place, issues) if is_list else sorted(place.rglob('*'))
            for file in files:
                if file in found:
                    issues.add('images that are listed again, which count once', str(file))
                elif is_list or is_image(file):
                    found[file] = file.parent if is_list else place
        return found

    def listed(self, file: Path, issues: Issues) -> list[Path]:
        """Return the images of a list file.

        Its lines are paths below one of the roots or below the folder of the list, or those of another machine
        (`find_images`).

        Raises:
            UserError: the list is empty, or an image is missing.
        """
        lines = [line.strip() for line in read_text_lines(file) if line.strip()]
        if not lines:
            raise UserError(f'{file} is empty: it must have the path of an image in each line')
        roots = [*self.roots, file.parent]
        root = next((root for root in roots if (root / lines[0]).is_file()), self.folder)
        names = find_images(lines, root, file, allow_outside=True, issues=issues)
        return [without_dots(root / name) for name in names]


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


def is_image(file: Path) -> bool:
    """Return whether a file has the name of an image; macOS writes ._NAME beside copies of files."""
    return file.suffix.lower() in SUFFIXES and not file.name.startswith('._')


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


def read_yolo(
    file: Path,
    height: int,
    width: int,
    names: Collection[int],
    issues: Issues,
    num_keypoint_values: int = 0,
    image: str = '',
) -> list[dict]:
    """Return category_id and bbox, or segmentation for a polygon, or `problem`, of each line.

    Args:
        height, width: of the image, in pixels.
        names: the valid class numbers.
        issues: where to count what is left out of lines, and lines that are left out.
        num_keypoint_values: numbers of keypoints that may follow a box.
        image: name of the image, for `issues`.
    """
    objects: list[dict] = []
    seen = set()
    for number, line in enumerate(read_text_lines(file) if file.is_file() else [], start=1):
        if not line.strip():
            continue
        source = f'{file}, line {number}'
        try:
            label, values, extra = parse_line(line, names, num_keypoint_values)
        except UserError as error:
            objects.append(unusable(str(error)) | {'source': source})
            continue
        shape = shape_of(values, height, width)
        places = [Place(image, shape.get('bbox'))]
        if extra:
            issues.add(extra, source, places=places)
        if (label, *values) in seen:
            kind = 'lines of label files that repeat another one, which are left out'
            issues.add(kind, source, places=places)
            continue
        seen.add((label, *values))
        objects.append({'category_id': label + 1, **shape, 'source': source})
    return objects


def parse_line(line: str, names: Collection[int], num_keypoint_values: int) -> tuple[int, list[float], str]:
    """Return the class of a line, the numbers of its box or polygon, and what is read no further, or ''.

    Raises:
        UserError: the line is invalid; the message lacks the place.
    """
    word, *words = line.split()
    try:
        label, values, extra = as_id(float(word)), [float(each) for each in words], ''
        if num_keypoint_values and len(values) in (4 + num_keypoint_values, 5 + num_keypoint_values):
            values, extra = values[:4], 'keypoints behind boxes, which are not read'
        if len(values) == 5 or (len(values) > 6 and len(values) % 2):
            values, extra = values[:-1], 'scores behind boxes and polygons, which are not read'
            if not 0 <= float(words[-1]) <= 1:
                raise ValueError(f'{words[-1]} at its end is no score')
        if not isinstance(label, int):
            raise ValueError(f'its class is {word}')
        if len(values) < 4:
            raise ValueError(f'{len(values)} numbers after the class')
        if not all(map(math.isfinite, values)) or (len(values) == 4 and min(values[2:]) < 0):
            raise ValueError('a size is negative or a number not finite')
    except ValueError as error:
        raise UserError(
            f'is {line[:60]!r}, which is neither a box nor a polygon ({error}): correct it'
        ) from None
    if label not in names:
        first, last = min(names), max(names)
        known = f'{first} to {last}' if 0 < last - first < len(names) else shorten(names)
        raise UserError(f'has class {label}; the classes are {known}: correct it, or add it to data.yaml')
    if beyond := [value for value in values if not -ROUNDING <= value <= 1 + ROUNDING]:
        raise UserError(
            f'has {beyond[0]:g}, which is not a share of the image, from 0 to 1: divide pixels by its width '
            'and height, or correct the line'
        )
    return label, values, extra


def shape_of(values: list[float], height: int, width: int) -> dict:
    """Return bbox or segmentation, in pixels, of a box or a polygon in shares."""
    if len(values) == 4:
        x, y, w, h = values
        return {'bbox': [(x - w / 2) * width, (y - h / 2) * height, w * width, h * height]}
    corners = zip(values[::2], values[1::2], strict=True)
    return {'segmentation': [[value for x, y in corners for value in (x * width, y * height)]]}


def without_dots(path: Path) -> Path:
    """Return the absolute path of a file, without '..'."""
    plain = Path(os.path.abspath(path))
    if '..' not in path.parts or not os.path.exists(path):
        return plain
    if plain.exists() and plain.samefile(path):
        return plain
    return path.resolve()  # it leaves the target of a link


def build(part: str, settings: DataSettings, class_map: ClassMap | None = None) -> YoloDetection:
    """Build the 'train' or 'val' part of --dataset_file yolo in --coco_path."""
    return YoloDetection(
        *find_files(settings.source(part), settings.coco_path), **coco_options(part, settings, class_map)
    )


def find_files(part: str, root: str | os.PathLike[str] | None) -> tuple[Path, Path]:
    """Return the image folder of a part, and data.yaml with the name of the part after a '#'.

    Several folders of images are below the one that is returned.

    Raises:
        UserError: there is no root, or it lacks the part.
    """
    file = yaml_file(root)
    folders = DataYaml(file).image_folders(part)
    return Path(os.path.commonpath(folders)), Path(f'{file}#{part}')


def has_part(part: str, root: str | os.PathLike[str] | None) -> bool:
    """Return whether data.yaml has a place for the images of a part."""
    return bool(DataYaml(yaml_file(root)).texts(part))


def yaml_file(root: str | os.PathLike[str] | None) -> Path:
    """Return data.yaml of --coco_path, which is its folder or the file itself."""
    folder = given_root(root, 'yolo')
    return folder if folder.suffix in ('.yaml', '.yml') else folder / 'data.yaml'
