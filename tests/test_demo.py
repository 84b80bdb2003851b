"""tools/demo.py: a browser drops an image, moves a slider, and reads what the page shows."""

import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import PIL.Image
import pytest

from datasets.shapes import ShapesDetection
from models.detector import load_detector
from tests.runs import ROOT, run
from tests.shared_data import EPS, put_ghostscript
from tools import demo
from util.command_line import run_command
from util.errors import UserError

CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
MISSING = [name for name in ('gradio', 'playwright') if find_spec(name) is None]


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp('run')
    run(folder, '--epochs', '1', '--eval_every', '0')
    return folder / 'checkpoint.pth'


@pytest.fixture
def address(checkpoint: Path) -> Iterator[str]:
    """The page of a running demo."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    words = [
        sys.executable,
        'tools/demo.py',
        '--checkpoint',
        str(checkpoint),
        '--port',
        str(port),
        '--device',
        'cpu',
    ]
    with subprocess.Popen(
        words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as server:
        try:
            place, end = f'http://127.0.0.1:{port}', time.monotonic() + 120
            while time.monotonic() < end and server.poll() is None:
                try:
                    urllib.request.urlopen(place, timeout=5).close()
                    yield place
                    return
                except (urllib.error.URLError, OSError):
                    time.sleep(0.5)
            server.kill()
            pytest.fail(f'the demo did not start: {server.stdout.read()}')
        finally:
            server.terminate()
            assert server.wait(30) == 0, 'so that its folder goes away'


@pytest.fixture
def page(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A page that is served in this process to user detr, with the password `open`."""
    pytest.importorskip('gradio')
    monkeypatch.setenv('GRADIO_TEMP_DIR', str(tmp_path))
    monkeypatch.setenv('GRADIO_ANALYTICS_ENABLED', 'False')
    monkeypatch.setattr(demo, 'DELETION', (1, 5))
    monkeypatch.setattr(PIL.Image, 'ID', [*PIL.Image.ID])
    page = demo.build_page(load_detector(weights=checkpoint), 'title')
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    demo.serve(page, '127.0.0.1', port, 'open', prevent_thread_lock=True, quiet=True)
    yield page
    page.close()


def status(request: urllib.request.Request) -> int:
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def test_numbers_equal_those_of_the_detector(checkpoint: Path, tmp_path: Path) -> None:
    detector, image = load_detector(weights=checkpoint), ShapesDetection(1, 'val', image_size=64)[0][0]
    lowest = sorted(detector.detect(image)['scores'].tolist())[-4]
    file = str(tmp_path / 'image.png')
    PIL.Image.fromarray(image.permute(1, 2, 0).numpy()).save(file)
    drawing, rows, sheet, text = demo.answer(detector, file, lowest, True, 1)
    expected = [
        [found['name'], round(found['score'], 3), *(round(edge, 1) for edge in found['box'])]
        for found in detector(image, lowest)
    ]
    assert rows == expected and len(rows) == 4 and text.startswith('4 objects in')
    assert drawing.shape[2] == 3 and sheet is not None
    assert demo.answer(detector, file, 1.0, True, 1)[1:3] == ([], None)


@pytest.mark.slow
@pytest.mark.skipif(
    bool(MISSING) or CHROMIUM is None, reason=f'needs chromium, gradio and playwright; no {MISSING}'
)
def test_a_browser_drops_an_image(address: str, tmp_path: Path) -> None:
    from playwright.sync_api import expect, sync_playwright

    image = ShapesDetection(1, 'val', image_size=64)[0][0].permute(1, 2, 0).numpy()
    PIL.Image.fromarray(image).save(tmp_path / 'image.png')
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=['--no-sandbox'])
        page = browser.new_page(viewport={'width': 1200, 'height': 1400})
        page.goto(address)
        page.get_by_role('button', name='detect').click()
        expect(page.get_by_text('drop an image first')).to_be_visible(timeout=30_000)
        page.get_by_role('spinbutton').first.fill('0')
        page.set_input_files('input[type=file]', str(tmp_path / 'image.png'))
        expect(page.get_by_text('objects in 64 x')).to_be_visible(timeout=60_000)
        expect(page.get_by_text('60 objects in')).to_be_visible(timeout=60_000)
        page.wait_for_function('document.querySelectorAll("img").length >= 3', timeout=30_000)
        page.screenshot(path=str(tmp_path / 'demo.png'), full_page=True)
        browser.close()


@pytest.mark.slow
def test_what_is_sent_goes_away_and_others_are_refused(
    page: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gradio_client import Client, handle_file
    from gradio_client.exceptions import AppError

    client = Client(page.local_url, auth=(demo.USER, 'open'), verbose=False, download_files=False)
    image = ShapesDetection(1, 'val', image_size=64)[0][0].permute(1, 2, 0).numpy()
    (tmp_path / 'mine').mkdir()
    PIL.Image.fromarray(image).save(tmp_path / 'mine/image.png')
    found = client.predict(handle_file(tmp_path / 'mine/image.png'), 0.0, False, 1, api_name='/detect')
    assert found[3].startswith('60 objects in 64 x')
    put_ghostscript(tmp_path / 'mine/gs', monkeypatch)
    (tmp_path / 'mine/image.png').write_bytes(EPS)
    with pytest.raises(AppError):
        client.predict(handle_file(tmp_path / 'mine/image.png'), 0.0, False, 1, api_name='/detect')
    cookie = {'Cookie': '; '.join(f'{name}={value}' for name, value in client.cookies.items())}
    call, body = f'{page.local_url}gradio_api/call/detect', b'{"data": [null, 0, false, 1]}'
    headers = cookie | {'Content-Type': 'application/json'}
    assert status(urllib.request.Request(call, body, {'Content-Type': 'application/json'})) == 401
    assert status(urllib.request.Request(call, body, headers)) == 200
    assert status(urllib.request.Request(call, body, headers | {'Origin': page.local_url.rstrip('/')})) == 200
    assert status(urllib.request.Request(call, body, headers | {'Origin': 'http://elsewhere.org'})) == 403
    assert status(urllib.request.Request(call, body, headers | {'Content-Length': '50000001'})) == 413
    assert sorted(path.name for path in (tmp_path / 'mine').iterdir()) == ['gs', 'image.png'], (
        'Ghostscript did not run'
    )
    shutil.rmtree(tmp_path / 'mine')
    end = time.monotonic() + 60
    while (left := [file for file in tmp_path.rglob('*') if file.is_file()]) and time.monotonic() < end:
        time.sleep(0.2)
    assert left == []


@pytest.mark.parametrize(
    ('headers', 'expected'),
    [
        ({'host': 'localhost:7860'}, 200),
        ({'host': '127.0.0.1:7860', 'origin': 'http://127.0.0.1:7860', 'content-length': '50000000'}, 200),
        ({'host': '127.0.0.1:7860', 'origin': 'http://127.0.0.1:80'}, 403),
        ({'host': '127.0.0.1:7860', 'origin': 'null'}, 403),
        ({'host': 'elsewhere.org:7860', 'origin': 'http://elsewhere.org:7860'}, 403),
        ({}, 403),
        ({'host': 'localhost:7860', 'content-length': '50000001'}, 413),
        ({'host': 'localhost:7860', 'content-length': '5', 'transfer-encoding': 'chunked'}, 413),
    ],
)
def test_requests_that_the_page_does_not_send(headers: dict[str, str], expected: int) -> None:
    scope = {'headers': [(name.encode(), value.encode()) for name, value in headers.items()]}
    assert demo.Guard(None, ('localhost', '127.0.0.1')).status(scope) == expected


@pytest.mark.parametrize('address', ['0.0.0.0', '::', '192.168.0.7', 'my-server'])
def test_other_machines_need_a_password(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv('DETR_DEMO_PASSWORD', raising=False)
    monkeypatch.setattr(demo, 'find_spec', lambda name: True)
    words = ['--checkpoint', 'nowhere', '--address', address]
    with pytest.raises(SystemExit, match='lets other machines in: set DETR_DEMO_PASSWORD'):
        run_command(demo.main, demo.get_args_parser(), words)
    with pytest.raises(SystemExit, match='no checkpoint at nowhere'):
        run_command(demo.main, demo.get_args_parser(), [*words, '--password', 'x'])
    monkeypatch.setenv('DETR_DEMO_PASSWORD', 'x')
    with pytest.raises(SystemExit, match='no checkpoint at nowhere'):
        run_command(demo.main, demo.get_args_parser(), words)


@pytest.mark.skipif('gradio' in MISSING, reason='needs gradio')
def test_a_port_in_use_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PIL.Image, 'ID', list(PIL.Image.ID))
    page = MagicMock()
    page.launch.side_effect = OSError('Cannot find empty port in range: 7-7')  # gradio's, without a number
    with pytest.raises(UserError, match=r'at 127\.0\.0\.1, port 7: choose another --port'):
        demo.serve(page, '127.0.0.1', 7, '')


def test_what_it_needs_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    parser = demo.get_args_parser()
    with pytest.raises(SystemExit, match='give --checkpoint FILE, or --model NAME'):
        run_command(demo.main, parser, [])
    monkeypatch.setattr(demo, 'find_spec', lambda name: None)
    with pytest.raises(SystemExit, match='pip install gradio'):
        run_command(demo.main, parser, ['--checkpoint', 'FILE'])
