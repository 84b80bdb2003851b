"""Co-DETR's data: class indices, mmdetection's resizing and filters, large-scale jitter, batches of one shape."""

import json
from argparse import Namespace
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

import main
from datasets import build_dataset
from datasets import transforms as T
from datasets.class_map import COCO_IDS, ClassMap
from tests.shared_data import needs_shared, read_shared, rule_picture

RESIZED = read_shared('parity/co_deformable_detr/components.json').get('resize', {'rows': []})['rows']
COCO_CATEGORIES = [{'id': i, 'name': f'c{i}'} for i in sorted(COCO_IDS, reverse=True)]


def write_data(root: Path, images: list[dict], annotations: list[dict], categories: list[dict]) -> Path:
    """The same training and validation part in COCO's layout; every picture file is height x width."""
    (root / 'annotations').mkdir(parents=True)
    for split in ('train', 'val'):
        (root / split).mkdir()
        for image in images:
            picture = rule_picture(str(image['id']), image['height'], image['width'])
            PIL.Image.fromarray(picture).save(root / split / f'{image["id"]}.png')
        data = {
            'images': [{'file_name': f'{image["id"]}.png'} | image for image in images],
            'annotations': [{'id': i} | row for i, row in enumerate(annotations, start=1)],
            'categories': categories,
        }
        (root / f'annotations/instances_{split}.json').write_text(json.dumps(data))
    return root


def write_coco_like(root: Path) -> Path:
    """Three pictures with COCO's 80 categories and one object each."""
    images = [{'id': i, 'height': 40, 'width': 48} for i in (1, 2, 3)]
    objects = [{'image_id': i, 'category_id': 90, 'bbox': [4, 4, 20, 10]} for i in (1, 2, 3)]
    return write_data(root, images, objects, COCO_CATEGORIES)


def arguments(root: Path, **options: object) -> Namespace:
    args = main.get_args_parser().parse_args(['--coco_path', str(root)])
    return Namespace(**(vars(args) | options))


def test_coco_ids_become_80_classes_and_come_out_again(tmp_path: Path) -> None:
    root = write_coco_like(tmp_path)
    dataset = build_dataset('train', arguments(root, class_ids='contiguous'))
    assert dataset.class_map.num_classes == 80
    assert dataset.class_map.category_ids == tuple(sorted(COCO_IDS))
    assert dataset[0][1]['labels'].tolist() == [79]
    assert dataset.class_map.category_ids[79] == 90
    assert build_dataset('train', arguments(root)).class_map.num_classes == 91
    settled = build_dataset('val', arguments(root), dataset.class_map)
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
    picture_wh, limits, new_wh, factor = row
    assert list(T.rescaled_size(tuple(picture_wh), min(limits), max(limits))) == new_wh
    ratios = torch.tensor(new_wh) / torch.tensor(picture_wh)
    torch.testing.assert_close(ratios, torch.tensor(factor), rtol=1e-6, atol=0)


def test_rescaling_multiplies_each_axis_and_clips() -> None:
    picture = torch.from_numpy(rule_picture('a', 41, 67)).permute(2, 0, 1)
    target = {'boxes': torch.tensor([[-3.0, 2, 30, 41], [10, 10, 70, 20]])}
    resized, target = T.rescale(picture, target, size=30, max_size=50)
    assert resized.shape == (3, 30, 49)  # 30 / 41 of the width is 49.02
    factor = torch.tensor([49 / 67, 30 / 41] * 2)
    expected = torch.tensor([[0.0, 2, 30, 41], [10, 10, 67, 20]]) * factor
    torch.testing.assert_close(target['boxes'], expected)
    assert T.rescale(picture, None, 1, 1)[0].shape == (3, 1, 1)


@pytest.mark.parametrize('new_wh', [(100, 60), (31, 17)], ids=['larger', 'smaller'])
def test_pixels_are_those_between_the_four_neighbours(new_wh: tuple[int, int]) -> None:
    """Bilinear at half-pixel centres, also when a picture shrinks; within a grey level."""
    pixels = rule_picture('b', 41, 67)
    ours, _ = T.resize_to(torch.from_numpy(pixels).permute(2, 0, 1), None, new_wh, antialias=False)
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
    pixels = rule_picture('b', 41, 67)
    ours, _ = T.resize_to(torch.from_numpy(pixels).permute(2, 0, 1), None, new_wh, antialias=False)
    expected = cv2.resize(pixels, new_wh, interpolation=cv2.INTER_LINEAR).transpose(2, 0, 1)
    assert np.abs(ours.numpy().astype(int) - expected).max() <= 1


def test_the_recipe_is_that_of_the_paper_and_scales() -> None:
    flip, select, _ = T.make_transforms('train', aug='co_detr').transforms
    whole, (first, size_crop, last) = select.first, select.second.transforms
    assert (flip.p, select.p) == (0.5, 0.5)
    assert whole.sizes == last.sizes == list(range(480, 801, 32)) and whole.max_size == 1333
    assert first.sizes == [400, 500, 600] and first.max_size == 4200
    assert (size_crop.min_size, size_crop.max_size) == (384, 600)
    assert {step.rule for step in (whole, first, last)} == {T.rescale}
    evaluated = T.make_transforms('val', aug='co_detr').transforms[0]
    assert (evaluated.sizes, evaluated.max_size, evaluated.rule) == ([800], 1333, T.rescale)
    _, select, _ = T.make_transforms('train', img_size=200, aug='co_detr').transforms
    assert select.second.transforms[0].max_size == 1050


def test_crops_draw_height_width_row_column(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    monkeypatch.setattr(T.random, 'randint', lambda low, high: drawn.append((low, high)) or high - 1)
    monkeypatch.setattr(T.torch, 'randint', lambda low, high, size: drawn.append((low, high - 1)) or low)
    target = {'boxes': torch.tensor([[0.0, 0, 2, 2], [49, 0, 70, 9]]), 'labels': torch.tensor([1, 2])}
    picture, target = T.HeightFirstSizeCrop(20, 50)(torch.zeros(3, 40, 80, dtype=torch.uint8), target)
    assert drawn == [(20, 40), (20, 50), (0, 1), (0, 31)]
    assert picture.shape == (3, 39, 49)
    assert target['labels'].tolist() == [1]
    empty = {'boxes': torch.tensor([[60.0, 0, 70, 9]]), 'labels': torch.tensor([1])}
    _, empty = T.HeightFirstSizeCrop(20, 50)(torch.zeros(3, 40, 80, dtype=torch.uint8), empty)
    assert empty['boxes'].shape == (0, 4)


def test_tiny_objects_and_in_training_tiny_pictures_are_left_out(tmp_path: Path) -> None:
    images = [{'id': i, 'height': 40, 'width': 48} for i in (1, 2)] + [{'id': 3, 'height': 31, 'width': 60}]
    boxes = [[0, 0, 0.9, 5], [0, 0, 5, 0.5], [3, 3, 1, 1], [48, 3, 9, 9], [-3, -3, 4.5, 4.5]]
    objects = [{'image_id': 1, 'category_id': 1, 'bbox': box} for box in boxes]
    objects += [
        {'image_id': 1, 'category_id': 1, 'bbox': [5, 5, 9, 9], 'area': 0},
        {'image_id': 1, 'category_id': 1, 'bbox': [5, 5, 9, 9], 'iscrowd': 1},
        {'image_id': 3, 'category_id': 1, 'bbox': [5, 5, 9, 9]},
    ]
    root = write_data(tmp_path, images, objects, [{'id': 1, 'name': 'thing'}])
    parts = {split: build_dataset(split, arguments(root, aug='co_detr')) for split in ('train', 'val')}
    assert parts['train'].ids == [1, 2] and parts['val'].ids == [1, 2, 3]
    for part in parts.values():
        assert part.untransformed(0)[1]['boxes'].tolist() == [[3, 3, 4, 4], [0, 0, 1.5, 1.5]]
        assert len(part[1][1]['boxes']) == 0
    assert len(parts['val'].ground_truth['annotations']) == len(objects)
    usual = build_dataset('train', arguments(root))
    assert usual.ids == [1, 2, 3] and len(usual.untransformed(0)[1]['boxes']) == 5


def test_data_of_tiny_pictures_only_is_refused(tmp_path: Path) -> None:
    root = write_data(tmp_path, [{'id': 1, 'height': 31, 'width': 60}], [], [{'id': 1}])
    with pytest.raises(ValueError, match=r'all 1 pictures .* less than 32 pixels'):
        build_dataset('train', arguments(root, aug='co_detr'))
