"""
Index of a data set in tar shards, and reading one shard with the WebDataset library.

The index, shards.json, holds what must be known before a tar is opened: categories, the shards' addresses and numbers
of images, and the id and size of each image in the order of the shards. Each image's annotations are stored beside it
in its shard. The whole annotation file is also stored beside the index, for evaluation.
"""

import json
import os
import re
import tarfile
import types
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from datasets.class_map import names_by_id
from util.errors import FileError, UserError

INDEX, ANNOTATIONS = 'shards.json', 'annotations.json'
VERSION = 2
WRITE_AGAIN = 'fetch it again, or write the shards again with tools/make_shards.py'


@dataclass(frozen=True)
class ShardIndex:
    """N images in shards.

    path: index file. urls: address of each shard for WebDataset. bounds: [shards + 1], shard s has the rows bounds[s]
    to bounds[s + 1]. image_ids: [N]. sizes: [N, 2] height and width in pixels. unsegmented: ids of images with an
    object (neither crowd nor tiny) that has no segmentation.
    """

    path: Path
    categories: list[dict]
    urls: list[str]
    bounds: np.ndarray
    image_ids: np.ndarray
    sizes: np.ndarray
    unsegmented: frozenset[int]

    def shard_of(self, row: int) -> int:
        """Return the shard that holds a row."""
        return int(np.searchsorted(self.bounds, row, side='right')) - 1


def read_index(place: str | os.PathLike[str]) -> ShardIndex:
    """Read the index at a path, or in a folder. Local shards must exist with the sizes in it.

    Raises:
        FileError: the index or a shard does not exist.
        UserError: the index or a shard is damaged.
    """
    path = Path(place) / INDEX if Path(place).is_dir() else Path(place)
    if not path.is_file():
        raise FileError(f'there is no index {path}: write shards with tools/make_shards.py')
    try:
        data = json.loads(path.read_bytes())
        index = parse_index(path, data)
        names_by_id(index.categories)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f'{path} is no index of shards ({error!r}): {WRITE_AGAIN}') from error
    if len(set(index.image_ids.tolist())) != len(index.image_ids):
        raise UserError(f'{path} has an image id twice: {WRITE_AGAIN}')
    for url, shard in zip(index.urls, data['shards'], strict=True):
        if is_local(url):
            check_file(Path(url), shard['bytes'], path)
    return index


def parse_index(path: Path, data: dict) -> ShardIndex:
    if data['version'] != VERSION:
        raise ValueError(f'it is of version {data["version"]}, this code reads {VERSION}')
    counts = [shard['images'] for shard in data['shards']]
    image_ids = np.array(data['image_ids'], dtype=np.int64)
    sizes = np.array(data['sizes'], dtype=np.int64).reshape(-1, 2)
    if not sum(counts) == data['images'] == len(image_ids) == len(sizes) > 0 or min(counts) < 1:
        raise ValueError(
            f'shards have {sum(counts)} images, the total is {data["images"]}, ids are {len(image_ids)}'
        )
    return ShardIndex(
        path,
        data['categories'],
        [shard_url(shard['url'], path.parent) for shard in data['shards']],
        np.cumsum([0, *counts]),
        image_ids,
        sizes,
        frozenset(data['unsegmented']),
    )


def is_local(url: str) -> bool:
    """Tell whether a URL is a path, and neither a command (pipe:) nor an address."""
    return re.match(r'[a-z]+:', url) is None


def shard_url(url: str, folder: Path) -> str:
    """Make paths relative to the index's folder absolute; leave other URLs to WebDataset."""
    return str((folder / url).absolute()) if is_local(url) else url


def check_file(path: Path, size: int, index: Path) -> None:
    if not path.is_file():
        raise FileError(f'shard {path} of {index} does not exist: {WRITE_AGAIN}')
    if path.stat().st_size != size:
        raise UserError(
            f'shard {path} has {path.stat().st_size} bytes, but {index} says {size}: {WRITE_AGAIN}'
        )


def import_webdataset() -> types.ModuleType:
    try:
        import webdataset
    except ImportError as error:
        raise UserError('tar shards are read and written by WebDataset: pip install webdataset') from error
    return webdataset


def read_samples(url: str) -> Iterator[dict]:
    """Yield a shard's images in order: a dictionary with `__key__` and the bytes of each member by its suffix.

    Raises:
        UserError: the shard cannot be opened or read.
    """
    parts = import_webdataset().tariterators
    stream = None
    try:
        stream = parts.gopen.gopen(url)
        yield from parts.group_by_keys(parts.tar_file_expander([{'url': url, 'stream': stream}]))
        while stream.read(1 << 20):
            pass  # padding: a command that could not write all of it would seem to have failed
        stream.close()
    except (OSError, EOFError, ValueError, tarfile.TarError) as error:
        reason = getattr(error, 'strerror', None) or (error.args or [error])[0]
        raise UserError(f'shard {url} cannot be read ({reason}): {WRITE_AGAIN}') from error
    finally:
        with suppress(OSError):  # a command that is left in the middle complains
            if stream is not None:
                stream.close()
