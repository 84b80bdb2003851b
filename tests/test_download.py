"""Files behind addresses come whole or not at all, once a machine, in time, and from https alone unless a flag allows more."""

import hashlib
import http.server
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from models.weights.read import read_checkpoint
from tests.processes import start, start_main
from tests.runs import TINY
from tests.web import served
from util import download as downloads
from util.distributed.preemption import UNFINISHED
from util.download import HTTP_ALLOWED, download, fetch
from util.errors import FileError, UserError
from util.files import save_checkpoint

WHOLE = b'weights' * 1000
DIGITS = hashlib.sha256(WHOLE).hexdigest()[:8]


class Server(http.server.BaseHTTPRequestHandler):
    """Answers as the name of the file says; `asked` keeps the paths."""

    asked: list[str]
    released: threading.Event

    def do_GET(self) -> None:
        self.asked.append(self.path)
        how = re.split('[-.]', self.path.rpartition('/')[2])[0]
        if how == 'absent':
            self.send_error(404)
            return
        self.send_response(302 if how == 'elsewhere' else 200)
        if how == 'elsewhere':
            self.send_header('Location', 'ftp://127.0.0.1/whole')
        if how != 'unsized':
            self.send_header('Content-Length', str(0 if how == 'elsewhere' else len(WHOLE)))
        self.end_headers()
        if how == 'stalled':
            self.wfile.write(WHOLE[:100])
            self.released.wait(30)
        elif how == 'slow':
            time.sleep(0.5)
        if how != 'elsewhere':
            self.wfile.write(WHOLE[:5000] if how in ('cut', 'unsized') else WHOLE)

    def log_message(self, *args: object) -> None: ...


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Its address, which may be fetched here and in processes of the test; torch.hub's folder is empty."""
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    Server.asked, Server.released = [], threading.Event()
    token = HTTP_ALLOWED.set(True)
    with served(Server) as address:
        yield address
        Server.released.set()
    HTTP_ALLOWED.reset(token)


def kept(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob('*') if path.is_file()} - {'run.lock'}


def test_a_file_is_fetched_once(server: str, tmp_path: Path) -> None:
    """Names without a checksum are kept apart by their addresses."""
    path = download(f'{server}/whole-{DIGITS}.pth')
    assert path == tmp_path / f'hub/checkpoints/whole-{DIGITS}.pth' and path.read_bytes() == WHOLE
    assert download(f'{server}/whole-{DIGITS}.pth') == path and len(Server.asked) == 1
    others = {download(f'{server}/{folder}/whole.bin') for folder in 'ab'}
    assert len(others) == 2 and kept(tmp_path) == {path.name, *(other.name for other in others)}
    save_checkpoint(path, {'model': {'a': torch.ones(2)}})
    assert torch.equal(read_checkpoint(f'{server}/whole-{DIGITS}.pth')['model']['a'], torch.ones(2))


@pytest.mark.parametrize(
    ('name', 'message'),
    [
        ('cut.pth', 'cut off after 5000 of 7000 bytes'),
        ('unsized.pth', 'does not give its length'),
        ('whole-0123abcd.pth', f'its hash is {DIGITS}, its name says 0123abcd'),
        ('stalled.pth', 'timed out'),
        ('absent.pth', '404'),
        ('elsewhere.pth', r'ftp://127\.0\.0\.1/whole is not downloaded'),
    ],
)
def test_what_does_not_come_whole_is_not_kept(name: str, message: str, server: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        download(f'{server}/{name}', timeout=0.2)
    assert not kept(tmp_path)
    (tmp_path / 'there').write_text('mine')
    with pytest.raises(UserError, match='downloaded'):
        fetch(f'{server}/{name}', tmp_path / 'there', '0123abcd', timeout=0.2)
    assert (tmp_path / 'there').read_text() == 'mine' and kept(tmp_path) == {'there'}


def test_a_folder_that_cannot_be_written_is_named(server: str, tmp_path: Path) -> None:
    (tmp_path / 'hub').write_text('a file')
    with pytest.raises(FileError, match='set TORCH_HOME'):
        download(f'{server}/whole.pth')


@pytest.mark.parametrize('address', ['http://127.0.0.1:9/w.pth', 'file:///etc/hostname', 'ftp://a/w.pth'])
def test_only_https_is_fetched(address: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r'is not downloaded, since .* use https'):
        fetch(address, tmp_path / 'file')
    with pytest.raises(UserError, match='is not downloaded'):
        downloads.Redirects().redirect_request(None, None, 302, '', {}, address)
    assert not kept(tmp_path)


def test_what_is_no_address_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r'https://\[bad/w.pth is not a URL \(Invalid IPv6 URL\)'):
        read_checkpoint('https://[bad/w.pth')


def fetch_in_process(address: str) -> None:
    HTTP_ALLOWED.set(True)
    assert download(address).read_bytes() == WHOLE


def test_one_of_two_processes_fetches(server: str, tmp_path: Path) -> None:
    environment = {'TORCH_HOME': str(tmp_path)}
    processes = [start(environment, fetch_in_process, f'{server}/slow.pth') for _ in range(2)]
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0] and len(Server.asked) == 1


@pytest.mark.parametrize('program', ['a tool', 'a run'])
def test_sigterm_ends_a_download(program: str, server: str, tmp_path: Path) -> None:
    """A run, which otherwise ends after a step, is told so too, and can go on as after any other signal."""
    environment, address = {'TORCH_HOME': str(tmp_path)}, f'{server}/stalled.pth'
    if program == 'a tool':
        process = start(environment, fetch_in_process, address)
    else:
        words = [*TINY.split(), '--pretrained', address, '--allow_http']
        process = start_main(tmp_path.with_suffix('.log'), words, environment)
    deadline = time.monotonic() + 60
    while not Server.asked:
        assert time.monotonic() < deadline and process.is_alive()
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGTERM)
    process.join(20)
    assert process.exitcode == (128 + signal.SIGTERM if program == 'a tool' else UNFINISHED)
    assert not kept(tmp_path)
