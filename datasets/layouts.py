"""
Find what a folder of data holds: its format, and the files of its parts.

LAYOUTS are known by the names of their files. A folder with none of them may hold one file in COCO form, or
one for each part, of any name.
"""

import json
import mmap
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

from datasets.image_io import SUFFIXES
from datasets.image_names import leads_out, walk
from util.errors import FileError, UserError

PARTS = ('train', 'val')
FORMATS = {'coco': 'COCO form', 'voc': 'Pascal VOC', 'yolo': 'YOLO'}  # what is looked for
LAYOUTS = (  # format, whose layout it is, pattern of its annotation files
    ('coco', 'COCO, CVAT', 'annotations/instances_*.json'),
    ('coco', 'Roboflow', '*/_annotations.coco.json'),
    ('coco', 'label-studio', 'result.json'),
    ('voc', 'Pascal VOC', 'ImageSets/Main/*.txt'),
    ('yolo', 'YOLO', 'data.yaml'),
)
VOC_LISTS: dict[str, tuple[str, ...]] = {'train': ('val', 'valid'), 'trainval': ('test',), 'default': ()}
ANY_JSON, ANY_YAML = ('*.json', 'annotations/*.json', '*/*.json'), ('*.yaml', '*.yml')
WORDS = {'train': ('train', 'training'), 'val': ('val', 'valid', 'validation'), 'test': ('test', 'testing')}
FIRST_NAME = re.compile(rb'"file_name"\s*:\s*("(?:[^"\\]|\\.)*")')
NAME_FILES = 'name the files with --train_images, --train_ann, --val_images and --val_ann'


@dataclass(frozen=True)
class Layout:
    """What a folder holds.

    place: the folder; of YOLO its YAML file. annotations: files of 'train' and 'val', if they are there. images:
    their folders, in COCO form. is_named: the names of the files say what is training and what validation;
    otherwise there is one part, 'train'.
    """

    place: Path
    dataset_file: str
    annotations: dict[str, Path]
    images: dict[str, Path] = field(default_factory=dict)
    is_named: bool = True

    def __str__(self) -> str:
        parts = []
        for part, file in self.annotations.items():
            words = [part] if self.is_named else []
            words += [str(file.relative_to(self.place))] if file != self.place else []
            if folder := self.images.get(part):
                words += ['with images in', str(folder.relative_to(self.place))]
            parts.append(' '.join(words))
        return f'{self.place}: {FORMATS[self.dataset_file]}, {"; ".join(parts)}'

    def flags(self) -> dict[str, str]:
        """Return the flags of data that it stands for."""
        values = {'dataset_file': self.dataset_file, 'coco_path': str(self.place)}
        if self.dataset_file == 'coco':
            values |= {f'{part}_ann': str(file) for part, file in self.annotations.items()}
            values |= {f'{part}_images': str(folder) for part, folder in self.images.items()}
        return values


def find_layout(root: Path, dataset_file: str = 'auto') -> Layout:
    """Return what a folder holds, or the one folder in it. dataset_file: the format; auto: any of FORMATS.

    Raises:
        FileError: the folder does not exist, or holds none of the layouts.
        UserError: it holds several.
    """
    if not root.exists():
        raise FileError(f'{root} does not exist: check --coco_path')
    kinds = FORMATS if dataset_file == 'auto' else (dataset_file,)
    if root.suffix in ('.yaml', '.yml') and 'yolo' in kinds:
        return build_layout(root.parent, 'yolo', [root])
    if not root.is_dir():
        raise UserError(f'--coco_path {root} is a file: give its folder, or {NAME_FILES}')
    for rows in (known_files, other_files):
        found = [(kind, paths) for kind, paths in rows(root) if paths and kind in kinds]
        if len(found) > 1:
            names = ' and '.join(f'{FORMATS[kind]} ({paths[0].relative_to(root)})' for kind, paths in found)
            choices = '|'.join(dict.fromkeys(kind for kind, _ in found))
            choose = f'choose with --dataset_file {choices}, or ' if '|' in choices else ''
            raise UserError(f'{root} holds data in two layouts, {names}: {choose}{NAME_FILES}')
        if found:
            return build_layout(root, *found[0])
    inside = [folder for folder in folders_of(root).values() if folder.name != '__MACOSX']
    if len(inside) == 1:  # that of an archive
        return find_layout(inside[0], dataset_file)
    patterns = ', '.join(f'{pattern} ({title})' for kind, title, pattern in LAYOUTS if kind in kinds)
    raise FileError(
        f'{root} holds no data in a usual layout: there is none of {patterns}, and no JSON file in COCO form in '
        f'it or in its folders. Check --coco_path, or {NAME_FILES}'
    )


def build_layout(root: Path, kind: str, paths: list[Path]) -> Layout:
    """Build the layout of a format from its annotation files.

    Raises:
        UserError: there are several files, and it is not clear which is that of a part.
    """
    if kind == 'yolo':
        file, yolo = the_one(root, paths), import_module('datasets.yolo')  # which imports this module
        return Layout(file, kind, {part: file for part in PARTS if yolo.has_part(part, file)})
    if kind == 'voc':
        lists = {part: path for part in PARTS if (path := find_list(root, part))}
        return Layout(root, kind, lists, is_named=[path.stem for path in lists.values()] != ['default'])
    if lvis := [path for path in paths if path.name.startswith('lvis_v1_')]:
        raise UserError(f'{root} holds LVIS ({lvis[0].relative_to(root)}): add --dataset_file lvis')
    by_part: dict[str, list[Path]] = {}
    for path in paths:
        by_part.setdefault(part_of(path.relative_to(root).as_posix()), []).append(path)
    named = {part: the_one(root, by_part[part], part) for part in PARTS if part in by_part}
    if not named and '' not in by_part:
        raise UserError(
            f'{root} holds a part called test alone ({paths[0].relative_to(root)}), which is not used: {NAME_FILES}'
        )
    annotations = named or {'train': the_one(root, by_part[''])}
    folders = {part: image_folder(root, file, part if named else '') for part, file in annotations.items()}
    images = {part: folder for part, folder in folders.items() if folder is not None}
    return Layout(root, kind, annotations, images, is_named=bool(named))


def known_files(root: Path) -> Iterator[tuple[str, list[Path]]]:
    """Yield the format and the annotation files of each of LAYOUTS."""
    for kind, _, pattern in LAYOUTS:
        yield kind, files_of(root, [pattern])


def other_files(root: Path) -> Iterator[tuple[str, list[Path]]]:
    """Yield the formats and files that only their content shows."""
    yield 'coco', list(filter(is_coco, files_of(root, ANY_JSON)))
    yield 'yolo', list(filter(is_yolo, files_of(root, ANY_YAML)))


def files_of(root: Path, patterns: Iterable[str]) -> list[Path]:
    """Return the files of these patterns in order of their names."""
    return sorted({path for pattern in patterns for path in root.glob(pattern) if path.is_file()})


def is_coco(file: Path) -> bool:
    """Return whether a file seems to be in COCO form."""
    with searched(file) as data:
        return all(data.find(name) >= 0 for name in (b'"images"', b'"annotations"', b'"categories"'))


def is_yolo(file: Path) -> bool:
    """Return whether a YAML file names classes and training images."""
    with searched(file) as data:
        return all(re.search(rb'(?m)^%s\s*:' % name, data) for name in (b'names', b'train'))


@contextmanager
def searched(file: Path) -> Iterator[mmap.mmap | bytes]:
    """Give the content of a file, of which only what is looked at is read."""
    with file.open('rb') as stream:
        if not file.stat().st_size:
            yield b''
            return
        with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            yield data


def part_of(path: str) -> str:
    """Return 'train', 'val' or 'test' if words of a path name one of them, else ''."""
    words = set(re.findall('[a-z]+', path.lower()))
    parts = [part for part, names in WORDS.items() if words.intersection(names)]
    return parts[0] if len(parts) == 1 else ''


def the_one(root: Path, paths: list[Path], part: str = '') -> Path:
    """Return the annotation file of a part. Of several it is COCO's own, that of 2017 first.

    Raises:
        UserError: none of several is COCO's own.
    """
    usual = [path for name in (f'{part}2017', part) for path in paths if path.stem == f'instances_{name}']
    if len(paths) > 1 and not usual:
        names = ', '.join(str(path.relative_to(root)) for path in paths[:3])
        raise UserError(
            f'{root} holds {len(paths)} annotation files{f" of the part {part}" if part else ""} ({names}'
            f'{", ..." if len(paths) > 3 else ""}): {NAME_FILES}'
        )
    return (usual or paths)[0]


def find_list(root: Path, part: str) -> Path | None:
    """Return the list of the images of 'train' or 'val'; None if there is none.

    As VOC 2007 is used, trainval goes with test. CVAT writes one part, default.
    """
    folder = root / 'ImageSets/Main'
    for training, validation in VOC_LISTS.items():
        if (file := folder / f'{training}.txt').is_file():
            files = [file] if part == 'train' else [folder / f'{name}.txt' for name in validation]
            return next((path for path in files if path.is_file()), None)
    file = folder / f'{part}.txt'
    return file if file.is_file() else None


def image_folder(root: Path, file: Path, part: str) -> Path | None:
    """Return the folder of the images of 'train', of 'val', or of all (''); None if there is none.

    Folders with the name of the part, or called `images`, come before others, unless they hold another part. Of
    several folders it is the first that has the first image of the annotation file.

    Raises:
        UserError: it is not clear which of several others it is.
    """
    own = [word for word in re.findall('[a-z]+[0-9]*', file.stem.lower()) if part_of(word) == part]
    names = [*own, f'{part}2017', part, *WORDS[part]] if part else []
    beside = [] if file.parent in (root, root / 'annotations') else [file.parent]
    inside, images = folders_of(root), folders_of(root / 'images')
    usual = [found[name] for name in names for found in (inside, images) if name in found]
    usual += [found[name] for name, found in (('default', images), ('images', inside)) if name in found]
    known = [*beside, *usual]
    whole = [folder for folder in known if not part or {*map(part_of, folders_of(folder))} <= {'', part}]
    unnamed = [] if known else [folder for name, folder in inside.items() if part_of(name) in ('', part)]
    others = list(filter(has_images, unnamed))
    name = first_name(file)
    standing = [folder for folder in (*(known or others), root) if stands(folder, name)]
    choices = standing or whole or others or ([root] if has_images(root, below=False) else [])
    if len(choices) > 1 and not known:
        shown = ' or '.join(f'{path.relative_to(root)}/' for path in choices[:3])
        raise UserError(
            f'{root}: are the images of {file.name} in {shown}? Name it with --{part or "train"}_images'
        )
    return choices[0] if choices else None


def stands(folder: Path, name: str) -> bool:
    """Return whether a name leads to a file in a folder."""
    return not leads_out(name) and os.path.isfile(folder / name)


def folders_of(folder: Path) -> dict[str, Path]:
    """Return the folders in a folder by their names in small letters."""
    if not folder.is_dir():
        return {}
    with os.scandir(folder) as entries:  # which knows what is a folder: there may be 100,000 images
        names = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith('.'))
    return {name.lower(): folder / name for name in names}


def has_images(folder: Path, below: bool = True) -> bool:
    """Return whether there is an image in a folder, or below it."""
    names = walk(folder) if below else os.listdir(folder)
    return any(Path(name).suffix.lower() in SUFFIXES for name in names)


def first_name(file: Path) -> str:
    """Return the first file name in a JSON file, which is searched and not read; '' if there is none."""
    with searched(file) as data:
        found = FIRST_NAME.search(data)
        text = found[1] if found else b'""'
    try:
        return json.loads(text)
    except ValueError:
        return ''
