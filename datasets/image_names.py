r"""
Find the image files that annotations name, also by names of another machine or tool.

`images\p1.jpg`, `..\set\p1.jpg`, `/home/me/images/p1.jpg`, `/data/local-files/?d=set/p1.jpg` and
`s3://bucket/p1.jpg` mean a file below the image folder. It is the one with the longest common tail of parts,
and only if there is one such file.
"""

import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from urllib.parse import unquote

from datasets.coco_json import EXAMPLES, File, Issues, Place
from util.errors import FileError, UserError

LOCAL_FILE = re.compile(r'local-files/?\?(?:.*&)?d=([^&]*)')  # in label-studio's URL of a local file
UPLOADED = re.compile(r'[0-9a-f]{4,32}-(?=.)')  # label-studio puts it before the name of an uploaded file


def find_images(
    names: Sequence[str],
    image_dir: File,
    file: File,
    allow_outside: bool = False,
    problems: Issues | None = None,
    issues: Issues | None = None,
    most_missing: int = 0,
) -> Sequence[str]:
    """Return the names of image files, relative to their folder; `names` itself if all stand as they are.

    Others are looked for below the folder (`FilesBelow`). If some names stand as they are, those of the same
    form keep all their parts, because then an image is missing, and not the folder another one.

    Args:
        file: which has the names, for messages.
        allow_outside: take names that lead out of the folder.
        problems: where to count missing images. issues: where to count names that were found otherwise.
        most_missing: so many images may be missing, if they are not most of all; their names stay.

    Raises:
        FileError: the folder does not exist, or more images are missing and problems is None.
        UserError: a name leads out of the folder, and allow_outside is not set; or problems is None, and a
            name fits several files, or two names fit one.
    """
    image_dir = Path(image_dir)
    if not image_dir.is_dir():
        raise FileError(f'image folder {image_dir} does not exist: check the path')
    others = find_others(names, image_dir, allow_outside)
    if not others:
        return names
    found, doubts = find_tails(others, FilesBelow(image_dir), set(names).difference(others))
    for name in [] if allow_outside else filter(leads_out, others):
        check_inside(name, found, image_dir, file)
    missing = [name for name in others if name not in found and name not in doubts]
    if len(missing) <= min(most_missing, len(names) // 2):
        missing = []
    if problems is not None:
        for text in doubts.values():
            problems.add('image names that are not clear', text)
        for name in missing:
            problems.add('images that are missing', name)
    elif doubts:
        raise UserError(
            f'{file}: {len(doubts)} image names are not clear in {image_dir}: {next(iter(doubts.values()))}. '
            'Correct the names, or give the folder of the files that they mean'
        )
    elif missing:
        raise FileError(
            f'{len(missing)} of {len(names)} images of {file} are not in {image_dir}, the first is '
            f'{missing[0]}: fetch them, give the right folder, or remove them from the file'
        )
    if issues is not None:
        for name, path in found.items():
            kind = 'image names found by their last parts'
            issues.add(kind, f'{name} is {path}', places=[Place(path)])
    return [found.get(name, name) for name in names]


def find_others(names: Iterable[str], image_dir: Path, allow_outside: bool) -> list[str]:
    """Return the names that do not stand for a file as they are; each of their folders is listed once."""
    listed: dict[str, set[str]] = {}
    others = []
    for path in names:
        folder, name = os.path.split(path)
        if folder not in listed:
            allowed = allow_outside or not leads_out(folder)
            inside = image_dir / folder
            listed[folder] = set(os.listdir(inside)) if allowed and os.path.isdir(inside) else set()
        if name not in listed[folder]:
            others.append(path)
    return others


def leads_out(name: str) -> bool:
    return os.path.isabs(name) or '..' in Path(name).parts


def check_inside(name: str, found: Mapping[str, str], image_dir: Path, file: File) -> None:
    """Refuse a name that leads to a file outside of the folder.

    If others were found inside, one that leads to no file at all is only missing.
    """
    outside = image_dir / name
    is_file = os.path.isfile(outside)
    if name in found:
        leads = is_file and not outside.samefile(image_dir / found[name])
    else:
        leads = is_file or not found
    if leads:
        raise UserError(
            f'{file}: file_name {name!r} leads out of the image folder {image_dir}: correct it, or '
            'trust the file with --allow_outside'
        )


def parts_of(name: str) -> list[str]:
    """Return the parts of a path of any system, or of a URL, without drive letters, '.' and '..'."""
    if local := LOCAL_FILE.search(name):
        name = local[1]
    elif '://' in name:
        name = name.partition('://')[2].partition('?')[0]
    parts: list[str] = []
    for part in re.split(r'[/\\]', name):
        if part == '..':
            parts = parts[:-1]
        elif part.strip(' .') and not re.fullmatch('[A-Za-z]:', part):
            parts.append(part)
    return parts


def same_letters(text: str) -> str:
    """Return a text without what systems change: case, the encoding of letters with accents, and spaces."""
    return unicodedata.normalize('NFC', text).casefold().strip().replace(' ', '_')


class FilesBelow:
    """The files below a folder, by all tails of their paths: for `a/b.jpg` these are `a/b.jpg` and `b.jpg`."""

    def __init__(self, folder: Path) -> None:
        self.by_tail: dict[str, list[str]] = defaultdict(list)
        for path in walk(folder):
            parts = same_letters(path).split('/')
            for length in range(1, len(parts) + 1):
                self.by_tail['/'.join(parts[-length:])].append(path)

    def fitting(self, readings: list[list[str]], keep_all: bool) -> list[str]:
        """Return the files that fit the readings of a name best. keep_all: in all parts."""
        matches = [self.longest(parts, len(parts) if keep_all else 1) for parts in readings]
        return max(matches, key=lambda match: match[0], default=(0, []))[1]

    def longest(self, parts: list[str], shortest: int) -> tuple[int, list[str]]:
        """Return the length of the longest tail that files have, of at least `shortest` parts, and these files.

        Of several files, those of the same letters and the one directly in the folder are preferred.
        """
        for length in range(len(parts), shortest - 1, -1):
            tail = '/'.join(parts[-length:])
            if files := self.by_tail.get(same_letters(tail), []):
                files = [path for path in files if f'/{path}'.endswith(f'/{tail}')] or files
                directly = [path for path in files if path.count('/') == length - 1]
                return length, directly if len(directly) == 1 else files
        return 0, []


def walk(folder: Path) -> Iterator[str]:
    """Yield the files below a folder, relative to it. Links to folders are followed, hidden files are
    left out.
    """
    seen = set()
    for path, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(path)
        folders[:] = [] if real in seen else sorted(name for name in folders if not name.startswith('.'))
        if real not in seen:
            inside = Path(path).relative_to(folder)
            yield from ((inside / name).as_posix() for name in sorted(files) if not name.startswith('.'))
        seen.add(real)


def find_tails(
    names: Iterable[str], files: FilesBelow, standing: Set[str]
) -> tuple[dict[str, str], dict[str, str]]:
    """Find the one file that each name fits.

    standing: the names that stand as they are.

    Returns:
        The file of each name that is found, and for names that are not clear what they fit.
    """
    found, doubts = {}, {}
    owners = {os.path.normpath(name): name for name in standing}
    for name in dict.fromkeys(names):
        readings = [parts for parts in map(parts_of, {name: 0, unquote(name): 0}) if parts]
        keep_all = bool(standing) and name in map('/'.join, readings)
        fitting = files.fitting(readings, keep_all) or files.fitting(without_prefix(readings), keep_all)
        owner = owners.setdefault(fitting[0], name) if len(fitting) == 1 else name
        if len(fitting) > 1:
            more = ', ...' if len(fitting) > EXAMPLES else ''
            doubts[name] = f'{name!r} fits {", ".join(fitting[:EXAMPLES])}{more}'
        elif parts_of(owner) != parts_of(name):
            doubts[name] = f'{owner!r} and {name!r} both fit {fitting[0]}'
        elif fitting:
            found[name] = fitting[0]
    return found, doubts


def without_prefix(readings: list[list[str]]) -> list[list[str]]:
    """Return the readings of a name whose last part has the prefix of an upload, without it."""
    return [
        [*parts[:-1], UPLOADED.sub('', parts[-1], count=1)] for parts in readings if UPLOADED.match(parts[-1])
    ]
