"""
Drawings: boxes in an image, ground truth beside predictions, curves of a run.

Pillow and matplotlib are imported where they draw, so that training does not need them.
"""

import colorsys
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from util.files import save_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL.ImageDraw import ImageDraw

Colour = tuple[int, int, int]
Names = Sequence[str | None] | dict[int, str]

MIN_SIDE = 480  # images whose longer side is shorter are enlarged, so that labels can be read
PANEL, TITLE = (385, 396), 20  # size of a panel of a sheet, and height of its title, pixels
LOSS_TERMS_SHOWN = 10
PROMINENT = 2  # metrics drawn with a thick line
PER_OBJECT = ('scores', 'labels', 'boxes', 'masks')
COLOURS = (
    (235, 45, 55),  # red
    (45, 120, 255),  # blue
    (255, 215, 0),  # yellow
    (35, 195, 75),  # green
    (245, 65, 225),  # magenta
    (0, 225, 235),  # cyan
    (255, 135, 0),  # orange
    (140, 75, 215),  # violet
    (190, 245, 90),  # lime
    (165, 100, 45),  # brown
)


def class_colour(label: int) -> Colour:
    """Return the colour of a class: a few distinct ones, then hues a golden angle apart in two shades."""
    if label < len(COLOURS):
        return COLOURS[label]
    saturation, value = (0.6, 1.0) if label % 2 else (0.95, 0.8)
    red, green, blue = colorsys.hsv_to_rgb(label * 0.618034 % 1, saturation, value)
    return round(255 * red), round(255 * green), round(255 * blue)


def class_name(names: Names, label: int) -> str:
    """Return the name of a label, or its number if `names` (a sequence or a dict) has none."""
    try:
        name = names[label]
    except (KeyError, IndexError):
        name = None
    return str(label if name is None else name)


def enlarge(image: Tensor) -> tuple[Tensor, int]:
    """Repeat the pixels of an image [3, H, W] up to a side of at least MIN_SIDE; also return the factor."""
    factor = max(1, math.ceil(MIN_SIDE / max(image.shape[-2:])))
    return image.repeat_interleave(factor, dim=-2).repeat_interleave(factor, dim=-1), factor


def paint_masks(image: Tensor, masks: Iterable[Tensor], labels: list[int]) -> Tensor:
    """Blend N masks [(1,) h, w] of any resolution (> 0.5 is object) into an image [3, H, W] uint8."""
    painted = image.float()
    for mask, label in zip(masks, labels, strict=True):
        mask = mask.reshape(1, 1, *mask.shape[-2:]).to(painted)
        inside = interpolate(mask, size=image.shape[-2:], mode='nearest')[0] > 0.5
        colour = painted.new_tensor(class_colour(label))[:, None, None]
        painted = torch.where(inside, 0.55 * painted + 0.45 * colour, painted)
    return painted.round().to(torch.uint8)


def draw_boxes(
    image: Tensor,
    boxes_xyxy: Tensor,
    labels: Tensor,
    names: Names,
    scores: Tensor | None = None,
    masks: Iterable[Tensor] | None = None,
) -> Tensor:
    """Draw boxes and class names into a copy of the image, enlarged by a whole factor if it is small.

    Args:
        image: [3, H, W] uint8.
        boxes_xyxy: [N, 4] in pixels of the image, may reach outside.
        labels, scores: [N]; higher scores are drawn over lower ones.
        masks: N of [(1,) H, W], bool or probabilities; an iterator may compute them one by one.

    Returns:
        [3, fH, fW] uint8 on the CPU.
    """
    from PIL import Image, ImageDraw

    canvas, factor = enlarge(image.cpu())
    if masks is not None and len(labels):
        canvas = paint_masks(canvas, masks, labels.tolist())
    pil = Image.fromarray(canvas.permute(1, 2, 0).contiguous().numpy())
    draw = ImageDraw.Draw(pil)
    boxes = [clip_box(box, pil.size) for box in (boxes_xyxy.detach().float().cpu() * factor).tolist()]
    texts = [class_name(names, label) for label in labels.tolist()]
    if scores is not None:
        texts = [f'{text} {100 * score:.0f}' for text, score in zip(texts, scores.tolist(), strict=True)]
    colours = [class_colour(label) for label in labels.tolist()]
    order = list(range(len(boxes)) if scores is None else scores.argsort().tolist())
    for number in order:
        draw_box(draw, boxes[number], colours[number])
    for number in order:
        draw_text(draw, boxes[number], texts[number], colours[number])
    drawn = torch.frombuffer(bytearray(pil.tobytes()), dtype=torch.uint8)
    return drawn.view(pil.height, pil.width, 3).permute(2, 0, 1)


def clip_box(box: list[float], size: tuple[int, int]) -> tuple[float, float, float, float]:
    """Return corner pixels x1, y1, x2 >= x1, y2 >= y1 of a box cut to an image of `size` (width, height)."""
    edges = [edge if math.isfinite(edge) else 0.0 for edge in box]
    x1, y1 = min(max(edges[0], 0), size[0] - 1), min(max(edges[1], 0), size[1] - 1)
    return x1, y1, min(max(edges[2] - 1, x1), size[0] - 1), min(max(edges[3] - 1, y1), size[1] - 1)


def draw_box(draw: 'ImageDraw', box: tuple[float, float, float, float], colour: Colour) -> None:
    """Draw the outline of a box with a black edge, so that it is visible on any background."""
    x1, y1, x2, y2 = box
    thickness = max(3, max(draw.im.size) // 240)
    draw.rectangle((x1 - 1, y1 - 1, x2 + 1, y2 + 1), outline=(0, 0, 0), width=thickness + 1)
    draw.rectangle(box, outline=colour, width=thickness)


def draw_text(draw: 'ImageDraw', box: tuple[float, float, float, float], text: str, colour: Colour) -> None:
    """Draw a label above the box, or inside if there is no room."""
    from PIL import ImageFont

    width, height = draw.im.size
    font = ImageFont.load_default(max(11, max(width, height) // 40))
    left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
    text_width, text_height = right - left + 4, bottom - top + 4
    x, y = max(0, min(box[0], width - text_width)), box[1] - text_height
    if y < 0:
        y = max(0, min(box[1], height - text_height))
    draw.rectangle((x, y, x + text_width, y + text_height), fill=colour)
    dark_text = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] > 140
    draw.text((x + 2 - left, y + 2 - top), text, font=font, fill=(0, 0, 0) if dark_text else (255, 255, 255))


def contact_sheet(
    path: str | os.PathLike,
    rows: list[tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]],
    names: Names,
    score_threshold: float = 0.5,
) -> None:
    """Draw the ground truth and, right of it, the predictions of a few images, two images per line.

    rows: (image [3, H, W] uint8, prediction {'scores', 'labels', 'boxes'}, target {'labels', 'boxes'}), boxes
    xyxy in pixels of the image. `masks` [N, H, W] are drawn if present. Predictions with a score under
    `score_threshold` are left out.
    """
    if not rows:
        raise ValueError('a contact sheet needs at least one image')
    panels = []
    for image, prediction, target in rows:
        panels.append((f'truth: {len(target["boxes"])}', draw_objects(image, target, names)))
        chosen = prediction['scores'] >= score_threshold
        shown = {name: values[chosen] for name, values in prediction.items() if name in PER_OBJECT}
        title = f'found with score {score_threshold:g} or more: {len(shown["boxes"])}'
        panels.append((title, draw_objects(image, shown, names)))
    save_panels(path, panels)


def draw_objects(image: Tensor, objects: dict[str, Tensor], names: Names) -> Tensor:
    """Call `draw_boxes` with `boxes`, `labels` and, if present, `scores` and `masks`."""
    return draw_boxes(
        image, objects['boxes'], objects['labels'], names, objects.get('scores'), objects.get('masks')
    )


def save_panels(path: str | os.PathLike, panels: list[tuple[str, Tensor]]) -> None:
    """Save images [3, H, W] uint8 below their titles as one image, four per line."""
    columns = min(4, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = build_figure(columns * PANEL[0] / 100, rows * PANEL[1] / 100, layout=None)
    figure.subplots_adjust(left=0, right=1, bottom=0, top=1 - TITLE / PANEL[1] / rows, wspace=0.02)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes:
        axis.axis('off')
    for axis, (title, image) in zip(axes, panels, strict=False):
        axis.imshow(image.permute(1, 2, 0).numpy())
        axis.set_title(title, fontsize=9)
    save_atomically(path, lambda partial: figure.savefig(partial, dpi=100))


def build_figure(
    width: float, height: float, layout: Literal['constrained'] | None = 'constrained'
) -> 'Figure':
    """Build a matplotlib figure, sized in inches, that needs no display and no global state.

    layout: matplotlib's layout engine, which draws everything twice; None: the caller sets the margins.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout=layout)
    FigureCanvasAgg(figure)
    return figure


def to_number(cell: Any) -> float:
    """Return the number in a cell of metrics.csv; nan if the cell has no number."""
    try:
        return float(cell)
    except (TypeError, ValueError):
        return math.nan


def plot_curves(
    path: str | os.PathLike, rows: Sequence[Mapping[str, Any]], metrics: Sequence[str] = ()
) -> None:
    """Plot loss, its terms, metrics and learning rate of a run over `epoch`.

    rows: rows of metrics.csv, numbers or text. metrics: names to draw, the first PROMINENT with thick lines;
    by default all.
    """
    header = dict.fromkeys(name for row in rows for name in row)
    columns = {name: [to_number(row.get(name)) for row in rows] for name in header}
    tested = [f'test_{name}' for name in metrics] or [name for name in columns if name.startswith('test_')]
    terms = [name for name in columns if name.startswith('train_loss_')]
    panels = (
        ('loss', ['train_loss', 'test_loss'], 'linear'),
        ('loss terms', final_terms(terms), 'log'),
        ('metrics', [name for name in tested if name != 'test_loss'], 'linear'),
        ('learning rate', [name for name in columns if short_name(name).split('_')[0] == 'lr'], 'linear'),
    )
    figure = build_figure(11, 7, layout=None)
    figure.subplots_adjust(left=0.06, right=0.985, bottom=0.07, top=0.95, hspace=0.3, wspace=0.2)
    for panel, (title, names, scale) in zip(figure.subplots(2, 2, sharex=True).ravel(), panels, strict=True):
        epochs = columns.get('epoch') or list(range(len(next(iter(columns.values()), []))))
        for number, name in enumerate(names):
            values, thin = columns.get(name, []), title == 'metrics' and number >= PROMINENT
            if title == 'metrics':  # COCO's rules give -1 if there are no objects
                values = [math.nan if value < 0 else value for value in values]
            plot_column(panel, epochs, values, short_name(name), 0.9 if thin else 1.8)
        finish_panel(panel, title, scale)
    save_atomically(path, lambda partial: figure.savefig(partial, dpi=110))


def final_terms(terms: list[str]) -> list[str]:
    """Return the first terms that are not of intermediate decoder layers, at most LOSS_TERMS_SHOWN."""
    final = [name for name in terms if not any(part.isdigit() for part in name.split('_'))]
    return final[:LOSS_TERMS_SHOWN]


def short_name(column: str) -> str:
    """Shorten train_loss_ce to loss_ce and test_AP to AP; the loss of the test set keeps its full name."""
    return column if column == 'test_loss' else column.removeprefix('train_').removeprefix('test_')


def plot_column(panel: 'Axes', epochs: list[float], values: list[float], label: str, width: float) -> None:
    """Draw a line through the epochs that have a value."""
    points = [(x, y) for x, y in zip(epochs, values, strict=False) if math.isfinite(x + y)]
    if not points:
        return
    x, y = zip(*points, strict=True)
    marker = 'o' if len(x) < 30 else None
    panel.plot(x, y, label=label, linewidth=width, marker=marker, markersize=3)


def finish_panel(panel: 'Axes', title: str, scale: str) -> None:
    panel.set_title(title, loc='left', fontsize=11)
    panel.set_xlabel('epoch', fontsize=9)
    panel.locator_params(axis='x', integer=True, min_n_ticks=1)
    panel.tick_params(labelbottom=True)
    panel.grid(alpha=0.25)
    panel.spines[['top', 'right']].set_visible(False)
    if not panel.lines:
        panel.annotate(
            'nothing recorded yet', (0.5, 0.5), xycoords='axes fraction', ha='center', color='grey'
        )
        return
    if scale == 'log' and all((np.asarray(line.get_ydata()) > 0).all() for line in panel.lines):
        panel.set_yscale('log')
    else:
        panel.ticklabel_format(axis='y', scilimits=(-2, 4))
        first = np.asarray(panel.lines[0].get_xdata())[0]
        panel.update_datalim(np.array([(first, 0)]))  # zero is always shown
        panel.autoscale_view()
    panel.legend(fontsize=8, edgecolor='none')
