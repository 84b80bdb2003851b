"""LVIS: its files, repetition of rare classes, and its federated evaluation beside an independent
computation.
"""

import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from torch import Tensor

from datasets.build import build_evaluator
from datasets.class_map import ClassMap
from datasets.coco import repeats_of
from datasets.coco_eval import LVIS_NAMES, CocoEvaluator, LvisEvaluator, encode_masks
from datasets.lvis import LvisDetection
from tests.runs import TINY, parse, run
from tests.shared_data import build_data
from util.config.settle import settle

pytest.importorskip('hotcoco')
THRESHOLDS = np.arange(0.5, 1.0, 0.05)
AREAS = ((0, 1e10), (0, 32**2), (32**2, 96**2), (96**2, 1e10))


def made(seed: int, num_images: int = 40, num_classes: int = 9) -> tuple[dict, dict[int, dict]]:
    """Annotations with classes of every frequency, negative and not exhaustive sets; and detections, near
    objects or not.
    """
    random = np.random.default_rng(seed)
    images, annotations, predictions = [], [], {}
    for image_id in range(1, num_images + 1):
        classes = random.permutation(num_classes) + 1
        present, negative = classes[: random.integers(0, 4)], classes[4 : 4 + random.integers(0, 4)]
        images.append(
            {
                'id': image_id,
                'height': 200,
                'width': 240,
                'coco_url': f'http://a/b/val2017/{image_id}.png',
                'neg_category_ids': negative.tolist(),
                'not_exhaustive_category_ids': present[:1].tolist() if random.random() < 0.5 else [],
            }
        )
        found = []
        for category in present:
            for _ in range(random.integers(1, 4)):
                x, y, w, h = random.uniform([0, 0, 4, 4], [120, 100, 118, 98])
                annotations.append(
                    {
                        'id': len(annotations) + 1,
                        'image_id': image_id,
                        'category_id': int(category),
                        'bbox': [x, y, w, h],
                        'area': w * h * random.uniform(0.5, 1),
                        'ignore': int(len(annotations) % 6 == 0),
                        'iscrowd': int(len(annotations) % 5 == 0),
                        'segmentation': [[x, y, x + w, y, x + w, y + h, x, y + h]],
                    }
                )
                for _ in range(random.integers(0, 3)):
                    shift = random.normal(0, 0.12, 4) * [w, h, w, h]
                    found.append(
                        (
                            int(category),
                            [x + shift[0], y + shift[1], w + shift[2], h + shift[3]],
                            random.random(),
                        )
                    )
        for _ in range(12):
            box = random.uniform([0, 0, 4, 4], [120, 100, 118, 98])
            found.append((int(random.integers(1, num_classes + 1)), box.tolist(), random.random() * 0.9))
        boxes = torch.tensor([box for _, box, _ in found], dtype=torch.float64).clamp(min=1)
        boxes[:, 2:] += boxes[:, :2]
        predictions[image_id] = {
            'labels': torch.tensor([label - 1 for label, _, _ in found]),
            'boxes': boxes,
            'scores': torch.tensor([score for _, _, score in found], dtype=torch.float64),
        }
    categories = [{'id': i, 'name': f'c{i}', 'frequency': 'rcf'[i % 3]} for i in range(1, num_classes + 1)]
    return {'images': images, 'annotations': annotations, 'categories': categories}, predictions


def iou(a: Tensor, b: Tensor) -> np.ndarray:
    low, high = torch.maximum(a[:, None, :2], b[None, :, :2]), torch.minimum(a[:, None, 2:], b[None, :, 2:])
    inter = (high - low).clamp(min=0).prod(-1)
    areas = [(x[:, 2:] - x[:, :2]).prod(-1) for x in (a, b)]
    return (inter / (areas[0][:, None] + areas[1][None] - inter)).numpy()


def independent(data: dict, predictions: dict[int, dict]) -> dict[str, float]:
    """LVIS's numbers for boxes, from the rules of the paper without a library (arXiv:1908.03195, Sec. 3), and
    objects with `ignore` ignored, whatever `iscrowd` is, as lvis-api does.
    """
    truths = defaultdict(list)
    for a in data['annotations']:
        truths[a['category_id'], a['image_id']].append(a)
    precision = np.full((10, 101, len(data['categories']), 4), -1.0)
    recall = np.full((10, len(data['categories']), 4), -1.0)
    for k, category in enumerate(data['categories']):
        for area_index, (low, high) in enumerate(AREAS):
            rows, total = [], 0
            for image in data['images']:
                objects = truths[category['id'], image['id']]
                if not objects and category['id'] not in image['neg_category_ids']:
                    continue  # nothing is known of this class here
                ignored = [o['ignore'] or not low <= o['area'] <= high for o in objects]
                ignored = np.array(ignored, dtype=bool)
                total += int((~ignored).sum())
                p = predictions[image['id']]
                best = torch.argsort(p['scores'], descending=True, stable=True)[:300]
                mine = best[p['labels'][best] == category['id'] - 1]
                boxes, scores = p['boxes'][mine], p['scores'][mine].numpy()
                real = torch.tensor([o['bbox'] for o in objects], dtype=torch.float64).reshape(-1, 4)
                real[:, 2:] += real[:, :2]
                overlap = iou(boxes, real) if len(objects) else np.zeros((len(boxes), 0))
                sizes = (boxes[:, 2:] - boxes[:, :2]).prod(-1).numpy()
                open_ended = category['id'] in image['not_exhaustive_category_ids']
                matched, left_out = (np.zeros((10, len(boxes)), dtype=bool) for _ in range(2))
                for t, threshold in enumerate(THRESHOLDS):
                    free = np.ones(len(objects), dtype=bool)
                    for d in range(len(boxes)):
                        # Objects that count come before ignored ones.
                        for group in (~ignored, ignored):
                            candidates = np.flatnonzero(
                                free & group & (overlap[d] >= min(threshold, 1 - 1e-10))
                            )
                            if len(candidates):
                                g = candidates[overlap[d][candidates].argmax()]
                                free[g], matched[t, d], left_out[t, d] = False, True, ignored[g]
                                break
                    unmatched = ~matched[t]
                    left_out[t] |= unmatched & (open_ended | (sizes < low) | (sizes > high))
                rows += [(scores[d], matched[:, d], left_out[:, d]) for d in range(len(boxes))]
            if not total:
                continue
            rows.sort(key=lambda row: -row[0])
            for t in range(10):
                true = np.array([m[t] and not out[t] for _, m, out in rows])
                false = np.array([not m[t] and not out[t] for _, m, out in rows])
                tp, fp = np.cumsum(true), np.cumsum(false)
                r = tp / total if len(rows) else np.zeros(0)
                q = tp / np.maximum(tp + fp, 1e-16) if len(rows) else np.zeros(0)
                q = np.maximum.accumulate(q[::-1])[::-1]
                places = np.searchsorted(r, np.linspace(0, 1, 101), side='left')
                precision[t, :, k, area_index] = [q[i] if i < len(q) else 0 for i in places]
                recall[t, k, area_index] = r[-1] if len(r) else 0

    def mean(x: np.ndarray) -> float:
        return x[x > -1].mean() if (x > -1).any() else -1.0

    frequency = np.array([c['frequency'] for c in data['categories']])
    values = [mean(precision[..., 0]), mean(precision[0, ..., 0]), mean(precision[5, ..., 0])]
    values += [mean(precision[..., area]) for area in (1, 2, 3)]
    values += [mean(precision[:, :, frequency == part, 0]) for part in 'rcf']
    values += [mean(recall[..., area]) for area in range(4)]
    return dict(zip(LVIS_NAMES, values, strict=True))


@pytest.mark.parametrize('seed', [0, 1, 2])
def test_federated_numbers_equal_an_independent_computation(seed: int) -> None:
    data, predictions = made(seed)
    class_map = ClassMap.contiguous(data['categories'])
    evaluator = LvisEvaluator(data, class_map)
    evaluator.update(predictions)
    summary = evaluator.summaries()['bbox']
    expected = independent(data, predictions)
    for name, value in summary.numbers.items():
        assert value == pytest.approx(expected[name], abs=1e-6), name
    assert 'rare' in summary.table() and 'AR300' in summary.table()
    plain = CocoEvaluator(data, class_map)
    plain.update(predictions)
    assert abs(plain.summarize().numbers['AP'] - summary.numbers['AP']) > 1e-3, 'the rules matter'


def test_masks_of_boxes_have_the_numbers_of_boxes() -> None:
    """Rectangular masks at whole pixels, so that box and mask overlap alike."""
    data, predictions = made(3)
    for a in data['annotations']:
        x, y, w, h = a['bbox'] = [float(max(1, round(v))) for v in a['bbox']]
        a['area'], a['segmentation'] = w * h, [[x, y, x + w, y, x + w, y + h, x, y + h]]
    class_map = ClassMap.contiguous(data['categories'])
    for prediction in predictions.values():
        boxes = prediction['boxes'] = prediction['boxes'].round()
        boxes[:, 2:] = torch.maximum(boxes[:, 2:], boxes[:, :2] + 1)
        boxes[:, 0::2].clamp_(0, 240)
        boxes[:, 1::2].clamp_(0, 200)
        masks = torch.zeros(len(boxes), 1, 200, 240)
        for mask, (x0, y0, x1, y1) in zip(masks, boxes.int().tolist(), strict=True):
            mask[:, y0:y1, x0:x1] = 1
        prediction['segmentation'] = encode_masks(masks)
    evaluator = LvisEvaluator(data, class_map, ('bbox', 'segm'))
    evaluator.update(predictions)
    boxes, masks = evaluator.summaries().values()
    np.testing.assert_allclose(list(masks.numbers.values())[:3], list(boxes.numbers.values())[:3], atol=0.02)
    assert tuple(masks.numbers) == LVIS_NAMES


@pytest.mark.parametrize(
    ('place', 'limit', 'counts'), [(300, 300, True), (301, 300, False), (301, 1000, True), (900, 1000, True)]
)
def test_as_many_detections_count_as_are_asked_for(place: int, limit: int, counts: bool) -> None:
    """A rare object, found as detection `place` of its image. Its mask has the best score of all masks."""
    data, _ = made(0, num_images=1, num_classes=2)
    box = {
        'image_id': 1,
        'bbox': [10, 10, 20, 20],
        'area': 400,
        'segmentation': [[10, 10, 30, 10, 30, 30, 10, 30]],
    }
    data['annotations'] = [box | {'id': 1, 'category_id': 1}]
    for category, frequency in zip(data['categories'], 'rf', strict=True):
        category['frequency'] = frequency
    data['images'][0] |= {'neg_category_ids': [2], 'not_exhaustive_category_ids': []}
    scores = torch.linspace(1, 0.1, place, dtype=torch.float64)
    mask = torch.zeros(1, 1, 200, 240)
    mask[..., 10:30, 10:30] = 1
    prediction = {
        'scores': scores,
        'mask_scores': scores.flip(0),
        'labels': torch.tensor([1] * (place - 1) + [0]),
        'boxes': torch.tensor([[10.0, 10, 30, 30]]).expand(place, 4),
        'segmentation': encode_masks(mask) * place,
    }
    evaluator = LvisEvaluator(data, ClassMap.contiguous(data['categories']), ('bbox', 'segm'), limit)
    evaluator.update({1: prediction})
    boxes, masks = evaluator.summaries().values()
    assert boxes.numbers['APr'] == pytest.approx(float(counts))
    assert masks.numbers['APr'] == pytest.approx(1), 'by their own scores'
    first, *_, last = boxes.table().splitlines()
    assert f'AR{limit}' in first and last.endswith(f'; {limit} detections of an image count')


def test_rare_classes_come_more_often() -> None:
    """Class 0 is in all 100 images, class 1 in 4, class 2 in one."""
    labels, starts = [], [0]
    for image in range(100):
        labels += [0] + [1] * (image < 4) + [2, 2] * (image == 0)
        starts.append(len(labels))
    repeats = repeats_of(np.array(labels), np.array(starts), 0.16)
    assert repeats.tolist() == [4, 2, 2, 2] + [1] * 96  # sqrt(0.16 / 0.01), sqrt(0.16 / 0.04)
    assert repeats_of(np.zeros(0, dtype=int), np.zeros(4, dtype=int), 0.5).tolist() == [1, 1, 1]


@pytest.fixture
def lvis_folder(tmp_path: Path) -> Path:
    for split, seed in (('train', 0), ('val', 1)):
        data, _ = made(seed, num_images=8)
        for image in data['images']:
            folder = tmp_path / 'val2017'
            folder.mkdir(exist_ok=True)
            pixels = np.random.default_rng(image['id']).integers(0, 256, (200, 240, 3), dtype=np.uint8)
            PIL.Image.fromarray(pixels).save(folder / f'{image["id"]}.png')
        (tmp_path / 'annotations').mkdir(exist_ok=True)
        (tmp_path / f'annotations/lvis_v1_{split}.json').write_text(json.dumps(data))
    return tmp_path


@pytest.mark.parametrize(
    ('flags', 'counted'), [('--deformable', 100), ('--deformable --topk_eval 1000', 1000)]
)
def test_a_dataset_tells_how_many_detections_count(flags: str, counted: int, lvis_folder: Path) -> None:
    args = settle(parse('', flags=f'{flags} --dataset_file lvis --coco_path {lvis_folder}'))
    dataset = build_data('val', args)
    assert dataset.federated == counted
    evaluator = build_evaluator('lvis', dataset)
    assert evaluator.limit == max(300, counted)


def test_files_are_found_by_address_and_repeated(lvis_folder: Path) -> None:
    file = lvis_folder / 'annotations/lvis_v1_train.json'
    plain = LvisDetection(lvis_folder, file)
    image, _ = plain.untransformed(2)
    assert image.shape == (3, 200, 240) and plain.class_map.num_classes == 9 and plain.federated
    often = LvisDetection(lvis_folder, file, repeat_threshold=1.0)
    assert len(often) > len(plain) and set(often.ids) == set(plain.ids)
    assert len(often.image_sizes()) == len(often)
    last = often.untransformed(len(often) - 1)
    assert torch.equal(last[0], plain.untransformed(len(plain) - 1)[0])
    assert int(last[1]['image_id']) == often.ids[-1]


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda data: data['images'][0].pop('neg_category_ids'), 'image 1 has no list neg_category_ids'),
        (lambda data: data['categories'][0].update(frequency='x'), "category 1 has frequency 'x'"),
    ],
)
def test_what_is_no_lvis_is_refused(change: object, message: str, lvis_folder: Path) -> None:
    file = lvis_folder / 'annotations/lvis_v1_train.json'
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=message):
        LvisDetection(lvis_folder, file)


@pytest.mark.slow
def test_a_run_trains_and_evaluates_on_lvis(
    lvis_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = TINY.replace(
        '--dataset_file shapes', f'--dataset_file lvis --coco_path {lvis_folder} --repeat_threshold 0.5'
    )
    run(tmp_path / 'out', '--epochs', '1', '--topk_eval', '400', flags=flags)
    assert '; 400 detections of an image count\n' in capsys.readouterr().out
    header = (tmp_path / 'out/metrics.csv').read_text().splitlines()[0]
    assert 'test_APr' in header and 'test_AR300' in header
    record = json.loads((tmp_path / 'out/log.jsonl').read_text().splitlines()[-1])
    assert len(record['test_coco_eval_bbox']) == 13
