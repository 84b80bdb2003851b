"""LVIS v1 (arXiv:1908.03195): COCO's images with 1203 classes, whose annotations are federated."""

import argparse
import os
from pathlib import Path
from urllib.parse import urlparse

from datasets.class_map import ClassMap
from datasets.coco import CocoDetection, find_path, options_of
from datasets.coco_json import Annotations, read_annotations


class LvisDetection(CocoDetection):
    """Images in LVIS's form.

    An image is named by its address, whose last two parts are folder and file, since the validation part has images of
    COCO's train2017 too. Evaluation follows LVIS's federated rules (`datasets.coco_eval`).
    """

    federated = True

    @staticmethod
    def read(annotation_file: str | os.PathLike[str]) -> Annotations:
        """Read the annotations, and name each image by its path below the folder of all images.

        Raises:
            ValueError: a list is missing, or the fields that federated evaluation reads are.
        """
        data = read_annotations(annotation_file)
        for image in data['images']:
            if 'file_name' not in image and 'coco_url' in image:
                image['file_name'] = '/'.join(urlparse(image['coco_url']).path.split('/')[-2:])
            for key in ('neg_category_ids', 'not_exhaustive_category_ids'):
                if not isinstance(image.get(key), list):
                    raise ValueError(
                        f'{annotation_file}: image {image.get("id")} has no list {key}: LVIS needs it; read data in COCO form '
                        'with --dataset_file coco'
                    )
        if without := [c for c in data['categories'] if c.get('frequency') not in ('r', 'c', 'f')]:
            raise ValueError(
                f'{annotation_file}: category {without[0].get("id")} has frequency {without[0].get("frequency")!r}: LVIS '
                'needs r, c or f (rare, common, frequent)'
            )
        return data


def build(image_set: str, args: argparse.Namespace, class_map: ClassMap | None = None) -> LvisDetection:
    """Build the 'train' or 'val' part named by the arguments, `annotations/lvis_v1_{train,val}.json` by default."""
    names = [f'annotations/lvis_v1_{image_set}.json', f'lvis_v1_{image_set}.json']
    annotation_file = find_path(
        args.coco_path, getattr(args, f'{image_set}_ann'), names, f'--{image_set}_ann'
    )
    images = getattr(args, f'{image_set}_images') or args.coco_path
    if images is None:
        raise ValueError(f'where are the images? Give --coco_path or --{image_set}_images')
    return LvisDetection(Path(images), annotation_file, **options_of(image_set, args, class_map))
