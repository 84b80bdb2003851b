"""Pages that need neither server nor network: one HTML file from data, and the files in `pages`."""

import base64
import io
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

FILES = Path(__file__).parent / 'pages'
THUMBNAIL = 480  # longest side of an image in a page, pixels


def build_page(name: str, data: Mapping[str, Any]) -> str:
    """Return the page that NAME.js and NAME.css make of plain data, with the parts that all pages share.

    The scripts escape all text of the data when they show it.
    """
    text = json.dumps(data).replace('<', '\\u003c')  # so that no name ends the script
    parts = {'DATA': text, 'STYLE': read_parts(name, 'css'), 'SCRIPT': read_parts(name, 'js')}
    html = (FILES / 'page.html').read_text(encoding='utf-8')
    return re.sub('|'.join(parts), lambda match: parts[match[0]], html)


def read_parts(name: str, suffix: str) -> str:
    """Return the shared file of a suffix, and that of a page."""
    return '\n'.join((FILES / f'{part}.{suffix}').read_text(encoding='utf-8') for part in ('page', name))


def thumbnail(image: Tensor) -> dict[str, Any]:
    """Return the `size` (width, height) of an image [3, H, W] uint8, and a small copy as `jpeg`, in base64."""
    from PIL import Image

    small = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    size, stream = small.size, io.BytesIO()
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    small.save(stream, 'JPEG', quality=85)
    return {'size': size, 'jpeg': base64.b64encode(stream.getvalue()).decode()}
