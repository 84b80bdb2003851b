"""
A detection dataset without files: textured shapes, drawn when an image is read (datasets/shape_scenes.py).

Every run on every machine sees the same images. Each split has its own random stream, and image n does not
depend on the number of images. There are six classes, and 0 to 20 objects per image; boxes and masks cover
the visible part, as in COCO. Source: this repository.

This writes them as plain files in COCO's layout, for `--coco_path DIR` or for other programs:

    python -m datasets.shapes --out DIR --count 50 --split val
"""

import json
from argparse import Namespace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from datasets.build import DataSettings, image_options
from datasets.class_map import ClassMap
from datasets.image_dataset import ImageDataset, Mix
from datasets.shape_scenes import KINDS, SPLITS, Scene, draw_scene, scene_size
from datasets.transforms import Transform
from util.command_line import FlagParser, int_range, run_command

IMAGE_SEED = 17  # a constant: all runs share the data, whatever their --seed
# Ids in the order of KINDS, so that the class index of a category is its number there.
CATEGORIES = [{'id': number, 'name': kind.__name__} for number, kind in enumerate(KINDS, start=1)]
MAX_CACHED_BYTES = 2**30  # of images; their masks are small


class ShapesDetection(ImageDataset):
    """Drawn images with their objects.

    An item is (image, target): [3, H, W] uint8 and the dict of `target_of`. `seed` does not change it.
    """

    def __init__(
        self,
        num_images: int,
        split: str = 'train',
        seed: int = 0,
        image_size: int = 128,
        transforms: Transform | None = None,
        return_masks: bool = False,
        mix: Mix | None = None,
    ) -> None:
        super().__init__(transforms, mix, seed)
        if split not in SPLITS:
            raise ValueError(f'split {split!r}: choose one of {", ".join(SPLITS)}')
        self.split, self.image_size, self.return_masks = split, image_size, return_masks
        self.class_map = ClassMap.from_categories(CATEGORIES)
        self.ids = list(range(num_images))
        self._cache: dict[int, tuple[Tensor, dict[str, Tensor]]] = {}
        self._fits_cache = num_images * 3 * image_size**2 <= MAX_CACHED_BYTES

    def __getstate__(self) -> dict:
        """Leave out the images too: each worker draws its own."""
        return super().__getstate__() | {'_cache': {}}

    def untransformed(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Return image and target; each process draws an image once, if all fit into MAX_CACHED_BYTES."""
        if index not in self._cache:
            scene = self.draw(index)
            item = torch.from_numpy(scene.image), self.target_of(scene, index)
            if not self._fits_cache:
                return item
            self._cache[index] = item
        image, target = self._cache[index]
        return image.clone(), dict(target)

    def image_sizes(self) -> np.ndarray:
        """Return height and width of all images, [N, 2]; nothing is drawn."""
        return np.array(
            [scene_size(IMAGE_SEED, self.split, index, self.image_size) for index in range(len(self))]
        )

    def draw(self, index: int) -> Scene:
        return draw_scene(IMAGE_SEED, self.split, index, self.image_size)

    def target_of(self, scene: Scene, index: int) -> dict[str, Tensor]:
        """Return the target of an image with N objects, as COCO defines it.

        It has boxes [N, 4] xyxy in pixels, labels [N], masks [N, H, W] uint8 if asked for, and area [N] of
        the masks in pixels; orig_size and size are (height, width).
        """
        target = {
            'boxes': torch.from_numpy(scene.boxes_xyxy).float(),
            'labels': torch.from_numpy(scene.kinds),
        }
        if self.return_masks:
            target['masks'] = torch.from_numpy(scene.masks.astype(np.uint8))
        target['image_id'] = torch.tensor([self.ids[index]])
        target['area'] = torch.from_numpy(scene.areas).float()
        target['iscrowd'] = torch.zeros(len(scene.kinds), dtype=torch.int64)
        target['orig_size'] = torch.tensor(scene.image.shape[1:])
        target['size'] = torch.tensor(scene.image.shape[1:])
        return target

    @cached_property
    def ground_truth(self) -> dict[str, list[dict]]:
        """Return the split in COCO's JSON form; objects are in the targets' order."""
        images: list[dict] = []
        annotations: list[dict] = []
        for index, image_id in enumerate(self.ids):
            scene = self.draw(index)
            height, width = scene.image.shape[1:]
            name = f'{image_id:012d}.png'
            images.append({'id': image_id, 'width': width, 'height': height, 'file_name': name})
            annotations += annotations_of(scene, image_id, first_id=len(annotations) + 1)
        return {'images': images, 'annotations': annotations, 'categories': CATEGORIES}


def annotations_of(scene: Scene, image_id: int, first_id: int) -> list[dict]:
    """Return COCO annotations of a scene: boxes xywh in pixels, masks as compressed run lengths.

    Ids must count from 1, because pycocotools reads id 0 as 'no match'.
    """
    from pycocotools import mask as coco_mask

    runs = coco_mask.encode(np.asfortranarray(scene.masks.transpose(1, 2, 0).astype(np.uint8)))
    return [
        {
            'id': first_id + number,
            'image_id': image_id,
            'category_id': CATEGORIES[kind]['id'],
            'bbox': [x1, y1, x2 - x1, y2 - y1],
            'area': area,
            'iscrowd': 0,
            'segmentation': {'size': list(run['size']), 'counts': run['counts'].decode('ascii')},
        }
        for number, (kind, (x1, y1, x2, y2), area, run) in enumerate(
            zip(scene.kinds, scene.boxes_xyxy.tolist(), scene.areas.tolist(), runs, strict=True)
        )
    ]


def build(part: str, settings: DataSettings, class_map: ClassMap | None = None) -> ShapesDetection:
    """Build the split 'train' or 'val'; its classes are always the same."""
    options = image_options(part, settings)
    return ShapesDetection(
        settings.shapes_train if part == 'train' else settings.shapes_val,
        part,
        image_size=settings.shapes_size,
        return_masks=options['mix'] is not None or settings.masks,
        **options,
    )


def export_shapes(folder: Path, dataset: ShapesDetection) -> None:
    """Write {split}2017/*.png and annotations/instances_{split}2017.json, COCO's layout on disk."""
    from PIL import Image

    files, annotations = folder / f'{dataset.split}2017', folder / 'annotations'
    files.mkdir(parents=True, exist_ok=True)
    annotations.mkdir(exist_ok=True)
    for index, entry in enumerate(dataset.ground_truth['images']):
        image = dataset.draw(index).image.transpose(1, 2, 0)
        Image.fromarray(np.ascontiguousarray(image)).save(files / entry['file_name'])
    path = annotations / f'instances_{dataset.split}2017.json'
    path.write_text(json.dumps(dataset.ground_truth), encoding='utf-8')


def get_args_parser() -> FlagParser:
    parser = FlagParser('datasets.shapes', description='Write the built-in images as files.')
    parser.add_argument('--out', type=Path, required=True, help='output folder, created if missing')
    parser.add_argument('--count', type=int_range(1), default=50, help='number of images')
    parser.add_argument('--split', choices=list(SPLITS), default='val', help='split to write')
    parser.add_argument('--size', type=int_range(1), default=128, help='longer side of an image in pixels')
    return parser


def main(args: Namespace) -> None:
    export_shapes(args.out, ShapesDetection(args.count, args.split, image_size=args.size))
    print(f'{args.count} images of the {args.split} split are in {args.out}')


if __name__ == '__main__':
    run_command(main, get_args_parser())
