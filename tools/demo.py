"""
Show a detector in a local web page: drop an image, see boxes, where the queries look, and how long it took.

  python tools/demo.py --checkpoint FILE          needs gradio (pip install gradio)
  python tools/demo.py --model detr_resnet50

The page is served to this machine alone, unless --address names another interface, and nothing is sent elsewhere.
"""

import argparse
import os
import sys
import time
from argparse import Namespace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from models.detector import Detector, add_detector_args, check_detector_args, load_detector
from tools.predict import select
from tools.visualize_attention import attention_of, panels_of, sheet_of
from util.bounds import whole
from util.errors import UserError
from util.flags import FlagParser, run_command
from util.visualize import class_name, draw_boxes

COLUMNS = ['class', 'score', 'left', 'top', 'right', 'bottom']


def get_args_parser() -> argparse.ArgumentParser:
    parser = FlagParser('demo.py', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = parser.add_argument
    add_detector_args(parser)
    flag('--address', default='127.0.0.1', help='interface that the page is served on (default: %(default)s)')
    flag('--port', default=7860, type=whole(1, 65535), help='port of the page (default: %(default)s)')
    flag('--half', action='store_true', help='compute in 16 bits: fp16 on NVIDIA GPUs, bf16 elsewhere')
    flag('--device', default='auto', help='auto, cuda, mps or cpu (default: %(default)s)')
    return parser


def answer(
    detector: Detector, pixels: np.ndarray, lowest: float, look: bool, layer: int
) -> tuple[np.ndarray, list[list], Image.Image | None, str]:
    """Detect in an image.

    Args:
        pixels: [H, W, 3] uint8.
        lowest: lowest score shown.
        look: draw attention too.
        layer: decoder layer whose attention is drawn, from 0.

    Returns:
        The drawn image, a row for each object (COLUMNS), the attention of the three best queries, and a line of text.
    """
    image = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
    names = detector.class_map.names
    start = time.perf_counter()
    result = detector.detect(image)
    seconds = time.perf_counter() - start
    found = select(result, lowest)
    order = found['scores'].argsort(descending=True)
    found = {key: value[order] for key, value in found.items()}
    drawing = draw_boxes(image, found['boxes'], found['labels'], names, found['scores'], found.get('masks'))
    columns = zip(*(found[key].tolist() for key in ('labels', 'scores', 'boxes')), strict=True)
    rows = [
        [class_name(names, label), round(score, 3), *(round(edge, 1) for edge in box)]
        for label, score, box in columns
    ]
    sheet = None
    if look and rows:
        attention = attention_of(detector, image, layer)
        chosen = Namespace(queries=['best'], num=3, layer=layer, head='mean')
        sheet = sheet_of(panels_of(detector, image, attention, chosen), attention)
    height, width = image.shape[-2:]
    text = f'{len(rows)} objects in {width} x {height} pixels, {1000 * seconds:.0f} ms with reading out'
    return drawing.permute(1, 2, 0).numpy(), rows, sheet, text


def make_page(detector: Detector, title: str) -> Any:
    """Make the page, a `gradio.Blocks`."""
    import gradio

    layers = len(detector.model.transformer.decoder.layers)
    with gradio.Blocks(title=title, analytics_enabled=False) as page:
        gradio.Markdown(f'## {title}')
        with gradio.Row():
            with gradio.Column():
                image = gradio.Image(type='numpy', image_mode='RGB', label='image')
                lowest = gradio.Slider(0, 1, 0.3, label='lowest score')
                look = gradio.Checkbox(True, label='show where the best queries look')
                layer = gradio.Slider(0, layers - 1, layers - 1, step=1, label='decoder layer')
                button = gradio.Button('detect', variant='primary')
            with gradio.Column():
                drawing = gradio.Image(label='objects')
                text = gradio.Markdown()
                table = gradio.Dataframe(headers=COLUMNS, label='objects as numbers', interactive=False)
        attention = gradio.Image(label='attention of the three best queries')

        def show(pixels: np.ndarray | None, *settings: Any) -> tuple:
            if pixels is None:
                raise gradio.Error('drop an image first')
            return answer(detector, pixels, *settings)

        gradio.on(
            [button.click, image.upload, lowest.release, layer.release, look.input],
            show,
            inputs=[image, lowest, look, layer],
            outputs=[drawing, table, attention, text],
            api_name='detect',
        )
    return page


def main(args: Namespace) -> None:
    check_detector_args(args)
    if find_spec('gradio') is None:
        raise UserError('the demo needs gradio: pip install gradio')
    os.environ['GRADIO_ANALYTICS_ENABLED'] = 'False'
    detector = load_detector(args.model, args.checkpoint, args.device, args.half)
    number = sum(parameter.numel() for parameter in detector.model.parameters())
    title = f'{args.model or Path(args.checkpoint).name}: {number:,} parameters, {detector.class_map.num_classes} classes'
    make_page(detector, title).launch(server_name=args.address, server_port=args.port, share=False)


if __name__ == '__main__':
    run_command(main, get_args_parser())
