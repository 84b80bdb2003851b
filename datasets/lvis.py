"""LVIS v1 (arXiv:1908.03195): COCO's images with 1203 classes, whose annotations are federated."""

from pathlib import Path

from datasets.build import DataSettings
from datasets.class_map import ClassMap
from datasets.coco import CocoDetection, coco_options, find_path
from datasets.coco_eval import FEDERATED, LVIS_DETECTIONS
from datasets.coco_json import File, Issues, Lists, decode_entry, errors_in, read_lists
from util.errors import UserError


class LvisDetection(CocoDetection):
    """Images in LVIS's form.

    An image is named by its URL, whose last two parts are folder and file, since the validation part has
    images of COCO's train2017 too. Evaluation follows LVIS's federated rules (`datasets.coco_eval`).
    """

    federated = LVIS_DETECTIONS

    def read_lists(self, annotation_file: File, issues: Issues) -> Lists:
        """Return the lists of the file.

        Raises:
            UserError: fields that federated evaluation reads are missing.
        """
        lists = read_lists(annotation_file, issues)
        with errors_in(annotation_file):
            for name, check in (('images', check_image), ('categories', check_category)):
                for entry in map(decode_entry, lists[name]):
                    if isinstance(entry, dict):  # others are refused later
                        check(entry)
        return lists


def check_image(image: dict) -> None:
    """Require the lists of LVIS."""
    for key in FEDERATED:
        if not isinstance(image.get(key), list):
            raise UserError(
                f'image {image.get("id")} has no list {key}: LVIS needs it; read data in COCO form with '
                '--dataset_file coco'
            )


def check_category(category: dict) -> None:
    """Require the frequency of LVIS."""
    if category.get('frequency') not in ('r', 'c', 'f'):
        raise UserError(
            f'category {category.get("id")} has frequency {category.get("frequency")!r}: LVIS needs r, c or '
            'f (rare, common, frequent)'
        )


def find_annotations(part: str, settings: DataSettings) -> Path:
    """Return the annotation file of 'train' or 'val': `annotations/lvis_v1_{train,val}.json` by default."""
    return find_path(settings.coco_path, settings.annotations(part), usual_files(part), f'--{part}_ann')


def has_part(part: str, settings: DataSettings) -> bool:
    """Return whether flags name the annotation file of a part, or it lies in --coco_path."""
    root = Path(settings.coco_path or '')
    return bool(settings.annotations(part)) or any((root / name).exists() for name in usual_files(part))


def usual_files(part: str) -> list[str]:
    return [f'annotations/lvis_v1_{part}.json', f'lvis_v1_{part}.json']


def build(part: str, settings: DataSettings, class_map: ClassMap | None = None) -> LvisDetection:
    """Build the 'train' or 'val' part."""
    annotation_file = find_annotations(part, settings)
    images = settings.images(part) or settings.coco_path
    if images is None:
        raise UserError(f'where are the images? Give --coco_path or --{part}_images')
    dataset = LvisDetection(images, annotation_file, **coco_options(part, settings, class_map))
    dataset.federated = settings.topk_eval or LVIS_DETECTIONS
    return dataset
