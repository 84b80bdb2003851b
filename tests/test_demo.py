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

import PIL.Image
import pytest

from datasets.shapes import ShapesDetection
from models.detector import load_detector
from tests.runs import ROOT, run
from tools import demo
from util.flags import run_command

CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
MISSING = [name for name in ('gradio', 'playwright') if find_spec(name) is None]


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp('run')
    run(folder, '--epochs', '1', '--no_validate')
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
            server.kill()


def test_numbers_equal_those_of_the_detector(checkpoint: Path) -> None:
    detector, image = load_detector(weights=checkpoint), ShapesDetection(1, 'val', image_size=64)[0][0]
    lowest = sorted(detector.detect(image)['scores'].tolist())[-4]
    pixels = image.permute(1, 2, 0).numpy()
    drawing, rows, sheet, text = demo.answer(detector, pixels, lowest, True, 1)
    expected = [
        [found['name'], round(found['score'], 3), *(round(edge, 1) for edge in found['box'])]
        for found in detector(image, lowest)
    ]
    assert rows == expected and len(rows) == 4 and text.startswith('4 objects in')
    assert drawing.shape[2] == 3 and sheet is not None
    assert demo.answer(detector, pixels, 1.0, True, 1)[1:3] == ([], None)


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


def test_what_it_needs_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    parser = demo.get_args_parser()
    with pytest.raises(SystemExit, match='give --checkpoint FILE, or --model NAME'):
        run_command(demo.main, parser, [])
    monkeypatch.setattr(demo, 'find_spec', lambda name: None)
    with pytest.raises(SystemExit, match='pip install gradio'):
        run_command(demo.main, parser, ['--checkpoint', 'FILE'])
