"""Transforms: official numbers for one image through every transform, and what has to hold for any image."""

import math
import random
from argparse import Namespace
from collections.abc import Callable

import numpy as np
import PIL.Image
import pytest
import torch
from torch import Tensor

from datasets import transforms as T
from datasets.augmentations import DETRAugmentation, NoAugmentation, build_augmentation
from models.backbone import IMAGENET_MEAN, IMAGENET_STD
from tests.shared_data import assert_target_equals, needs_shared, read_shared, rule_image

RECORDED = read_shared('parity/transforms/transforms.json')
SINGLE = RECORDED.get('single', {})
SEEDED = RECORDED.get('train_transform_seeded', {'runs': []})['runs']


def transform_of(name: str, call: dict) -> tuple[Callable, tuple]:
    """The function of a recorded entry, and its arguments after (image, target)."""
    if name == 'hflip':
        return T.hflip, ()
    if name.startswith('resize'):
        return T.resize, (call['size'], call['max_size'])
    if name == 'pad':
        return T.pad, (call['padding_right_bottom'],)
    if name == 'center_crop':
        (height, width), (image_h, image_w) = call['size_height_width'], (150, 200)
        return T.crop, ((round((image_h - height) / 2), round((image_w - width) / 2), height, width),)
    if name.startswith('crop'):
        return T.crop, (call['region_top_left_height_width'],)
    return {
        'to_tensor_normalize': T.NormalizeBoxes(),
        'eval_transform': DETRAugmentation().transforms('val'),
    }[name], ()


def recorded_image() -> Tensor:
    return torch.from_numpy(rule_image('pil0', 150, 200)).permute(2, 0, 1).contiguous()


def recorded_target(expected: dict) -> dict[str, Tensor]:
    """The input of an entry: a field is given where the result has it."""
    source = RECORDED['input_target']
    masks = torch.zeros(6, 150, 200, dtype=torch.bool)
    for mask, (x0, y0, x1, y1) in zip(masks, source['boxes_xyxy'], strict=True):
        mask[math.floor(y0) : math.ceil(y1), math.floor(x0) : math.ceil(x1)] = True
    target = {
        'boxes': torch.tensor(source['boxes_xyxy']),
        'labels': torch.tensor(source['labels']),
        'image_id': torch.tensor([1]),
        'area': torch.tensor(source['area']),
        'iscrowd': torch.tensor(source['iscrowd']),
        'orig_size': torch.tensor([150, 200]),
        'size': torch.tensor([150, 200]),
        'masks': masks,
    }
    return {key: value for key, value in target.items() if f'{key}_dtype' in expected}


def assert_image(image: Tensor, recorded: dict) -> None:
    """Within one grey level of the recorded samples, of a uint8 image or a normalised float one."""
    if 'uint8_crc32' in recorded:
        assert image.shape == (3, recorded['height'], recorded['width'])
        values = image.permute(1, 2, 0).flatten()[recorded['sample_flat_indices_hwc']].float()
        expected = torch.tensor(recorded['sample_values'])
    else:
        assert list(image.shape) == recorded['shape']
        flat_idx = torch.tensor(recorded['sample_flat_indices_chw'])
        values = image.flatten()[flat_idx].float()
        channel = flat_idx // image[0].numel()
        mean, std = torch.tensor(IMAGENET_MEAN)[channel], torch.tensor(IMAGENET_STD)[channel]
        expected = (torch.tensor(recorded['sample_values']) * std + mean) * 255
    assert (values - expected).abs().max() <= 1.001
    assert image.dtype == torch.uint8


@needs_shared
@pytest.mark.parametrize('name', SINGLE)
def test_transform_equals_official(name: str) -> None:
    entry = SINGLE[name]
    transform, arguments = transform_of(name, entry.get('call', {}))
    image, target = transform(recorded_image(), recorded_target(entry['target']), *arguments)
    assert_image(image, entry['picture'])
    assert_target_equals(target, entry['target'])


@needs_shared
@pytest.mark.parametrize('run', SEEDED, ids=lambda run: f'seed{run["seed"]}')
def test_training_recipe_draws_and_numbers_are_official(run: dict) -> None:
    random.seed(run['seed'])
    torch.manual_seed(run['seed'])
    image, target = DETRAugmentation().transforms('train')(recorded_image(), recorded_target(run['target']))
    assert_image(image, run['picture'])
    assert_target_equals(target, run['target'])


@needs_shared
@pytest.mark.parametrize('entry', RECORDED.get('resize_sizes', []), ids=lambda e: f'{e["wh"]}-{e["size"]}')
def test_resized_size_equals_official(entry: dict) -> None:
    assert list(T.resized_size(tuple(entry['wh']), entry['size'], entry['max_size'])) == entry['out_wh']


@pytest.mark.parametrize(
    ('image_wh', 'max_size', 'expected'),
    [((640, 480), 1333, (1066, 800)), ((640, 128), 1333, (1335, 267)), ((1200, 400), 1333, (1332, 444))],
)
def test_long_side_is_truncated_not_rounded(image_wh: tuple, max_size: int, expected: tuple) -> None:
    assert T.resized_size(image_wh, 800, max_size) == expected


def make_sample(objects: int = 3) -> tuple[Tensor, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (3, 60, 80), generator=generator, dtype=torch.uint8)
    corners = torch.rand(objects, 2, 2, generator=generator).sort(dim=1).values * torch.tensor([80, 60])
    target = {
        'boxes': corners.flatten(1),
        'labels': torch.arange(objects),
        'masks': torch.ones(objects, 60, 80, dtype=torch.uint8),
        'image_id': torch.tensor([4]),
        'area': torch.ones(objects),
        'iscrowd': torch.zeros(objects, dtype=torch.int64),
        'orig_size': torch.tensor([60, 80]),
        'size': torch.tensor([60, 80]),
    }
    return image, target


TRANSFORMS = {
    'hflip': T.RandomHorizontalFlip(1.0),
    'resize': T.RandomResize([30, 90], 100),
    'size_crop': T.RandomSizeCrop(20, 50),
    'normalize': T.NormalizeBoxes(),
    'train': DETRAugmentation(64).transforms('train'),
    'val': DETRAugmentation(64).transforms('val'),
}


@pytest.mark.parametrize('name', TRANSFORMS)
@pytest.mark.parametrize('objects', [0, 3])
def test_targets_stay_whole_and_the_input_unchanged(name: str, objects: int) -> None:
    image, target = make_sample(objects)
    before = image.clone(), {key: value.clone() for key, value in target.items()}
    for seed in range(4):
        random.seed(seed)
        torch.manual_seed(seed)
        result, changed = TRANSFORMS[name](image, target)
        assert torch.equal(image, before[0])
        assert all(torch.equal(target[key], before[1][key]) for key in before[1])
        kept = len(changed['boxes'])
        assert {len(changed[key]) for key in T.OBJECT_FIELDS} == {kept}
        assert changed['boxes'].shape == (kept, 4)
        assert list(result.shape[1:]) == list(changed['masks'].shape[1:]) == changed['size'].tolist()
        assert result.dtype == torch.uint8
        assert changed['orig_size'].tolist() == [60, 80]


@pytest.mark.parametrize('name', TRANSFORMS)
def test_a_image_without_target_passes(name: str) -> None:
    image, _ = make_sample()
    result, target = TRANSFORMS[name](image, {})
    assert not target.keys() - {'size'}
    assert result.shape[0] == 3


def test_flipping_twice_gives_the_image_back() -> None:
    image, target = make_sample()
    result, flipped = T.hflip(*T.hflip(image, target))
    assert torch.equal(result, image)
    torch.testing.assert_close(flipped['boxes'], target['boxes'])


def test_memory_layout_does_not_change_pixels() -> None:
    image, _ = make_sample()
    pixels_first = image.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    ours, _ = T.resize(pixels_first, {}, 96)
    assert torch.equal(ours, T.resize(image, {}, 96)[0])
    pil = PIL.Image.fromarray(image.permute(1, 2, 0).numpy()).resize((128, 96), PIL.Image.Resampling.BILINEAR)
    pillow = torch.from_numpy(np.array(pil)).permute(2, 0, 1)
    assert (ours.int() - pillow.int()).abs().max() <= 1


def test_another_img_size_scales_the_whole_recipe() -> None:
    recipe = DETRAugmentation(200).transforms('train')
    _, select, _ = recipe.transforms
    first, size_crop, last = select.second.transforms
    assert first.sizes == [100, 125, 150]
    assert (size_crop.min_size, size_crop.max_size) == (96, 150)
    assert last.sizes == [120, 128, 136, 144, 152, 160, 168, 176, 184, 192, 200]
    assert (first.max_size, last.max_size) == (None, 333)


@pytest.mark.parametrize('img_size', [8, 33, 100, 640, 1333])
def test_crops_fit_at_every_img_size(img_size: int) -> None:
    for seed in range(6):
        random.seed(seed)
        image, target = DETRAugmentation(img_size).transforms('train')(*make_sample())
        assert list(image.shape[1:]) == target['size'].tolist()


def test_training_without_augmentation_is_the_evaluation_transform() -> None:
    image, target = NoAugmentation(64).transforms('train')(*make_sample())
    expected, expected_target = DETRAugmentation(64).transforms('val')(*make_sample())
    assert torch.equal(image, expected)
    assert all(torch.equal(target[key], expected_target[key]) for key in target)


@pytest.mark.parametrize('flags', [{'aug': 'strong'}, {'img_size': 0}])
def test_unknown_augmentations_and_sizes_are_refused(flags: dict) -> None:
    with pytest.raises(ValueError, match='choose'):
        build_augmentation(Namespace(**flags))


def test_float_images_are_refused() -> None:
    with pytest.raises(ValueError, match='uint8'):
        T.NormalizeBoxes()(torch.zeros(3, 4, 4), {})
