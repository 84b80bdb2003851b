"""COCO evaluation: the known answers, however the images arrive."""

import copy
import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from datasets import coco_eval
from datasets.class_map import ClassMap
from datasets.coco_eval import CocoEvaluator, Summary, encode_masks
from tests.processes import in_processes
from tests.shared_data import needs_shared, read_shared
from util.errors import UserError

REFERENCE = 'data/coco_eval_reference'
KNOWN = {
    'bbox': '0.504581 0.696973 0.572982 0.585626 0.519400 0.501398 '
    '0.386813 0.593680 0.595353 0.639811 0.566421 0.564291',
    'segm': '0.319545 0.562288 0.298927 0.387374 0.310183 0.326934 '
    '0.268230 0.415449 0.416839 0.469450 0.376759 0.381472',
}
RESULTS = {'bbox': 'fakebbox100_results.json', 'segm': 'fakesegm100_results.json'}


def as_predictions(results: list[dict], ground_truth: dict, class_map: ClassMap) -> dict[int, dict]:
    """COCO result entries as a model would give them."""
    predictions = {}
    for image in ground_truth['images']:
        mine = [result for result in results if result['image_id'] == image['id']]
        boxes = torch.tensor(
            [result.get('bbox', [0, 0, 1, 1]) for result in mine], dtype=torch.float64
        ).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        predictions[image['id']] = {
            'scores': torch.tensor([result['score'] for result in mine], dtype=torch.float64),
            'labels': torch.tensor(
                [class_map.label_of[result['category_id']] for result in mine], dtype=torch.int64
            ),
            'boxes': boxes,
            'segmentation': [result.get('segmentation') for result in mine],
        }
    return predictions


@needs_shared
@pytest.mark.parametrize('iou_type', ['bbox', 'segm'])
@pytest.mark.parametrize('make_map', [ClassMap.identity, ClassMap.from_categories])
def test_known_answer_of_a_hundred_coco_images(iou_type: str, make_map: object) -> None:
    ground_truth = read_shared(f'{REFERENCE}/instances_val2014_100.json')
    results = read_shared(f'{REFERENCE}/{RESULTS[iou_type]}')
    class_map = make_map(ground_truth['categories'])
    evaluator = CocoEvaluator(ground_truth, class_map, (iou_type,))
    evaluator.update(as_predictions(results, ground_truth, class_map))
    stats = list(evaluator.summaries()[iou_type].numbers.values())
    np.testing.assert_allclose(stats, [float(value) for value in KNOWN[iou_type].split()], atol=1e-6)


def recorded_predictions(recorded: dict, sizes: dict[int, tuple[int, int]]) -> dict[int, dict]:
    predictions = {}
    for key, entry in recorded['evaluator']['predictions'].items():
        boxes = torch.tensor(entry['boxes']).reshape(-1, 4)
        masks = torch.zeros(len(boxes), 1, *sizes[int(key)], dtype=torch.uint8)
        for mask, box in zip(masks, entry['boxes'], strict=True):
            x0, y0, x1, y1 = (max(0, round(side)) for side in box)
            mask[0, y0:y1, x0:x1] = 1
        scores, labels = torch.tensor(entry['scores']), torch.tensor(entry['labels'], dtype=torch.int64)
        predictions[int(key)] = {'scores': scores, 'labels': labels, 'boxes': boxes, 'masks': masks}
    return predictions


@needs_shared
@pytest.mark.parametrize(
    'batches', [[[1, 2], [3, 7], [9]], [[9], [7, 3, 2, 1]]], ids=['in order', 'backwards']
)
def test_official_evaluator_with_masks(batches: list[list[int]]) -> None:
    recorded = read_shared('parity/transforms/coco_pipeline.json')
    ground_truth = recorded['coco_json']
    sizes = {image['id']: (image['height'], image['width']) for image in ground_truth['images']}
    predictions = recorded_predictions(recorded, sizes)
    evaluator = CocoEvaluator(ground_truth, ClassMap.identity(ground_truth['categories']), ('segm', 'bbox'))
    for batch in batches:
        evaluator.update({image_id: predictions[image_id] for image_id in batch})
    evaluator.synchronize()
    summaries = evaluator.summaries()
    assert list(summaries) == ['segm', 'bbox']
    for iou_type, summary in summaries.items():
        np.testing.assert_allclose(
            list(summary.numbers.values()), recorded['evaluator'][f'stats_{iou_type}'], atol=1e-9
        )


CATEGORIES = [{'id': 7, 'name': 'cat'}, {'id': 3, 'name': 'dog'}, {'id': 250, 'name': 'owl'}]
CLASS_MAP = ClassMap.from_categories(CATEGORIES)


def tiny_ground_truth() -> dict:
    """Three images: two objects (one has id 0), one object, none. No area, no iscrowd."""
    annotations = [
        {'id': 0, 'image_id': 1, 'category_id': 7, 'bbox': [10, 10, 50, 60]},
        {'id': 4, 'image_id': 1, 'category_id': 250, 'bbox': [100, 20, 40, 40]},
        {'id': 5, 'image_id': 2, 'category_id': 7, 'bbox': [5, 5, 20, 20]},
    ]
    images = [{'id': image_id, 'width': 200, 'height': 100, 'file_name': 'x.jpg'} for image_id in (1, 2, 3)]
    return {'images': images, 'annotations': annotations, 'categories': CATEGORIES}


def perfect(ground_truth: dict, image_id: int) -> dict[str, Tensor]:
    mine = [a for a in ground_truth['annotations'] if a['image_id'] == image_id]
    boxes = torch.tensor([a['bbox'] for a in mine], dtype=torch.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    labels = torch.tensor([CLASS_MAP.label_of[a['category_id']] for a in mine], dtype=torch.int64)
    return {'scores': torch.full((len(mine),), 0.9), 'labels': labels, 'boxes': boxes}


def summarize(predictions: dict, ground_truth: dict | None = None) -> Summary:
    evaluator = CocoEvaluator(ground_truth or tiny_ground_truth(), CLASS_MAP)
    evaluator.update(predictions)
    return evaluator.summaries()['bbox']


def test_perfect_detections_score_one_without_area_and_iscrowd() -> None:
    truth = tiny_ground_truth()
    before = copy.deepcopy(truth)
    summary = summarize({image_id: perfect(truth, image_id) for image_id in (1, 2, 3)}, truth)
    assert list(summary.numbers.values())[:2] == pytest.approx([1, 1])
    rows = {row['name']: row for row in summary.per_class}
    assert rows['cat']['AP'] == pytest.approx(1)
    assert (rows['cat']['objects'], rows['dog']['objects'], rows['owl']['objects']) == (2, 0, 1)
    assert rows['dog']['AP'] == rows['dog']['AR100'] == -1
    assert truth == before


def test_no_detections_score_zero() -> None:
    nothing = {
        'scores': torch.zeros(0),
        'labels': torch.zeros(0, dtype=torch.int64),
        'boxes': torch.zeros(0, 4),
    }
    summary = summarize({1: nothing, 2: {}, 3: nothing})
    assert summary.numbers['AP'] == 0
    assert summary.numbers['AR100'] == 0


def test_no_objects_or_no_images_give_minus_one() -> None:
    assert list(summarize({3: {}}).numbers.values()) == [-1] * 12
    assert list(summarize({}).numbers.values()) == [-1] * 12


def test_only_images_handed_in_count() -> None:
    truth = tiny_ground_truth()
    assert summarize({2: perfect(truth, 2)}).numbers['AP'] == pytest.approx(1)
    missed = summarize({1: {}, 2: perfect(truth, 2)})
    assert 0 < missed.numbers['AP'] < 1
    assert sum(row['objects'] for row in missed.per_class) == 3


def test_first_prediction_of_a_image_wins() -> None:
    truth = tiny_ground_truth()
    evaluator = CocoEvaluator(truth, CLASS_MAP)
    evaluator.update({2: perfect(truth, 2)})
    evaluator.update({2: {}})
    assert evaluator.summarize().numbers['AP'] == pytest.approx(1)


def test_indices_without_category_are_dropped() -> None:
    truth = tiny_ground_truth()
    class_map = ClassMap.identity(CATEGORIES)
    prediction = perfect(truth, 2)
    prediction = {key: torch.cat([value, value]) for key, value in prediction.items()}
    prediction['labels'] = torch.tensor([12, 7])
    prediction['scores'] = torch.tensor([0.99, 0.5])
    evaluator = CocoEvaluator(truth, class_map)
    evaluator.update({2: prediction})
    assert evaluator.summarize().numbers['AP'] == pytest.approx(1)
    assert len(evaluator.detections[2].rows) == 1


def test_nothing_is_printed(capfd: pytest.CaptureFixture) -> None:
    summarize({1: perfect(tiny_ground_truth(), 1), 2: {}})
    assert capfd.readouterr() == ('', '')


def test_table_has_a_line_a_class_and_one_for_all() -> None:
    truth = tiny_ground_truth()
    lines = summarize({1: perfect(truth, 1)}).table().splitlines()
    assert [line.split()[0] for line in lines] == ['class', 'dog', 'cat', 'owl', 'all']
    assert lines[1].split() == ['dog', '-', '-', '-', '-', '0']
    assert lines[-1].split() == ['all', '100.0', '100.0', '100.0', '100.0', '2']
    assert len({len(line) for line in lines}) == 1


def official_numbers(truth: dict, rows: np.ndarray, capfd: pytest.CaptureFixture[str]) -> list[float]:
    """What pycocotools itself computes."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    coco = COCO()
    coco.dataset = truth
    coco.createIndex()
    evaluator = COCOeval(coco, coco.loadRes(rows), 'bbox')
    evaluator.evaluate()
    evaluator.accumulate()
    evaluator.summarize()
    capfd.readouterr()
    return evaluator.stats.tolist()


def test_numbers_are_those_of_pycocotools(capfd: pytest.CaptureFixture[str]) -> None:
    """On random detections with ties, crowd regions and more than a hundred detections of a class."""
    generator = torch.Generator().manual_seed(0)
    truth = tiny_ground_truth()
    truth['annotations'][1] |= {'iscrowd': 1, 'ignore': 0}
    truth['annotations'][2]['ignore'] = 1
    evaluator = CocoEvaluator(truth, CLASS_MAP)
    for image_id in (1, 2, 3):
        corners = torch.rand(400, 2, 2, generator=generator).sort(dim=1).values * torch.tensor([200, 100])
        prediction = {
            'scores': (torch.rand(400, generator=generator) * 20).round() / 20,
            'labels': torch.randint(0, 3, (400,), generator=generator),
            'boxes': torch.cat([corners.flatten(1)[:380], perfect(truth, 1)['boxes'].repeat(10, 1)]),
        }
        evaluator.update({image_id: prediction})
    prepared = coco_eval.prepare_ground_truth(truth, {1, 2, 3}, 'bbox')
    rows = coco_eval.result_rows(evaluator.detections, 'bbox')
    prepared['annotations'][2]['ignore'] = 1  # which pycocotools overwrites
    numbers = list(evaluator.compute().numbers.values())
    np.testing.assert_allclose(numbers, official_numbers(prepared, rows, capfd), atol=1e-12)


def test_wrong_input_is_refused() -> None:
    truth = tiny_ground_truth()
    with pytest.raises(ValueError, match='bbox and segm'):
        CocoEvaluator(truth, CLASS_MAP, kinds=('keypoints',))
    evaluator = CocoEvaluator(truth, CLASS_MAP)
    with pytest.raises(ValueError, match='image 17 is not among the 3'):
        evaluator.update({17: {}})
    with pytest.raises(ValueError, match='labels run from 0 to 90, but the data has 3 classes'):
        evaluator.update({2: perfect(truth, 2) | {'labels': torch.tensor([90, 0])}})
    for key, good in perfect(truth, 2).items():
        if good.is_floating_point():
            with pytest.raises(UserError, match=r'are not finite: .*take an earlier checkpoint'):
                evaluator.update({2: perfect(truth, 2) | {key: good * torch.nan}})
    masks = CocoEvaluator(truth, CLASS_MAP, kinds=('segm',))
    masks.update({1: {}})
    with pytest.raises(ValueError, match=r'annotation 0 .* has no segmentation'):
        masks.summarize()


def test_fields_that_evaluation_does_not_need_may_hold_anything() -> None:
    odd = {'license': 'CC BY 4.0', 'date_captured': 0, 'flickr_url': 7, 'height': None, 'width': None}
    truth, plain = tiny_ground_truth(), tiny_ground_truth()
    truth['images'] = [image | odd for image in truth['images']]
    predictions = {image_id: perfect(plain, image_id) for image_id in (1, 2, 3)}
    stats = []
    for data in (truth, plain):
        evaluator = CocoEvaluator(data, CLASS_MAP)
        evaluator.update(predictions)
        stats.append(list(evaluator.summarize().numbers.values()))
    assert stats[0] == stats[1] and stats[0][0] == 1


def test_masks_are_encoded_as_they_are() -> None:
    from pycocotools import mask as coco_mask

    masks = torch.rand(3, 1, 7, 5, generator=torch.Generator().manual_seed(0)) > 0.5
    decoded = np.stack([coco_mask.decode(rle) for rle in encode_masks(masks)])
    assert np.array_equal(decoded, masks[:, 0].numpy())


def gather_in_two_processes(rank: int) -> list[float]:
    truth = tiny_ground_truth()
    evaluator = CocoEvaluator(truth, CLASS_MAP)
    if rank:
        coco_eval.compute_metrics = coco_eval.prepare_ground_truth = None  # the main process alone computes
    # Image 2 comes twice, as a sampler that fills up gives it; the copy of rank 0 counts.
    evaluator.update({1: perfect(truth, 1), 2: perfect(truth, 2)} if rank == 0 else {3: {}, 2: {}})
    evaluator.synchronize()
    assert len(evaluator.detections) == (0 if rank else 3)
    stats = list(evaluator.summarize().numbers.values())
    evaluator.kinds = ('segm',)
    with pytest.raises(UserError, match=r'annotation 0 .* has no segmentation'):  # on all, instead of a wait
        evaluator.summarize()
    return stats


@pytest.mark.slow
def test_processes_merge_and_count_an_image_once() -> None:
    stats = in_processes(2, gather_in_two_processes)
    alone = tiny_ground_truth()
    expected = summarize({image_id: perfect(alone, image_id) for image_id in (1, 2, 3)})
    for first, second in itertools.pairwise([*stats, list(expected.numbers.values())]):
        assert first == pytest.approx(second)
