"""
Show where a detector errs: one HTML page, which needs neither server nor network, from predictions and annotations.

  python tools/analyze_errors.py --predictions predictions.json --ann val.json --images DIR --output report.html

Predictions have COCO's result form, as tools/predict.py writes it. False positives are of the kinds of TIDE
(arXiv:2008.08115, Sec. 2.2), in the order of its official code, and counted from a score on. Left out: masks, LVIS's
images that are judged in part, and TIDE's loss of AP by kind.
"""

import base64
import io
import json
import sys
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from datasets.annotations import AnnotationTable
from datasets.class_map import ClassMap
from datasets.coco_eval import CocoEvaluator, Summary
from datasets.coco_json import (
    as_id,
    box_problem,
    check_files,
    is_finite,
    numbers_of,
    read_annotations,
    shorten,
)
from datasets.image_io import read_image
from datasets.json_stream import list_blocks
from util.bounds import real
from util.errors import UserError
from util.files import save_atomically
from util.flags import FlagParser, run_command

# Of false positives.
KINDS = ('wrong class', 'wrong place', 'wrong class and place', 'duplicate', 'background')
CLASS, PLACE, BOTH, DUPLICATE, BACKGROUND, MISSED = range(6)
FOUND, IGNORED = -1, -2  # what is no error: a detection of an object, one in a crowd region
SIZE_BOUNDS = (32**2, 96**2)  # areas from which objects are medium, and large
NEAR = 0.1  # IoU with the nearest object under which a detection is background
MOST_DETECTIONS = 100  # of a class in an image, the best; COCO counts no others
USUAL_SCORE = 0.3  # threshold where no detection is right, so that none is best
WORST, THUMBNAIL, PLOT_POINTS = 24, 480, 150


@dataclass(frozen=True)
class Boxes:
    """N objects, or detections, in order of image; detections by falling score in each. All fields have N rows.

    images, labels: rows of image and class. boxes_xywh: [N, 4]; it and areas in pixels. scores: 1 for objects. crowd: bool.
    """

    images: np.ndarray
    labels: np.ndarray
    boxes_xywh: np.ndarray
    areas: np.ndarray
    scores: np.ndarray
    crowd: np.ndarray

    def __getitem__(self, rows: np.ndarray) -> 'Boxes':
        return Boxes(*(column[rows] for column in vars(self).values()))


@dataclass(frozen=True)
class Truth:
    """Annotations of I images and K classes. content: in COCO form. files: [I] names. rows: of images by id, by name, and by
    the last part of the name where no other has it. class_map: its labels are the rows of classes.
    """

    content: dict
    files: list[str]
    rows: dict[int | str, int]
    class_map: ClassMap
    objects: Boxes

    def image_of(self, result: dict) -> int | None:
        """Return the row of a result's image. The name goes first: tools/predict.py takes a number in it for the id."""
        name = str(result.get('file_name'))
        keys = (name, name.rpartition('/')[2], as_id(result.get('image_id')))
        return next((self.rows[key] for key in keys if key in self.rows), None)


def read_truth(file: str | Path) -> Truth:
    """Read annotations in COCO form; ids of images may be text."""
    table, content = AnnotationTable(file), read_annotations(file)
    ids = [as_id(image['id']) for name, block in list_blocks(file) if name == 'images' for image in block]
    ids = ids if numbers_of(ids) else sorted(ids)
    files, class_map, columns = list(table.file_names), ClassMap.contiguous(table.categories), table.objects
    bases = [name.rpartition('/')[2] for name in files]
    often = Counter(bases)
    rows = {base: row for row, base in enumerate(bases) if often[base] == 1}
    rows |= {key: row for keys in (files, ids) for row, key in enumerate(keys)}
    images = np.repeat(np.arange(len(files)), np.diff(table.starts))
    labels, scores = columns.labels(class_map), np.ones(len(images))
    objects = Boxes(images, labels, columns.boxes_xywh, columns.areas, scores, columns.crowd)
    return Truth(content, files, rows, class_map, objects)


def read_results(file: str | Path, truth: Truth) -> Boxes:
    """Read detections in COCO's result form.

    Raises:
        UserError: the file is no list of results, or one of them has a bad box or score, an unknown image or category.
    """
    try:
        results = json.loads(Path(file).read_text(encoding='utf-8'))
    except (ValueError, RecursionError) as error:
        raise UserError(f'{file} is not JSON ({error}): write it again') from error
    if not isinstance(results, list) or not all(isinstance(result, dict) for result in results):
        form = '[{"image_id": 1, "category_id": 1, "bbox": [x, y, width, height], "score": 0.9}, ...]'
        raise UserError(f'{file} is no list of results, which COCO has as {form}')
    rows, labels = [], truth.class_map.label_of
    for number, result in enumerate(results):
        category, problem = as_id(result.get('category_id')), box_problem(result)
        image, label = truth.image_of(result), labels.get(category)
        if not is_finite(result.get('score')):
            problem = f'has score {result.get("score")!r}: it must be a finite number'
        if label is None:
            problem = f'has category {category!r}, but those of the annotations are {shorten(labels)}'
        if image is None:
            given = {key: result.get(key) for key in ('image_id', 'file_name')}
            problem = f'has image {given}, which is none of the {len(truth.files)} of the annotations'
        if problem:
            raise UserError(f'{file}: result {number} {problem}')
        rows.append((image, label, *result['bbox'], result['score']))
    columns = np.array(rows, dtype=np.float64).reshape(-1, 7)
    images, labels = columns[:, :2].astype(np.int64).T
    crowd = np.zeros(len(columns), dtype=bool)
    return ranked(Boxes(images, labels, columns[:, 2:6], columns[:, 4:6].prod(1), columns[:, 6], crowd))


def ranked(found: Boxes) -> Boxes:
    """Sort detections, in any order, as `Boxes` says, and keep the best of each class in an image."""
    order = np.lexsort((-found.scores, found.labels, found.images))
    group = found.images[order] * (found.labels.max(initial=0) + 1) + found.labels[order]
    order = order[np.arange(len(order)) - np.searchsorted(group, group) < MOST_DETECTIONS]
    return found[order[np.lexsort((-found.scores[order], found.images[order]))]]


def overlaps(boxes_xywh: np.ndarray, objects_xywh: np.ndarray, crowd: np.ndarray) -> np.ndarray:
    """Return the IoU [N, T] of boxes [N, 4] and objects [T, 4]; of a crowd region ([T] bool), the share of the box in it."""
    low = np.maximum(boxes_xywh[:, None, :2], objects_xywh[:, :2])
    corners = boxes_xywh[:, :2] + boxes_xywh[:, 2:], objects_xywh[:, :2] + objects_xywh[:, 2:]
    shared = (np.minimum(corners[0][:, None], corners[1]) - low).clip(0).prod(-1)
    mine = boxes_xywh[:, None, 2:].prod(-1)
    union = np.where(crowd, mine, mine + objects_xywh[:, 2:].prod(-1) - shared)
    return np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)


def match(iou: np.ndarray, may: np.ndarray, crowd: np.ndarray, least: float) -> np.ndarray:
    """Give each of N detections, by falling score, the free object that it overlaps most, as COCO does.

    iou: [N, T]. may: [N, T] bool, whether a pair is allowed. crowd: [T] bool, regions for detections that get no object. least:
    IoU of a pair. Returns the objects [N], -1 for none.
    """
    free, matched, candidate = ~crowd, np.full(len(iou), -1), may & (iou >= min(least, 1 - 1e-10))
    for row in np.flatnonzero(candidate.any(axis=1)):
        some = candidate[row] & free
        some = some if some.any() else candidate[row] & crowd
        if some.any():  # COCO's code takes the last of equal ones
            matched[row] = len(some) - 1 - np.where(some, iou[row], -1)[::-1].argmax()
            free[matched[row]] = False
    return matched


def by_image(found: Boxes, objects: Boxes) -> Iterator[tuple[slice, slice]]:
    """Yield the rows of detections and of objects of each image that has detections."""
    for image in np.unique(found.images):
        first, second = (np.searchsorted(x.images, (image, image + 1)).tolist() for x in (found, objects))
        yield slice(*first), slice(*second)


def judge(found: Boxes, objects: Boxes, least: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the object of each detection, -1 for none, and its kind, a row of KINDS, FOUND or IGNORED; both [N].

    What is in the wrong place is not of the wrong class, and what is of the wrong class is no duplicate: TIDE's order.
    """
    matched, kinds = np.full((2, len(found.scores)), -1)
    for mine, theirs in by_image(found, objects):
        crowd = objects.crowd[theirs]
        iou = overlaps(found.boxes_xywh[mine], objects.boxes_xywh[theirs], crowd)  # [n, t]
        same = found.labels[mine, None] == objects.labels[theirs]
        some = match(iou, same, crowd, least)
        matched[mine] = np.where(some >= 0, some + theirs.start, -1)
        own, other = (np.where(pair & ~crowd, iou, 0).max(axis=1, initial=0) for pair in (same, ~same))
        rules = [(own >= NEAR) & (own < least), other >= least, own >= least, other >= NEAR]
        wrong = np.select(rules, [PLACE, CLASS, DUPLICATE, BOTH], BACKGROUND)
        right = np.where(np.append(crowd, False)[some], IGNORED, FOUND)
        kinds[mine] = np.where(some >= 0, right, wrong)
    return matched, kinds


def missed(objects: Boxes, matched: np.ndarray) -> np.ndarray:
    """Return which objects [T], crowd regions aside, are not among those matched ([N], -1 for none)."""
    lost = ~objects.crowd
    lost[matched[matched >= 0]] = False
    return lost


def curve_of(scores: np.ndarray, right: np.ndarray, num_objects: int) -> np.ndarray:
    """Return score, precision, recall and F1 [P, 4] of what has at least each of the P different scores, from the highest.

    scores: [N]. right: [N] bool, whether a detection has an object.
    """
    order = np.argsort(-scores, kind='stable')
    scores, hits = scores[order], np.cumsum(right[order])
    last = np.flatnonzero(np.append(scores[1:] != scores[:-1], True)[: len(scores)])
    hits, shown, all_ = hits[last], last + 1, max(num_objects, 1)
    return np.stack([scores[last], hits / shown, hits / all_, 2 * hits / (shown + num_objects)], axis=1)


def drawn(curve: np.ndarray) -> dict:
    """Return some `points` of a curve, even in score and recall, and the `best` by F1; of equals, that of highest score."""
    if not curve[:, 3].any():
        return {'points': [], 'best': None}
    rows = [best := int(curve[:, 3].argmax())]
    for rising in (-curve[:, 0], curve[:, 2]):
        rows.extend(np.searchsorted(rising, np.linspace(rising[0], rising[-1], PLOT_POINTS)))
    return {'points': curve[np.unique(rows)].round(4).tolist(), 'best': curve[best].tolist()}


def confusion_matrix(
    found: Boxes, objects: Boxes, matched: np.ndarray, kinds: np.ndarray, least: float, num_classes: int
) -> np.ndarray:
    """Count objects (rows) by what they are detected as (columns), [K + 1, K + 1]; last are background, and missed.

    An object that no detection of its class has goes to one of another class. Sums are those of objects and detections.
    """
    partner, lost = matched.copy(), missed(objects, matched)
    for mine, theirs in by_image(found, objects):
        wrong = np.arange(mine.start, mine.stop)[kinds[mine] >= 0]
        iou = overlaps(found.boxes_xywh[wrong], objects.boxes_xywh[theirs], objects.crowd[theirs])
        some = match(iou, lost[None, theirs], ~lost[theirs], least)
        partner[wrong] = np.where(some >= 0, some + theirs.start, -1)
    counted, lost = kinds != IGNORED, missed(objects, partner)
    rows = np.append(objects.labels, num_classes)[partner]
    matrix = tally(rows[counted], found.labels[counted], (num_classes + 1, num_classes + 1))
    matrix[:-1, -1] = np.bincount(objects.labels[lost], minlength=num_classes)
    return matrix


def tally(rows: np.ndarray, columns: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Count how often each place of an array, by rows [N] and columns [N], occurs."""
    return np.bincount(rows * shape[1] + columns, minlength=shape[0] * shape[1]).reshape(shape)


def average_precision(found: Boxes, truth: Truth) -> Summary:
    """Evaluate all images, those without detections too."""
    evaluator, boxes = CocoEvaluator(truth.content, truth.class_map), found.boxes_xywh.copy()
    boxes[:, 2:] += boxes[:, :2]
    columns = {'scores': found.scores, 'labels': found.labels, 'boxes': boxes}
    bounds = np.searchsorted(found.images, np.arange(len(truth.files) + 1)).tolist()
    for row, image_id in enumerate(sorted(image['id'] for image in truth.content['images'])):
        mine = slice(bounds[row], bounds[row + 1])
        evaluator.update({image_id: {key: torch.from_numpy(values[mine]) for key, values in columns.items()}})
    return evaluator.summaries()['bbox']


def analyze(found: Boxes, truth: Truth, least: float, threshold: float | None = None) -> dict:
    """Return the numbers of a report, as JSON has them.

    threshold: score from which a detection counts; None: that of the best F1 of all classes together.

    iou, threshold: as used. names: of K classes, and of all. stats: COCO's twelve numbers. classes: AP of each, [K].
    objects, missed: [K, 3], small to large. false: [K, 5] by kind. confusion: [K + 1, K + 1]. curves: [K + 1] (`drawn`).
    images, silent: number of all, and of those without detections. worst: images with most errors: name, number of errors
    by kind [6], and marks, each with its box [4], kind (of `kinds`) and text.
    """
    objects, names, num_images = truth.objects, truth.class_map.names, len(truth.files)
    num_classes, silent = len(names), num_images - len(np.unique(found.images))
    summary, (matched, kinds), curves = average_precision(found, truth), judge(found, objects, least), []
    for label in range(num_classes + 1):
        mine, theirs = ((x.labels == label) | (label == num_classes) for x in (found, objects))
        mine, number = mine & (kinds != IGNORED), int((theirs & ~objects.crowd).sum())
        curves.append(drawn(curve_of(found.scores[mine], kinds[mine] == FOUND, number)))
    if threshold is None:
        threshold = (curves[-1]['best'] or [USUAL_SCORE])[0]
    shown = found.scores >= threshold
    found, matched, kinds = found[shown], matched[shown], kinds[shown]
    lost, wrong, sizes = missed(objects, matched), kinds >= 0, np.digitize(objects.areas, SIZE_BOUNDS)
    errors = tally(found.images[wrong], kinds[wrong], (num_images, MISSED + 1))
    errors[:, MISSED] = np.bincount(objects.images[lost], minlength=num_images)
    object_kinds, worst = np.where(lost, MISSED, MISSED + 1), []
    for row in np.argsort(-errors.sum(1), kind='stable')[: min(WORST, int(errors.any(1).sum()))].tolist():
        marks = marks_of(objects, ~objects.crowd & (objects.images == row), object_kinds, names)
        marks += marks_of(found, wrong & (found.images == row), kinds, names)
        worst.append({'name': truth.files[row], 'errors': errors[row].tolist(), 'marks': marks})
    by_size = [tally(objects.labels[x], sizes[x], (num_classes, 3)).tolist() for x in (~objects.crowd, lost)]
    return {
        'iou': least, 'threshold': threshold, 'kinds': [*KINDS, 'missed', 'found'], 'names': [*names, 'all classes'],
        'stats': summary.numbers, 'classes': summary.per_class,
        'objects': by_size[0], 'missed': by_size[1], 'curves': curves, 'worst': worst,
        'false': tally(found.labels[wrong], kinds[wrong], (num_classes, len(KINDS))).tolist(),
        'confusion': confusion_matrix(found, objects, matched, kinds, least, num_classes).tolist(),
        'images': num_images, 'silent': silent,
    }  # fmt: skip


def marks_of(boxes: Boxes, chosen: np.ndarray, kinds: np.ndarray, names: Sequence[str | None]) -> list[list]:
    """Return box, kind and text of those chosen ([N] bool), the best ones last. kinds: [N]."""
    marks = []
    for row in np.flatnonzero(chosen)[::-1].tolist():
        text = f'{names[boxes.labels[row]]}' + ('' if kinds[row] >= MISSED else f' {boxes.scores[row]:.2f}')
        marks.append([boxes.boxes_xywh[row].round(1).tolist(), int(kinds[row]), text])
    return marks


def page(report: dict, folder: str | Path, title: str) -> str:
    """Return the page of a report; the images are read from a folder."""
    images = []
    for entry in report['worst']:
        image = Image.fromarray(read_image(Path(folder, entry['name'])).permute(1, 2, 0).numpy())
        size, stream = image.size, io.BytesIO()
        image.thumbnail((THUMBNAIL, THUMBNAIL))
        image.save(stream, 'JPEG', quality=85)
        images.append({**entry, 'size': size, 'jpeg': base64.b64encode(stream.getvalue()).decode()})
    data = json.dumps({**report, 'worst': images, 'title': title})
    return PAGE.replace('DATA', data.replace('<', '\\u003c'))  # so that no name ends the script


def get_args_parser() -> FlagParser:
    parser = FlagParser('analyze_errors.py', description=__doc__)
    parser.add_argument('--predictions', required=True, metavar='FILE', help="detections in COCO's form")
    parser.add_argument('--ann', required=True, metavar='FILE', help='annotations in COCO form')
    parser.add_argument('--images', required=True, metavar='DIR', help='folder of the images')
    parser.add_argument('--output', default='report.html', metavar='FILE', help='page (default: %(default)s)')
    parser.add_argument('--iou', default=0.5, type=real(NEAR, 1.0),
                        help='IoU from which a detection has an object (default: %(default)s)')  # fmt: skip
    parser.add_argument('--score_thr', type=real(0, 1),
                        help='lowest score that counts (default: that of the best F1 of all classes)')  # fmt: skip
    return parser


def main(args: Namespace) -> str:
    if Path(args.output).suffix.lower() not in ('.html', '.htm'):
        raise UserError(f'--output {args.output}: let it end in .html')
    truth = read_truth(args.ann)
    report = analyze(read_results(args.predictions, truth), truth, args.iou, args.score_thr)
    check_files([image['name'] for image in report['worst']], args.images, args.ann)
    text = page(report, args.images, Path(args.predictions).name)
    save_atomically(args.output, lambda path: path.write_text(text, encoding='utf-8'))
    false, lost = np.sum(report['false']), np.sum(report['missed'])
    return f'{args.output}: {false} false positives and {lost} missed, from score {report["threshold"]:g} on'


PAGE = r"""<!DOCTYPE html><html lang=en><meta charset=utf-8><title>Errors</title><meta http-equiv=Content-Security-Policy
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"><style>
body{font:15px/1.45 system-ui,sans-serif;color:#1d2430;background:#f6f7f9;max-width:1240px;margin:auto;padding:8px 24px 60px}
h1{font-size:24px;margin:18px 0 4px}h2{font-size:18px;margin:38px 0 6px}p{margin:4px 0 10px;color:#56606f}
table,.plot,.card{background:#fff;box-shadow:0 0 0 1px #dfe3e8}table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:4px 10px;text-align:right;border-bottom:1px solid #eceff3}th{font-size:13px;background:#eef1f5;vertical-align:bottom}
.names :is(td,th):first-child,.bars td{text-align:left}.wide{overflow:auto;max-height:640px}.wide th{position:sticky;top:0}
.sort th{cursor:pointer}.sort tr:last-child td{font-weight:600;background:#f4f6f9;position:sticky;bottom:0}.up:after{content:' \25B2'}
.down:after{content:' \25BC'}.names td:first-child{white-space:nowrap}.matrix td{padding:2px 6px}
.matrix span{writing-mode:vertical-rl;transform:rotate(180deg)}.row{display:flex;flex-wrap:wrap;gap:20px;align-items:start}
button{font:inherit;border:1px solid #cfd5dd;border-radius:6px;background:#fff;padding:3px 10px;margin-right:4px;cursor:pointer}
button.on{background:#1d2430;color:#fff}i{display:inline-block;width:11px;height:11px;border-radius:3px;margin-right:6px}
#chips{position:sticky;top:0;background:#f6f7f9;padding:8px 0;z-index:1}.bar{height:14px;display:block}.plot{width:540px;max-width:100%}
.plot text{font-size:11px;fill:#56606f;text-anchor:middle}.plot path{stroke:#e6e9ee}.plot :is(polyline,circle){fill:none;stroke:#b9c2cf}
.plot .on *{stroke:#0b62d6;stroke-width:2.2}.plot circle{stroke:none!important}.plot .on circle{fill:#0b62d6}
.card{margin:0;width:285px;cursor:zoom-in}.card svg{display:block;width:100%;height:285px;background:#e6e9ee}
.card figcaption{padding:5px 9px;overflow-wrap:anywhere}.card.big{width:880px;max-width:100%}.card.big svg{height:80vh}
.card:not(.big) .found text{display:none}
.card text{font-size:var(--size);stroke:#000;stroke-width:.2em;paint-order:stroke;pointer-events:none}
.card.big text{font-size:calc(var(--size)/2.5)}.card rect{fill:#fff0;stroke-width:2;vector-effect:non-scaling-stroke}
</style><body><script>
const data = DATA;
const COLOURS = ['#ff4d55', '#ff9a2e', '#e06bff', '#5b9bff', '#ffe14d', '#29e0ee', '#4fe063'];
const {names, kinds, iou} = data, K = names.length - 1, KEYS = ['AP', 'AP50', 'AP75', 'AR100'], SIZES = ['small', 'medium', 'large'];
const MEANINGS = [`IoU of ${iou} or more with an object of another class`, `IoU from 0.1 to ${iou} with an object of its class`,
  `IoU from 0.1 to ${iou} with an object of another class`, 'its object has a detection of a higher score',
  'IoU under 0.1 with every object', 'object without a detection of its class'];
const esc = text => String(text).replace(/[&<>"]/g, sign => `&#${sign.charCodeAt()};`);
const percent = share => share < 0 ? '-' : (100 * share).toFixed(1);
const join = (items, text) => items.map(text).join('');
const sum = numbers => numbers.reduce((one, other) => one + other, 0);
const [objects, lost, wrong] = [data.objects, data.missed, data.false].map(rows =>
  [...rows, rows[0].map((_, at) => sum(rows.map(row => row[at])))]);  // the last row has the sums
const errors = [...wrong[K], sum(lost[K])];
const table = (head, rows, kind) => `<div class=wide><table class="${kind}"><thead><tr>${join(head, name => `<th>${name}`)}<tbody>` +
  join(rows, row => '<tr>' + join(row, cell => `<td>${esc(cell)}`)) + '</table></div>';
const chip = (kind, tag = 'button') => `<${tag} data-kind=${kind}><i style="background:${COLOURS[kind]}"></i>${kinds[kind]}</${tag}>`;
function best(row) {
  const [score, precision, recall, f1] = data.curves[row].best || [];
  return score === undefined ? ['-', '-', '-', '-'] : [percent(f1), score.toFixed(5), percent(precision), percent(recall)];
}
function plot(across, up, titles) {
  const x = share => (45 + 340 * Math.min(Math.max(share, 0), 1)).toFixed(1), y = share => (275 - 260 * share).toFixed(1);
  return `<svg class=plot viewBox="0 0 400 312">${join([0, .2, .4, .6, .8, 1], tick => `<path d="M45 ${y(tick)}H385M${x(tick)} 15V275"/>
    <text x=${x(tick)} y=291>${tick}</text><text x=30 y=${+y(tick) + 4}>${tick}</text>`)}
    <text x=215 y=307>${titles[0]}</text><text x=-145 y=13 transform="rotate(-90)">${titles[1]}</text>
    ${join(data.curves, ({points, best}, row) => `<g data-class=${row}>
      <polyline points="${points.map(point => x(point[across]) + ',' + y(point[up])).join(' ')}"/>
      ${best ? `<circle r=4 cx=${x(best[across])} cy=${y(best[up])} />` : ''}</g>`)}</svg>`;
}
function matrixRow(row, at) {
  const name = esc(at < K ? names[at] : 'background'), total = sum(row) || 1;
  return `<tr><td>${name}` + join(row, (count, to) => `<td title="${name}: ${esc(to < K ? names[to] : 'missed')}"
    style="background:rgba(${at === to ? '40,180,80' : '240,50,60'},${.9 * count / total})">${count || ''}`);
}
function card({size: [width, height], jpeg, name, errors, marks}) {
  const size = Math.max(width, height) / 20;
  return `<figure class=card data-errors="${errors}"><svg viewBox="0 0 ${width} ${height}" style="--size:${size}px">
    <image width=${width} height=${height} href="data:image/jpeg;base64,${jpeg}" />
    ${join(marks, ([[x, y, wide, high], kind, text]) => `<g data-mark=${kind} class="${kinds[kind]}"><title>${esc(text)}: ${kinds[kind]}</title>
      <rect x=${x} y=${y} width=${wide} height=${high} stroke="${COLOURS[kind]}" stroke-dasharray="${kind === 5 ? '5 4' : ''}" />
      <text x=${Math.max(x, 0)} y=${Math.max(y - size / 4, size)} fill="${COLOURS[kind]}">${esc(text)}</text></g>`)}
    </svg><figcaption>errors: ${sum(errors)} in ${esc(name)}</figcaption></figure>`;
}
document.body.innerHTML = `<h1>Errors of ${esc(data.title)}</h1><p>${data.images} images, ${sum(objects[K])} objects. At IoU ${iou}
and from score ${+data.threshold.toFixed(5)} on: ${sum(objects[K]) - errors[5]} found, ${sum(wrong[K])} false positives, ${errors[5]}
missed. ${data.silent ? `The file has no detection in ${data.silent} of the images.` : ''}</p>
<h2>Average precision</h2>${table(Object.keys(data.stats), [Object.values(data.stats).map(percent)], '')}
<h2>Classes</h2><p>Best F1 at IoU ${iou}, and the lowest score of the detections that give it. A click on a title sorts.</p>
${table(['class', 'objects', ...KEYS, 'best F1', 'at score', 'precision', 'recall'], names.map((name, row) => [name,
  sum(objects[row]), ...KEYS.map(key => percent((data.classes[row] || data.stats)[key])), ...best(row)]), 'names sort')}
<h2>Kinds of errors</h2><p>A click on a kind shows its images below. An object with a detection in the wrong place can be missed, too.</p>
<div class=row><table class=bars>${join(errors, (number, kind) => `<tr><td>${chip(kind)}<td>${number}<td style="width:200px">
  <span class=bar style="background:${COLOURS[kind]};width:${100 * number / Math.max(...errors, 1)}%"></span><td>${MEANINGS[kind]}`)}</table>
${table(['size', 'objects', 'missed', '%'], SIZES.map((size, at) => [size, objects[K][at], lost[K][at],
  percent(objects[K][at] ? lost[K][at] / objects[K][at] : -1)]), 'names')}</div><p></p>
${table(['class', 'objects', ...kinds.slice(0, 6), ...SIZES.map(size => `${size} missed`)], names.map((name, row) =>
  [name, sum(objects[row]), ...wrong[row], sum(lost[row]), ...lost[row]]), 'names sort')}
<h2>Confusion matrix</h2><p>An object counts once. Further detections of it are in the row of the background.</p><div class=wide>
<table class="names matrix"><tr><th>object \\ detected as${join([...names.slice(0, K), 'missed'], name => `<th><span>${esc(name)}</span>`)}
${join(data.confusion, matrixRow)}</table></div>
<h2>Precision, recall and F1</h2><p><select>${join(names, (name, row) => `<option value=${row}>${esc(name)}`)}</select> <span id=note></span></p>
<div class=row>${plot(2, 1, ['recall', 'precision'])}${plot(0, 3, ['score', 'F1'])}</div>
<h2>Worst images</h2><div id=chips>${join([...errors.keys()], kind => chip(kind))} ${chip(6, 'span')}. <span id=number></span> A click enlarges.</div>
<div class=row>${join(data.worst, card)}</div>`;

const every = (selector, run) => document.querySelectorAll(selector).forEach(run), byId = id => document.getElementById(id);
let chosen;
function filter(kind) {
  chosen = chosen === kind ? undefined : kind;
  every('button', one => one.classList.toggle('on', one.dataset.kind === chosen));
  every('.card', one => {
    const counts = one.dataset.errors.split(',').map(Number), count = chosen ? counts[chosen] : sum(counts);
    one.hidden = !count; one.style.order = -count;
  });
  every('[data-mark]', one => { one.style.display = !chosen || one.dataset.mark === chosen || +one.dataset.mark > 4 ? '' : 'none'; });
  byId('number').textContent = `${document.querySelectorAll('.card:not([hidden])').length} of ${data.worst.length} images are shown.`;
}
function select(row) {
  every('[data-class]', one => one.classList.toggle('on', one.dataset.class === row));
  every('.plot .on', one => one.parentNode.append(one));  // over the others
  const [f1, at, precision, recall] = best(row);
  byId('note').textContent = `best F1 ${f1} from score ${at} on, with precision ${precision} and recall ${recall}`;
}
function sort(title) {
  const body = title.closest('table').tBodies[0], rows = [...body.rows], last = rows.pop(), at = title.cellIndex;
  const cell = row => row.cells[at].textContent, number = row => +cell(row).replace(/^-$/, -1), down = title.className !== 'down';
  rows.sort((one, other) => at ? number(other) - number(one) : cell(one).localeCompare(cell(other)));
  body.append(...(down ? rows : rows.reverse()), last);
  for (const one of title.parentNode.cells) one.className = one !== title ? '' : down ? 'down' : 'up';
}
every('.sort th', one => { one.onclick = () => sort(one); });
every('button', one => { one.onclick = () => { filter(one.dataset.kind); one.closest('.bars') && byId('chips').scrollIntoView(); }; });
every('.card', one => { one.onclick = () => one.classList.toggle('big'); });
every('select', one => { one.onchange = () => select(one.value); one.value = K; one.onchange(); });
filter();
</script>
"""


if __name__ == '__main__':
    run_command(main, get_args_parser())
