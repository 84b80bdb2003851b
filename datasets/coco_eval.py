"""
COCO's twelve numbers, or LVIS's thirteen, and AP by class, for boxes and masks. The definitions are
pycocotools' and lvis-api's, computed by hotcoco.
"""

import contextlib
import io
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import hotcoco
import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch import Tensor

from datasets.class_map import ClassMap
from datasets.coco_json import as_id, object_area, title_of
from datasets.evaluation import Evaluation, Evaluator
from datasets.image_dataset import ImageDataset
from datasets.segmentations import polygons_of, run_lengths
from util.errors import UserError

STAT_NAMES = ('AP', 'AP50', 'AP75', 'APs', 'APm', 'APl', 'AR1', 'AR10', 'AR100', 'ARs', 'ARm', 'ARl')
# lvis-api's names, whose 300 is the usual number of detections of an image that count; r, c and f are rare,
# common and frequent classes.
LVIS_NAMES = (*STAT_NAMES[:6], 'APr', 'APc', 'APf', 'AR300', 'ARs300', 'ARm300', 'ARl300')
PRECISIONS = STAT_NAMES[:6]
ALL_AREAS, MOST_DETECTIONS, IOU_50, IOU_75 = 0, -1, 0, 5  # indices into the evaluators' arrays
LVIS_DETECTIONS = 300
IGNORED_AREA = 1e12  # pixels, beyond the largest range; hotcoco does not read `ignore`
FEDERATED = ('neg_category_ids', 'not_exhaustive_category_ids')  # an image's lists in LVIS


@dataclass
class Summary:
    """Result for boxes or masks.

    numbers: in [0, 1] by name, -1 where there was no object to find. per_class: one dict per category with
    name, AP, AP50, AP75, AR100 (LVIS: AR300; -1 without objects) and the number of its objects without crowd
    regions. counted: number of detections that count, of an image and category (LVIS: of an image).
    """

    numbers: dict[str, float]
    per_class: list[dict]
    counted: int = 100

    def table(self) -> str:
        """Return text with one line per class and one for all classes."""
        names = [str(row['name']) for row in self.per_class]
        width = max([len(name) for name in [*names, 'class', 'all']])
        columns = ('AP', 'AP50', 'AP75', 'AR300' if 'AR300' in self.numbers else 'AR100')
        titles = (*columns[:-1], f'AR{self.counted}')
        lines = [f'{"class":<{width}}' + ''.join(f'{title:>8}' for title in titles) + f'{"objects":>9}']
        total: dict[str, Any] = {**self.numbers, 'name': 'all'}
        total['objects'] = sum(row['objects'] for row in self.per_class)
        for row in [*self.per_class, total]:
            cells = ''.join(f'{format_percent(row[column]):>8}' for column in columns)
            lines.append(f'{row["name"]:<{width}}{cells}{row["objects"]:>9}')
        if 'APr' in total:
            parts = (('rare', 'APr'), ('common', 'APc'), ('frequent', 'APf'))
            text = ', '.join(f'{word} {format_percent(total[key])}' for word, key in parts)
            lines.append(f'{text}; {self.counted} detections of an image count')
        return '\n'.join(lines)


def format_percent(value: float) -> str:
    return '-' if value < 0 else f'{100 * value:.1f}'


@dataclass
class Detections:
    """N detections in one image, each with a category.

    rows: [N, 6] float64 of x, y, width, height, score, category id. masks: N dicts with category_id,
    segmentation (run lengths) and score; empty if masks are not evaluated.
    """

    rows: np.ndarray
    masks: list[dict]


# Of boxes and masks: title, prefix of the names of their numbers, suffixes of their names in records.
KINDS = {'bbox': ('boxes', '', 'bbox', ''), 'segm': ('masks', 'segm_', 'masks', '_masks')}


class CocoEvaluator(Evaluator):
    """Evaluator by COCO's rules, of the kinds in KINDS."""

    limit = 0  # detections of an image that count by LVIS's rules; 0: COCO's rules

    def __init__(self, ground_truth: dict, class_map: ClassMap, kinds: tuple[str, ...] = ('bbox',)) -> None:
        super().__init__(ground_truth, class_map, kinds)
        if unknown := set(kinds) - set(KINDS):
            raise ValueError(f'kinds {sorted(unknown)} are not known: choose from bbox and segm')

    def read(self, prediction: dict) -> Detections:
        """Keep detections of real categories; class indices that no category uses are dropped."""
        if not prediction:
            return Detections(np.zeros((0, 6)), [])
        class_map, labels = self.class_map, prediction['labels'].tolist()
        if labels and not 0 <= min(labels) <= max(labels) < class_map.num_classes:
            raise UserError(
                f'predicted labels run from {min(labels)} to {max(labels)}, but the data has '
                f'{class_map.num_classes} classes: evaluate the model with the class map that it was trained '
                'with'
            )
        if not all(prediction[key].isfinite().all() for key in ('scores', 'boxes')):
            raise UserError(
                'predicted scores or boxes are not finite: the weights have diverged (take an earlier '
                'checkpoint, and a lower --lr), or 16 bits overflow (evaluate with --amp off)'
            )
        keep = [idx for idx, label in enumerate(labels) if class_map.names[label] is not None]
        boxes_xywh = prediction['boxes'].detach().clone()
        boxes_xywh[:, 2:] -= boxes_xywh[:, :2]
        rows = np.zeros((len(labels), 6))
        rows[:, :4] = boxes_xywh.cpu().numpy()
        rows[:, 4] = prediction['scores'].detach().cpu().numpy()
        rows[:, 5] = [class_map.category_ids[label] for label in labels]
        if 'segm' not in self.kinds:
            return Detections(rows[keep], [])
        scores = prediction.get('mask_scores', prediction['scores']).tolist()
        encoded = prediction.get('segmentation')
        encoded = encode_masks(prediction['masks']) if encoded is None else encoded
        masks = [
            {'category_id': int(rows[idx, 5]), 'segmentation': encoded[idx], 'score': scores[idx]}
            for idx in keep
        ]
        return Detections(rows[keep], masks)

    def compute(self) -> Evaluation:
        """Return the numbers of boxes under their usual names, and those of masks as `segm_NAME`."""
        numbers: dict[str, float] = {}
        record: dict[str, list] = {}
        shown, texts = [], []
        for kind, summary in self.summaries().items():
            title, prefix, kind_in_record, suffix = KINDS[kind]
            numbers |= {f'{prefix}{name}': value for name, value in summary.numbers.items()}
            record[f'test_coco_eval_{kind_in_record}'] = list(summary.numbers.values())
            record[f'per_class{suffix}'] = summary.per_class
            shown += [f'{prefix}AP', f'{prefix}AP50']
            texts.append(f'{title}:\n{summary.table()}' if len(self.kinds) > 1 else summary.table())
        drawn = tuple(f'{KINDS[self.kinds[0]][1]}{name}' for name in PRECISIONS)
        return Evaluation(numbers, tuple(shown), drawn, '\n'.join(texts), record)

    def summaries(self) -> dict[str, Summary]:
        """Return the result of each kind."""
        results = {}
        for kind in self.kinds:
            truth = prepare_ground_truth(self.ground_truth, set(self.detections), kind, self.limit > 0)
            arrays = compute_metrics(truth, result_rows(self.detections, kind), kind, self.limit)
            results[kind] = summarize_arrays(truth, *arrays, self.limit)
        return results


class LvisEvaluator(CocoEvaluator):
    """Evaluator by LVIS's federated rules.

    A class is evaluated in the images that are known to have it or to lack it, by the best 300 detections of
    an image, as lvis-api does by default, or by `limit` of them if it is larger.
    """

    def __init__(
        self,
        ground_truth: dict,
        class_map: ClassMap,
        kinds: tuple[str, ...] = ('bbox',),
        limit: int = LVIS_DETECTIONS,
    ) -> None:
        super().__init__(ground_truth, class_map, kinds)
        self.limit = max(LVIS_DETECTIONS, limit)

    @classmethod
    def build(cls, dataset: ImageDataset, kinds: tuple[str, ...]) -> 'LvisEvaluator':
        if not dataset.federated:
            raise UserError('--evaluator lvis needs the annotations of LVIS: add --dataset_file lvis')
        return cls(dataset.ground_truth, dataset.class_map, kinds, dataset.federated)


def encode_masks(masks: Tensor) -> list[dict]:
    """Encode masks [N, 1, H, W] as COCO's compressed run lengths."""
    binary = (masks[:, 0] > 0.5).cpu().numpy().astype(np.uint8)
    encoded = [coco_mask.encode(np.asfortranarray(mask)) for mask in binary]
    return [{'size': rle['size'], 'counts': rle['counts'].decode()} for rle in encoded]


def decode_masks(encoded: list[dict]) -> Iterator[Tensor]:
    """Yield masks [H, W] uint8 of COCO's compressed run lengths, one at a time."""
    return (torch.from_numpy(coco_mask.decode(rle)) for rle in encoded)


def prepare_ground_truth(ground_truth: dict, image_ids: set[int], kind: str, federated: bool = False) -> dict:
    """Copy the annotations of the chosen images, in the form that the evaluators need.

    Ids are counted anew from 1, because the evaluators treat an object of id 0 as unmatched. A missing
    iscrowd counts as 0, a missing area as that of the box. pycocotools ignores objects by iscrowd, and
    overwrites `ignore` with it. lvis-api (federated) reads `ignore`, and not iscrowd.
    """
    annotations: list[dict] = []
    for annotation in ground_truth['annotations']:
        if annotation['image_id'] not in image_ids:
            continue
        entry = {key: annotation[key] for key in ('image_id', 'category_id', 'bbox')}
        entry['id'] = len(annotations) + 1
        entry['area'] = object_area(annotation)
        entry['iscrowd'] = int(annotation.get('iscrowd') or 0)
        if federated:
            entry['iscrowd'] = 0
            entry['area'] = IGNORED_AREA if annotation.get('ignore') == 1 else entry['area']
        if kind == 'segm':
            entry['segmentation'] = require_segmentation(annotation)
        annotations.append(entry)
    images = []
    for image in ground_truth['images']:
        if image['id'] in image_ids:
            lists = {
                key: [as_id(value) for value in image[key]] for key in FEDERATED if image.get(key) is not None
            }
            images.append({'id': image['id'], 'file_name': '', **size_of(image, kind), **lists})
    categories = [
        {'id': category['id'], 'name': str(category.get('name') or category['id'])}
        | {key: category[key] for key in ('frequency',) if key in category}
        for category in sorted(ground_truth['categories'], key=lambda category: category['id'])
    ]
    return {'info': {}, 'images': images, 'annotations': annotations, 'categories': categories}


def size_of(image: dict, kind: str) -> dict[str, int]:
    size = {key: int(image.get(key) or 0) for key in ('height', 'width')}
    if kind == 'segm' and not all(size.values()):
        raise UserError(
            f'image {image["id"]} has no height and width, which masks are evaluated with: add them'
        )
    return size


def require_segmentation(annotation: dict) -> list | dict:
    """Return the segmentation in a form that cannot crash the evaluators, which are compiled code."""
    title, segmentation = title_of(annotation), annotation.get('segmentation')
    if not segmentation:
        raise UserError(f'{title} has no segmentation: masks cannot be evaluated on this data, boxes can')
    try:
        if isinstance(segmentation, dict):
            return run_lengths(segmentation)
        return polygons_of(segmentation) or [[0.0] * 6]
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(
            f'{title} has an invalid segmentation ({error}): correct it, or evaluate boxes'
        ) from error


def result_rows(detections: dict[int, Detections], kind: str) -> np.ndarray | list[dict]:
    """Return boxes [N, 7]: image id, x, y, width, height, score, category id; masks in COCO's result form."""
    images = sorted(detections.items())
    if kind == 'segm':
        return [{'image_id': image_id} | mask for image_id, image in images for mask in image.masks]
    parts = [np.insert(image.rows, 0, image_id, axis=1) for image_id, image in images]
    return np.concatenate([np.zeros((0, 7)), *parts])


def compute_metrics(
    truth: dict, rows: np.ndarray | list[dict], kind: str, limit: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Evaluate all detections; nothing is printed.

    limit: number of detections of an image, the best ones, that count by LVIS's rules; 0: COCO's rules.

    Returns:
        Precision [10 IoU, 101 recall, K, 4 areas, 3 maxima] and recall [10, K, 4, 3], -1 where there is no
        object. K are the categories in ascending order of id. Federated evaluation has one maximum.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        coco = hotcoco.COCO(truth)
        results = coco.load_res(rows)
        if limit:  # else hotcoco cuts at 300 itself
            results = results.cap_detections_per_image(limit)
        evaluator = hotcoco.COCOeval(coco, results, kind, lvis_style=bool(limit))
        evaluator.evaluate()
        evaluator.accumulate()
    arrays: Any = evaluator.eval
    return np.asarray(arrays['precision']), np.asarray(arrays['recall'])


def summarize_arrays(truth: dict, precision: np.ndarray, recall: np.ndarray, limit: int = 0) -> Summary:
    """Average what is defined, as the official code does; -1 where nothing is. See `compute_metrics`."""
    frequency = np.array([category.get('frequency', '') for category in truth['categories']])
    stats = [
        *precisions(precision),
        *(mean_defined(precision[..., area, MOST_DETECTIONS]) for area in (1, 2, 3)),
        *(precisions(precision[:, :, frequency == group])[0] for group in ('rcf' if limit else '')),
        *(mean_defined(recall[..., ALL_AREAS, most]) for most in range(recall.shape[-1])),
        *(mean_defined(recall[..., area, MOST_DETECTIONS]) for area in (1, 2, 3)),
    ]
    counted = (a for a in truth['annotations'] if not a['iscrowd'] and a['area'] < IGNORED_AREA)
    objects = Counter(a['category_id'] for a in counted)
    columns = ('AP', 'AP50', 'AP75', 'AR300' if limit else 'AR100')
    per_class = []
    for idx, category in enumerate(truth['categories']):
        mean_recall = mean_defined(recall[:, idx, ALL_AREAS, MOST_DETECTIONS])
        row: dict = dict(zip(columns, (*precisions(precision[:, :, idx]), mean_recall), strict=True))
        per_class.append(row | {'name': category['name'], 'objects': objects[category['id']]})
    numbers = dict(zip(LVIS_NAMES if limit else STAT_NAMES, stats, strict=True))
    return Summary(numbers, per_class, limit or 100)


def precisions(precision: np.ndarray) -> list[float]:
    """Return AP, AP50 and AP75 of precision [10, 101, ..., 4, 3]."""
    precision = precision[..., ALL_AREAS, MOST_DETECTIONS]
    return [mean_defined(values) for values in (precision, precision[IOU_50], precision[IOU_75])]


def mean_defined(values: np.ndarray) -> float:
    defined = values[values > -1]
    return float(defined.mean()) if defined.size else -1.0
