"""The built-in images: the same on every machine, and the same objects in every form."""

import argparse
import json
import pickle
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask

from datasets import shapes
from datasets.shape_scenes import KINDS, MAX_OBJECTS, Dice, draw_scene
from datasets.shapes import IMAGE_SEED, ShapesDetection
from tests.shared_data import build_data
from util.command_line import run_command
from util.config.declare import DATA
from util.config.settle import settle

RECORDED = {  # (split, number, size): crc32 of image, labels, boxes and areas
    ('train', 0, 128): 1560046643,
    ('train', 1, 128): 264208437,
    ('train', 3999, 128): 3396735928,
    ('val', 0, 128): 1080437648,
    ('val', 5, 96): 959890304,
    ('test', 2, 128): 2570222125,
    ('train', 7, 333): 545478254,
}
DICE = [609, 886, 476, 897]


def checksum(scene) -> int:
    crc = zlib.crc32(np.ascontiguousarray(scene.image))
    for part in (scene.kinds, scene.boxes_xyxy, scene.areas):
        crc = zlib.crc32(part.astype('<i8').tobytes(), crc)
    return crc


@pytest.fixture(scope='module')
def scenes():
    return [draw_scene(IMAGE_SEED, 'train', index) for index in range(150)]


@pytest.mark.parametrize('key', RECORDED)
def test_images_are_the_recorded_ones(key):
    assert checksum(draw_scene(IMAGE_SEED, *key)) == RECORDED[key]


def test_random_numbers_are_the_recorded_ones():
    dice = Dice(1, 2, 3)
    assert [dice.integer(0, 1000) for _ in range(4)] == DICE


def test_rotations_have_length_one():
    dice = Dice(5)
    for cosine, sine in (dice.rotation() for _ in range(100)):
        assert abs(cosine * cosine + sine * sine - 1) < 1e-15


def test_a_image_depends_on_its_own_number_only():
    few, many = ShapesDetection(3, 'val'), ShapesDetection(9, 'val', seed=5)
    image, target = many[2]
    many[7]
    np.random.seed(1)
    again, again_target = few[2]
    assert torch.equal(image, again)
    assert all(torch.equal(target[name], again_target[name]) for name in target)


def test_drawing_leaves_the_global_generators_alone():
    numpy_state, torch_state = np.random.get_state()[1].copy(), torch.get_rng_state()
    ShapesDetection(1)[0]
    assert (np.random.get_state()[1] == numpy_state).all() and torch.equal(torch.get_rng_state(), torch_state)


def test_splits_seeds_and_numbers_differ():
    keys = [(17, 'train', 0), (17, 'val', 0), (17, 'test', 0), (18, 'train', 0), (17, 'train', 1)]
    assert len({checksum(draw_scene(*key)) for key in keys}) == len(keys)


def test_masks_agree_with_boxes_and_areas(scenes):
    for scene in scenes[:40]:
        assert scene.masks.sum(axis=0).max(initial=0) <= 1, 'objects share a pixel'
        for mask, (x1, y1, x2, y2), area in zip(scene.masks, scene.boxes_xyxy, scene.areas, strict=True):
            inside = mask[y1:y2, x1:x2]
            assert mask.sum() == inside.sum() == area
            assert inside[0].any() and inside[-1].any() and inside[:, 0].any() and inside[:, -1].any()


def test_variety(scenes):
    counts = np.array([len(scene.kinds) for scene in scenes])
    sides = np.concatenate([scene.boxes_xyxy[:, 2:] - scene.boxes_xyxy[:, :2] for scene in scenes])
    shapes_seen = {scene.image.shape[1:] for scene in scenes}
    assert counts.min() == 0 and 10 <= counts.max() <= MAX_OBJECTS and 2 < counts.mean() < 6
    assert set(np.concatenate([scene.kinds for scene in scenes])) == set(range(len(KINDS)))
    assert (sides.max(axis=1) >= 10).mean() > 0.97 and sides.max() > 64
    assert len(shapes_seen) > 30 and {max(shape) for shape in shapes_seen} == {128}


def test_the_longer_side_is_as_asked():
    small, large = draw_scene(IMAGE_SEED, 'train', 3, 64), draw_scene(IMAGE_SEED, 'train', 3, 320)
    assert max(small.image.shape) == 64 and max(large.image.shape) == 320


def test_target_has_the_house_form():
    dataset = ShapesDetection(4, 'val', return_masks=True)
    image, target = dataset[0]
    height, width = image.shape[1:]
    num = len(target['labels'])
    assert list(target) == ['boxes', 'labels', 'masks', 'image_id', 'area', 'iscrowd', 'orig_size', 'size']
    assert image.dtype == torch.uint8 and target['masks'].shape == (num, height, width)
    dtypes = [torch.float32, torch.int64, torch.uint8, torch.int64, torch.float32] + 3 * [torch.int64]
    assert [value.dtype for value in target.values()] == dtypes
    assert target['image_id'].tolist() == [0] and target['size'].tolist() == [height, width]
    assert 'masks' not in ShapesDetection(4, 'val')[0][1]


def test_a_image_without_objects_has_empty_targets(scenes):
    index = next(index for index, scene in enumerate(scenes) if not len(scene.kinds))
    image, target = ShapesDetection(index + 1, 'train', return_masks=True)[index]
    assert target['boxes'].shape == (0, 4) and target['labels'].shape == (0,)
    assert target['masks'].shape == (0, *image.shape[1:])


def test_ground_truth_equals_targets():
    dataset = ShapesDetection(12, 'val', return_masks=True)
    truth = json.loads(json.dumps(dataset.ground_truth))
    assert [annotation['id'] for annotation in truth['annotations']] == list(
        range(1, len(truth['annotations']) + 1)
    )
    for index, entry in enumerate(truth['images']):
        image, target = dataset[index]
        objects = [obj for obj in truth['annotations'] if obj['image_id'] == entry['id']]
        boxes = torch.tensor([obj['bbox'] for obj in objects], dtype=torch.float32).reshape(-1, 4)
        assert (entry['height'], entry['width']) == image.shape[1:] and entry['id'] == dataset.ids[index]
        assert torch.equal(torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], dim=1), target['boxes'])
        assert [obj['area'] for obj in objects] == target['area'].tolist()
        labels = [dataset.class_map.label_of[obj['category_id']] for obj in objects]
        assert labels == target['labels'].tolist()
        for obj, mask in zip(objects, target['masks'], strict=True):
            assert (coco_mask.decode([obj['segmentation']])[..., 0] == mask.numpy()).all()
            assert coco_mask.toBbox([obj['segmentation']])[0].tolist() == obj['bbox']


def test_a_dataset_travels_without_its_ground_truth():
    dataset = ShapesDetection(2)
    size = len(pickle.dumps(dataset))
    assert dataset.ground_truth['images'] and len(pickle.dumps(dataset)) == size


def test_class_indices_are_named_after_the_shapes():
    class_map = ShapesDetection(1).class_map
    assert class_map.names == tuple(kind.__name__ for kind in KINDS)


def test_iteration_ends_and_numbers_outside_are_refused():
    dataset = ShapesDetection(2)
    assert len(list(dataset)) == len(dataset) == 2
    with pytest.raises(IndexError):
        dataset[2]
    with pytest.raises(ValueError, match='split'):
        ShapesDetection(2, 'validation')


@pytest.mark.parametrize(('image_set', 'count'), [('train', 5), ('val', 3)])
def test_build_reads_the_flags(image_set, count):
    args = argparse.Namespace(
        shapes_train=5,
        shapes_val=3,
        shapes_size=96,
        seed=0,
        img_size=128,
        max_size=192,
        aug='detr',
        dataset_file='shapes',
    )
    dataset = build_data(image_set, settle(args, (DATA,)))
    image, target = dataset[1]
    assert len(dataset) == count and dataset.split == image_set
    assert min(image.shape[1:]) > 60
    assert target['boxes'].max() <= 1 and target['size'].tolist() == list(image.shape[1:])
    assert max(target['orig_size']) == 96


def test_exported_files_hold_the_same_images(tmp_path):
    run_command(
        shapes.main, shapes.get_args_parser(), f'--out {tmp_path} --count 3 --split val --size 80'.split()
    )
    dataset = ShapesDetection(3, 'val', image_size=80)
    truth = json.loads((tmp_path / 'annotations' / 'instances_val2017.json').read_text())
    assert truth == dataset.ground_truth
    for index, entry in enumerate(truth['images']):
        stored = np.array(Image.open(tmp_path / 'val2017' / entry['file_name']))
        assert (stored.transpose(2, 0, 1) == dataset[index][0].numpy()).all()
