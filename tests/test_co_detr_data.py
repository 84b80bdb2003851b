"""Co-DETR's data: class indices, mmdetection's resizing and filters, large-scale jitter, batches of one
shape.
"""

import json
from argparse import Namespace
from pathlib import Path
from unittest import mock

import numpy as np
import PIL.Image
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler

import main
from datasets import transforms as T
from datasets.augmentations import AUGMENTATIONS, CoDETRAugmentation, SquareJitter
from datasets.class_map import COCO_IDS, ClassMap
from datasets.coco_eval import CocoEvaluator
from datasets.copy_paste import TRIES, LargeScaleJitter, jitter, mask_extents, paste_objects, pick
from datasets.loaders import build_loader
from datasets.samplers import BATCHES, AspectBatches
from datasets.shapes import ShapesDetection
from datasets.unreadable import UnreadableImages
from engine import evaluate, sample_detections
from models.detector import Detector
from models.postprocess import TopKPostProcess, frame_size, scale_boxes
from tests.runs import assert_same, load, run
from tests.shared_data import build_data, needs_shared, read_shared, rule_image
from util.config import flags
from util.config.declare import DATA
from util.config.settle import settle, use_current_names
from util.nested_tensor import collate_fn
from util.seeding import local_seed

RESIZED = read_shared('parity/co_deformable_detr/components.json').get('resize', {'rows': []})['rows']
COCO_CATEGORIES = [{'id': i, 'name': f'c{i}'} for i in sorted(COCO_IDS, reverse=True)]


def write_data(root: Path, images: list[dict], annotations: list[dict], categories: list[dict]) -> Path:
    """The same training and validation part in COCO's layout; every image file is height x width."""
    (root / 'annotations').mkdir(parents=True)
    for split in ('train', 'val'):
        (root / split).mkdir()
        for entry in images:
            image = rule_image(str(entry['id']), entry['height'], entry['width'])
            PIL.Image.fromarray(image).save(root / split / f'{entry["id"]}.png')
        data = {
            'images': [{'file_name': f'{entry["id"]}.png'} | entry for entry in images],
            'annotations': [{'id': i} | row for i, row in enumerate(annotations, start=1)],
            'categories': categories,
        }
        (root / f'annotations/instances_{split}.json').write_text(json.dumps(data))
    return root


def write_coco_like(root: Path) -> Path:
    """Three images with COCO's 80 categories and one object each."""
    images = [{'id': i, 'height': 40, 'width': 48} for i in (1, 2, 3)]
    objects = [{'image_id': i, 'category_id': 90, 'bbox': [4, 4, 20, 10]} for i in (1, 2, 3)]
    return write_data(root, images, objects, COCO_CATEGORIES)


def arguments(root: Path, **options: object) -> Namespace:
    args = main.get_args_parser().parse_args(['--coco_path', str(root)])
    return Namespace(**(vars(args) | options))


def test_coco_ids_become_80_classes_and_come_out_again(tmp_path: Path) -> None:
    root = write_coco_like(tmp_path)
    dataset = build_data('train', arguments(root, class_ids='contiguous'))
    assert dataset.class_map.num_classes == 80
    assert dataset.class_map.category_ids == tuple(sorted(COCO_IDS))
    assert dataset[0][1]['labels'].tolist() == [79]
    assert dataset.class_map.category_ids[79] == 90
    assert build_data('train', arguments(root)).class_map.num_classes == 91
    settled = build_data('val', arguments(root), dataset.class_map)
    assert settled.class_map == dataset.class_map


def test_unknown_numbering_is_refused() -> None:
    with pytest.raises(ValueError, match="--class_ids 'dense' is not known: choose one of auto, contiguous"):
        ClassMap.numbered(COCO_CATEGORIES, 'dense')


def test_a_run_may_not_change_its_numbering(tmp_path: Path) -> None:
    root, contiguous = write_coco_like(tmp_path), ClassMap.contiguous(COCO_CATEGORIES)
    with pytest.raises(ValueError, match=r'80 class indices, here 91\): give the --class_ids of its run'):
        main.build_datasets(arguments(root, resume='run.pth'), contiguous)
    evaluated = main.build_datasets(arguments(root, resume='run.pth', eval=True), contiguous)
    assert evaluated['val'].class_map == contiguous


@needs_shared
@pytest.mark.parametrize('row', RESIZED, ids=lambda row: f'{row[0]}-{row[1]}')
def test_rescaled_size_equals_mmdetection(row: list) -> None:
    image_wh, limits, new_wh, factor = row
    assert list(T.rescaled_size(tuple(image_wh), min(limits), max(limits))) == new_wh
    ratios = torch.tensor(new_wh) / torch.tensor(image_wh)
    torch.testing.assert_close(ratios, torch.tensor(factor), rtol=1e-6, atol=0)


def test_rescaling_multiplies_each_axis_and_clips() -> None:
    image = torch.from_numpy(rule_image('a', 41, 67)).permute(2, 0, 1)
    target = {'boxes': torch.tensor([[-3.0, 2, 30, 41], [10, 10, 70, 20]])}
    resized, target = T.rescale(image, target, size=30, max_size=50)
    assert resized.shape == (3, 30, 49)  # 30 / 41 of the width is 49.02
    factor = torch.tensor([49 / 67, 30 / 41] * 2)
    expected = torch.tensor([[0.0, 2, 30, 41], [10, 10, 67, 20]]) * factor
    torch.testing.assert_close(target['boxes'], expected)
    assert T.rescale(image, {}, 1, 1)[0].shape == (3, 1, 1)


@pytest.mark.parametrize('new_wh', [(100, 60), (31, 17)], ids=['larger', 'smaller'])
def test_pixels_are_those_between_the_four_neighbours(new_wh: tuple[int, int]) -> None:
    """Bilinear at half-pixel centres, also when an image shrinks; within a grey level."""
    pixels = rule_image('b', 41, 67)
    ours, _ = T.resize_to(torch.from_numpy(pixels).permute(2, 0, 1), {}, new_wh, antialias=False)
    expected = np.stack([between(pixels[..., channel].astype(float), new_wh) for channel in range(3)])
    assert np.abs(ours.numpy() - expected).max() <= 1


def between(grey: np.ndarray, new_wh: tuple[int, int]) -> np.ndarray:
    """Bilinear interpolation of [H, W], written out."""
    for axis, new in ((0, new_wh[1]), (1, new_wh[0])):
        old = grey.shape[axis]
        place = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)
        low = np.floor(place).astype(int)
        part = (place - low).reshape((-1, 1) if axis == 0 else (1, -1))
        high = np.minimum(low + 1, old - 1)
        grey = grey.take(low, axis) * (1 - part) + grey.take(high, axis) * part
    return grey


@pytest.mark.parametrize('new_wh', [(100, 60), (31, 17)], ids=['larger', 'smaller'])
def test_pixels_equal_opencv(new_wh: tuple[int, int]) -> None:
    cv2 = pytest.importorskip('cv2')
    pixels = rule_image('b', 41, 67)
    ours, _ = T.resize_to(torch.from_numpy(pixels).permute(2, 0, 1), {}, new_wh, antialias=False)
    expected = cv2.resize(pixels, new_wh, interpolation=cv2.INTER_LINEAR).transpose(2, 0, 1)
    assert np.abs(ours.numpy().astype(int) - expected).max() <= 1


def test_the_recipe_is_that_of_the_paper_and_scales() -> None:
    flip, select, _ = CoDETRAugmentation().transforms('train').transforms
    whole, (first, size_crop, last) = select.first, select.second.transforms
    assert (flip.p, select.p) == (0.5, 0.5)
    assert whole.sizes == last.sizes == list(range(480, 801, 32)) and whole.max_size == 1333
    assert first.sizes == [400, 500, 600] and first.max_size == 4200
    assert (size_crop.min_size, size_crop.max_size) == (384, 600)
    assert {step.rule for step in (whole, first, last)} == {T.rescale}
    evaluated = CoDETRAugmentation().transforms('val').transforms[0]
    assert (evaluated.sizes, evaluated.max_size, evaluated.rule) == ([800], 1333, T.rescale)
    _, select, _ = CoDETRAugmentation(200).transforms('train').transforms
    assert select.second.transforms[0].max_size == 1050


def test_crops_draw_height_width_row_column(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    monkeypatch.setattr(T.random, 'randint', lambda low, high: drawn.append((low, high)) or high - 1)
    monkeypatch.setattr(T.torch, 'randint', lambda low, high, size: drawn.append((low, high - 1)) or low)
    target = {'boxes': torch.tensor([[0.0, 0, 2, 2], [49, 0, 70, 9]]), 'labels': torch.tensor([1, 2])}
    image, target = T.RandomSizeCrop(20, 50, height_first=True)(
        torch.zeros(3, 40, 80, dtype=torch.uint8), target
    )
    assert drawn == [(20, 40), (20, 50), (0, 1), (0, 31)]
    assert image.shape == (3, 39, 49)
    assert target['labels'].tolist() == [1]
    empty = {'boxes': torch.tensor([[60.0, 0, 70, 9]]), 'labels': torch.tensor([1])}
    _, empty = T.RandomSizeCrop(20, 50, height_first=True)(torch.zeros(3, 40, 80, dtype=torch.uint8), empty)
    assert empty['boxes'].shape == (0, 4)


def test_tiny_objects_and_in_training_tiny_images_are_left_out(tmp_path: Path) -> None:
    images = [{'id': i, 'height': 40, 'width': 48} for i in (1, 2)] + [{'id': 3, 'height': 31, 'width': 60}]
    boxes = [[0, 0, 0.9, 5], [0, 0, 5, 0.5], [3, 3, 1, 1], [48, 3, 9, 9], [-3, -3, 4.5, 4.5]]
    objects = [{'image_id': 1, 'category_id': 1, 'bbox': box} for box in boxes]
    objects += [
        {'image_id': 1, 'category_id': 1, 'bbox': [5, 5, 9, 9], 'area': 0},
        {'image_id': 1, 'category_id': 1, 'bbox': [5, 5, 9, 9], 'iscrowd': 1},
        {'image_id': 3, 'category_id': 1, 'bbox': [5, 5, 9, 9]},
    ]
    root = write_data(tmp_path, images, objects, [{'id': 1, 'name': 'thing'}])
    parts = {split: build_data(split, arguments(root, aug='co_detr')) for split in ('train', 'val')}
    assert parts['train'].ids == [1, 2] and parts['val'].ids == [1, 2, 3]
    for part in parts.values():
        assert part.untransformed(0)[1]['boxes'].tolist() == [[3, 3, 4, 4], [0, 0, 1.5, 1.5]]
        assert len(part[1][1]['boxes']) == 0
    assert len(parts['val'].ground_truth['annotations']) == len(objects)
    usual = build_data('train', arguments(root))
    assert usual.ids == [1, 2, 3] and len(usual.untransformed(0)[1]['boxes']) == 5


def test_data_of_tiny_images_only_is_refused(tmp_path: Path) -> None:
    root = write_data(tmp_path, [{'id': 1, 'height': 31, 'width': 60}], [], [{'id': 1}])
    with pytest.raises(ValueError, match=r'all 1 images .* less than 32 pixels'):
        build_data('train', arguments(root, aug='co_detr'))


def extent(mask: Tensor) -> list[int]:
    rows, columns = mask.nonzero().unbind(1)
    return [int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1]


def no_other() -> T.Sample:
    raise AssertionError('no second image is wanted here')


def test_jittered_boxes_are_the_extents_of_masks_in_a_grey_square() -> None:
    data, found = ShapesDetection(6, image_size=64, return_masks=True), []
    for index in range(60):
        with local_seed(index):
            sample = jitter(*data.untransformed(index % 6), size=64)
        if sample is None:
            continue
        image, target = sample
        assert image.shape == (3, 64, 64) and image.dtype == torch.uint8
        assert target['size'].tolist() == [64, 64]
        assert {len(target[key]) for key in T.OBJECT_FIELDS} == {len(target['boxes'])}
        assert target['boxes'].tolist() == [extent(mask) for mask in target['masks']]
        grey = (image == 114).all(dim=0)
        width, height = int((~grey).any(dim=0).sum()), int((~grey).any(dim=1).sum())
        assert grey[height:].all() and grey[:, width:].all()
        assert not target['masks'][:, height:].any() and not target['masks'][:, :, width:].any()
        found.append(max(width, height))
    assert min(found) < 10 and max(found) == 64


def test_extents_of_no_masks_and_of_empty_ones() -> None:
    assert mask_extents(torch.zeros(0, 4, 5, dtype=torch.bool)).shape == (0, 4)
    masks = torch.zeros(2, 4, 5, dtype=torch.bool)
    masks[1, 1:3, 4] = True
    assert mask_extents(masks).tolist() == [[0, 0, 0, 0], [4, 1, 5, 3]]


def sample_of(boxes: list[list[int]], grey: int, size: int = 64, masks: bool = True) -> T.Sample:
    """A grey image with filled boxes as objects, labelled 0, 1, ..."""
    target = {
        'boxes': torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        'labels': torch.arange(len(boxes)),
        'area': torch.zeros(len(boxes)),
        'iscrowd': torch.zeros(len(boxes), dtype=torch.int64),
        'image_id': torch.tensor([grey]),
        'orig_size': torch.tensor([size, size]),
    }
    if masks:
        target['masks'] = torch.zeros(len(boxes), size, size, dtype=torch.bool)
        for mask, (x0, y0, x1, y1) in zip(target['masks'], boxes, strict=True):
            mask[y0:y1, x0:x1] = True
    return torch.full((3, size, size), grey, dtype=torch.uint8), target


def test_pasted_objects_cover_and_what_is_hidden_goes() -> None:
    """Objects: far away; cut by 10 pixels; cut by 11 with 110 pixels left, and with 440; hidden near the
    origin.
    """
    boxes = [[0, 20, 5, 25], [30, 10, 50, 15], [29, 15, 51, 25], [29, 25, 51, 65], [2, 2, 9, 9]]
    image, target = sample_of(boxes, 10, size=80)
    source, source_target = sample_of([[40, 0, 60, 75], [0, 0, 10, 10]], 200, size=80)
    result, merged = paste_objects(image, target, source, source_target)
    assert (result[:, 0:75, 40:60] == 200).all() and int((result == 200).sum()) == 3 * 1600
    assert merged['labels'].tolist() == [0, 1, 3, 0, 1]
    assert merged['boxes'][:3].tolist() == [[0, 20, 5, 25], [30, 10, 40, 15], [29, 25, 40, 65]]
    assert merged['boxes'].tolist() == [extent(mask) for mask in merged['masks']]
    assert merged['image_id'].tolist() == [10]
    nothing = sample_of([], 200, size=80)
    assert paste_objects(image, target, *nothing)[1] is target
    assert paste_objects(*nothing, source, source_target)[1]['labels'].tolist() == [0, 1]


def test_every_number_of_objects_is_picked_and_none_twice() -> None:
    _, target = sample_of([[i, i, i + 3, i + 3] for i in range(4)], 1)
    counts = set()
    for seed in range(40):
        with local_seed(seed):
            labels = pick(target)['labels'].tolist()
        assert len(set(labels)) == len(labels)
        counts.add(len(labels))
    assert counts == {0, 1, 2, 3, 4}
    _, crowd = sample_of([[0, 0, 1, 1]] * 130, 1, size=4)
    assert max(len(pick(crowd)['labels']) for _ in range(300)) <= 99


def test_a_image_whose_objects_vanish_is_replaced() -> None:
    vanishing = sample_of([[5, 5, 50, 50]], 1)
    vanishing[1]['masks'][:] = False
    usual, empty = sample_of([[0, 0, 64, 64]], 2), sample_of([], 3)
    _, target = LargeScaleJitter(64)(*vanishing, lambda: usual)
    assert target['image_id'].tolist() == [2] and 'masks' not in target
    _, target = LargeScaleJitter(64)(*empty, lambda: empty)
    assert target['image_id'].tolist() == [3] and target['boxes'].shape == (0, 4)
    with pytest.raises(ValueError, match=f'{TRIES} images one after another lost all their objects'):
        LargeScaleJitter(64)(*vanishing, lambda: vanishing)


def test_without_masks_boxes_are_cut_and_nothing_is_pasted() -> None:
    sides = set()
    for seed in range(20):
        with local_seed(seed):
            image, target = LargeScaleJitter(64)(*sample_of([[0, 0, 64, 64]], 9, masks=False), no_other)
        assert 'masks' not in target
        sides.add(tuple((target['boxes'][0, 2:] - target['boxes'][0, :2]).tolist()))
        assert int((image == 9).sum()) == 3 * int(target['area'][0])
    assert len(sides) > 5 and (64.0, 64.0) in sides


def square_data(root: Path, segmented: bool) -> Path:
    """Three images of one object each, the last one without."""
    images = [{'id': i, 'height': 40, 'width': 50} for i in (1, 2, 3)]
    objects = [{'image_id': i, 'category_id': 1, 'bbox': [0, 0, 50, 40]} for i in (1, 2)]
    objects.append({'image_id': 1, 'category_id': 1, 'bbox': [0, 0, 9, 9], 'iscrowd': 1})
    if segmented:
        for row in objects[:2]:
            row['segmentation'] = [[0, 0, 50, 0, 50, 40, 0, 40]]
    return write_data(root, images, objects, [{'id': 1, 'name': 'thing'}])


@pytest.mark.parametrize('segmented', [True, False])
def test_masks_are_used_where_every_object_has_one(tmp_path: Path, segmented: bool) -> None:
    root = square_data(tmp_path, segmented)
    dataset = build_data('train', arguments(root, aug='lsj', img_size=64))
    assert dataset.return_masks == segmented
    objects = []
    for epoch in range(12):
        dataset.set_epoch(epoch)
        for image, target in dataset:
            assert image.shape == (3, 64, 64) and 'masks' not in target
            assert target['size'].tolist() == [64, 64]
            assert ((target['boxes'] >= 0) & (target['boxes'] <= 1)).all()
            objects.append(len(target['boxes']))
    assert max(objects) == (2 if segmented else 1)


@pytest.mark.parametrize('aug', ['lsj', 'co_detr'])
def test_images_depend_on_seed_epoch_and_index_only(aug: str) -> None:
    args = Namespace(**vars(arguments(Path())) | {'dataset_file': 'shapes', 'coco_path': None, 'aug': aug})
    args.shapes_train, args.shapes_size, args.img_size = 4, 64, 64
    dataset = build_data('train', args)
    alone = DataLoader(dataset, batch_size=None)
    workers = DataLoader(dataset, batch_size=None, num_workers=2, persistent_workers=True)
    sums = []
    for epoch in range(3):
        dataset.set_epoch(epoch)
        for (image, target), (expected, expected_target) in zip(workers, alone, strict=True):
            assert torch.equal(image, expected)
            assert torch.equal(target['boxes'], expected_target['boxes'])
        sums.append([int(image.sum()) for image, _ in alone])
    dataset.set_epoch(1)
    assert [int(dataset[index][0].sum()) for index in range(4)] == sums[1]
    assert len({tuple(row) for row in sums}) == 3
    args.seed += 1
    assert [int(image.sum()) for image, _ in build_data('train', args)] != sums[0]


@pytest.mark.parametrize('shape', [(40, 64), (51, 40), (30, 30)], ids=str)
def test_boxes_come_back_to_original_pixels(shape: tuple[int, int]) -> None:
    """Also where the fitted side was rounded, and beyond the image."""
    height, width = shape
    image = torch.full((3, *shape), 9, dtype=torch.uint8)
    boxes = torch.tensor([[0.0, 0, width, height], [3, 5, 21, 17]])
    target = {'boxes': boxes, 'orig_size': torch.tensor(shape)}
    square, fitted = SquareJitter(96).transforms('val')(image, target)
    new_width, new_height = T.rescaled_size((width, height), 96, 96)
    assert (square[:, :new_height, :new_width] == 9).all() and (square[:, new_height:] == 114).all()
    assert (square[:, :, new_width:] == 114).all()
    assert fitted['size'].tolist() == [96, 96] and fitted['orig_size'].tolist() == list(shape)
    back = scale_boxes(fitted['boxes'][None], frame_size(fitted)[None])[0]
    torch.testing.assert_close(back, boxes, rtol=0, atol=1e-4)
    corner = scale_boxes(torch.tensor([[[0.5, 0.5, 1, 1]]]), frame_size(fitted)[None])[0, 0]
    expected = torch.tensor([0, 0, 96 * width / new_width, 96 * height / new_height])
    torch.testing.assert_close(corner, expected)


class Oracle(nn.Module):
    """Answers with the objects of the images of a dataset, in turn."""

    def __init__(self, dataset: ShapesDetection) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.targets = [target for _, target in dataset] * 2

    def forward(self, samples: object) -> dict[str, Tensor]:
        target = self.targets.pop(0)
        logits = nn.functional.one_hot(target['labels'], 6)[None] * 20.0 - 10
        return {'pred_logits': logits, 'pred_boxes': target['boxes'][None]}


@pytest.mark.parametrize('aug', ['detr', 'co_detr', 'lsj'])
def test_true_objects_score_one_at_evaluation_and_in_predictions(tmp_path: Path, aug: str) -> None:
    transforms = AUGMENTATIONS[aug](80).transforms('val')
    dataset = ShapesDetection(4, 'val', image_size=64, transforms=transforms)
    model, postprocess = Oracle(dataset), {'bbox': TopKPostProcess()}
    evaluator = CocoEvaluator(dataset.ground_truth, dataset.class_map)
    loader = DataLoader(dataset, 1, collate_fn=collate_fn)
    assert evaluate(model, postprocess, loader, evaluator).numbers['AP'] == pytest.approx(1)
    assert len(sample_detections(model, postprocess, dataset, count=1)) == 1
    image, target = dataset.untransformed(1)
    args = Namespace(img_size=80, max_size=None, aug=aug)
    result = Detector(model, postprocess, dataset.class_map, args).detect(image)
    best = result['scores'] > 0.5
    order = [extent_order(boxes) for boxes in (result['boxes'][best], target['boxes'])]
    torch.testing.assert_close(order[0], order[1], rtol=0, atol=1e-3)


def extent_order(boxes: Tensor) -> Tensor:
    return torch.tensor(sorted(boxes.tolist()))


# Of rank 1 of 2, where every third of 9 images is wide.
RECORDED_BATCHES = [[7, 4], [5, 6], [3, 8]]


def sizes_of(wide: list[bool]) -> np.ndarray:
    return np.array([(40, 41) if one else (40, 40) for one in wide])


def aspect_batches(wide: list[bool], batch_size: int, processes: int, rank: int) -> AspectBatches:
    dataset = mock.MagicMock(image_sizes=lambda: sizes_of(wide), __len__=lambda _: len(wide))
    return AspectBatches(dataset, batch_size, processes, rank, seed=3)


@pytest.mark.parametrize('wide_every', [2, 3, 100])
@pytest.mark.parametrize('processes', [1, 2, 4])
def test_batches_are_of_one_kind_and_every_image_is_seen(processes: int, wide_every: int) -> None:
    wide = [index % wide_every == 1 for index in range(23)]
    samplers = [aspect_batches(wide, 4, processes, rank) for rank in range(processes)]
    assert len({len(sampler) for sampler in samplers}) == 1
    epochs = []
    for epoch in (0, 1, 0):
        for sampler in samplers:
            sampler.set_epoch(epoch)
        epochs.append([list(sampler) for sampler in samplers])
        for sampler, batches in zip(samplers, epochs[-1], strict=True):
            assert len(batches) == len(sampler) and {len(batch) for batch in batches} == {4}
            assert all(len({wide[index] for index in batch}) == 1 for batch in batches)
        assert {index for rank in epochs[-1] for batch in rank for index in batch} == set(range(23))
    assert epochs[0] == epochs[2] != epochs[1]
    samplers[-1].set_epoch(0, first=2)
    assert list(samplers[-1]) == epochs[0][-1][2:]


@pytest.mark.parametrize('processes', [1, 2, 3])
def test_random_batches_are_those_of_pytorch(processes: int) -> None:
    data = range(23)
    for rank in range(processes):
        theirs = DistributedSampler(data, processes, rank, seed=5, drop_last=processes > 1)
        theirs.set_epoch(2)
        sampler = BATCHES['random'](data, 3, processes, rank, seed=5)
        sampler.set_epoch(2)
        assert list(sampler) == list(BatchSampler(theirs, 3, drop_last=True)) and len(sampler) == len(
            list(sampler)
        )


def test_the_order_of_aspect_batches_is_as_recorded() -> None:
    """Drawn before batches had a class of their own."""
    batches = aspect_batches([index % 3 == 1 for index in range(9)], 2, 2, 1)
    assert list(batches) == RECORDED_BATCHES


def test_images_are_repeated_as_little_as_batches_allow() -> None:
    sampler = aspect_batches([True] * 9 + [False] * 4, 4, 1, 0)
    assert len(sampler) == 3 + 1
    seen = np.bincount([index for batch in sampler for index in batch])
    assert seen.sum() == 16 and (seen[9:] == 1).all() and sorted(seen[:9]) == [1] * 6 + [2] * 3
    kinds = set()
    for epoch in range(8):
        sampler.set_epoch(epoch)
        kinds.add(tuple(batch[0] < 9 for batch in sampler))
    assert len(kinds) > 1  # the order of the kinds is drawn too


def test_sizes_come_from_the_annotations_or_the_image(tmp_path: Path) -> None:
    images = [{'id': 1, 'height': 40, 'width': 50}, {'id': 2, 'height': 33, 'width': 32}]
    root = write_data(tmp_path, images, [], [{'id': 1, 'name': 'thing'}])
    file = root / 'annotations/instances_train.json'
    data = json.loads(file.read_text())
    del data['images'][1]['height']
    file.write_text(json.dumps(data))
    dataset = build_data('train', arguments(root, aug='co_detr'))
    (root / 'train/1.png').unlink()
    assert dataset.image_sizes().tolist() == [[40, 50], [33, 32]]
    (root / 'train/2.png').write_bytes(b'nothing')
    with pytest.raises(ValueError, match=r'2\.png is not a readable image'):
        dataset.image_sizes()
    dataset.unreadable = UnreadableImages(tmp_path / 'list.txt', 1)  # another image takes its place
    assert dataset.image_sizes().tolist() == [[40, 50], [480, 640]]
    shapes = ShapesDetection(5, image_size=64)
    assert shapes.image_sizes().tolist() == [list(image.shape[1:]) for image, _ in shapes]


def test_loaders_batch_images_of_one_kind(tmp_path: Path) -> None:
    """Validation keeps its order."""
    images = [{'id': i, 'height': 40, 'width': 30 + 20 * (i % 3 > 0)} for i in range(1, 8)]
    root = write_data(tmp_path, images, [], [{'id': 1, 'name': 'thing'}])
    args = arguments(root, img_size=40)
    train, val = (
        build_loader(build_data(part, args), part, 2, batching='aspect') for part in ('train', 'val')
    )
    assert len(train) == 1 + 3  # 2 high images, 5 wide ones
    for _, targets in train:
        assert len({bool(t['orig_size'][1] > t['orig_size'][0]) for t in targets}) == 1
    assert [int(t['image_id']) for _, targets in val for t in targets] == list(range(1, 8))


@pytest.mark.slow
def test_a_run_of_this_recipe_resumes_bit_for_bit(tmp_path: Path) -> None:
    flags = '--aug lsj --img_size 64 --batches aspect --total_batch_size 4 --batch_size 2 --epochs'
    run(tmp_path / 'whole', *flags.split(), '2')
    run(tmp_path / 'parts', *flags.split(), '1')
    run(tmp_path / 'parts', *flags.split(), '2', '--resume', 'auto')
    assert_same(load(tmp_path / 'whole')['model'], load(tmp_path / 'parts')['model'])


@pytest.mark.parametrize(
    ('flag', 'remedy'),
    [
        ('--lsj_size 64', 'give --img_size, the side'),
        ('--bucket_sizes', 'give --batches size'),
        ('--group_aspect_ratio', 'give --batches aspect'),
    ],
)
def test_an_old_flag_names_the_new_one(flag: str, remedy: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main.get_args_parser().parse_args(flag.split())
    assert f'{flag.split()[0]} is no option: {remedy}' in capsys.readouterr().err


def test_the_words_and_the_classes_of_augmentations_agree() -> None:
    assert list(AUGMENTATIONS) == list(flags.AUGMENTATIONS)
    assert flags.FLAGS['batches'].type == tuple(BATCHES)
    for name, augmentation in AUGMENTATIONS.items():
        usual = augmentation()
        assert usual.img_size == settle(Namespace(aug=name), (DATA,)).img_size
        scaled = augmentation(train_scales=[32, 64]).train()
        assert (scaled != usual.train()) == (name in flags.RANDOM_SCALES)


def test_records_of_older_runs_are_read() -> None:
    old = {'aug': 'lsj', 'lsj_size': 512, 'img_size': 800, 'group_aspect_ratio': True, 'bucket_sizes': False}
    assert use_current_names(old) == {'aug': 'lsj', 'img_size': 512, 'batches': 'aspect'}
    old |= {'aug': 'detr', 'group_aspect_ratio': False, 'bucket_sizes': True}
    assert use_current_names(old) == {'aug': 'detr', 'img_size': 800, 'batches': 'size'}


def test_the_cache_of_files_is_the_operating_systems(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run(tmp_path, '--cache_mode', '--epochs', '1', '--eval_every', '0')
    assert '--cache_mode is not needed' in capsys.readouterr().out
