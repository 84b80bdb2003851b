"""A web server for a test, on this machine alone, and a browser that shows a page."""

import contextlib
import html
import http.server
import json
import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest


@contextlib.contextmanager
def served(handler: Callable) -> Iterator[str]:
    """The address at which a class of http.server, or what makes one, answers."""
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler) as server:
        server.daemon_threads, server.block_on_close = True, False
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        try:
            yield f'http://127.0.0.1:{server.server_port}'
        finally:
            server.shutdown()


CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
needs_browser = pytest.mark.skipif(
    CHROMIUM is None, reason='needs chromium, which shows the page and clicks in it'
)


def clicked(page: Path, script: str) -> dict:
    """What a browser shows: `script` runs at the end of a page, and writes JSON into its title."""
    place = page.with_name('clicked.html')
    place.write_text(page.read_text() + script)
    flags = ('--headless', '--no-sandbox', '--disable-gpu', f'--user-data-dir={page.parent / "profile"}')
    command = [CHROMIUM, *flags, '--virtual-time-budget=5000', '--dump-dom', place.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return json.loads(html.unescape(re.search(r'<title>(.*?)</title>', done.stdout, re.DOTALL)[1]))
