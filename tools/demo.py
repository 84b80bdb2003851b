"""
Show a detector in a local web page: objects in an image, attention of the queries, and time.

  python tools/demo.py --checkpoint FILE          needs gradio (pip install gradio)
  python tools/demo.py --model detr_resnet50

The page is served to this machine alone, unless --address names another interface, which needs a password
(DETR_DEMO_PASSWORD). Nothing is sent elsewhere. Images and drawings are deleted after ten minutes and when
the program ends.
"""

import argparse
import os
import signal
import sys
import tempfile
import time
from argparse import Namespace
from importlib.util import find_spec
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from datasets.image_io import FORMATS, UnreadableImage, turned_sample
from datasets.readers import add_reader_args
from datasets.results import select
from models.detector import Detector, add_detector_args, load_from_flags
from tools.visualize_attention import build_panels, build_sheet, compute_attention
from util.command_line import FlagParser, int_range, run_command
from util.errors import UserError
from util.visualize import class_name, draw_boxes

COLUMNS = ['class', 'score', 'left', 'top', 'right', 'bottom']
MAX_BYTES = 50_000_000  # of a request, and therefore of an image
DELETION = (60, 600)  # seconds between two searches for old files, and their age
USER = 'detr'


def get_args_parser() -> argparse.ArgumentParser:
    parser = FlagParser('demo.py', description=__doc__)
    add_detector_args(parser)
    add_reader_args(parser, 'as the weights were trained; else upright, and by the values of each image')
    flag = parser.add_argument
    flag('--address', default='127.0.0.1', help='interface that the page is served on (default: %(default)s)')
    flag('--port', default=7860, type=int_range(1, 65535), help='port of the page (default: %(default)s)')
    flag(
        '--password',
        help=f'password of the page, for the user {USER}; others on this machine can see it, unlike the '
        'environment variable DETR_DEMO_PASSWORD (default: no password, on this machine)',
    )
    return parser


def answer(
    detector: Detector, file: str, score_threshold: float, with_attention: bool, layer: int
) -> tuple[np.ndarray, list[list], Image.Image | None, str]:
    """Detect in an image file.

    Args:
        score_threshold: lowest score shown.
        with_attention: draw attention too.
        layer: decoder layer whose attention is drawn, from 0.

    Returns:
        The drawn image, a row for each object (COLUMNS), the attention of three queries, and a line of text.
            Drawings stand upright; numbers are pixels of the image as the detector reads it.
    """
    image, turn = detector.reader.read(file), detector.reader.turn_left(file)
    names = detector.class_map.names
    start = time.perf_counter()
    result = detector.detect(image)
    seconds = time.perf_counter() - start
    chosen = select(result, score_threshold)
    order = chosen['scores'].argsort(descending=True)
    boxes, labels, scores = (chosen[key][order] for key in ('boxes', 'labels', 'scores'))
    objects = {'boxes': boxes} | ({'masks': chosen['masks'][order]} if 'masks' in chosen else {})
    shown, objects = turned_sample(image, objects, turn)
    drawing = draw_boxes(shown, objects['boxes'], labels, names, scores, objects.get('masks'))
    rows = [
        [class_name(names, label), round(score, 3), *(round(edge, 1) for edge in box)]
        for label, score, box in zip(labels.tolist(), scores.tolist(), boxes.tolist(), strict=True)
    ]
    sheet = None
    if with_attention and rows:
        attention = compute_attention(detector, image, layer)
        options = Namespace(queries=['best'], num=3, layer=layer, head='mean')
        sheet = build_sheet(build_panels(detector, image, attention, options, turn), attention)
    height, width = image.shape[-2:]
    text = f'{len(rows)} objects in {width} x {height} pixels, {1000 * seconds:.0f} ms with postprocessing'
    return drawing.permute(1, 2, 0).numpy(), rows, sheet, text


def build_page(detector: Detector, title: str) -> Any:
    """Build the page, a `gradio.Blocks`."""
    import gradio

    layers = len(detector.model.transformer.decoder.layers)
    with gradio.Blocks(title=title, analytics_enabled=False, delete_cache=DELETION) as page:
        gradio.Markdown(f'## {title}')
        with gradio.Row():
            with gradio.Column():
                image = gradio.Image(type='filepath', image_mode=None, label='image')  # as it was sent
                threshold = gradio.Slider(0, 1, 0.3, label='lowest score')
                with_attention = gradio.Checkbox(True, label='show attention of the best queries')
                layer = gradio.Slider(0, layers - 1, layers - 1, step=1, label='decoder layer')
                button = gradio.Button('detect', variant='primary')
            with gradio.Column():
                drawing = gradio.Image(label='objects')
                text = gradio.Markdown()
                table = gradio.Dataframe(headers=COLUMNS, label='objects as numbers', interactive=False)
        attention = gradio.Image(label='attention of the three best queries')

        def show(file: str | None, *settings: Any) -> tuple:
            if file is None:
                raise gradio.Error('drop an image first')
            try:
                return answer(detector, file, *settings)
            except UnreadableImage as error:
                raise gradio.Error(str(error)) from error

        gradio.on(
            [button.click, image.upload, threshold.release, layer.release, with_attention.input],
            show,
            inputs=[image, threshold, with_attention, layer],
            outputs=[drawing, table, attention, text],
            api_name='detect',
        )
    return page


class Guard:
    """Middleware that refuses requests of other pages, to other host names, and of too many bytes.

    app: the ASGI server. hosts: allowed host names; empty: all.
    """

    def __init__(self, app: Any, hosts: tuple[str, ...]) -> None:
        self.app, self.hosts = app, hosts

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        from starlette.responses import PlainTextResponse

        status = self.status(scope) if scope['type'] == 'http' else 200
        answer = self.app if status == 200 else PlainTextResponse('refused', status)
        await answer(scope, receive, send)

    def status(self, scope: dict) -> int:
        """Return the HTTP status of a request: 200 if it may pass."""
        headers = {name.decode('latin-1'): value.decode('latin-1') for name, value in scope['headers']}
        host, length = headers.get('host', ''), headers.get('content-length', '0')
        if 'origin' in headers and urlsplit(headers['origin']).netloc != host:
            return 403
        if self.hosts and urlsplit(f'//{host}').hostname not in self.hosts:
            return 403  # pages of another name of this machine would have the same origin
        return 413 if 'transfer-encoding' in headers or int(length) > MAX_BYTES else 200


def is_this_machine(address: str) -> bool:
    """Return whether only programs of this machine reach an address."""
    try:
        return address == 'localhost' or ip_address(address).is_loopback
    except ValueError:
        return False


def serve(page: Any, address: str, port: int, password: str, **options: Any) -> None:
    """Serve the page until Ctrl-C or SIGTERM. options: of gradio's `launch`.

    Raises:
        UserError: the address or the port is not available.
    """
    from starlette.middleware import Middleware

    Image.init()
    Image.ID[:] = FORMATS  # gradio opens received files by itself
    hosts = ('localhost', '127.0.0.1', '::1', address) if is_this_machine(address) else ()
    try:
        page.launch(
            server_name=address,
            server_port=port,
            share=False,
            auth=(USER, password) if password else None,
            max_file_size=MAX_BYTES,
            app_kwargs={'middleware': [Middleware(Guard, hosts=hosts)]},
            **options,
        )
    except OSError as error:
        raise UserError(
            f'the page cannot be served at {address}, port {port}: choose another --port if this one is '
            'in use, or another --address'
        ) from error


def main(args: Namespace) -> None:
    if find_spec('gradio') is None:
        raise UserError('the demo needs gradio: pip install gradio')
    password = args.password or os.environ.get('DETR_DEMO_PASSWORD', '')
    if not password and not is_this_machine(args.address):
        raise UserError(
            f'--address {args.address} lets other machines in: set DETR_DEMO_PASSWORD (or --password), or '
            'leave --address out'
        )
    detector = load_from_flags(args)
    num_parameters = sum(parameter.numel() for parameter in detector.model.parameters())
    name, num_classes = args.model or Path(args.checkpoint).name, detector.class_map.num_classes
    title = f'{name}: {num_parameters:,} parameters, {num_classes} classes'
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the folder is removed then too
    with tempfile.TemporaryDirectory(prefix='detr_demo_') as folder:
        os.environ |= {'GRADIO_ANALYTICS_ENABLED': 'False', 'GRADIO_TEMP_DIR': folder}
        serve(build_page(detector, title), args.address, args.port, password)


if __name__ == '__main__':
    run_command(main, get_args_parser())
