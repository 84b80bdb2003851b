"""
What the headers of image files show at the start of a run: photographs that EXIF data turn, deep images, files
that cannot be read.
"""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from datasets.coco_json import Issues, Place
from datasets.deep_images import Extremes, Range, deep_values, extremes_of, fitting_range
from datasets.image_io import Header, ImageReader, UnreadableImage, is_flat, naming, open_image, read_header

MOST_FILES = 20_000  # whose headers are read: some seconds
MOST_DEEP = 64  # that are decoded to find their range
MOST_LOOKED_AT = 16  # images of a part that are decoded when a run starts
THREADS = 16

T = TypeVar('T')


@dataclass(frozen=True)
class Survey:
    """Headers of the image files of a part of the data.

    total: number of its files. paths: [n] those that were read, evenly chosen. annotated: [n] (height, width)
    of their annotations, 0 if unknown. headers: [n], for a file that has none that can be read the error.
    upright, pixel_range: of images that are not files, if something else has them (the index of shards).
    """

    total: int = 0
    paths: Sequence[Path] = ()
    annotated: Sequence[tuple[int, int]] = ()
    headers: Sequence[Header | UnreadableImage] = ()
    upright: bool | None = None
    pixel_range: Range | None = None

    @classmethod
    def of(cls, paths: Sequence[Path], annotated: Any = None) -> 'Survey':
        """Read the headers of files, of MOST_FILES at most.

        annotated: [N, 2] height and width of the annotations; None: they have none.
        """
        rows = evenly(range(len(paths)), MOST_FILES)
        chosen = [paths[row] for row in rows]
        sizes = np.zeros((len(paths), 2), dtype=int) if annotated is None else np.asarray(annotated)
        pairs = [(height, width) for height, width in sizes[rows].tolist()]
        return cls(len(paths), chosen, pairs, in_threads(header_or_error, chosen))

    @property
    def readable(self) -> list[tuple[Path, tuple[int, int], Header]]:
        """Return path, annotated size and header of each file that has one."""
        rows = zip(self.paths, self.annotated, self.headers, strict=True)
        return [(path, size, header) for path, size, header in rows if isinstance(header, Header)]

    @property
    def unreadable(self) -> list[tuple[Path, UnreadableImage]]:
        """Return the path and the error of each file without a readable header."""
        rows = zip(self.paths, self.headers, strict=True)
        return [(path, header) for path, header in rows if isinstance(header, UnreadableImage)]


def evenly(items: Sequence[T], most: int) -> list[T]:
    """Choose at most `most` items, evenly from the first to the last."""
    rows = np.linspace(0, len(items) - 1, min(len(items), most)).astype(int)
    return [items[row] for row in rows.tolist()]


def in_threads(function: Callable[[Path], T], paths: Iterable[Path]) -> list[T]:
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(function, paths))


def header_or_error(path: Path) -> Header | UnreadableImage:
    try:
        return read_header(path)
    except UnreadableImage as error:
        return error


def find_range(paths: Sequence[Path]) -> Range | None:
    """Return the range that fits deep images, from a sample of them; None if none of it can be read."""
    extremes = in_threads(extremes_or_none, evenly(paths, MOST_DEEP))
    return fitting_range(each for each in extremes if each is not None)


def extremes_or_none(path: Path) -> Extremes | None:
    try:
        with naming(path), open_image(path) as image:
            return extremes_of(deep_values(image))
    except UnreadableImage:
        return None


def find_reading(settings: Any, surveys: Sequence[Survey]) -> dict[str, Any]:
    """Return the flags `upright` and `pixel_range`, as files show them where they are not given.

    upright: most images whose annotated size shows it are meant so; None: no image depends on it.
    """
    found = {'upright': settings.upright, 'pixel_range': settings.pixel_range}
    rows = [row for survey in surveys for row in survey.readable]
    if settings.exif == 'auto' and settings.upright is None:
        shown = [header.is_upright_in(size) for _, size, header in rows if header.orientation != 1]
        shown += [survey.upright for survey in surveys if survey.upright is not None]
        if shown:
            found['upright'] = shown.count(True) >= shown.count(False)
    if settings.pixel_range is None:
        known = [survey.pixel_range for survey in surveys if survey.pixel_range]
        deep = [path for path, _, header in rows if header.is_deep]
        limits = find_range(deep) if deep else next(iter(known), None)
        found['pixel_range'] = limits and list(limits)
    return found


def describe_headers(survey: Survey, reader: ImageReader) -> Issues:
    """Return which images EXIF data turn, and which are deep."""
    issues = Issues()
    for path, size, header in survey.readable:
        places = [Place(str(path))]
        if header.orientation != 1:
            is_turned = reader.turn(header, size) != 1
            kind = (
                f'images {"turned by" if is_turned else "as they are stored, not turned by"} their EXIF data'
            )
            if reader.exif == 'auto':
                shown = header.is_upright_in(size) is not None
                reason = (
                    'as their annotated sizes ask for'
                    if shown
                    else 'which their sizes neither ask for nor forbid'
                )
                kind += f', {reason}'
            issues.add(kind, path.name, places=places)
        if header.is_deep and reader.pixel_range:
            low, high = reader.pixel_range
            kind = f'images of more than 8 bits: {low:g} is black and {high:g} white in them'
            issues.add(kind, path.name, places=places)
    return issues


def find_flat(survey: Survey, reader: ImageReader) -> list[str]:
    """Return a sentence if images of a sample are nearly of one value."""
    issues, sample = Issues(), evenly(survey.readable, MOST_LOOKED_AT)
    for path, size, _ in sample:
        try:
            if is_flat(reader.read(path, size)):
                issues.add(
                    f'of {len(sample)} images that were looked at are nearly of one value: look at them, and '
                    'give --pixel_range if they are grey and have more than 8 bits',
                    path.name,
                )
        except UnreadableImage:
            continue  # reported elsewhere
    return issues.lines()
