"""
Show the errors of a detector: one HTML page, without server or network, from predictions and annotations.

  python tools/analyze_errors.py --predictions predictions.json --ann val.json --images DIR

Predictions have COCO's result form, as tools/predict.py writes it. hotcoco computes the pairs of detections
and objects, AP and the confusion matrix. False positives have the kinds of TIDE (arXiv:2008.08115, Sec. 2.2),
in the order of its official code, and count from --score_thr on. Left out: masks, LVIS's rules for images
that are annotated in part, and TIDE's loss of AP by kind.
"""

import itertools
import json
import sys
from argparse import Namespace
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torchvision.ops import box_convert, box_iou

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


from datasets.annotations import AnnotationTable, labels_of
from datasets.class_map import ClassMap
from datasets.coco_eval import Summary, summarize_arrays
from datasets.coco_json import (
    Issues,
    as_id,
    box_problem,
    decode_entry,
    numbers_of,
    read_lists,
    shorten,
)
from datasets.image_io import ImageReader
from datasets.image_names import find_images
from datasets.segmentations import is_finite
from util.command_line import FlagParser, float_range, run_command
from util.errors import UserError
from util.files import save_atomically
from util.page import build_page, thumbnail

KINDS = ('wrong class', 'wrong place', 'wrong class and place', 'duplicate', 'background', 'missed', 'found')
CLASS, PLACE, BOTH, DUPLICATE, BACKGROUND, MISSED, FOUND, IGNORED = range(8)
SIZE_BOUNDS = (32**2, 96**2)  # smallest areas of medium and of large objects
NEAR = 0.1  # a detection with a smaller IoU with every object is background
DEFAULT_SCORE = 0.3  # threshold if no detection is right
WORST, PLOT_POINTS = 24, 150


@dataclass(frozen=True)
class Boxes:
    """N objects, or detections, in order of image; detections by falling score in each image.

    images, labels: rows of image and class. boxes_xywh: [N, 4]; it and areas in pixels. scores: for an object
    the score of its detection, or -1. kinds: indices into KINDS, or IGNORED: crowd regions, their detections,
    and those after the best 100 of a class in an image. Before `classify`, objects are missed or ignored.
    """

    images: np.ndarray
    labels: np.ndarray
    boxes_xywh: np.ndarray
    areas: np.ndarray
    scores: np.ndarray
    kinds: np.ndarray

    def __getitem__(self, rows: np.ndarray | slice) -> 'Boxes':
        return Boxes(*(column[rows] for column in vars(self).values()))

    @property
    def counted(self) -> np.ndarray:
        return self.kinds != IGNORED


@dataclass(frozen=True)
class Truth:
    """Annotations of I images and K classes.

    files: [I] names. rows: rows of images by id, by name, and by the last part of the name if it is unique.
    class_map: its labels are the rows of classes.
    """

    files: list[str]
    rows: dict[int | str, int]
    class_map: ClassMap
    objects: Boxes

    def image_of(self, result: dict) -> int | None:
        """Return the row of a result's image, by its name first: predict.py makes ids of numbers in names."""
        name = str(result.get('file_name'))
        keys = (name, name.rpartition('/')[2], as_id(result.get('image_id')))
        return next((self.rows[key] for key in keys if key in self.rows), None)


def read_truth(file: str | Path) -> Truth:
    """Read annotations in COCO form; ids of images may be text."""
    table = AnnotationTable(file)
    ids = [as_id(decode_entry(raw)['id']) for raw in read_lists(file, Issues())['images']]
    ids = ids if numbers_of(ids) else sorted(ids)
    files, class_map, columns = list(table.file_names), ClassMap.contiguous(table.categories), table.objects
    bases = [name.rpartition('/')[2] for name in files]
    counts = Counter(bases)
    rows = {base: row for row, base in enumerate(bases) if counts[base] == 1}
    rows |= {key: row for keys in (files, ids) for row, key in enumerate(keys)}
    images = np.repeat(np.arange(len(files)), np.diff(table.starts))
    labels, scores = labels_of(columns, class_map), np.full(len(images), -1.0)
    kinds = np.where(columns.crowd, IGNORED, MISSED)
    return Truth(
        files, rows, class_map, Boxes(images, labels, columns.boxes_xywh, columns.areas, scores, kinds)
    )


def read_results(file: str | Path, truth: Truth) -> Boxes:
    """Read detections in COCO's result form.

    Raises:
        UserError: the file is not a list of results, or a result has an invalid box or score, or an unknown
            image or category.
    """
    try:
        results = json.loads(Path(file).read_text(encoding='utf-8'))
    except (ValueError, RecursionError) as error:
        raise UserError(f'{file} is not JSON ({error}): write it again') from error
    if not isinstance(results, list) or not all(isinstance(result, dict) for result in results):
        form = '[{"image_id": 1, "category_id": 1, "bbox": [x, y, width, height], "score": 0.9}, ...]'
        raise UserError(f'{file} is not a list of results, which COCO has as {form}')
    rows, labels = [], truth.class_map.label_of
    for number, result in enumerate(results):
        category, problem = as_id(result.get('category_id')), box_problem(result)
        image, label = truth.image_of(result), labels.get(category)
        if not is_finite(result.get('score')):
            problem = f'has score {result.get("score")!r}: it must be a finite number'
        if label is None:
            problem = f'has category {category!r}, but those of the annotations are {shorten(labels)}'
        if image is None:
            names = {key: result.get(key) for key in ('image_id', 'file_name')}
            problem = f'has image {names}, which is not among the {len(truth.files)} of the annotations'
        if problem:
            raise UserError(f'{file}: result {number} {problem}')
        rows.append((image, label, *result['bbox'], result['score']))
    columns = np.array(rows, dtype=np.float64).reshape(-1, 7)
    images, labels = columns[:, :2].astype(np.int64).T
    kinds = np.full(len(columns), FOUND)
    detections = Boxes(images, labels, columns[:, 2:6], columns[:, 4:6].prod(1), columns[:, 6], kinds)
    return detections[np.lexsort((-detections.scores, images))]


def evaluate_boxes(detections: Boxes, objects: Boxes, names: Sequence[str | None]) -> tuple[dict, Any]:
    """Return the objects in COCO form, and a `hotcoco.COCOeval` of them.

    Ids are rows + 1. names: of K classes.
    """
    import hotcoco

    keys = 'id', 'image_id', 'category_id', 'bbox', 'area', 'iscrowd'
    columns = objects.images, objects.labels, objects.boxes_xywh, objects.areas, ~objects.counted
    rows = zip(itertools.count(1), *(column.tolist() for column in columns))
    truth = {
        'images': [{'id': image} for image in np.union1d(detections.images, objects.images).tolist()],
        'categories': [{'id': label, 'name': str(name)} for label, name in enumerate(names)],
        'annotations': [dict(zip(keys, row, strict=True)) for row in rows],
    }
    coco = hotcoco.COCO(truth)
    results = np.column_stack(
        [detections.images, detections.boxes_xywh, detections.scores, detections.labels]
    )
    return truth, hotcoco.COCOeval(coco, coco.load_res(results), 'bbox')


def compute_summary(detections: Boxes, objects: Boxes, names: Sequence[str | None]) -> Summary:
    truth, evaluator = evaluate_boxes(detections, objects, names)
    evaluator.evaluate()
    evaluator.accumulate()
    return summarize_arrays(truth, *(np.asarray(evaluator.eval[key]) for key in ('precision', 'recall')))


def classify(
    detections: Boxes, objects: Boxes, min_iou: float, names: Sequence[str | None]
) -> tuple[Boxes, Boxes]:
    """Return detections and objects with their kinds, and objects with the scores of their detections.

    By COCO's rules detections choose objects by falling score. An object has at most one detection; a crowd
    region has any number of those without an object. The kinds of the others are tested in TIDE's order:
    wrong place, wrong class, duplicate. min_iou: IoU of a pair.
    """
    _, evaluator = evaluate_boxes(detections, objects, names)
    evaluator.params.iou_thrs = [min_iou]
    evaluator.evaluate()
    pairs = evaluator.image_diagnostics(min_iou)
    kinds = np.full(len(detections.scores), IGNORED)  # these have no status
    for number, status in pairs['dt_status'].items():
        kinds[number - 1] = FOUND if status == 'tp' else BACKGROUND
    for image in np.unique(detections.images[kinds == BACKGROUND]):
        rows, columns = (slice(*np.searchsorted(x.images, (image, image + 1))) for x in (detections, objects))
        boxes = (detections.boxes_xywh[rows], objects.boxes_xywh[columns])
        iou = box_iou(*(box_convert(torch.from_numpy(x), 'xywh', 'xyxy') for x in boxes)).numpy()  # [n, t]
        iou = np.where(objects.counted[columns], np.nan_to_num(iou), 0)
        same_class = detections.labels[rows, None] == objects.labels[columns]
        same, other = (np.where(pair, iou, 0).max(axis=1, initial=0) for pair in (same_class, ~same_class))
        rules = [(same >= NEAR) & (same < min_iou), other >= min_iou, same >= min_iou, other >= NEAR]
        errors = np.select(rules, [PLACE, CLASS, DUPLICATE, BOTH], BACKGROUND)
        kinds[rows] = np.where(kinds[rows] == BACKGROUND, errors, kinds[rows])
    scores, object_kinds = objects.scores.copy(), objects.kinds.copy()
    for number, detection in pairs['gt_match'].items():
        scores[number - 1], object_kinds[number - 1] = detections.scores[detection - 1], FOUND
    return replace(detections, kinds=kinds), replace(objects, scores=scores, kinds=object_kinds)


def confusion_matrix(
    detections: Boxes, objects: Boxes, min_iou: float, names: Sequence[str | None]
) -> np.ndarray:
    """Count objects by their class (rows) and that of their detections (columns), [K + 1, K + 1].

    The last row is background, the last column missed. An object belongs to the detection of the highest
    score that overlaps it, of any class.
    """
    _, evaluator = evaluate_boxes(detections[detections.counted], objects[objects.counted], names)
    return evaluator.confusion_matrix(min_iou, max_det=len(detections.scores))['matrix']


def tally(rows: np.ndarray, columns: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Return an array with the number of times that each pair of rows [N] and columns [N] occurs."""
    return np.bincount(rows * shape[1] + columns, minlength=shape[0] * shape[1]).reshape(shape)


def compute_curve(scores: np.ndarray, right: np.ndarray, num_objects: int) -> np.ndarray:
    """Return score, precision, recall and F1 [P, 4] with each of the P different scores as the threshold.

    scores: [N]. right: [N] bool, whether a detection has an object.
    """
    order = np.argsort(-scores, kind='stable')
    scores, hits = scores[order], np.cumsum(right[order])
    last = np.flatnonzero(np.append(scores[1:] != scores[:-1], True)[: len(scores)])
    hits, total = hits[last], last + 1
    recall, f1 = hits / max(num_objects, 1), 2 * hits / (total + num_objects)
    return np.stack([scores[last], hits / total, recall, f1], axis=1)


def curve_to_json(curve: np.ndarray) -> dict:
    """Return `points` of a curve at even steps of score and recall, and the `best` point by F1 and score."""
    if not curve[:, 3].any():
        return {'points': [], 'best': None}
    rows = [best := int(curve[:, 3].argmax())]
    for rising in (-curve[:, 0], curve[:, 2]):
        rows.extend(np.searchsorted(rising, np.linspace(rising[0], rising[-1], PLOT_POINTS)))
    return {'points': curve[np.unique(rows)].round(4).tolist(), 'best': curve[best].tolist()}


def class_curves(detections: Boxes, objects: Boxes, num_classes: int) -> list[dict]:
    """Return the curve of each class, and of all classes together, [K + 1]."""
    detections, objects, curves = detections[detections.counted], objects[objects.counted], []
    for label in range(num_classes + 1):
        chosen, num_objects = detections, len(objects.labels)
        if label < num_classes:
            chosen = detections[detections.labels == label]
            num_objects = int((objects.labels == label).sum())
        curves.append(curve_to_json(compute_curve(chosen.scores, chosen.kinds == FOUND, num_objects)))
    return curves


def worst_images(detections: Boxes, objects: Boxes, truth: Truth) -> list[dict]:
    """Return the images with most errors: name, number of errors by kind [6], and marks.

    A mark is a box [4], a kind and a text.
    """
    shape, names = (len(truth.files), IGNORED + 1), truth.class_map.names
    errors = tally(detections.images, detections.kinds, shape) + tally(objects.images, objects.kinds, shape)
    errors, worst = errors[:, : MISSED + 1], []
    for row in np.argsort(-errors.sum(1), kind='stable')[: min(WORST, int(errors.any(1).sum()))].tolist():
        marks = []
        for boxes, shown in ((objects, objects.counted), (detections, detections.kinds < MISSED)):
            for index in np.flatnonzero(shown & (boxes.images == row))[::-1].tolist():  # the best ones last
                kind, text = int(boxes.kinds[index]), str(names[boxes.labels[index]])
                text += '' if kind >= MISSED else f' {boxes.scores[index]:.2f}'
                marks.append([boxes.boxes_xywh[index].round(1).tolist(), kind, text])
        worst.append({'name': truth.files[row], 'errors': errors[row].tolist(), 'marks': marks})
    return worst


def analyze(detections: Boxes, truth: Truth, min_iou: float, threshold: float | None = None) -> dict:
    """Return the numbers of a report as plain values; `util/pages/errors.js` shows them.

    threshold: lowest score of a detection that counts; None: that of the best F1 of all classes together.
    """
    names, silent = truth.class_map.names, len(truth.files) - len(np.unique(detections.images))
    summary = compute_summary(detections, truth.objects, names)
    detections, objects = classify(detections, truth.objects, min_iou, names)
    curves = class_curves(detections, objects, len(names))
    if threshold is None:
        threshold = (curves[-1]['best'] or [DEFAULT_SCORE])[0]
    detections = detections[detections.scores >= threshold]
    missed = objects.counted & (objects.scores < threshold)
    objects = replace(objects, kinds=np.where(missed, MISSED, objects.kinds))
    sizes = np.digitize(objects.areas, SIZE_BOUNDS)
    by_size = [tally(objects.labels[x], sizes[x], (len(names), 3)) for x in (objects.counted, missed)]
    false = tally(detections.labels, detections.kinds, (len(names), IGNORED + 1))[:, :MISSED]
    return {
        'iou': min_iou,
        'threshold': threshold,
        'kinds': KINDS,
        'names': [*names, 'all classes'],
        'images': len(truth.files),
        'silent': silent,  # images without detections
        'stats': summary.numbers,  # COCO's twelve numbers
        'classes': summary.per_class,  # [K]
        'objects': by_size[0].tolist(),  # [K, 3], small to large
        'missed': by_size[1].tolist(),
        'false': false.tolist(),  # [K, 5]
        'confusion': confusion_matrix(detections, objects, min_iou, names).tolist(),
        'curves': curves,
        'worst': worst_images(detections, objects, truth),
    }


def page(report: dict, folder: str | Path, title: str) -> str:
    """Return the page of a report; images are read from a folder."""
    reader = ImageReader()
    images = [entry | thumbnail(reader.read(Path(folder, entry['name']))) for entry in report['worst']]
    return build_page('errors', {**report, 'worst': images, 'title': title})


def get_args_parser() -> FlagParser:
    parser = FlagParser('analyze_errors.py', description=__doc__)
    flag = parser.add_argument
    flag('--predictions', required=True, metavar='FILE', help="detections in COCO's form")
    flag('--ann', required=True, metavar='FILE', help='annotations in COCO form')
    flag('--images', required=True, metavar='DIR', help='folder of the images')
    flag('--output', default='report.html', metavar='FILE', help='page (default: %(default)s)')
    text = 'lowest IoU of a detection and its object (default: 0.5)'
    flag('--iou', default=0.5, type=float_range(NEAR, 1.0), help=text)
    text = 'lowest score that counts (default: that of the best F1)'
    flag('--score_thr', type=float_range(0, 1), help=text)
    return parser


def main(args: Namespace) -> str:
    if Path(args.output).suffix.lower() not in ('.html', '.htm'):
        raise UserError(f'--output {args.output}: let it end in .html')
    truth = read_truth(args.ann)
    report = analyze(read_results(args.predictions, truth), truth, args.iou, args.score_thr)
    names = find_images([image['name'] for image in report['worst']], args.images, args.ann)
    for image, name in zip(report['worst'], names, strict=True):
        image['name'] = name
    text = page(report, args.images, Path(args.predictions).name)
    save_atomically(args.output, lambda path: path.write_text(text, encoding='utf-8'))
    false, missed = np.sum(report['false']), np.sum(report['missed'])
    threshold = report['threshold']
    return f'{args.output}: {false} false positives and {missed} missed, from score {threshold:g} on'


if __name__ == '__main__':
    run_command(main, get_args_parser())
