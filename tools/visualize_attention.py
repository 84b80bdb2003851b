"""
Draw the cross-attention of one decoder layer over an image: where the queries look.

  python tools/visualize_attention.py --checkpoint FILE --source IMAGE --output OUT.png
  python tools/visualize_attention.py --model detr_resnet50 --source IMAGE --output OUT.png --queries 3 17

DETR and Conditional DETR attend to every cell of a map, which is drawn as heat. Deformable DETR and its
descendants sample points, drawn as dots that are coloured by weight and larger on coarser levels.
`compute_attention` returns the numbers.
"""

import argparse
import math
import sys
from argparse import Namespace
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from datasets.image_io import SUFFIXES, turned, turned_boxes
from datasets.readers import add_reader_args
from models.deformable_transformer import valid_ratio
from models.detector import Detector, add_detector_args, load_from_flags
from models.ops.modules import MSDeformAttn
from util import visualize
from util.command_line import FlagParser, int_range, run_command
from util.errors import UserError
from util.files import save_atomically
from util.visualize import PANEL, TITLE

# Colours of weights from 0 to the largest.
RAMP = torch.tensor([(70, 70, 255), (160, 40, 190), (235, 50, 60), (255, 160, 30), (255, 255, 160)]).float()
MARGIN = 6  # around the image of a panel, pixels
LEGEND = 56  # height of the legend below all panels, pixels


@dataclass
class Attention:
    """Cross-attention of a decoder layer in one image, on the CPU; Q queries, M heads, L levels, P points.

    Positions are x, y, and (0, 0) to (1, 1) is the image.
    """

    # Dense: [M, Q, H, W], sum 1 over H and W, 0 in the padding. Deformable: [Q, M, L, P], sum 1 over L and P.
    weights: Tensor
    points: Tensor | None  # [Q, M, L, P, 2], may lie outside the image; None: dense attention
    reference: Tensor | None  # [Q, 2 or 4] reference points, or boxes cxcywh; None: dense attention
    shapes: list[tuple[int, int]]  # (H, W) of each level; dense attention has one
    share: Tensor  # [L, 2] share of each map that shows the image; points * share are relative to the map
    outputs: dict[str, Tensor]  # of the model: `pred_logits` [1, Q, K], `pred_boxes` [1, Q, 4]
    frame: Tensor  # [1, 2] height and width that `pred_boxes` are relative to, in pixels of the image


@torch.no_grad()
def compute_attention(detector: Detector, image: Tensor, layer: int = -1) -> Attention:
    """Detect in a uint8 image [3, H, W], and return the cross-attention of a decoder layer.

    layer: from 0, or from the end if negative. Hooks record the arguments of modules; results do not change.

    Raises:
        UserError: there is no such layer.
    """
    decoder, calls = detector.model.transformer.decoder, {}
    decoder_layer = decoder.layers[parse_index('layer', layer, -len(decoder.layers), len(decoder.layers) - 1)]
    attention = getattr(decoder_layer, 'cross_attn', None) or decoder_layer.multihead_attn
    postprocess = detector.postprocessors['bbox']

    def record(module: nn.Module, args: tuple, options: dict) -> None:
        calls[module] = args, options

    with ExitStack() as hooks:
        for module in (decoder, attention, postprocess):
            hooks.enter_context(module.register_forward_pre_hook(record, with_kwargs=True))
        detector.detect(image)
    memory, (outputs, frame) = calls[decoder][0][1], calls[postprocess][0]
    ratios = memory.valid_ratios  # [1, L, 2]
    if ratios is None:
        ratios = valid_ratio(memory.padding_mask.unflatten(1, memory.shapes[0]))[:, None]
    share = ratios[0].cpu() * (torch.tensor(image.shape[-2:]) / frame[0].cpu()).flip(-1)
    points = reference = None
    if isinstance(attention, MSDeformAttn):
        weights, points, reference = sampling_points(attention, *calls[attention])
        points, reference = points / share[:, None], reference / share[0].repeat(reference.shape[-1] // 2)
    else:
        weights = dense_weights(attention, *calls[attention]).unflatten(-1, memory.shapes[0])
    outputs = {name: outputs[name].cpu() for name in ('pred_logits', 'pred_boxes')}
    return Attention(weights, points, reference, memory.shapes, share, outputs, frame.cpu())


def dense_weights(attention: nn.Module, args: tuple, options: dict) -> Tensor:
    """Compute weights [M, Q, S] from the arguments of the attention of DETR or Conditional DETR."""
    if isinstance(attention, nn.MultiheadAttention):
        options = options | {'need_weights': True, 'average_attn_weights': False}
        return attention.forward(*args, **options)[1][0].float().cpu()
    q, k, _, hidden = args
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    return scores.masked_fill(hidden, float('-inf')).softmax(-1)[0].float().cpu()


def sampling_points(attention: MSDeformAttn, args: tuple, options: dict) -> tuple[Tensor, Tensor, Tensor]:
    """Compute weights [Q, M, L, P], points [Q, M, L, P, 2] and references [Q, 2 or 4], relative to maps."""
    query, reference, _, shapes = args
    heads, levels, points = attention.n_heads, attention.n_levels, attention.n_points
    weights = attention.attention_weights(query).unflatten(-1, (heads, -1)).float().softmax(-1)
    weights = weights.unflatten(-1, (levels, points))
    offsets = attention.sampling_offsets(query).unflatten(-1, (heads, levels, points, 2))
    locations = attention.locations(offsets, reference, shapes, options.get('sizes'))
    return tuple(x[0].float().cpu() for x in (weights, locations, reference[:, :, 0]))


def query_detections(
    detector: Detector, attention: Attention, queries: list[int], num: int
) -> dict[int, dict[str, Tensor]]:
    """Return score, label and box (xyxy, pixels) of the named queries; without names of the `num` best."""
    postprocess, names = detector.postprocessors['bbox'], detector.class_map.names
    mark = {'pred_masks': None}  # with this key, which is not read, detections have their query
    if queries:  # each alone, and without NMS
        alone = {name: value[0, queries, None] for name, value in attention.outputs.items()}
        frames = attention.frame.expand(len(queries), -1)
        results = getattr(postprocess, 'best_pairs', postprocess)(alone | mark, frames)
        first = [{name: value[0] for name, value in result.items()} for result in results]
        return dict(zip(queries, first, strict=True))
    result = postprocess(attention.outputs | mark, attention.frame)[0]
    best: dict[int, dict[str, Tensor]] = {}
    for index in result['scores'].argsort(descending=True).tolist():
        detection = {name: value[index] for name, value in result.items()}
        if names[detection['labels']] is not None and len(best) < num:
            best.setdefault(int(detection['query']), detection)
    if not best:
        raise UserError('nothing was detected in the image: name queries, for example --queries 0 1 2')
    return best


def parse_index(flag: str, text: str | int, low: int, high: int, words: str = '') -> int:
    """Return the number of a flag; raise a UserError if it is not a number, or out of bounds."""
    number = int(text) if str(text).removeprefix('-').isdecimal() else low - 1
    if not low <= number <= high:
        raise UserError(f'{flag} {text}: choose {words}a number from {low} to {high} for this detector')
    return number


def choose_heads(text: str, num_heads: int, dense: bool) -> list[tuple[str, slice]]:
    """Return title and heads of each panel of a query."""
    if text == 'mean':
        return [(f'{"mean of" if dense else "all"} {num_heads} heads', slice(None))]
    only = None if text == 'all' else parse_index('--head', text, 0, num_heads - 1, 'mean, all or ')
    return [(f'head {head}', slice(head, head + 1)) for head in range(num_heads) if only in (None, head)]


def weight_colours(values: Tensor) -> Tensor:
    """Return the colours [..., 3] of values in [0, 1]."""
    position = values * (len(RAMP) - 1)
    low = position.long().clamp(max=len(RAMP) - 2)
    return torch.lerp(RAMP[low], RAMP[low + 1], (position - low)[..., None])


def to_pil(pixels: Tensor) -> Image.Image:
    """Convert [H, W, 3] in [0, 255]."""
    return Image.fromarray(pixels.round().to(torch.uint8).contiguous().numpy())


def fade(image: Tensor) -> Tensor:
    """Return an image [3, H, W] as floats [H, W, 3], darker and less coloured so that drawings stand out."""
    pixels = image.permute(1, 2, 0).float()
    return 0.75 * torch.lerp(pixels, pixels.mean(-1, keepdim=True), 0.7)


def draw_heat(image: Tensor, weights: Tensor, share: Tensor) -> Image.Image:
    """Blend weights [H, W] over an image [h, w, 3]; share: [2] share of the map that shows it."""
    width, height = (
        min(side, side * part) for side, part in zip(weights.shape[::-1], share.tolist(), strict=True)
    )
    heat = Image.fromarray((weights / weights.max()).numpy())
    heat = heat.resize(image.shape[1::-1], Image.Resampling.BILINEAR, box=(0, 0, width, height))
    value = torch.from_numpy(np.array(heat)).clamp(0, 1)
    return to_pil(torch.lerp(image, weight_colours(value), (2 * value).clamp(max=0.8)[..., None]))


def draw_points(image: Tensor, weights: Tensor, points: Tensor, reference: Tensor) -> Image.Image:
    """Draw points [M, L, P, 2] over an image [h, w, 3], the heaviest last, and a cross at the reference."""
    canvas = to_pil(image)
    unit, size = max(canvas.size) / PANEL[0], torch.tensor(canvas.size)
    draw = ImageDraw.Draw(canvas)
    centres, colours = (points * size).flatten(0, 2), weight_colours(weights / weights.max()).flatten(0, 2)
    for index in weights.flatten().argsort().tolist():
        level = index // weights.shape[2] % weights.shape[1]
        draw_dot(draw, centres[index].tolist(), level, unit, colours[index])
    x, y = (reference[:2] * size).tolist()
    for colour, reach, width in (('black', 7 * unit, 5 * unit), ('white', 6 * unit, 2 * unit)):
        draw.line((x - reach, y, x + reach, y), fill=colour, width=round(width))
        draw.line((x, y - reach, x, y + reach), fill=colour, width=round(width))
    return canvas


def draw_dot(draw: ImageDraw.ImageDraw, centre: list[float], level: int, unit: float, colour: Tensor) -> None:
    """Draw the dot of a point; unit: pixels of the image for each pixel of its panel."""
    (x, y), radius, fill = centre, unit * (3 + 1.5 * level), tuple(colour.int().tolist())
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill, 'black', max(1, round(unit / 2)))


def turned_drawing(drawing: Image.Image, orientation: int) -> Image.Image:
    pixels = torch.from_numpy(np.array(drawing)).permute(2, 0, 1)
    return to_pil(turned(pixels, orientation).permute(1, 2, 0))


def build_panel(image: Image.Image, title: str) -> Image.Image:
    """Return an image below its title, as wide as a panel and at most as high."""
    width, height = PANEL
    image = ImageOps.contain(
        image, (width - 2 * MARGIN, height - TITLE - 2 * MARGIN), Image.Resampling.LANCZOS
    )
    panel = Image.new('RGB', (width, TITLE + 2 * MARGIN + image.height), 'white')
    panel.paste(image, ((width - image.width) // 2, MARGIN + TITLE))
    centre = (width / 2, MARGIN + TITLE / 2)
    ImageDraw.Draw(panel).text(centre, title, 'black', ImageFont.load_default(14), 'mm')
    return panel


def build_panels(
    detector: Detector, image: Tensor, attention: Attention, args: Namespace, orientation: int = 1
) -> list[list[Image.Image]]:
    """Return the panels of each query, the detection first.

    Args:
        args: `queries`, `num`, `layer` and `head` of the command line.
        orientation: how the drawings are turned, see `datasets.image_io.turned`.
    """
    dense, num_queries = attention.points is None, attention.outputs['pred_boxes'].shape[1]
    heads = choose_heads(args.head, attention.weights.shape[0 if dense else 1], dense)
    words = [] if args.queries == ['best'] else args.queries
    queries = [parse_index('--queries', word, 0, num_queries - 1, 'best alone, or ') for word in words]
    layer, names = args.layer % len(detector.model.transformer.decoder.layers), detector.class_map.names
    canvas, factor = visualize.enlarge(image)
    canvas, shown, rows = fade(canvas), turned(image, orientation), []
    for query, detection in query_detections(detector, attention, queries, args.num).items():
        label, score = detection['labels'], detection['scores']
        boxes = turned_boxes(detection['boxes'][None], orientation, image.shape[1:])
        drawing = visualize.draw_boxes(shown, boxes, label[None], names, score[None])
        rows.append([build_panel(to_pil(drawing.permute(1, 2, 0)), f'query {query}')])
        for title, chosen in heads:
            if dense:
                weights = attention.weights[chosen, query].mean(0)
                drawing = draw_heat(canvas, weights, attention.share[0])
            else:
                weights, points = attention.weights[query, chosen], attention.points[query, chosen]
                drawing = draw_points(canvas, weights, points, attention.reference[query])
            drawing = turned_drawing(drawing, orientation)
            edges = visualize.clip_box((boxes[0] * factor).tolist(), drawing.size)
            visualize.draw_box(ImageDraw.Draw(drawing), edges, visualize.class_colour(int(label)))
            name = f'{visualize.class_name(names, int(label))[:20]} {100 * score:.0f}, layer {layer}'
            rows[-1].append(build_panel(drawing, f'{name}, {title}, peak {weights.max():.2g}'))
    return rows


def build_sheet(rows: list[list[Image.Image]], attention: Attention) -> Image.Image:
    """Return panels in one image, a row for each query, above a legend."""
    width, height = rows[0][0].size
    sheet = Image.new('RGB', (len(rows[0]) * width, len(rows) * height + LEGEND), 'white')
    for row, panels in enumerate(rows):
        for column, panel in enumerate(panels):
            sheet.paste(panel, (column * width, row * height))
    draw, font, y = ImageDraw.Draw(sheet), ImageFont.load_default(14), len(rows) * height + 14
    sheet.paste(to_pil(weight_colours(torch.linspace(0, 1, 160)).expand(12, -1, -1)), (80, y - 6))
    maps = [f'map of {height} x {width} cells' for height, width in attention.shapes]
    kind = maps[0] if attention.points is None else 'cross: reference point'
    draw.text((12, y), 'weight 0', 'black', font, 'lm')
    draw.text((248, y), f'peak of the panel;  {kind};  outline: predicted box', 'black', font, 'lm')
    for level, text in enumerate(maps if attention.points is not None else []):
        draw_dot(draw, [20 + 145 * level, y + 26], level, 1, RAMP[2])
        draw.text((34 + 145 * level, y + 26), text.removesuffix(' cells'), 'black', font, 'lm')
    return sheet


def main(args: Namespace) -> None:
    if Path(args.output).resolve() == Path(args.source).resolve():
        raise UserError(f'--output {args.output} is the source: choose another')
    if Path(args.output).suffix.lower() not in SUFFIXES:
        raise UserError(f'--output {args.output}: let it end in .png or .jpg')
    detector = load_from_flags(args)
    image, turn = detector.reader.read(args.source), detector.reader.turn_left(args.source)
    attention = compute_attention(detector, image, args.layer)
    rows = build_panels(detector, image, attention, args, turn)
    save_atomically(args.output, build_sheet(rows, attention).save)
    print(f'{args.output}: {len(rows)} queries')


def get_args_parser() -> argparse.ArgumentParser:
    parser = FlagParser('visualize_attention.py', description=__doc__)
    flag = parser.add_argument
    add_detector_args(parser)
    add_reader_args(parser, 'as the weights were trained; else upright, and by the values of the image')
    flag('--source', required=True, metavar='IMAGE', help='an image')
    flag('--output', required=True, metavar='FILE', help='image to write, for example attention.png')
    flag('--queries', nargs='+', default=['best'], help='numbers, or best: with the best scores (default)')
    flag('--num', default=6, type=int_range(1), help='number of the best queries (default: %(default)s)')
    flag('--layer', default=-1, type=int, help='decoder layer, from 0 or back from -1 (default: -1)')
    flag('--head', default='mean', help='mean (default; points: of all), all (a panel each) or a number')
    return parser


if __name__ == '__main__':
    run_command(main, get_args_parser())
