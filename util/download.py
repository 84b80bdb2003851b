"""Download weights and images: completely or not at all, with a time limit, and by https unless the user
allows http.
"""

import hashlib
import re
import urllib.request
import zlib
from collections.abc import Iterator
from contextlib import ExitStack
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlparse

import torch

from util.command_line import HTTP_ALLOWED
from util.distributed.preemption import interruptible
from util.errors import FileError, UserError
from util.files import lock_folder, save_atomically

TIMEOUT = 30.0  # seconds of silence after which a server counts as lost
CHUNK = 2**20  # bytes


def is_url(source: object) -> bool:
    """Return whether a source is a URL and not a path.

    Raises:
        UserError: it begins like a URL but is not valid.
    """
    try:
        return str(source).startswith(('http://', 'https://')) and bool(urlparse(str(source)))
    except ValueError as error:
        raise UserError(f'{source} is not a URL ({error}): check it') from error


class Redirects(urllib.request.HTTPRedirectHandler):
    """Follow redirections to URLs that `check_url` allows."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        check_url(newurl)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def check_url(url: str) -> None:
    """Refuse a URL without encryption.

    Raises:
        UserError: it is neither https nor http with --allow_http.
    """
    scheme = urlparse(url).scheme
    if scheme != 'https' and not (scheme == 'http' and HTTP_ALLOWED.get()):
        remedy = ', or add --allow_http' * (scheme == 'http')
        raise UserError(
            f'{url} is not downloaded, since anybody on the way could change it: use https{remedy}'
        )


def pieces(url: str, timeout: float) -> Iterator[bytes]:
    """Yield the content of a URL in pieces.

    Raises:
        UserError: it may not or cannot be downloaded, or ends before its length is reached.
    """
    try:
        check_url(url)
        request = urllib.request.Request(url, headers={'User-Agent': 'torch.hub'})
        with urllib.request.build_opener(Redirects).open(request, timeout=timeout) as response:
            length, received = response.headers['Content-Length'], 0
            if length is None and not response.chunked:
                raise ConnectionError('the server does not give its length')
            total = None if length is None else int(length)
            with torch.hub.tqdm(total=total, unit='B', unit_scale=True, disable=None) as bar:
                while piece := response.read(CHUNK):
                    received += len(piece)
                    bar.update(len(piece))
                    yield piece
            if total not in (None, received):
                raise ConnectionError(f'cut off after {received} of {total} bytes')
    except UserError:
        raise
    except (OSError, HTTPException, ValueError) as error:
        raise UserError(
            f'{url} could not be downloaded ({error or type(error).__name__}): check the URL, or download it '
            'by hand and pass its path'
        ) from error


@interruptible()
def fetch(url: str, path: Path, digits: str = '', timeout: float = TIMEOUT) -> None:
    """Download a file; what was at `path` stays unless the new file is complete. SIGTERM ends this at once.

    Args:
        digits: the first hex digits of its SHA-256; '': not known.
        timeout: seconds of silence after which the server counts as lost.

    Raises:
        UserError: it cannot be downloaded or written, or has another SHA-256.
    """
    checksum = hashlib.sha256()

    def save(partial_path: Path) -> None:
        with partial_path.open('wb') as file:
            for piece in pieces(url, timeout):
                checksum.update(piece)
                file.write(piece)
        if not checksum.hexdigest().startswith(digits):
            raise UserError(
                f'{url} could not be downloaded (its hash is {checksum.hexdigest()[: len(digits)]}, its name '
                f'says {digits}): try again, or download it by hand and pass its path'
            )

    save_atomically(path, save)


@interruptible()
def download(url: str, timeout: float = TIMEOUT) -> Path:
    """Return the path of a file of weights in the folder of torch.hub. One process downloads it.

    Other processes of the machine wait. Eight or more hex digits at the end of its name are checked against
    its SHA-256.

    Raises:
        UserError: `fetch` fails, or the folder cannot be written.
    """
    name = PurePosixPath(urlparse(url).path).name
    digits = re.search(r'-([0-9a-f]{8,})\.', name)
    if not digits:
        # A general name (pytorch_model.bin) must not be taken for that of another URL.
        name = f'{zlib.crc32(url.encode()):08x}_{name}'
    path = Path(torch.hub.get_dir()) / 'checkpoints' / name
    if path.is_file():
        return path
    with ExitStack() as stack:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(lock_folder(path.parent, wait=float('inf')))
        except OSError as error:
            raise FileError(
                f'{url} could not be saved ({error}): set TORCH_HOME to another folder'
            ) from error
        if not path.is_file():  # another process may have downloaded it
            fetch(url, path, digits[1] if digits else '', timeout)
    return path
