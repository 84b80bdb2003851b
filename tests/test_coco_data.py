"""COCO-form data: official targets, files of every kind, errors that name the culprit, randomness without
surprises.
"""

import copy
import io
import json
import pickle
import random
from argparse import Namespace
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from torch.utils.data import DataLoader

from datasets.augmentations import DETRAugmentation
from datasets.class_map import COCO_IDS, ClassMap
from datasets.coco import CocoDetection, find_files
from datasets.coco_eval import prepare_ground_truth
from datasets.image_io import ImageReader, UnreadableImage
from datasets.jpeg_end import with_end_marker
from tests.shared_data import (
    SHARED,
    assert_target_equals,
    build_data,
    needs_shared,
    read_shared,
    recorded_fields,
    rule_image,
)
from util.errors import FileError
from util.seeding import local_seed

RECORDED = read_shared('parity/transforms/coco_pipeline.json')


def write_data(root: Path, data: dict, name: str = 'val2017') -> Path:
    """A folder in COCO's layout, with the deterministic images of the recording as PNG."""
    (root / 'annotations').mkdir(parents=True, exist_ok=True)
    (root / name).mkdir(parents=True, exist_ok=True)
    (root / 'annotations' / f'instances_{name}.json').write_text(json.dumps(data))
    for entry in data['images']:
        image = rule_image(f'coco/{entry["id"]}', entry['height'], entry['width'])
        PIL.Image.fromarray(image).save(root / name / entry['file_name'])
    return root


def small_data() -> dict:
    """Two images and the second one empty; category ids with gaps and not in order."""
    return {
        'images': [
            {'id': 12, 'file_name': 'b.png', 'height': 40, 'width': 50},
            {'id': 5, 'file_name': 'a.png', 'height': 30, 'width': 20},
        ],
        'annotations': [
            {'id': 1, 'image_id': 12, 'category_id': 250, 'bbox': [1, 2, 10, 20], 'area': 150, 'iscrowd': 0},
            {'id': 2, 'image_id': 12, 'category_id': 3, 'bbox': [-5, 30, 60, 20]},
            {'id': 3, 'image_id': 12, 'category_id': 7, 'bbox': [1, 1, 9, 9], 'area': 81, 'iscrowd': 1},
        ],
        'categories': [{'id': 7, 'name': 'cat'}, {'id': 3, 'name': 'dog'}, {'id': 250}],
    }


def load(root: Path, **options: object) -> CocoDetection:
    return CocoDetection(root / 'val2017', root / 'annotations' / 'instances_val2017.json', **options)


@pytest.fixture(scope='module')
def recorded_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp('recorded'), RECORDED['coco_json'])


@needs_shared
@pytest.mark.parametrize('kind', ['items_without_transform', 'items_without_transform_with_masks'])
def test_items_equal_official(recorded_root: Path, kind: str) -> None:
    class_map = ClassMap.identity(RECORDED['coco_json']['categories'])
    dataset = load(recorded_root, class_map=class_map, return_masks=kind.endswith('masks'))
    assert dataset.ids == RECORDED['ids_order']
    assert len(dataset) == RECORDED['dataset_length']
    for (image, target), recorded in zip(dataset, RECORDED[kind], strict=True):
        assert_target_equals(target, recorded)
        assert list(target) == recorded_fields(recorded)
        expected = rule_image(f'coco/{int(target["image_id"])}', *target['size'].tolist())
        assert np.array_equal(image.permute(1, 2, 0).numpy(), expected)


@needs_shared
def test_evaluation_items_equal_official(recorded_root: Path) -> None:
    class_map = ClassMap.identity(RECORDED['coco_json']['categories'])
    dataset = load(recorded_root, class_map=class_map, transforms=DETRAugmentation().transforms('val'))
    mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    std = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    for (image, target), recorded in zip(dataset, RECORDED['items_val_transform'], strict=True):
        assert_target_equals(target, recorded['target'])
        assert list(image.shape) == recorded['picture_shape']
        normalized = (image / 255 - mean) / std
        assert abs(float(normalized.mean()) - recorded['picture_mean']) < 1e-4
        assert abs(float(normalized.norm()) - recorded['picture_l2']) < 1e-4 * recorded['picture_l2']


@needs_shared
@pytest.mark.parametrize('name', ['train', 'val'])
def test_true_coco_images_load(name: str) -> None:
    root = SHARED / 'data/coco_mini'
    folder, file = find_files(name, str(root))
    dataset = CocoDetection(folder, file, DETRAugmentation(100).transforms(name), return_masks=True)
    assert dataset.class_map.num_classes == 91
    objects = 0
    for idx in range(0, len(dataset), 4):
        image, target = dataset[idx]
        assert image.shape[0] == 3
        assert image.dtype == torch.uint8
        assert target['masks'].shape[1:] == image.shape[1:]
        objects += len(target['labels'])
    assert objects > 0


def arguments(**options: object) -> Namespace:
    names = ('coco_path', 'train_images', 'train_ann', 'val_images', 'val_ann', 'max_size')
    defaults = dict.fromkeys(names) | {'img_size': 800, 'aug': 'detr', 'seed': 0}
    return Namespace(**(defaults | {'dataset_file': 'coco'} | options))


def test_foreign_ids_become_contiguous_labels(tmp_path: Path) -> None:
    dataset = load(write_data(tmp_path, small_data()))
    assert dataset.class_map.category_ids == (3, 7, 250)
    assert dataset.class_map.names == ('dog', 'cat', '250')
    assert dataset.ids == [5, 12]
    _, target = dataset[1]
    assert target['labels'].tolist() == [2, 0]
    assert target['boxes'].tolist() == [[1, 2, 11, 22], [0, 30, 50, 40]]
    assert target['area'].tolist() == [150, 1200]  # without an area it is the box's
    assert dataset.ground_truth['categories'][2] == {'id': 250}


def test_negative_index_and_end_of_iteration(tmp_path: Path) -> None:
    dataset = load(write_data(tmp_path, small_data()))
    assert dataset[-1][1]['image_id'].tolist() == [12]
    assert len(list(dataset)) == 2


def test_coco_keeps_its_ids_and_gaps() -> None:
    class_map = ClassMap.from_categories([{'id': i, 'name': f'c{i}'} for i in COCO_IDS])
    assert class_map.num_classes == 91
    assert len(class_map.label_of) == 80
    assert class_map.label_of[90] == 90
    assert class_map.names[0] is None
    assert class_map.names[12] is None


def test_class_map_survives_a_weights_only_checkpoint(tmp_path: Path) -> None:
    class_map = ClassMap.identity([{'id': 2, 'name': 'a'}, {'id': 5}])
    torch.save(class_map.to_dict(), tmp_path / 'map.pth')
    assert ClassMap.from_dict(torch.load(tmp_path / 'map.pth', weights_only=True)) == class_map


@pytest.mark.parametrize(
    ('categories', 'message'),
    [
        ([], 'no categories'),
        ([{'id': 1}, {'id': 1}], 'category id 1 occurs twice'),
        ([{'name': 'x'}], 'integer id'),
    ],
)
def test_bad_categories_are_refused(categories: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClassMap.from_categories(categories)


def test_missing_files_are_named(tmp_path: Path) -> None:
    write_data(tmp_path, small_data())
    (tmp_path / 'val2017/a.png').unlink()
    with pytest.raises(FileError, match=r'1 of 2 images .* the first is a\.png'):
        load(tmp_path)
    with pytest.raises(FileError, match='does not exist'):
        CocoDetection(tmp_path / 'val2017', tmp_path / 'nothing.json')
    with pytest.raises(FileError, match='image folder'):
        CocoDetection(tmp_path / 'nothing', tmp_path / 'annotations/instances_val2017.json')


def test_masks_need_segmentations(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r'annotation 1 .* has no segmentation.*without --masks'):
        load(write_data(tmp_path, small_data()), return_masks=True)


def test_masks_are_evaluated_where_images_have_no_size(tmp_path: Path) -> None:
    data = small_data()
    write_data(tmp_path, data)
    sizes = {image['id']: (image.pop('height'), image.pop('width')) for image in data['images']}
    for annotation in data['annotations']:
        annotation['segmentation'] = [[1, 1, 9, 1, 9, 9]]
    (tmp_path / 'annotations/instances_val2017.json').write_text(json.dumps(data))
    dataset = load(tmp_path, return_masks=True)
    truth = prepare_ground_truth(dataset.ground_truth, set(sizes), 'segm')
    assert {image['id']: (image['height'], image['width']) for image in truth['images']} == sizes
    with pytest.raises(ValueError, match=r'image .* has no height and width, which masks are evaluated with'):
        prepare_ground_truth(load(tmp_path).ground_truth, set(sizes), 'segm')


def test_a_image_of_another_size_is_refused(tmp_path: Path) -> None:
    data = small_data()
    write_data(tmp_path, data)
    data['images'][1]['width'] = 21
    (tmp_path / 'annotations/instances_val2017.json').write_text(json.dumps(data))
    with pytest.raises(ValueError, match=r'a\.png is 20 x 30 .* says 21 x 30'):
        load(tmp_path)[0]
    data['images'][1]['width'] = 0
    (tmp_path / 'annotations/instances_val2017.json').write_text(json.dumps(data))
    assert load(tmp_path)[0][0].shape == (3, 30, 20)


def test_file_names_may_have_folders(tmp_path: Path) -> None:
    data = small_data()
    write_data(tmp_path, data)
    (tmp_path / 'val2017/sub').mkdir()
    (tmp_path / 'val2017/a.png').rename(tmp_path / 'val2017/sub/ä.png')
    data['images'][1]['file_name'] = 'sub/ä.png'
    (tmp_path / 'annotations/instances_val2017.json').write_text(json.dumps(data))
    assert load(tmp_path)[0][0].shape == (3, 30, 20)


GREY = rule_image('grey', 24, 36)[:, :, 0]
RGB = rule_image('colour', 24, 36)
PHOTO = np.array(
    PIL.Image.fromarray(rule_image('photo', 8, 8)).resize((61, 45), PIL.Image.Resampling.BICUBIC)
)


def encoded(image: PIL.Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def rotated_exif() -> PIL.Image.Exif:
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    return exif


ODD_IMAGES = {
    'grey.jpg': lambda: encoded(PIL.Image.fromarray(GREY), 'JPEG'),
    'colour.jpg': lambda: encoded(PIL.Image.fromarray(RGB), 'JPEG', quality=90),
    'progressive.jpg': lambda: encoded(PIL.Image.fromarray(RGB), 'JPEG', progressive=True),
    'exif.jpg': lambda: encoded(PIL.Image.fromarray(RGB), 'JPEG', exif=rotated_exif()),
    'cmyk.jpg': lambda: encoded(PIL.Image.fromarray(RGB).convert('CMYK'), 'JPEG'),
    'grey.png': lambda: encoded(PIL.Image.fromarray(GREY), 'PNG'),
    'palette.png': lambda: encoded(PIL.Image.fromarray(RGB).convert('P'), 'PNG'),
    'alpha.png': lambda: encoded(PIL.Image.fromarray(RGB).convert('RGBA'), 'PNG'),
    'one_bit.png': lambda: encoded(PIL.Image.fromarray(GREY).convert('1'), 'PNG'),
    'colour.bmp': lambda: encoded(PIL.Image.fromarray(RGB), 'BMP'),
    'colour.tiff': lambda: encoded(PIL.Image.fromarray(RGB), 'TIFF'),
    'colour.webp': lambda: encoded(PIL.Image.fromarray(RGB), 'WEBP'),
    'jpeg_called.png': lambda: encoded(PIL.Image.fromarray(RGB), 'JPEG'),
}


@pytest.mark.parametrize('name', ODD_IMAGES)
def test_images_of_every_kind_decode_as_pillow_does(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(ODD_IMAGES[name]())
    image = ImageReader(exif='stored').read(path)
    with PIL.Image.open(path) as opened:
        expected = torch.from_numpy(np.array(opened.convert('RGB'))).permute(2, 0, 1)
    assert image.dtype == torch.uint8
    assert image.shape == (3, 24, 36)
    assert (image.int() - expected.int()).abs().max() <= 1


def test_sixteen_bits_become_eight_and_not_white(tmp_path: Path) -> None:
    PIL.Image.fromarray(GREY.astype(np.uint16) * 256 + 77).save(tmp_path / 'deep.png')
    image = ImageReader().read(tmp_path / 'deep.png')
    assert np.array_equal(image.numpy(), np.stack([GREY] * 3))


@pytest.mark.parametrize('name', ['colour.jpg', 'grey.png', 'colour.tiff'])
def test_broken_images_are_named(tmp_path: Path, name: str) -> None:
    data = ODD_IMAGES[name]()
    for content in (data[: len(data) // 2], b'', b'no image at all'):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f'{name} is not a readable image'):
            ImageReader().read(tmp_path / name)


JPEGS = {
    'plain': lambda: encoded(PIL.Image.fromarray(PHOTO), 'JPEG', quality=90),
    'grey': lambda: encoded(PIL.Image.fromarray(PHOTO).convert('L'), 'JPEG'),
    'CMYK': lambda: encoded(PIL.Image.fromarray(PHOTO).convert('CMYK'), 'JPEG'),
    'progressive': lambda: encoded(PIL.Image.fromarray(PHOTO), 'JPEG', progressive=True, quality=95),
    'restarts': lambda: encoded(PIL.Image.fromarray(PHOTO), 'JPEG', restart_marker_blocks=2),
    'progressive with restarts': lambda: encoded(
        PIL.Image.fromarray(PHOTO), 'JPEG', progressive=True, restart_marker_rows=1
    ),
}


@pytest.mark.parametrize('name', JPEGS)
def test_jpegs_without_their_end_marker_are_read_and_shorter_ones_refused(name: str) -> None:
    """Also without half of the marker. Not if zeros are in place of what is cut off, as after a crash."""
    data = JPEGS[name]()
    expected = ImageReader().decode(name, data)
    for cut in (1, 2):
        assert torch.equal(ImageReader().decode(name, data[:-cut]), expected)
    scan = data.rindex(b'\xff\xda')
    cuts = [*range(3, 40), *range(40, len(data) - 2, len(data) // 20), len(data) - scan]
    for cut in cuts:
        with pytest.raises(UnreadableImage):
            ImageReader().decode(name, data[:-cut])
        for zeros in (2, cut, 4096):
            assert with_end_marker(data[:-cut] + bytes(zeros)) is None


def test_augmentation_depends_on_seed_epoch_and_index_only(tmp_path: Path) -> None:
    root = write_data(tmp_path, small_data())
    dataset = load(root, transforms=DETRAugmentation(64).transforms('train'), seed=1)
    epochs = []
    for epoch in range(4):
        dataset.set_epoch(epoch)
        random.seed(epoch)
        epochs.append([dataset[0][0], dataset[1][0]])
    assert len({tuple(image.shape) for images in epochs for image in images}) > 2
    dataset.set_epoch(2)
    assert torch.equal(dataset[1][0], epochs[2][1])
    other = load(root, transforms=DETRAugmentation(64).transforms('train'), seed=2)
    images = []
    for epoch in range(4):
        other.set_epoch(epoch)
        images.append(other[1][0])
    assert any(mine.shape != theirs[1].shape for mine, theirs in zip(images, epochs, strict=True))


def test_number_of_workers_does_not_change_images(tmp_path: Path) -> None:
    """Also over epochs with workers that stay alive."""
    dataset = load(write_data(tmp_path, small_data()), transforms=DETRAugmentation(64).transforms('train'))
    alone = DataLoader(dataset, batch_size=None)
    workers = DataLoader(dataset, batch_size=None, num_workers=2, persistent_workers=True)
    for epoch in range(3):
        dataset.set_epoch(epoch)
        for (image, target), (expected, expected_target) in zip(workers, alone, strict=True):
            assert torch.equal(image, expected)
            assert torch.equal(target['boxes'], expected_target['boxes'])


@pytest.mark.slow
def test_spawned_workers_work(tmp_path: Path) -> None:
    dataset = load(write_data(tmp_path, small_data()), transforms=DETRAugmentation(64).transforms('train'))
    loader = DataLoader(dataset, batch_size=None, num_workers=1, multiprocessing_context='spawn')
    for (image, _), (expected, _) in zip(loader, dataset, strict=True):
        assert torch.equal(image, expected)


def test_workers_get_no_ground_truth(tmp_path: Path) -> None:
    dataset = load(write_data(tmp_path, small_data()))
    assert len(dataset.ground_truth['annotations']) == 3
    received = pickle.loads(pickle.dumps(dataset))
    assert 'ground_truth' not in vars(received)
    assert torch.equal(received[1][1]['boxes'], dataset[1][1]['boxes'])


def test_local_seed_restores_both_generators() -> None:
    random.seed(3)
    torch.manual_seed(3)
    expected = random.random(), torch.rand(2).tolist()
    random.seed(3)
    torch.manual_seed(3)
    with pytest.raises(KeyError), local_seed(1, 2, 3):
        inside = random.random(), torch.rand(2).tolist()
        raise KeyError
    assert (random.random(), torch.rand(2).tolist()) == expected
    with local_seed(1, 2, 3):
        assert (random.random(), torch.rand(2).tolist()) == inside
    with local_seed(1, 23):
        assert random.random() != inside[0]


@pytest.mark.parametrize(
    ('folder', 'name'), [('', 'val2017'), ('images', 'val2017'), ('', 'val'), ('images', 'val')]
)
def test_usual_layouts_are_found(tmp_path: Path, folder: str, name: str) -> None:
    write_data(tmp_path, small_data(), name)
    if folder:
        (tmp_path / folder).mkdir()
        (tmp_path / name).rename(tmp_path / folder / name)
    assert len(build_data('val', arguments(coco_path=str(tmp_path)))) == 2


def test_explicit_paths_win_and_need_no_coco_path(tmp_path: Path) -> None:
    root = write_data(tmp_path, small_data())
    paths = {'val_images': str(root / 'val2017'), 'val_ann': str(root / 'annotations/instances_val2017.json')}
    assert len(build_data('val', arguments(**paths))) == 2
    with pytest.raises(FileError, match='--val_ann'):
        build_data('val', arguments(coco_path=str(root), val_ann='nowhere.json'))
    with pytest.raises(FileError, match=r'instances_train2017.*instances_train.*--train_ann'):
        build_data('train', arguments(coco_path=str(root)))
    with pytest.raises(ValueError, match='--coco_path'):
        build_data('train', arguments())


def test_validation_takes_the_class_map_of_training(tmp_path: Path) -> None:
    root = write_data(tmp_path, small_data())
    data = copy.deepcopy(small_data())
    data['annotations'] = []
    data['categories'] = [{'id': 7, 'name': 'cat'}]
    training = ClassMap.from_categories(small_data()['categories'])
    dataset = build_data('val', arguments(coco_path=str(root)), training)
    assert dataset.class_map is training
    with pytest.raises(ValueError, match='unknown to the training data'):
        build_data('val', arguments(coco_path=str(root)), ClassMap.from_categories(data['categories']))


def test_unknown_dataset_is_refused() -> None:
    with pytest.raises(ValueError, match='coco, lvis, voc, yolo, shapes'):
        build_data('val', arguments(dataset_file='pascal'))
