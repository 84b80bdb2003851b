"""Build a dataset by the name of its format, from the settled flags of data."""

from argparse import Namespace
from importlib import import_module
from pathlib import Path
from typing import Any

from datasets.augmentations import build_augmentation
from datasets.class_map import ClassMap
from datasets.coco_eval import CocoEvaluator, LvisEvaluator
from datasets.evaluation import Evaluator
from datasets.image_dataset import ImageDataset
from datasets.layouts import FORMATS, PARTS, find_layout
from util.config.declare import DATA
from util.config.flags import FLAGS
from util.config.networks import level_strides
from util.config.rules import is_shards
from util.config.settle import Settled, settle
from util.errors import UserError

# Value of --dataset_file -> module whose `build(part, settings, class_map)` builds the part 'train' or 'val'.
DATASETS = {
    'coco': 'datasets.coco',
    'lvis': 'datasets.lvis',
    'voc': 'datasets.voc',
    'yolo': 'datasets.yolo',
    'shapes': 'datasets.shapes',
}
# Value of --evaluator -> what computes the metrics.
EVALUATORS: dict[str, type[Evaluator]] = {'coco': CocoEvaluator, 'lvis': LvisEvaluator}
FILES = ('train_images', 'train_ann', 'val_images', 'val_ann')  # flags that name files
MOST_UNREADABLE = 20  # training images, by default: more are a sign of a disk that is gone
MASK_FLAGS = ('masks', 'co_masks', 'co_rcnn_masks')  # a model with one of these learns masks


class DataSettings(Settled):
    """Settled flags of data, which the builders of datasets read, and `masks`: targets need masks.

    `locate` adds the parts that the data have, the part whose files hold that of validation, and in words what
    --coco_path holds.
    """

    parts: frozenset[str] | None = None
    val_source = 'val'
    found = ''

    @property
    def most_unreadable(self) -> int:
        """Return how many training images may be unreadable."""
        return MOST_UNREADABLE if self.skip_unreadable is None else self.skip_unreadable

    @property
    def most_missing(self) -> int:
        """Return how many files of training images may be missing at the start: in a new run none by default."""
        is_new = self.skip_unreadable is None and not getattr(self, 'resume', '')
        return 0 if is_new else self.most_unreadable

    def source(self, part: str) -> str:
        """Return the part whose files hold this one: with --val_share, both are in those of training."""
        return self.val_source if part == 'val' else part

    def images(self, part: str) -> str | None:
        """Return --train_images or --val_images."""
        return getattr(self, f'{self.source(part)}_images')

    def annotations(self, part: str) -> str | None:
        """Return --train_ann or --val_ann."""
        return getattr(self, f'{self.source(part)}_ann')


def data_settings(args: Namespace, masks: bool | None = None) -> DataSettings:
    """Return the settings of flags; those that are missing have their defaults.

    Args:
        masks: whether targets need masks; None: as the flags of the model say.

    Raises:
        UserError: a value is invalid, or flags contradict each other.
    """
    flags = vars(settle(args, (DATA,)))
    if masks is None:
        masks = any(flags.get(name) for name in MASK_FLAGS)
    return DataSettings(**{'seed': FLAGS['seed'].default, 'topk_eval': None} | flags | {'masks': masks})


def data_limits(args: Namespace) -> dict[str, int]:
    """Return the limits of `datasets.inventory.find_warnings` that settled flags imply."""
    augmentation = build_augmentation(args)
    limits = {'num_queries': args.num_queries, 'stride': level_strides(args)[0]}
    return limits | {'img_size': augmentation.img_size, 'max_size': augmentation.max_size}


def locate(settings: DataSettings, alone: bool = False) -> DataSettings:
    """Find the format and the files of --coco_path, and which parts the data have.

    Files that flags name win. Formats that are not among `datasets.layouts.FORMATS` stay as they are.

    Args:
        alone: only validation is asked for. A folder with one part, which has no name, is taken for it.

    Raises:
        FileError: the folder does not exist, or holds no data.
        UserError: it is not clear what it holds, or --val_share is given beside a validation part.
    """
    kind, share = settings.dataset_file, settings.val_share
    if kind not in ('auto', *FORMATS):
        has_part = getattr(import_module(DATASETS[kind]), 'has_part', lambda part, settings: True)
        return settings.but(parts=frozenset(part for part in PARTS if has_part(part, settings)))
    given = {name: value for name in FILES if (value := getattr(settings, name))}
    parts = {part for part in PARTS if f'{part}_ann' in given}
    flags, found, is_named = {'dataset_file': 'coco' if kind == 'auto' else kind}, '', True
    try:
        layout = (
            find_layout(Path(settings.coco_path), 'coco' if given else kind) if settings.coco_path else None
        )
    except UserError:
        if kind in ('auto', 'coco') and not given:
            raise
        layout = None
    if layout is not None:
        flags, found, is_named = layout.flags() | given, str(layout), layout.is_named
        parts |= layout.annotations.keys()
    elif kind in ('voc', 'yolo'):  # what is missing is said when a part is built
        parts = set(PARTS)
    if share and 'val' in parts:
        raise UserError(
            f'--val_share {share:g} makes a validation part, but there is one ({found or settings.val_ann}): '
            'leave it out'
        )
    from_training = 'train' in parts and (share > 0 or (alone and not is_named))
    if from_training:
        parts.add('val')
        found += f'; a share of {share:g} is for validation' if share else '; all of it is evaluated'
    return settings.but(
        **flags,
        parts=frozenset(parts),
        val_source='train' if from_training else 'val',
        found='' if given else found,
    )


def build_dataset(part: str, settings: DataSettings, class_map: ClassMap | None = None) -> ImageDataset:
    """Build the 'train' or 'val' part of the data.

    Args:
        class_map: class indices of the training part or of a checkpoint, if they are known.

    Raises:
        UserError: the data are invalid.
        TypeError: the dataset does not keep the contract of `datasets.image_dataset.ImageDataset`.
    """
    if settings.parts is None:
        settings = locate(settings)
    shards = is_shards(settings.annotations(part))
    module = 'datasets.shards' if shards else DATASETS[settings.dataset_file]
    dataset = import_module(module).build(part, settings, class_map)
    missing = [name for name in ('ids', 'class_map') if not hasattr(dataset, name)]
    if not isinstance(dataset, ImageDataset) or missing:
        problem = f'lacks {" and ".join(missing)}' if missing else 'is not an ImageDataset'
        raise TypeError(f'{type(dataset).__name__} of {module} {problem}: see datasets/image_dataset.py')
    return dataset


def build_evaluator(name: str, dataset: ImageDataset, kinds: tuple[str, ...] = ('bbox',)) -> Evaluator:
    """Build the evaluator of a dataset. kinds: what is evaluated, of 'bbox' and 'segm'."""
    return EVALUATORS[name].build(dataset, kinds)


def main_column(name: str) -> str:
    """Return the name in log files of the number by which the best epoch is chosen."""
    return f'test_{EVALUATORS[name].main}'


def image_options(part: str, settings: DataSettings) -> dict[str, Any]:
    """Return the options of an `ImageDataset`: transforms, mix and seed."""
    augmentation = build_augmentation(settings)
    transforms, mix = augmentation.transforms(part), augmentation.mix(part, settings.masks)
    return {'transforms': transforms, 'mix': mix, 'seed': settings.seed}
