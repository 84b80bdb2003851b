"""Co-DETR's data: class indices, mmdetection's resizing and filters, large-scale jitter, batches of one shape."""

import json
from argparse import Namespace
from pathlib import Path

import PIL.Image
import pytest

import main
from datasets import build_dataset
from datasets.class_map import COCO_IDS, ClassMap
from tests.shared_data import rule_picture

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
