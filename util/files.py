"""Files and folders that are written whole or not at all, and folders that one run locks."""

import contextlib
import itertools
import os
import re
import shutil
import socket
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TextIO

import torch

from util.errors import FileError, UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]  # a module elsewhere

LOCK_FILE = 'run.lock'
STAYS = 'what was there before stays'


def save_atomically(path: str | os.PathLike, save: Callable[[Path], object]) -> None:
    """Call `save` with a temporary name beside `path`, of the same suffix, then move the file to `path`.

    `save` may also make a folder of that name.

    Raises:
        FileError: the file cannot be written, for instance since the disk is full; what was at `path` stays.
    """
    path = Path(path)
    partial = path.with_name(f'.{path.stem}.{os.getpid()}{path.suffix}')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save(partial)
        if partial.is_file():
            with partial.open('rb+') as file:
                os.fsync(file.fileno())  # on disk before the name says so
        os.replace(partial, path)
    except FileError:  # of another file, which it names
        raise
    except OSError as error:
        raise FileError(f'{path} could not be written ({error.strerror or error}); {STAYS}') from error
    except RuntimeError as error:  # PyTorch's words for a disk that is full or read-only
        if not re.search('PytorchStreamWriter|unexpected pos|inline_container', str(error)):
            raise
        raise FileError(f'{path} could not be written (is the disk full or read-only?); {STAYS}') from error
    finally:
        if partial.is_dir():
            shutil.rmtree(partial)
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def save_checkpoint(path: Path, checkpoint: dict) -> None:
    """Write a checkpoint of plain tensors and dictionaries atomically; `torch.load(weights_only=True)` reads
    it.
    """
    save_atomically(path, partial(torch.save, checkpoint))


class GrowingFile:
    """A text file that is written piece by piece, and whole after each: who ends in between loses nothing.

    It is called NAME.unfinished.EXT (or NAME.unfinished2.EXT and so on, beside what other programs have left)
    until `finish`. Nothing is made before the first `add`.

    start, between, end: what stands before, between and behind the pieces.
    """

    def __init__(self, path: Path, start: str = '', between: str = '', end: str = '') -> None:
        self.path = path
        self.part: Path | None = None
        self.start, self.between, self.end = start, between, end
        self.size = self.number = 0  # bytes without the end, and pieces

    def add(self, pieces: Sequence[str]) -> None:
        """Write pieces behind the others.

        Raises:
            FileError: they cannot be written; the others stay.
        """
        text = self.start * (not self.size) + self.between * (self.number > 0 and len(pieces) > 0)
        data = (text + self.between.join(pieces)).encode()
        try:
            self.part = self.part or new_file(self.path)
            write_at(self.part, self.size, data + self.end.encode())
        except OSError as error:
            if self.part:
                with contextlib.suppress(OSError):
                    os.truncate(self.part, self.size)
                    write_at(self.part, self.size, self.end.encode() * (self.size > 0))
            raise FileError(
                f'{self.path} could not be written ({error.strerror or error}); {STAYS}'
            ) from error
        self.size += len(data)
        self.number += len(pieces)

    def finish(self) -> None:
        """Give the file its name, in place of an earlier one."""
        if self.part:
            os.replace(self.part, self.path)


def write_at(path: Path, place: int, data: bytes) -> None:
    with path.open('rb+') as file:
        file.seek(place)
        file.write(data)


def new_file(path: Path) -> Path:
    """Make an empty file of the name of `path` with `.unfinished`, and a number if there is one."""
    for number in itertools.count(1):
        part = path.with_name(f'{path.stem}.unfinished{number if number > 1 else ""}{path.suffix}')
        with contextlib.suppress(FileExistsError):
            part.touch(exist_ok=False)
            break
        print(f'{part} stays: another program writes it, or has left it')
    return part


def make_folder(path: str | os.PathLike) -> Path:
    """Make an output folder with its parents, if it does not exist.

    Raises:
        UserError: there is a file of that name, or of a parent's.
    """
    path = Path(path)
    for place in (path, *path.parents):
        if place.exists() and not place.is_dir():
            raise UserError(f'{path} cannot be an output folder, since {place} is a file: choose another')
    path.mkdir(parents=True, exist_ok=True)
    return path


@contextlib.contextmanager
def or_warn() -> Iterator[None]:
    """Turn an OSError inside into a printed warning: a training of days does not end because a drawing cannot
    be written.
    """
    try:
        yield
    except OSError as error:
        print(f'warning: {error}', flush=True)


def remove_partial_files(folder: str | os.PathLike) -> None:
    """Remove temporary files of processes that were killed while saving; no other process may be saving
    there.
    """
    for path in Path(folder).iterdir():
        if re.fullmatch(r'\.\w+\.\d+\.\w+', path.name) and path.is_file():
            path.unlink()


def lock_folder(folder: str | os.PathLike, wait: float = 20.0) -> TextIO | None:
    """Lock a folder for this process until `unlock` gets the returned file, or the process ends in any way.

    Returns None if the file system knows no locks. wait: seconds to wait for another holder, perhaps a
    process that is just ending.

    Raises:
        UserError: another process holds the lock; the message names it.
    """
    if fcntl is None:
        return None
    path, deadline = Path(folder) / LOCK_FILE, time.monotonic() + wait
    file = path.open('a+')
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() > deadline:
                holder = path.read_text().strip() or 'another process'
                file.close()
                raise UserError(
                    f'{folder} is in use by {holder}: choose another --output_dir, or stop that run'
                ) from None
            time.sleep(0.2)
        except OSError:
            file.close()
            return None
    file.truncate(0)
    job = f', Slurm job {os.environ["SLURM_JOB_ID"]}' if 'SLURM_JOB_ID' in os.environ else ''
    file.write(f'process {os.getpid()} on {socket.gethostname()}{job}')
    file.flush()
    return file


def unlock(file: TextIO | None) -> None:
    """Release a lock, even if forked processes (for instance loader workers) still have its file open."""
    if file is not None:
        fcntl.flock(file, fcntl.LOCK_UN)
        file.close()


def code_checksum(root: Path) -> str:
    """Return a checksum of the Python files of a run, which differs between versions of the code."""
    files = [*root.glob('*.py')]
    files += [path for folder in ('datasets', 'models', 'util') for path in (root / folder).rglob('*.py')]
    checksum = 0
    for path in sorted(files):
        checksum = zlib.crc32(path.read_bytes(), checksum)
    return f'version {checksum:08x}'
