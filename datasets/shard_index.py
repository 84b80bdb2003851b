"""
Index of a dataset in tar shards, and reading one shard with the WebDataset library.

The index, shards.json, holds what must be known before a tar is opened: categories, the shards' URLs and
numbers of images, and the id and size of each image in the order of the shards. Each image's annotations are
stored beside it in its shard. The whole annotation file is also stored beside the index, for evaluation.
"""

import os
import re
import tarfile
import types
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from datasets.class_map import names_by_id
from util.errors import FileError, UserError

INDEX, ANNOTATIONS = 'shards.json', 'annotations.json'
VERSION = 2
WRITE_AGAIN = 'fetch it again, or write the shards again with tools/make_shards.py'
LARGEST_MEMBER = 1 << 30  # bytes of a member of a shard

Int64 = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]


class Shard(msgspec.Struct):
    """A tar. url: a path, an https URL, or a command (pipe:). images, bytes: how many it has."""

    url: str
    images: Annotated[int, msgspec.Meta(ge=1)]
    bytes: int


class ShardIndex(msgspec.Struct):
    """Content of shards.json: N images in shards.

    image_ids: [N]. sizes: [N, 2] height and width in pixels. unsegmented: ids of images with an object
    (neither crowd nor tiny) that has no segmentation. upright, pixel_range: how images are read of which the
    size and the file do not show it (`ImageReader`); None: as older programs wrote them.
    """

    version: Literal[2]
    categories: list[dict]
    shards: Annotated[list[Shard], msgspec.Meta(min_length=1)]
    images: int
    image_ids: list[Int64]
    sizes: list[tuple[Int64, Int64]]
    unsegmented: list[Int64]
    upright: bool | None = None
    pixel_range: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        """Refuse contradictions; msgspec turns a ValueError of this method into its own error."""
        names_by_id(self.categories)
        total = sum(shard.images for shard in self.shards)
        if not total == self.images == len(self.image_ids) == len(self.sizes):
            numbers = f'the total is {self.images}, ids are {len(self.image_ids)}'
            raise ValueError(f'its shards have {total} images, {numbers}')
        if len(set(self.image_ids)) != total:
            raise ValueError('it has an image id twice')
        if self.pixel_range and not self.pixel_range[0] < self.pixel_range[1]:
            raise ValueError(f'its pixel_range is {self.pixel_range}')


def index_file(place: str | os.PathLike[str]) -> Path:
    """Return the index at a path, or in a folder."""
    return Path(place) / INDEX if Path(place).is_dir() else Path(place)


def read_index(place: str | os.PathLike[str], allow_pipe: bool = False) -> ShardIndex:
    """Read the index at a path, or in a folder.

    Paths of shards become absolute. These files must exist, with the sizes in the index.

    allow_pipe: take shards that are commands.

    Raises:
        FileError: the index or a shard does not exist.
        UserError: the index or a shard is damaged, or a shard is a command and allow_pipe is not set.
    """
    path = index_file(place)
    if not path.is_file():
        raise FileError(f'there is no index {path}: write shards with tools/make_shards.py')
    try:
        index = msgspec.json.decode(path.read_bytes(), type=ShardIndex)
    except (ValueError, RecursionError) as error:
        raise UserError(f'{path} is not an index of shards ({error}): {WRITE_AGAIN}') from error
    for shard in index.shards:
        check_shard_url(shard.url, path, allow_pipe)
        if is_local(shard.url):
            file = (path.parent / shard.url).absolute()
            if not file.is_file():
                raise FileError(f'shard {file} of {path} does not exist: {WRITE_AGAIN}')
            if (size := file.stat().st_size) != shard.bytes:
                raise UserError(
                    f'shard {file} has {size} bytes, but {path} says {shard.bytes}: {WRITE_AGAIN}'
                )
            shard.url = str(file)
    return index


def is_local(url: str) -> bool:
    """Return whether this is a path, and neither a command (pipe:) nor a URL."""
    return re.match(r'[a-z][a-z0-9+.-]*:', url, re.IGNORECASE) is None


def check_shard_url(url: str, source: object, allow_pipe: bool) -> None:
    """Refuse a shard that is neither a file, nor an https URL, nor an allowed command.

    Raises:
        UserError: the shard is refused; the message names the source.
    """
    if is_local(url) or url.startswith('https://') or (allow_pipe and url.startswith('pipe:')):
        return
    if url.startswith('pipe:'):
        raise UserError(
            f'{source} has the shard {url!r}, a command that this machine would run: if you trust it, '
            'add --allow_pipe'
        )
    raise UserError(
        f'{source} has the shard {url!r}: a shard is a file, an https URL, or with --allow_pipe a command '
        "that writes it ('pipe:gsutil cat gs://bucket/000000.tar')"
    )


def import_webdataset() -> types.ModuleType:
    try:
        import webdataset
    except ImportError as error:
        raise UserError('tar shards are read and written by WebDataset: pip install webdataset') from error
    return webdataset


class Member(tarfile.TarInfo):
    """Header of a member. Sparse and very large ones, which a small file can hold, are not read."""

    @classmethod
    def frombuf(cls, *header: Any) -> 'Member':
        return super().frombuf(*header).checked()

    def checked(self) -> 'Member':
        """Raise UserError for what is refused."""
        if self.type == tarfile.GNUTYPE_SPARSE or self.issparse():
            raise UserError(f'its member {self.name} is sparse')
        if self.size > LARGEST_MEMBER:
            raise UserError(f'its member {self.name} has {self.size} bytes, more than {LARGEST_MEMBER}')
        return self


def open_shard(url: str) -> Any:
    """Open a shard whose URL was checked, as a stream of bytes."""
    if is_local(url):
        return open(url, 'rb')
    gopen = import_webdataset().tariterators.gopen
    if url.startswith('pipe:'):
        return gopen.gopen(url)
    tries = ['--connect-timeout', '30', '--retry', '30', '--retry-delay', '2']
    only_https = ['--proto', '=https', '--globoff']  # after a redirection too
    command = ['curl', *only_https, *tries, '-f', '-s', '-L', url]
    return gopen.Pipe(command, mode='rb', bufsize=8192, ignore_status=[141, 23])


def members_of(url: str, stream: Any) -> Iterator[dict]:
    """Yield the files of an uncompressed tar, as WebDataset groups them to samples: their names and bytes."""
    tar: Any
    with tarfile.open(fileobj=stream, mode='r|', tarinfo=Member) as tar:
        for member in tar:
            member.checked()  # later headers may have changed it
            if member.isreg():
                yield {'fname': member.name, 'data': tar.extractfile(member).read(), '__url__': url}
            tar.members = []


def read_samples(url: str) -> Iterator[dict]:
    """Yield a shard's images in order: dictionaries of `__key__` and of each member's bytes by its suffix.

    Raises:
        UserError: the shard cannot be opened or read.
    """
    stream = None
    try:
        stream = open_shard(url)
        yield from import_webdataset().tariterators.group_by_keys(members_of(url, stream))
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
