"""Headers of the image files of a dataset, read at the start of a run; nothing is decoded."""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from datasets.deep_images import Extremes, Range, deep_values, extremes_of, fitting_range
from datasets.image_io import Header, UnreadableImage, naming, open_image, read_header

MOST_FILES = 20_000  # whose headers are read: some seconds
MOST_DEEP = 64  # that are decoded to find their range
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
