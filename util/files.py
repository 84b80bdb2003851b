"""Files that are written completely or not at all, and folders that are locked."""

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
    """Call `save` with a temporary path of the same suffix, then move the file to `path`.

    `save` may also make a folder.

    Raises:
        FileError: the file cannot be written, for instance since the disk is full; what was at `path` stays.
    """
    path = Path(path)
    temporary = path.with_name(f'.{path.stem}.{os.getpid()}{path.suffix}')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save(temporary)
        if temporary.is_file():
            with temporary.open('rb+') as file:
                os.fsync(file.fileno())  # the content is on disk before the name
        os.replace(temporary, path)
    except FileError:  # of another file, which it names
        raise
    except OSError as error:
        raise FileError(f'{path} could not be written ({error.strerror or error}); {STAYS}') from error
    except RuntimeError as error:  # of PyTorch, if the disk is full or read-only
        if not re.search('PytorchStreamWriter|unexpected pos|inline_container', str(error)):
            raise
        raise FileError(f'{path} could not be written (is the disk full or read-only?); {STAYS}') from error
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def save_checkpoint(path: Path, checkpoint: dict) -> None:
    """Write plain tensors and dictionaries atomically, for `torch.load(weights_only=True)`."""
    save_atomically(path, partial(torch.save, checkpoint))


class GrowingFile:
    """A text file that is written in pieces, and is valid after each of them.

    Until `finish` it is called NAME.unfinished.EXT, or NAME.unfinished2.EXT if another program has left such
    a file. It is created by the first `add`.

    start, between, end: text before, between and after the pieces.
    """

    def __init__(self, path: Path, start: str = '', between: str = '', end: str = '') -> None:
        self.path = path
        self.unfinished: Path | None = None
        self.start, self.between, self.end = start, between, end
        self.size = self.number = 0  # bytes without the end, and pieces

    def add(self, pieces: Sequence[str]) -> None:
        """Append pieces.

        Raises:
            FileError: they cannot be written; the earlier ones stay.
        """
        text = self.start * (not self.size) + self.between * (self.number > 0 and len(pieces) > 0)
        data = (text + self.between.join(pieces)).encode()
        try:
            self.unfinished = self.unfinished or new_file(self.path)
            write_at(self.unfinished, self.size, data + self.end.encode())
        except OSError as error:
            if self.unfinished:
                with contextlib.suppress(OSError):
                    os.truncate(self.unfinished, self.size)
                    write_at(self.unfinished, self.size, self.end.encode() * (self.size > 0))
            raise FileError(
                f'{self.path} could not be written ({error.strerror or error}); {STAYS}'
            ) from error
        self.size += len(data)
        self.number += len(pieces)

    def finish(self) -> None:
        """Give the file its name, in place of an earlier one."""
        if self.unfinished:
            os.replace(self.unfinished, self.path)


def write_at(path: Path, offset: int, data: bytes) -> None:
    with path.open('rb+') as file:
        file.seek(offset)
        file.write(data)


def new_file(path: Path) -> Path:
    """Create an empty file with the name of `path` and `.unfinished`, and a number if that file exists."""
    for number in itertools.count(1):
        file = path.with_name(f'{path.stem}.unfinished{number if number > 1 else ""}{path.suffix}')
        with contextlib.suppress(FileExistsError):
            file.touch(exist_ok=False)
            break
        print(f'{file} stays: another program writes it, or has left it')
    return file


def make_folder(path: str | os.PathLike) -> Path:
    """Create an output folder and its parents, if they do not exist.

    Raises:
        UserError: one of these paths is a file.
    """
    path = Path(path)
    for folder in (path, *path.parents):
        if folder.exists() and not folder.is_dir():
            raise UserError(f'{path} cannot be an output folder, since {folder} is a file: choose another')
    path.mkdir(parents=True, exist_ok=True)
    return path


@contextlib.contextmanager
def or_warn() -> Iterator[None]:
    """Print an OSError of the block as a warning: training goes on without a drawing."""
    try:
        yield
    except OSError as error:
        print(f'warning: {error}', flush=True)


def remove_partial_files(folder: str | os.PathLike) -> None:
    """Remove temporary files of processes that were killed; no other process may be saving there."""
    for path in Path(folder).iterdir():
        if re.fullmatch(r'\.\w+\.\d+\.\w+', path.name) and path.is_file():
            path.unlink()


@contextlib.contextmanager
def lock_folder(folder: str | os.PathLike, wait: float = 20.0) -> Iterator[None]:
    """Lock a folder for this process during the block; the end of the process releases the lock in any case.

    Without effect if the file system has no locks. wait: seconds to wait for another holder, perhaps a
    process that is just ending.

    Raises:
        UserError: another process holds the lock; the message names it.
    """
    if fcntl is None:
        yield
        return
    path = Path(folder) / LOCK_FILE
    with path.open('a+') as file:
        locked = take_lock(file, path, wait)
        if locked:
            file.truncate(0)
            job = f', Slurm job {os.environ["SLURM_JOB_ID"]}' if 'SLURM_JOB_ID' in os.environ else ''
            file.write(f'process {os.getpid()} on {socket.gethostname()}{job}')
            file.flush()
        try:
            yield
        finally:
            if locked:  # forked processes (loader workers) may still have the file open
                fcntl.flock(file, fcntl.LOCK_UN)


def take_lock(file: TextIO, path: Path, wait: float) -> bool:
    """Lock an open file; return False if its file system has no locks."""
    deadline = time.monotonic() + wait
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > deadline:
                holder = path.read_text().strip() or 'another process'
                raise UserError(
                    f'{path.parent} is in use by {holder}: choose another --output_dir, or stop that run'
                ) from None
            time.sleep(0.2)
        except OSError:
            return False


def code_checksum(root: Path) -> str:
    """Return a checksum of the code of a training."""
    files = [*root.glob('*.py')]
    files += [path for folder in ('datasets', 'models', 'util') for path in (root / folder).rglob('*.py')]
    checksum = 0
    for path in sorted(files):
        checksum = zlib.crc32(path.read_bytes(), checksum)
    return f'version {checksum:08x}'
