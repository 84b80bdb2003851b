"""Declare the flags of data (paths, image preparation, batches) and refuse impossible combinations."""

from argparse import ArgumentParser, Namespace, _ArgumentGroup
from collections.abc import Collection, Mapping

from datasets import DATASETS
from datasets.class_map import CLASS_IDS
from datasets.streaming.shards import SHUFFLE_BUFFER
from datasets.transforms import AUGMENTATIONS, LSJ_SIZE, RANDOM_SCALES
from util.bounds import check_bounds, real, whole
from util.distributed.collectives import get_local_size
from util.errors import UserError


def add_data_args(parser: ArgumentParser) -> None:
    group = parser.add_argument_group('data')
    group.add_argument(
        '--dataset_file', default='coco', choices=DATASETS,
        help='coco: any data in COCO form; lvis: LVIS v1; voc, yolo: folders of Pascal VOC and of YOLO; shapes: built-in images, '
        'drawn as they are needed (default: %(default)s)',
    )  # fmt: skip
    group.add_argument(
        '--coco_path', metavar='DIR',
        help='folder with annotations/instances_{train,val}2017.json and {train,val}2017/ or images/{train,val}2017/ (2017 may '
        'be missing); of voc with ImageSets/Main; of yolo with data.yaml, or that file',
    )  # fmt: skip
    for split in ('train', 'val'):
        group.add_argument(
            f'--{split}_images', metavar='DIR', help=f'folder of {split} images, instead of --coco_path'
        )
        group.add_argument(
            f'--{split}_ann', metavar='FILE', help=f'file of {split} annotations, instead of --coco_path'
        )
        group.add_argument(
            f'--{split}_shards', metavar='PLACE',
            help=f'{split} data in tar shards: shards.json of tools/make_shards.py, or its folder',
        )  # fmt: skip
    group.add_argument(
        '--class_ids', default='auto', choices=CLASS_IDS,
        help="class indices of the model. auto: COCO's 91 ids for COCO, 0 to K-1 in order of id for other data; contiguous: 0 "
        'to K-1 for COCO too, 80 classes (default: %(default)s)',
    )  # fmt: skip
    group.add_argument(
        '--check_data', action='store_true',
        help='read and decode all data, report what is odd, draw some of it into --output_dir, then stop',
    )  # fmt: skip
    add_trust_args(group)
    group.add_argument(
        '--repeat_threshold', default=0.0, type=real(0, 1), metavar='SHARE',
        help='repeat training images of classes that are in less than this share of the images, the rarer the more often; usual '
        'for LVIS: 0.001 (default: 0, no repetition)',
    )  # fmt: skip
    group.add_argument(
        '--img_size', default=800, type=whole(16, 10**5),
        help='shorter side of an image at evaluation, pixels; the scales of training shrink and grow with it '
        '(default: %(default)s)',
    )  # fmt: skip
    group.add_argument(
        '--max_size', type=whole(16, 10**5),
        help='longest side of an image, pixels (default: 1333, in proportion to --img_size)',
    )  # fmt: skip
    group.add_argument(
        '--train_scales', nargs=2, type=whole(16, 10**5), metavar=('MIN', 'MAX'),
        help=f'shortest and longest short side of a training image with --aug {" or ".join(RANDOM_SCALES)}, pixels, in steps of '
        '32 (default: 480 800, in proportion to --img_size)',
    )  # fmt: skip
    group.add_argument(
        '--train_max_size',
        type=whole(16, 10**5),
        help=f'longest side of a training image with --aug {" or ".join(RANDOM_SCALES)}, pixels (default: --max_size)',
    )
    group.add_argument(
        '--aug', default='detr', choices=AUGMENTATIONS,
        help=f'augmentation of training images. {"; ".join(map(": ".join, AUGMENTATIONS.items()))} (default: %(default)s)',
    )  # fmt: skip
    group.add_argument(
        '--lsj_size', default=LSJ_SIZE, type=whole(16, 10**5),
        help='side of the squares of --aug lsj, pixels, instead of --img_size and --max_size (default: %(default)s)',
    )  # fmt: skip
    for flag, default, text in (
        ('shapes_train', 4000, 'number of built-in training images'),
        ('shapes_val', 200, 'number of built-in validation images'),
        ('shapes_size', 128, 'longer side of a built-in image, pixels'),
    ):
        group.add_argument(
            f'--{flag}', default=default, type=whole(1, 10**9), help=f'{text} (default: %(default)s)'
        )
    add_loader_args(parser)


def add_trust_args(group: ArgumentParser | _ArgumentGroup) -> None:
    """Declare the flags that trust a file more than usual. Only a command line sets them, never a checkpoint."""
    group.add_argument(
        '--allow_outside', action='store_true',
        help='take images whose file_name leads out of the image folder (an absolute path, or ..); refused otherwise, because '
        'an annotation file of unknown origin could name any file',
    )  # fmt: skip
    group.add_argument(
        '--allow_pipe', action='store_true',
        help='run the commands that stand for tar shards in shards.json ("pipe:COMMAND"); refused otherwise, because an index of '
        'unknown origin could run anything',
    )  # fmt: skip


def add_loader_args(parser: ArgumentParser) -> None:
    group = parser.add_argument_group('loading')
    group.add_argument(
        '--num_workers',
        default=2,
        type=whole(0, 10**4),
        help='loader workers per training process (default: %(default)s)',
    )
    group.add_argument(
        '--group_aspect_ratio', action='store_true',
        help='make training batches of images that are all wider than high, or all not',
    )  # fmt: skip
    group.add_argument(
        '--bucket_sizes', action='store_true',
        help='make training batches of images that have about the same size after scaling and cropping, the same on all '
        'processes: a quarter of the padding, and no process waits',
    )  # fmt: skip
    group.add_argument(
        '--cache_mode', action='store_true',
        help='keep the compressed image files in memory; each process of a machine keeps its own share',
    )  # fmt: skip
    group.add_argument(
        '--shard_buffer', default=SHUFFLE_BUFFER, type=whole(1),
        help='images among which a loader worker shuffles --train_shards; it holds their files in memory '
        '(default: %(default)s)',
    )  # fmt: skip


SOURCES = ('dataset_file', 'coco_path', 'val_images', 'val_ann', 'val_shards', 'shapes_val', 'shapes_size')
TRUST = ('allow_outside', 'allow_pipe')
VIEW = (
    'img_size',
    'max_size',
    'aug',
    'lsj_size',
    'class_ids',
    'batch_size',
)  # how images and classes reach the model
# How a run prepares images and makes batches of them, which it keeps when it is resumed.
PREPARATION = (
    'img_size', 'max_size', 'train_scales', 'train_max_size', 'aug', 'lsj_size', 'class_ids', 'repeat_threshold',
    'group_aspect_ratio', 'bucket_sizes',
)  # fmt: skip


def adopt_data(args: Namespace, given: Collection[str], recorded: Mapping) -> None:
    """Take from the flags of a run what an evaluation of it needs and was not given: sizes, and the data if none is named."""
    names: tuple[str, ...] = (*SOURCES, *VIEW)
    kind, shapes = recorded.get('dataset_file'), {'shapes_val', 'shapes_size'}
    if set(SOURCES) - shapes & set(given):
        same = getattr(args, 'dataset_file', None) == kind if 'dataset_file' in given else kind == 'lvis'
        names = (*VIEW, *(('dataset_file', *shapes) if same and not args.val_shards else ()))
    for name in names:
        if name not in given and name in recorded:
            setattr(args, name, recorded[name])


def check_data_args(args: Namespace) -> None:
    """Refuse impossible combinations.

    Raises:
        UserError: flags contradict each other, or a number makes no sense.
    """
    parser = ArgumentParser()
    add_data_args(parser)
    check_bounds(args, parser)
    if args.train_scales and args.train_scales[0] > args.train_scales[1]:
        raise UserError(
            f'--train_scales {args.train_scales[0]} {args.train_scales[1]}: give the smaller size first'
        )
    if args.aug not in RANDOM_SCALES and (args.train_scales or args.train_max_size):
        raise UserError(
            f'--train_scales and --train_max_size are not for --aug {args.aug}, which scales otherwise: leave them out'
        )
    if args.cache_mode and args.aug == 'lsj' and get_local_size() > 1:
        raise UserError(
            '--aug lsj mixes any two images, but with --cache_mode a process keeps only its share: leave one out'
        )
    if args.repeat_threshold and (args.dataset_file == 'shapes' or args.train_shards):
        raise UserError('--repeat_threshold needs image files in COCO form or LVIS: leave it out')
    if args.cache_mode and args.dataset_file == 'shapes':
        raise UserError('--cache_mode keeps image files; built-in images have none: leave it out')
    for flag in ('coco_path', 'train_images', 'train_ann', 'val_images', 'val_ann'):
        fits = args.dataset_file in ('coco', 'lvis') or (
            flag == 'coco_path' and args.dataset_file != 'shapes'
        )
        if not fits and getattr(args, flag) is not None:
            instead = 'leave it out' if args.dataset_file == 'shapes' else 'give --coco_path instead'
            raise UserError(f'--{flag} is not for --dataset_file {args.dataset_file}: {instead}')
    others = {
        'group_aspect_ratio': args.group_aspect_ratio,
        'cache_mode': args.cache_mode,
        'train_shards': args.train_shards,
        'aug lsj': args.aug == 'lsj',
    }
    if args.bucket_sizes and any(others.values()):
        other = next(flag for flag, given in others.items() if given)
        raise UserError(f'--bucket_sizes makes batches in another way than --{other}: leave one out')
    for split in ('train', 'val'):
        if getattr(args, f'{split}_shards') is not None and not (args.eval and split == 'train'):
            check_shard_args(split, args)


def check_shard_args(split: str, args: Namespace) -> None:
    """Refuse flags that contradict shards of the 'train' or 'val' part."""
    flag = f'--{split}_shards'
    if args.dataset_file != 'coco':
        raise UserError(f'{flag} holds data in COCO form: leave --dataset_file {args.dataset_file} out')
    for other in (f'{split}_images', f'{split}_ann'):
        if getattr(args, other) is not None:
            raise UserError(f'{flag} and --{other} name the same images twice: give one of them')
    if args.cache_mode:
        raise UserError(f'--cache_mode keeps image files, and {flag} has none: leave it out')
    if args.group_aspect_ratio and split == 'train':
        raise UserError(
            f'--group_aspect_ratio chooses images for a batch, and {flag} streams them: leave it out'
        )
