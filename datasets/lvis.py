"""LVIS v1 (arXiv:1908.03195): COCO's images with 1203 classes, whose annotations are federated."""

from collections.abc import Iterator

from datasets.build import DataSettings
from datasets.class_map import ClassMap
from datasets.coco import CocoDetection, coco_options, find_path
from datasets.coco_eval import FEDERATED, LVIS_DETECTIONS
from datasets.coco_json import File
from datasets.json_stream import list_blocks
from util.errors import UserError


class LvisDetection(CocoDetection):
    """Images in LVIS's form.

    An image is named by its address, whose last two parts are folder and file, since the validation part has images of
    COCO's train2017 too. Evaluation follows LVIS's federated rules (`datasets.coco_eval`).
    """

    federated = LVIS_DETECTIONS

    @classmethod
    def blocks(cls, annotation_file: File) -> Iterator[tuple[str, list]]:
        """Yield the lists of the file, prepared."""
        for name, block in list_blocks(annotation_file):
            cls.prepare(name, [entry for entry in block if isinstance(entry, dict)], annotation_file)
            yield name, block

    @staticmethod
    def prepare(name: str, block: list[dict], file: File) -> None:
        """Check what LVIS has besides.

        Raises:
            UserError: the fields that federated evaluation reads are missing.
        """
        for image in block if name == 'images' else []:
            for key in FEDERATED:
                if not isinstance(image.get(key), list):
                    raise UserError(
                        f'{file}: image {image.get("id")} has no list {key}: LVIS needs it; read data in COCO form with '
                        '--dataset_file coco'
                    )
        for category in block if name == 'categories' else []:
            if category.get('frequency') not in ('r', 'c', 'f'):
                raise UserError(
                    f'{file}: category {category.get("id")} has frequency {category.get("frequency")!r}: LVIS needs r, c or '
                    'f (rare, common, frequent)'
                )


def build(part: str, settings: DataSettings, class_map: ClassMap | None = None) -> LvisDetection:
    """Build the 'train' or 'val' part, from `annotations/lvis_v1_{train,val}.json` by default."""
    names = [f'annotations/lvis_v1_{part}.json', f'lvis_v1_{part}.json']
    annotation_file = find_path(settings.coco_path, settings.annotations(part), names, f'--{part}_ann')
    images = settings.images(part) or settings.coco_path
    if images is None:
        raise UserError(f'where are the images? Give --coco_path or --{part}_images')
    dataset = LvisDetection(images, annotation_file, **coco_options(part, settings, class_map))
    dataset.federated = settings.topk_eval or LVIS_DETECTIONS
    return dataset
