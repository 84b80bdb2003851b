"""Unusual and bad inputs: each ends in one clear message, or is handled as docs/data.md says."""

import argparse
import errno
import json
import os
import pickle
import random
import signal
import traceback
import zipfile
from collections.abc import Callable
from pathlib import Path

import PIL.Image
import pytest
import torch
from torch.utils.data import get_worker_info

import main
from datasets.coco import CocoDetection
from datasets.unreadable import UnreadableImages
from models.training import losses
from models.weights.write import write_safetensors
from tests.runs import TINY
from tests.shared_data import rule_image
from tools import compare_runs, convert_checkpoint, make_shards, predict
from util.command_line import is_of_user, run_command
from util.errors import FileError, UserError

PROGRAMS = {
    'main': (main.main, main.get_args_parser),
    'predict': (predict.main, predict.get_args_parser),
    'convert': (convert_checkpoint.main, convert_checkpoint.get_args_parser),
    'shards': (make_shards.make_shards, make_shards.get_args_parser),
    'compare': (compare_runs.main, compare_runs.get_args_parser),
}
SMALL = [*TINY.replace('--dataset_file shapes', '').split(), '--epochs', '1', '--batch_size', '3']


def complaint(program: str, argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The message with which a program ends, as its user reads it."""
    function, parser = PROGRAMS[program]
    with pytest.raises(SystemExit) as stop:
        run_command(function, parser(), argv)
    said = capsys.readouterr()
    text = stop.value.code if isinstance(stop.value.code, str) else said.err
    assert stop.value.code == 2 or text.startswith('error: '), text
    assert 'Traceback' not in said.err and 'weights_only' not in text
    assert len(text) < 1500 and text.count('\n') < 15, text
    return text


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob('*') if path.is_file()}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Three images and five objects of two classes."""
    for split in ('train', 'val'):
        (tmp_path / split).mkdir()
        for number in range(3):
            PIL.Image.fromarray(rule_image(f'{split}{number}', 48, 64)).save(
                tmp_path / f'{split}/{number}.png'
            )
        (tmp_path / f'{split}.json').write_text(json.dumps(content()))
    return tmp_path


def content() -> dict:
    boxes = [[2, 3, 20, 20], [30, 10, 25, 30], [1, 1, 9, 9], [5, 5, 40, 40], [12, 20, 8, 8]]
    return {
        'images': [{'id': n, 'file_name': f'{n}.png', 'height': 48, 'width': 64} for n in range(3)],
        'annotations': [
            {
                'id': n + 1,
                'image_id': n % 3,
                'category_id': 1 + n % 2,
                'bbox': box,
                'area': box[2] * box[3],
                'iscrowd': 0,
                'segmentation': [[box[0], box[1], box[0] + box[2], box[1], box[0], box[1] + box[3]]],
            }
            for n, box in enumerate(boxes)
        ],
        'categories': [{'id': 1, 'name': 'one'}, {'id': 2, 'name': 'two'}],
    }


def flags(data: Path, *more: str) -> list[str]:
    places = [
        f'--{split}_{kind}={data / split}{end}'
        for split in ('train', 'val')
        for kind, end in (('images', ''), ('ann', '.json'))
    ]
    return [*SMALL, *places, *more]


# Flags ----

FLAGS = [
    ('--nheads 0', 'nheads must be at least 1'),
    ('--nheads eight', "'eight' is not a whole number"),
    ('--nheads 3', 'hidden_dim 32 must be a multiple of --nheads 3'),
    ('--num_queries 1000000000', 'num_queries must be at most'),
    ('--num_queries -5', 'num_queries must be at least 1'),
    ('--hidden_dim 0', 'hidden_dim must be at least'),
    ('--enc_layers -1', 'enc_layers must be at least 1'),
    ('--dec_layers 0', 'dec_layers must be at least 1'),
    ('--dropout 1.5', 'dropout must be less than 1'),
    ('--lr nan', 'lr must be a finite number'),
    ('--lr -1', 'lr must be at least 0'),
    ('--weight_decay inf', 'weight_decay must be a finite number'),
    ('--clip_max_norm nan', 'clip_max_norm must be a finite number'),
    ('--clip_max_norm -1', 'clip_max_norm must be at least 0'),
    ('--focal_alpha 2', 'focal_alpha must be at most 1'),
    ('--epochs 0', 'epochs must be at least 1'),
    ('--batch_size 0', 'batch_size must be at least 1'),
    ('--img_size 1', 'img_size must be at least 16'),
    ('--max_size 2', 'max_size must be at least 16'),
    ('--num_workers -1', 'num_workers must be at least 0'),
    ('--print_freq 0', 'print_freq must be at least 1'),
    ('--eval_every -1', 'eval_every must be at least 0'),
    ('--seed -3', 'seed must be at least 0'),
    ('--ema 1', 'ema must be less than 1'),
    ('--shapes_train 0', 'shapes_train must be at least 1'),
    ('--conditional --deformable', 'choose different models'),
    ('--two_stage', '--conditional and --two_stage choose different models'),
    ('--backbone resnet999', 'resnet999'),
    ('--backbone timm/no_such_network', 'no_such_network'),
    ('--backbone_weights imagenet', 'resnet10 has no ImageNet weights'),
    ('--device tpu', 'tpu'),
    ('--device cuda:99', 'cuda'),
    ('--dataset_file pascal', "invalid choice: 'pascal'"),
    ('--aug spectacular', 'invalid choice'),
    ('--amp int8', 'invalid choice'),
    ('--eval', '--eval needs weights'),
    ('--model no_such_model', 'no_such_model'),
    ('--resume nowhere.pth', 'no checkpoint at nowhere.pth'),
    ('--pretrained nowhere.pth', 'no checkpoint at nowhere.pth'),
    ('--co_rcnn_masks', 'needs --co_aux_heads'),
    ('--hybrid_k 3 --hybrid_queries 0', 'hybrid'),
    ('--masks --co_masks', 'is for Deformable DETR'),
    ('--frozen_weights x.pth', 'add --masks'),
    ('--unknown_flag 3', 'unrecognized arguments: --unknown_flag'),
    ('--lr_drop_epochs 0 1', 'lr_drop_epochs must be at least 1'),
    ('--train_scales 64 32', 'smaller size first'),
    ('--evaluator magic', 'invalid choice'),
    ('--fsdp', '--fsdp shares a model among processes'),
]


@pytest.mark.parametrize(('more', 'message'), FLAGS, ids=[more for more, _ in FLAGS])
def test_flags(more: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = complaint('main', [*TINY.split(), '--output_dir', str(tmp_path / 'out'), *more.split()], capsys)
    assert message in text
    assert not list(tmp_path.rglob('*.pth'))


# Annotations ----


def put(path: str, value: object) -> Callable[[dict], object]:
    """A change of one place, such as annotations.0.bbox; ... removes it."""

    def change(data: dict) -> None:
        *way, last = path.split('.')
        place: object = data
        for step in way:
            place = place[int(step) if step.isdecimal() else step]
        if value is ...:
            del place[last]
        else:
            place[int(last) if last.isdecimal() else last] = value

    return change


REFUSED = {
    'no images': (put('images', ...), 'no list "images"'),
    'no annotations': (put('annotations', ...), 'no list "annotations"'),
    'no categories': (put('categories', ...), 'no list "categories"'),
    'images a dictionary': (put('images', {'0': {}}), 'no list "images"'),
    'categories empty': (put('categories', []), 'no categories'),
    'a category that is a name': (put('categories.0', 'one'), 'not an object in braces'),
    'image id a list': (put('images.0.id', [1]), 'needs an id'),
    'image id twice': (put('images.0.id', 1), 'image id 1 occurs twice'),
    'image without name': (put('images.0.file_name', ...), 'image 0 needs a file_name'),
    'image name a number': (put('images.0.file_name', 3), 'image 0 needs a file_name'),
    'image missing': (put('images.0.file_name', 'gone.png'), 'the first is gone.png'),
    'image in a missing folder': (put('images.0.file_name', 'gone/0.png'), 'the first is gone/0.png'),
    'absolute image': (put('images.0.file_name', '/etc/passwd'), 'leads out of the image folder'),
    'two image names for one file': (
        put('images.0.file_name', 'C:\\x\\1.png'),
        "'1.png' and 'C:\\\\x\\\\1.png' both fit 1.png",
    ),
    'image above': (put('images.0.file_name', '../val/0.png'), 'leads out of the image folder'),
    'category without id': (put('categories.0.id', ...), 'integer id'),
    'category id twice': (put('categories.0.id', 2), 'category id 2 occurs twice'),
    'category id in words': (put('categories.0.id', 'one'), 'integer id'),
    'annotation of no category': (
        put('annotations.0.category_id', 9),
        'has category 9, but the categories are 1, 2',
    ),
    'annotation without category': (put('annotations.0.category_id', ...), 'has category None'),
    'box of three': (put('annotations.0.bbox', [1, 2, 3]), 'annotation 1 (image 0) has bbox [1, 2, 3]'),
    'box of words': (put('annotations.0.bbox', ['a', 'b', 'c', 'd']), 'four finite numbers'),
    'box not a number': (put('annotations.0.bbox', [float('nan'), 1, 2, 3]), 'four finite numbers'),
    'box infinite': (put('annotations.0.bbox', [1, 1, float('inf'), 3]), 'four finite numbers'),
    'box negative': (put('annotations.0.bbox', [10, 10, -5, 5]), 'not negative'),
    'box and segmentation missing': (
        lambda d: (put('annotations.0.bbox', None)(d), put('annotations.0.segmentation', [])(d)),
        'has bbox None',
    ),
    'run lengths beyond 32 bits': (
        lambda d: d['annotations'][0].update(
            bbox=None, segmentation={'size': [70_000] * 2, 'counts': [70_000**2]}
        ),
        'gives none (its size is [70000, 70000])',
    ),
    'height of 400 digits': (put('images.0.height', 10**400), 'has height 1000'),
    'height far away': (put('images.0.height', 1e30), 'has height 1e+30'),
    'area of 400 digits': (put('annotations.0.area', 10**400), 'has area 1000'),
    'ignore in words': (put('annotations.0.ignore', 'yes'), "annotation 1 (image 0) has ignore 'yes'"),
    'area not a number': (put('annotations.0.area', float('nan')), 'has area nan'),
    'only crowds': (lambda d: [a.update(iscrowd=1) for a in d['annotations']], 'no object to learn from'),
    'no object': (put('annotations', []), 'no object to learn from'),
}


@pytest.mark.parametrize('name', REFUSED)
def test_annotations_that_are_refused(name: str, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change, message = REFUSED[name]
    bad = content()
    change(bad)
    (data / 'train.json').write_text(json.dumps(bad))
    before = files_of(data)
    text = complaint('main', flags(data, '--output_dir', str(data / 'out')), capsys)
    assert message in text and str(data) in text
    after = files_of(data)
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) <= {'out/run.lock'}


JSON = {
    'a list': (b'[]', 'no list'),
    'cut off': (json.dumps(content()).encode()[:-40], 'is not JSON'),
    'nested without end': (b'{"images": ' + b'[' * 200_000, 'nested too deep'),
    'no UTF-8': (b'{"images": [], "annotations": [], "categories": ["\xff\xfe\xfa"]}', 'is not JSON'),
    'a picture': (b'\x89PNG\r\n\x1a\n' + bytes(range(256)), 'is not JSON'),
}


@pytest.mark.parametrize('name', JSON)
def test_files_that_are_no_annotations(name: str, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, message = JSON[name]
    (data / 'train.json').write_bytes(text)
    assert message in complaint('main', flags(data), capsys)


HANDLED = {
    'ids as text': (lambda d: [i.update(id=str(i['id'])) for i in d['images']], 'not written as integers'),
    'ids as words': (
        lambda d: (
            [i.update(id=f'img{i["id"]}') for i in d['images']]
            + [a.update(image_id=f'img{a["image_id"]}') for a in d['annotations']]
        ),
        'numbered from 1',
    ),
    'no boxes, only polygons': (
        lambda d: [a.pop('bbox') for a in d['annotations']],
        'made from the segmentation',
    ),
    'a box of no size': (put('annotations.0.bbox', [5, 5, 0, 10]), 'of no size'),
    'a box outside': (put('annotations.0.bbox', [70, 5, 10, 10]), 'wholly outside'),
    'a box over the border': (put('annotations.0.bbox', [50, 5, 40, 10]), 'cut off'),
    'a crowd region': (put('annotations.0.iscrowd', 1), 'crowd regions'),
    'an object to ignore': (
        put('annotations.0.ignore', True),
        '1 objects with ignore 1, which training leaves out',
    ),
    'an image without objects': (
        lambda d: [a.update(image_id=1) for a in d['annotations']],
        '2 of them without objects',
    ),
    'a class without objects': (
        lambda d: d['categories'].append({'id': 9, 'name': 'rare'}),
        'classes have no training object: rare',
    ),
    'more objects than queries': (
        lambda d: d['annotations'].extend({**d['annotations'][0], 'id': 100 + n} for n in range(20)),
        'more objects than',
    ),
    'image names of Windows': (
        lambda d: [i.update(file_name=f'..\\set\\{i["file_name"]}') for i in d['images']],
        '3 image names found by their last parts (..\\set\\0.png is 0.png',
    ),
    'no area': (lambda d: [a.pop('area') for a in d['annotations']], '5 objects'),
    'no sizes': (lambda d: [i.pop('height') for i in d['images']], '3 images'),
    'unknown keys': (
        lambda d: (d.update(info=[1], extra={'a': [1]}), d['images'][0].update(camera='x')),
        '3 images',
    ),
}


@pytest.mark.parametrize('name', HANDLED)
def test_annotations_that_are_kept_repaired_or_left_out(
    name: str, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run trains and evaluates, and says what it did."""
    change, message = HANDLED[name]
    for split in ('train', 'val'):
        odd = content()
        change(odd)
        (data / f'{split}.json').write_text(json.dumps(odd))
    main.main(main.get_args_parser().parse_args(flags(data, '--output_dir', str(data / 'out'))))
    assert message in capsys.readouterr().out
    assert len(json.loads((data / 'out/log.jsonl').read_text())['test_coco_eval_bbox']) == 12


@pytest.mark.parametrize(('mark', 'number'), [(1, 4), (True, 4), ('1', 4), (0, 5), (None, 5)])
def test_objects_to_ignore_are_not_trained_on(mark: object, number: int, data: Path) -> None:
    odd = content()
    odd['annotations'][0]['ignore'] = mark
    (data / 'train.json').write_text(json.dumps(odd))
    train = CocoDetection(data / 'train', data / 'train.json')
    assert len(train.inventory().labels) == number
    assert len(train.ground_truth['annotations']) == 5


MASKS = {
    'run lengths of another size': {'size': [48, 60], 'counts': [48 * 60]},
    'too few run lengths': {'size': [48, 64], 'counts': [5, 5]},
    'negative run lengths': {'size': [48, 64], 'counts': [-5, 48 * 64 + 5]},
    'compressed nonsense': {'size': [48, 64], 'counts': 'not a mask at all'},
    'no counts': {'size': [48, 64]},
    'words': 'everything',
    'a polygon of words': [['a', 'b', 'c', 'd', 'e', 'f']],
}


@pytest.mark.parametrize('name', MASKS)
def test_masks_that_are_none(name: str, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--check_data names the image before a run is lost."""
    bad = content()
    bad['annotations'][0]['segmentation'] = MASKS[name]
    (data / 'train.json').write_text(json.dumps(bad))
    text = complaint('main', flags(data, '--masks', '--check_data'), capsys)
    assert 'image 0 (0.png)' in text and 'which is not a mask of 48 x 64' in text


def test_polygons_of_two_points_cover_nothing(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    odd = content()
    odd['annotations'][0]['segmentation'] = [[1, 1, 5, 5]]
    (data / 'train.json').write_text(json.dumps(odd))
    main.main(main.get_args_parser().parse_args(flags(data, '--masks', '--check_data')))
    assert 'can be read' in capsys.readouterr().out


def test_val_equal_to_train_is_said(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    places = [
        f'--{split}_{kind}={data}/train{end}'
        for split in ('train', 'val')
        for kind, end in (('images', ''), ('ann', '.json'))
    ]
    main.main(
        main.get_args_parser().parse_args(
            [*SMALL, *places, '--check_data', '--output_dir', str(data / 'out')]
        )
    )
    printed = capsys.readouterr().out
    assert '3 images are in the training and in the validation part' in printed
    assert '3 images that are twice in train and val' in printed
    assert (data / 'out/data.html').is_file()


def test_objects_too_small_for_the_image_size_are_said(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three of five objects have a side below the stride of 16 at 32 x 43 pixels, two at 64 x 85."""
    said = '60% of the training objects are narrower or lower than the finest stride of 16 pixels at --img_size 32'
    for size in ('32', '64'):
        sizes = '--img_size', size, '--max_size', '128'
        main.main(main.get_args_parser().parse_args(flags(data, *sizes, '--check_data')))
        printed = capsys.readouterr().out
        assert said in printed if size == '32' else 'narrower or lower' not in printed


def test_check_data_counts_all_that_is_bad(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = content()
    bad['annotations'][0]['bbox'] = [1, 2]
    bad['annotations'][1]['bbox'] = None
    bad['annotations'][1]['segmentation'] = None
    bad['annotations'][2]['category_id'] = 8
    bad['annotations'][3]['iscrowd'] = 2
    bad['images'].append({'id': 9, 'file_name': 'gone.png'})
    (data / 'train.json').write_text(json.dumps(bad))
    (data / 'train/1.png').write_bytes(b'no image')
    text = complaint('main', flags(data, '--check_data'), capsys)
    for part in (
        '3 annotations that cannot be used',
        '1 annotations whose category',
        '1 images that are missing',
        'cannot be read',
    ):
        assert part in text, text


# Images ----


def png(number: int = 0) -> bytes:
    import io

    buffer = io.BytesIO()
    PIL.Image.fromarray(rule_image(f'train{number}', 48, 64)).save(buffer, 'PNG')
    return buffer.getvalue()


def jpeg(size: tuple[int, int] = (48, 64)) -> bytes:
    import io

    buffer = io.BytesIO()
    PIL.Image.fromarray(rule_image('x', *size)).save(buffer, 'JPEG')
    return buffer.getvalue()


IMAGES = {
    'empty': (b'', 'is not a readable image'),
    'text': (b'this is no image', 'is not a readable image'),
    'half a PNG': (png()[: len(png()) // 2], 'is not a readable image'),
    'half a JPEG': (jpeg()[: len(jpeg()) // 2], 'is not a readable image'),
    'a JPEG header': (b'\xff\xd8\xff\xe0', 'is not a readable image'),
    'JSON': (b'{"images": []}', 'is not a readable image'),
    'another size': (jpeg((50, 64)), 'is 64 x 50'),
    'a vector image': (b'<svg xmlns="http://www.w3.org/2000/svg"/>', 'is not a readable image'),
    'a bomb': (b'P6 40000 40000 255\n', 'is not a readable image'),
}


@pytest.mark.parametrize('name', IMAGES)
def test_images_that_are_none(name: str, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (data / 'train/0.png').write_bytes(IMAGES[name][0])
    words = '--output_dir', str(data / 'out'), '--skip_unreadable', '0'
    text = complaint('main', flags(data, *words), capsys)
    assert '0.png' in text and IMAGES[name][1] in text


# Files in place of training images (number -> bytes; None: no file), flags, what is said, and
# how many are listed; None: the run ends with one message.
UNREADABLE: dict[str, tuple[dict[int, bytes | None], str, str, int | None]] = {
    'one missing': (
        {0: None},
        '--skip_unreadable 1',
        'warning: 1 train images cannot be read, and others take',
        1,
    ),
    'most missing': ({0: None, 1: None}, '--skip_unreadable 2', '2 of 3 images of', None),
    'one missing in a new run': ({0: None}, '', '1 of 3 images of', None),
    'one without a header': ({0: b''}, '', 'warning: 1 train images cannot be read, and others take', 1),
    'one cut off': ({0: png()[:-99]}, '', '0.png is not a readable image', 1),
    'one and two workers': ({0: png()[:-99]}, '--num_workers 2', '', 1),
    'one and --batches size': ({0: png()[:-99]}, '--batches size', 'another image takes its place', 1),
    'one and --aug lsj': ({0: png()[:-99]}, '--aug lsj', 'another image takes its place', 1),
    'two': ({0: png()[:-99], 2: b''}, '--skip_unreadable 2', 'another image takes its place', 2),
    'too many headers': (
        {0: b'', 2: b''},
        '--skip_unreadable 1',
        '2 training images cannot be read, more',
        None,
    ),
    'too many': (
        {0: png()[:-99], 2: b''},
        '--skip_unreadable 1',
        '2 training images cannot be read, more',
        None,
    ),
    'all': ({0: png()[:-99], 1: png()[:-99], 2: b''}, '', 'no other image can be read', None),
    'of another size': ({0: jpeg((50, 64)), 1: b''}, '', 'is 64 x 50', None),
}


@pytest.mark.parametrize('name', UNREADABLE)
def test_unreadable_training_images(name: str, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each is named once, in two epochs, and listed."""
    files, more, said, number = UNREADABLE[name]
    for image, content in files.items():
        path = data / f'train/{image}.png'
        path.write_bytes(content) if content is not None else path.unlink()
    out = data / 'out'
    words = flags(data, '--output_dir', str(out), '--epochs', '2', '--eval_every', '0', *more.split())
    if number is None:
        text = complaint('main', words, capsys)
        assert said in text and '\n' not in text
        assert name == 'of another size' or ' missing' in name or 'unreadable.txt' in text
        return
    main.main(main.get_args_parser().parse_args(words))
    printed = capsys.readouterr().out
    assert said in printed and printed.count('0.png is not a readable image') <= 1
    lines = (out / 'unreadable.txt').read_text().splitlines()
    names = {line.partition('\t')[0] for line in lines}
    assert len(lines) == number and names == {str(data / f'train/{image}.png') for image in files}
    reasons = ('is not a readable image', 'cannot be read (No such file or directory)')
    assert all(line.partition('\t')[2].startswith(reasons) for line in lines)


@pytest.mark.parametrize(
    ('content', 'message'), [(b'', '1 val images cannot be read'), (png()[:-99], 'val/0.png')]
)
def test_unreadable_validation_images_are_refused(
    content: bytes, message: str, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (data / 'val/0.png').write_bytes(content)
    assert message in complaint('main', flags(data), capsys)


def test_the_image_that_replaces_another_one_depends_on_seed_epoch_and_index(data: Path) -> None:
    (data / 'train/0.png').write_bytes(png()[:-99])
    train = CocoDetection(data / 'train', data / 'train.json', seed=3)
    with pytest.raises(FileError, match=r'0\.png is not a readable image'):
        train[0]
    train.unreadable = UnreadableImages(data / 'list.txt', 1)
    chosen = []
    for epoch in (*range(9), *range(9)):
        train.set_epoch(epoch)
        chosen.append(int(train[0][1]['image_id']))
    assert chosen[:9] == chosen[9:] and set(chosen) == {1, 2}
    random.seed(1)  # draws image 0, for --aug lsj
    assert int(train.random_item()[1]['image_id']) in (1, 2)


def test_the_list_of_unreadable_images_is_shared(tmp_path: Path) -> None:
    """By processes; a new start of the run counts from 0 again."""
    first, second = (UnreadableImages(tmp_path / 'out/list.txt', 2) for _ in range(2))
    first.begin()
    assert first.add(('a  b.png', OSError('a  b.png is\nnone'))) and second.add(
        ('c.png', OSError('c.png is none'))
    )
    assert not second.add(('a  b.png', OSError('a  b.png is gone')))
    first.check()
    assert (tmp_path / 'out/list.txt').read_text() == 'a b.png\tis none\nc.png\tis none\n'
    assert first.add(('d\udcff.png', OSError('d\udcff.png is none')))
    with pytest.raises(
        UserError, match=r'^3 training images .* more than --skip_unreadable 2: a b.png, c.png, d'
    ):
        second.check()
    second.begin()
    assert not second.names() and second.add(('c.png', OSError('c.png is none')))
    assert len((tmp_path / 'out/list.txt').read_text('utf-8', 'surrogateescape').splitlines()) == 5


def test_an_image_that_is_a_folder(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (data / 'train/0.png').unlink()
    (data / 'train/0.png').mkdir()
    assert '0.png' in complaint('main', flags(data, '--skip_unreadable', '0'), capsys)
    (data / 'folder.jpg').mkdir()
    assert 'no image there' in complaint(
        'predict', ['--checkpoint', 'x', '--source', str(data / 'folder.jpg')], capsys
    )


def test_places_that_are_something_else(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (data / 'file').write_text('')
    for argv in (
        flags(data, '--output_dir', str(data / 'file')),
        flags(data, '--output_dir', str(data / 'file/below')),
        flags(data, '--train_ann', str(data / 'train')),
        flags(data, '--train_images', str(data / 'train.json')),
        flags(data, '--pretrained', str(data / 'train')),
        flags(data, '--backbone_weights', str(data / 'train')),
    ):
        text = complaint('main', argv, capsys)
        assert str(data) in text


def test_an_image_that_vanishes_and_a_worker_that_is_killed(
    data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = CocoDetection.untransformed

    def vanishing(self: CocoDetection, idx: int) -> tuple:
        (data / 'train/1.png').unlink(missing_ok=True)
        return original(self, idx)

    with monkeypatch.context() as patch:
        patch.setattr(CocoDetection, 'untransformed', vanishing)
        text = complaint('main', flags(data, '--num_workers', '1', '--skip_unreadable', '0'), capsys)
    assert 'train/1.png' in text and '\n' not in text
    PIL.Image.fromarray(rule_image('train1', 48, 64)).save(data / 'train/1.png')

    def killed(self: CocoDetection, idx: int) -> tuple:
        if get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, idx)

    monkeypatch.setattr(CocoDetection, 'untransformed', killed)
    assert 'lower --num_workers' in complaint('main', flags(data, '--num_workers', '1'), capsys)


def test_the_fault_of_a_loss_keeps_its_traceback(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(boxes: torch.Tensor, target_boxes: torch.Tensor) -> torch.Tensor:
        return torch.stack([box for box, _ in zip(boxes, target_boxes[1:], strict=True)])

    monkeypatch.setitem(losses.BOX_LOSSES, 'bbox', broken)
    with pytest.raises(ValueError, match='shorter') as found:
        run_command(main.main, main.get_args_parser(), flags(data))
    line = broken.__code__.co_firstlineno + 1
    assert f'File "{__file__}", line {line}, in broken' in ''.join(traceback.format_exception(found.value))
    assert not isinstance(found.value, UserError)


def test_whose_fault_an_oserror_is(tmp_path: Path) -> None:
    flags = argparse.Namespace(output_dir=str(tmp_path / 'out'), queries=[1], ann=None)
    assert is_of_user(PermissionError(13, 'Permission denied', str(tmp_path / 'out/log.jsonl')), flags)
    assert is_of_user(NotADirectoryError(20, 'Not a directory', tmp_path), flags)
    assert is_of_user(OSError(errno.ENOSPC, 'No space left on device'), flags)
    assert not is_of_user(FileNotFoundError(2, 'No such file', str(tmp_path / 'other')), flags)
    assert not is_of_user(ConnectionResetError(104, 'Connection reset by peer'), flags)


def test_flags_have_no_abbreviations(capsys: pytest.CaptureFixture[str]) -> None:
    for word, near in (
        ('--epoch', '--epochs'),
        ('--hybrid_q=9', '--hybrid_queries'),
        ('--ouput_dir', '--output_dir'),
    ):
        with pytest.raises(SystemExit) as stop:
            main.get_args_parser().parse_args([word, *([] if '=' in word else ['3'])])
        said = capsys.readouterr().err
        assert stop.value.code == 2 and f'did you mean {near}' in said, said
    with pytest.raises(SystemExit):
        predict.get_args_parser().parse_args(['--source', 'x', '--check', 'y'])
    assert 'did you mean --checkpoint' in capsys.readouterr().err


@pytest.mark.skipif(os.geteuid() == 0, reason='root may write anywhere')
def test_a_folder_that_cannot_be_written(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (data / 'closed').mkdir(mode=0o500)
    assert 'closed' in complaint('main', flags(data, '--output_dir', str(data / 'closed/out')), capsys)


# Weights ----


def saved(path: Path, value: object) -> None:
    torch.save(value, path)


class Foreign:
    """An object of a program."""


def zipped(path: Path) -> None:
    with zipfile.ZipFile(path, 'w') as archive:
        archive.writestr('weights.pth', b'1')


WEIGHTS: dict[str, Callable[[Path], object]] = {
    'empty': lambda path: path.write_bytes(b''),
    'text': lambda path: path.write_text('weights'),
    'a list': lambda path: saved(path, [1, 2]),
    'a tensor': lambda path: saved(path, torch.ones(3)),
    'nothing': lambda path: saved(path, None),
    'no model': lambda path: saved(path, {'model': None}),
    'an empty model': lambda path: saved(path, {'model': {}}),
    'numbers for weights': lambda path: saved(path, {'model': {'a': 1.0}}),
    'cut off': lambda path: (
        saved(path, {'model': {'a': torch.ones(9)}}),
        path.write_bytes(path.read_bytes()[:-200]),
    ),
    'damaged': lambda path: (
        saved(path, {'model': {'a': torch.ones(9)}}),
        path.write_bytes(b'PK' + bytes(300)),
    ),
    'a zip': zipped,
    'a pickle': lambda path: path.write_bytes(pickle.dumps({'a': [1]})),
    'a cut pickle': lambda path: path.write_bytes(pickle.dumps({'a': list(range(99))})[:40]),
    'an object': lambda path: saved(path, Foreign()),
    'a program': lambda path: path.write_bytes(b"cos\nsystem\n(S'touch proof'\ntR."),
    'a picture': lambda path: path.write_bytes(png()),
    'JSON': lambda path: path.write_text('{"model": {}}'),
    'another network': lambda path: saved(path, {'model': {'layer.weight': torch.ones(3, 3)}}),
    'safetensors of another network': lambda path: write_safetensors(path, {'model': {'b': torch.ones(2)}}),
}
DOORS = {
    'resume': ('main', ['--resume', '{file}']),
    'pretrained': ('main', ['--pretrained', '{file}']),
    'eval': ('main', ['--eval', '--resume', '{file}']),
    'backbone': ('main', ['--backbone_weights', '{file}']),
    'predict': ('predict', ['--checkpoint', '{file}', '--source', '{image}']),
    'convert': ('convert', ['{file}', '{out}']),
}


# Every file as one flag, and some files as all of them: one function reads them.
CASES = [(name, 'pretrained') for name in WEIGHTS]
CASES += [(name, door) for name in ('a list', 'damaged', 'another network') for door in DOORS]


@pytest.mark.parametrize(('name', 'door'), sorted(set(CASES)))
def test_weights_that_are_none(
    name: str, door: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path, image = tmp_path / 'weights.pth', tmp_path / 'image.png'
    WEIGHTS[name](path)
    image.write_bytes(png())
    before = files_of(tmp_path)
    program, words = DOORS[door]
    places = {'file': path, 'image': image, 'out': tmp_path / 'out.pth'}
    argv = [word.format(**places) for word in words]
    text = complaint(program, [*TINY.split(), *argv] if program == 'main' else argv, capsys)
    assert 'weights.pth' in text, text
    assert files_of(tmp_path) == before


# Tools ----

TOOLS = [
    ('predict', '--checkpoint w.pth --source nowhere', 'no image there'),
    ('predict', '--source {data}/train', 'give --checkpoint FILE'),
    ('predict', '--model no_such --source {data}/train', 'no_such'),
    ('predict', '--checkpoint nowhere.pth --source {data}/train', 'no checkpoint at nowhere.pth'),
    ('predict', '--checkpoint w.pth', 'required: --source'),
    ('convert', 'nowhere.pth out.pth', 'no checkpoint at nowhere.pth'),
    ('shards', '--coco_path nowhere --output {data}/s', 'check --coco_path'),
    ('shards', '--images {data}/train --ann {data}/train.json --output {data}', 'exists'),
    (
        'shards',
        '--images {data}/train --ann {data}/train.json --output {data}/s --shard_size -3',
        '--shard_size -3',
    ),
    (
        'shards',
        '--images {data}/train --ann {data}/train.json --output {data}/s --shard_size many',
        '--shard_size many',
    ),
    ('shards', '--images {data}/nowhere --ann {data}/train.json --output {data}/s', 'nowhere'),
    ('shards', '--images {data}/train --ann {data}/train.json --output {data}/s --url x', '{file}'),
]


@pytest.mark.parametrize(
    ('tool', 'words', 'message'), TOOLS, ids=[f'{tool} {words}' for tool, words, _ in TOOLS]
)
def test_tools(tool: str, words: str, message: str, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = files_of(data)
    assert message in complaint(tool, words.replace('{data}', str(data)).split(), capsys)
    assert files_of(data) == before
