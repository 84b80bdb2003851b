"""What `--coco_path` may hold: found by itself, said, and divided by `--val_share`."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

import main
from datasets.layouts import find_layout
from datasets.loaders import build_datasets
from datasets.split import choose_images
from tests.runs import TINY, load
from tests.shared_data import rule_image
from tools import make_shards
from util.command_line import run_command
from util.config.settle import EVERYTHING, settle
from util.errors import UserError

SMALL = TINY.replace('--dataset_file shapes', '').replace(
    '--shapes_train 12 --shapes_val 4 --shapes_size 64', ''
)


def write_part(root: Path, file: str, images: str, number: int, first: int = 0, name: str = '{}.png') -> None:
    """A file in COCO form: image n has n % 3 + 1 objects, of the classes 1 to 3 in turn."""
    (root / file).parent.mkdir(parents=True, exist_ok=True)
    (root / images).mkdir(parents=True, exist_ok=True)
    data: dict[str, list] = {'images': [], 'annotations': []}
    for image in range(first, first + number):
        PIL.Image.fromarray(rule_image(str(image), 48, 64)).save(root / images / f'{image}.png')
        data['images'].append({'id': image, 'file_name': name.format(image), 'height': 48, 'width': 64})
        for place in range(image % 3 + 1):
            box = {'bbox': [5 + 9 * place, 6, 8, 20], 'area': 160, 'iscrowd': 0}
            ids = {'id': len(data['annotations']) + 1, 'image_id': image, 'category_id': place + 1}
            data['annotations'].append(ids | box)
    data['categories'] = [{'id': label, 'name': name} for label, name in enumerate('abc', start=1)]
    (root / file).write_text(json.dumps(data))


def write_voc(root: Path, lists: dict[str, int]) -> None:
    for folder in ('JPEGImages', 'Annotations', 'ImageSets/Main'):
        (root / folder).mkdir(parents=True, exist_ok=True)
    first = 0
    for part, number in lists.items():
        names = [f'{image:03}' for image in range(first, first + number)]
        first += number
        (root / f'ImageSets/Main/{part}.txt').write_text('\n'.join(names))
        for name in names:
            PIL.Image.fromarray(rule_image(name, 48, 64)).save(root / f'JPEGImages/{name}.png')
            corners = ''.join(
                f'<{key}>{value}</{key}>'
                for key, value in zip(('xmin', 'ymin', 'xmax', 'ymax'), (5, 5, 20, 30), strict=True)
            )
            label = 'ab'[int(name) % 4 == 0]
            objects = f'<object><name>{label}</name><bndbox>{corners}</bndbox></object>'
            text = f'<annotation><filename>{name}.png</filename>{objects}</annotation>'
            (root / f'Annotations/{name}.xml').write_text(text)


def write_yolo(root: Path, parts: dict[str, int], file: str = 'data.yaml', prefix: str = '') -> None:
    for part, number in parts.items():
        for folder in ('images', 'labels'):
            (root / part / folder).mkdir(parents=True, exist_ok=True)
        for image in range(number):
            PIL.Image.fromarray(rule_image(f'{part}{image}', 48, 64)).save(
                root / f'{part}/images/{image}.png'
            )
            (root / f'{part}/labels/{image}.txt').write_text(f'{int(image % 4 == 0)} 0.5 0.5 0.2 0.4\n')
    keys = {'train': 'train', 'valid': 'val'}
    places = ''.join(f'{keys[part]}: {prefix}{part}/images\n' for part in parts)
    (root / file).write_text(f'{places}names: [a, b]\nnc: 2\n')


def both(train: tuple, val: tuple) -> Callable[[Path], None]:
    return lambda root: (write_part(root, *train, 6), write_part(root, *val, 3, 6))  # type: ignore[func-returns-value]


def one(*place: str, **more: str) -> Callable[[Path], None]:
    return lambda root: write_part(root, *place, 6, **more)  # type: ignore[arg-type]


BOTH = {
    'COCO': both(
        ('annotations/instances_train2017.json', 'train2017'),
        ('annotations/instances_val2017.json', 'val2017'),
    ),
    'COCO without a year': both(
        ('annotations/instances_train.json', 'images/train'), ('annotations/instances_val.json', 'images/val')
    ),
    'COCO of 2014': both(
        ('annotations/instances_train2014.json', 'train2014'),
        ('annotations/instances_val2014.json', 'val2014'),
    ),
    'one folder of images': both(
        ('annotations/instances_train.json', 'images'), ('annotations/instances_val.json', 'images')
    ),
    'CVAT, two parts': both(
        ('annotations/instances_Train.json', 'images/Train'),
        ('annotations/instances_Validation.json', 'images/Validation'),
    ),
    'Roboflow': both(('train/_annotations.coco.json', 'train'), ('valid/_annotations.coco.json', 'valid')),
    'files of the parts': both(('train.json', 'train'), ('val.json', 'val')),
    'files in annotations': both(
        ('annotations/train_set.json', 'pictures'), ('annotations/val_set.json', 'pictures')
    ),
    'folders of the parts': both(
        ('train/labels.json', 'train/data'), ('validation/labels.json', 'validation/data')
    ),
    'VOC': lambda root: write_voc(root, {'train': 6, 'val': 3}),
    'VOC 2007': lambda root: write_voc(root, {'trainval': 6, 'test': 3}),
    'YOLO': lambda root: write_yolo(root, {'train': 6, 'valid': 3}, prefix='../'),
    'YOLO, another name': lambda root: write_yolo(root, {'train': 6, 'valid': 3}, 'my.yaml'),
}
ONE = {
    'CVAT': one('annotations/instances_default.json', 'images/default'),
    'CVAT, all in images': one('annotations/instances_default.json', 'images'),
    'another task of CVAT': one('annotations/instances_task7.json', 'images'),
    'label-studio': one('result.json', 'images', name='images/{}.png'),
    'label-studio, Windows': one('result.json', 'images', name='images\\\\{}.png'),
    'one file, one folder': one('my.json', 'pictures'),
    'one file, names with a folder': one('my.json', 'pictures/set', name='pictures/set/{}.png'),
    'one file beside its images': one('_annotations.coco.json', '.'),
    'a folder of an archive': one('My set.v1/images/labels.json', 'My set.v1/images'),
    'VOC of CVAT': lambda root: write_voc(root, {'default': 6}),
}
TRAINING = {
    'COCO': one('annotations/instances_train2017.json', 'train2017'),
    'Roboflow': one('train/_annotations.coco.json', 'train'),
    'VOC': lambda root: write_voc(root, {'train': 6}),
    'YOLO': lambda root: write_yolo(root, {'train': 6}),
}


def build(root: Path, *flags: str) -> dict:
    args = main.get_args_parser().parse_args([*SMALL.split(), '--coco_path', str(root), *flags])
    return build_datasets(settle(args, EVERYTHING), None)


@pytest.mark.parametrize('name', BOTH)
def test_two_parts_are_found(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    BOTH[name](tmp_path)
    datasets = build(tmp_path)
    kind = {'VOC': 'Pascal VOC', 'YOL': 'YOLO'}.get(name[:3], 'COCO form')
    assert [len(dataset) for dataset in datasets.values()] == [6, 3]
    assert f': {kind}, train' in capsys.readouterr().out.splitlines()[0]
    assert all(len(dataset[0][1]['labels']) for dataset in datasets.values())
    with pytest.raises(UserError, match=r'--val_share 0.5 makes a validation part, but there is one'):
        build(tmp_path, '--val_share', '0.5')


@pytest.mark.parametrize('name', ONE)
def test_one_part_is_found(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is trained on, in part or without evaluation, or evaluated, and is checked as it is."""
    ONE[name](tmp_path)
    with pytest.raises(UserError, match=r'there is no validation part: .*--val_share 0.1.*--eval_every 0'):
        build(tmp_path)
    for flags, sizes in (
        ('--val_share 0.34', [4, 2]),
        ('--eval_every 0', [6]),
        ('--check_data', [6]),
        ('--check_data --val_share 0.5', [3, 3]),
        ('--eval --pretrained FILE', [6]),
        ('--eval --pretrained FILE --val_share 0.5', [3]),
    ):
        datasets = build(tmp_path, *flags.split())
        assert [len(dataset) for dataset in datasets.values()] == sizes, flags
        assert all(len(dataset[0][1]['labels']) for dataset in datasets.values())
    assert 'all of it is evaluated' in capsys.readouterr().out


@pytest.mark.parametrize('name', TRAINING)
def test_a_training_part_alone_is_not_evaluated(name: str, tmp_path: Path) -> None:
    TRAINING[name](tmp_path)
    assert [len(dataset) for dataset in build(tmp_path, '--val_share', '0.5').values()] == [3, 3]
    with pytest.raises(
        UserError, match=r'there is no validation part: name it with --val_images and --val_ann$'
    ):
        build(tmp_path, '--eval', '--pretrained', 'FILE')
    with pytest.raises(UserError, match=r'there is no validation part: .*--val_share 0.1.*--eval_every 0'):
        build(tmp_path)


UNCLEAR = {
    'two formats': (
        lambda root: (ONE['label-studio'](root), write_yolo(root, {'train': 2})),
        r'COCO form \(result.json\) and YOLO \(data.yaml\): choose with --dataset_file coco\|yolo, or name',
    ),
    'two layouts': (
        lambda root: (ONE['label-studio'](root), BOTH['Roboflow'](root)),
        r'\(train/_annotations.coco.json\) and COCO form \(result.json\): name the files with --train_images',
    ),
    'two files': (
        lambda root: (ONE['one file, one folder'](root), write_part(root, 'other.json', 'pictures', 2)),
        r'holds 2 annotation files \(my.json, other.json\): name',
    ),
    'two files of a part': (
        lambda root: (write_part(root, 'train_a.json', 'x', 1), write_part(root, 'train_b.json', 'x', 1)),
        r'holds 2 annotation files of the part train \(train_a.json, train_b.json\)',
    ),
    'two folders': (
        lambda root: (
            write_part(root, 'my.json', 'a', 3, name='x/{}.png'),
            write_part(root / 'b', '../a.txt', '.', 2),
        ),
        r'are the images of my.json in a/ or b/\? Name it with --train_images',
    ),
    'nothing': (
        lambda root: None,
        r'holds no data in a usual layout: there is none of annotations/instances_',
    ),
    'other JSON': (
        lambda root: (root / 'p.json').write_text('{"version": "5.0", "shapes": []}'),
        'no JSON file in COCO form',
    ),
    'LVIS': (
        lambda root: write_part(root, 'annotations/lvis_v1_train.json', 'train2017', 1),
        'holds LVIS .*: add --dataset_file lvis',
    ),
    'no folder': (shutil.rmtree, 'does not exist: check --coco_path'),
    'a file': (lambda root: (shutil.rmtree(root), root.write_text('')), 'is a file: give its folder'),
    'no images': (
        lambda root: (BOTH['COCO'](root), shutil.rmtree(root / 'train2017')),
        'check --coco_path, or give --train_images',
    ),
}


@pytest.mark.parametrize('name', UNCLEAR)
def test_what_is_not_clear_is_refused_by_name(name: str, tmp_path: Path) -> None:
    write, message = UNCLEAR[name]
    (tmp_path / 'set').mkdir()
    write(tmp_path / 'set')
    with pytest.raises(UserError, match=message):
        build(tmp_path / 'set')


def test_flags_choose_among_layouts(tmp_path: Path) -> None:
    ONE['label-studio'](tmp_path)
    write_yolo(tmp_path, {'train': 4, 'valid': 2})
    assert len(build(tmp_path, '--dataset_file', 'yolo')['val']) == 2
    assert len(build(tmp_path, '--dataset_file', 'coco', '--eval_every', '0')['train']) == 6
    files = [
        f'--train_ann={tmp_path}/result.json',
        f'--train_images={tmp_path}',
        f'--val_ann={tmp_path}/result.json',
    ]
    datasets = build(tmp_path / 'gone', *files, f'--val_images={tmp_path}')
    assert [len(dataset) for dataset in datasets.values()] == [6, 6]


def test_files_of_coco_are_not_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its other annotations take gigabytes."""
    BOTH['COCO'](tmp_path)
    for name in ('captions_train2017', 'person_keypoints_train2017', 'instances_minival', 'instances_train'):
        shutil.copyfile(
            tmp_path / 'annotations/instances_val2017.json', tmp_path / f'annotations/{name}.json'
        )
    monkeypatch.setattr('datasets.layouts.is_coco', lambda file: pytest.fail(f'{file} is searched'))
    layout = find_layout(tmp_path)
    assert [file.name for file in layout.annotations.values()] == [
        'instances_train2017.json',
        'instances_val2017.json',
    ]


# --val_share ----


def test_classes_keep_their_proportions() -> None:
    """The worst deviation of a class, in images, is below that of a shuffle."""
    random = np.random.default_rng(0)
    rates = np.geomspace(0.4, 0.01, 12)
    classes = [np.flatnonzero(random.random(12) < rates).tolist() for _ in range(1000)]
    counts = np.array([sum(label in labels for labels in classes) for label in range(12)])
    worst = []
    for seed in range(5):
        chosen = choose_images(classes, 0.2, seed)
        assert chosen.sum() == 200
        numbers = [sum(label in classes[image] for image in np.flatnonzero(chosen)) for label in range(12)]
        worst.append(np.abs(numbers - 0.2 * counts).max())
        empty = [image for image, labels in enumerate(classes) if not labels]
        assert abs(chosen[empty].sum() - 0.2 * len(empty)) <= 1
    assert max(worst) < 5, worst


def test_every_class_stays_in_training() -> None:
    classes = [[label] for label in range(10)] + [[10]] * 2 + [[]] * 8
    for share in (0.1, 0.5, 0.9):
        for seed in range(20):
            chosen = choose_images(classes, share, seed)
            assert not chosen[:10].any() and chosen[10:12].sum() < 2
            assert chosen.sum() == min(round(share * 20), 9)


@pytest.mark.parametrize('name', ['one file, one folder', 'VOC', 'YOLO'])
def test_parts_are_complementary_and_in_order(name: str, tmp_path: Path) -> None:
    (ONE | TRAINING)[name](tmp_path)
    whole = build(tmp_path, '--eval_every', '0')['train']
    for seed in ('0', '1'):
        first, again = (build(tmp_path, '--val_share', '0.34', '--split_seed', seed) for _ in range(2))
        train, val = first['train'], first['val']
        assert [each.ids for each in first.values()] == [each.ids for each in again.values()]
        assert sorted(train.ids + val.ids) == whole.ids and train.ids == sorted(train.ids)
        assert train.class_map == val.class_map == whole.class_map
        assert [image['id'] for image in val.ground_truth['images']] == val.ids
        assert {a['image_id'] for a in val.ground_truth['annotations']} == set(val.ids)
        for part in (train, val):
            for idx, image_id in enumerate(part.ids):
                image, target = part.untransformed(idx)
                expected, other = whole.untransformed(whole.ids.index(image_id))
                assert image.equal(expected) and target['boxes'].equal(other['boxes'])
            assert len(part.inventory().names) == len(part)
    assert val.ids != build(tmp_path, '--val_share', '0.34')['val'].ids or name != 'one file, one folder'


REFUSED_SHARES = [
    ('--val_share 0.05', 'leaves the validation part empty'),
    ('--val_share 1', 'must be less than 1'),
    ('--val_share -1', 'must be at least 0'),
    ('--split_seed 3', 'needs --val_share'),
    ('--val_share 0.5 --val_ann x.json', 'give one of them'),
    ('--val_share 0.5 --dataset_file lvis', '--val_share is not for --dataset_file lvis'),
    ('--val_share 0.5 --train_ann shards.json', 'divides image files, not tar shards'),
]


@pytest.mark.parametrize(('flags', 'message'), REFUSED_SHARES)
def test_shares_that_are_refused(flags: str, message: str, tmp_path: Path) -> None:
    write_part(tmp_path, 'my.json', 'x', 6)
    with pytest.raises(UserError, match=message):
        build(tmp_path, *flags.split())


def test_a_checkpoint_keeps_the_parts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Resumed and evaluated without a flag; other data have their own parts."""
    write_part(tmp_path / 'data', 'my.json', 'x', 12, name='C:\\old\\{}.png')
    out = tmp_path / 'out'

    def run(*flags: str) -> str:
        main.main(main.get_args_parser().parse_args([*flags, '--num_workers', '0', '--device', 'cpu']))
        return capsys.readouterr().out

    split = f'--coco_path {tmp_path}/data --val_share 0.34 --split_seed 7 --output_dir {out}'
    text = run(*SMALL.split(), *split.split(), '--epochs', '1')
    assert (
        '8 train, 4 val' in text
        and '12 image names found by their last parts (C:\\old\\0.png is 0.png' in text
    )
    first = json.loads((out / 'log.jsonl').read_text())
    recorded = load(out)['args']
    assert (recorded['dataset_file'], recorded['val_share'], recorded['split_seed']) == ('auto', 0.34, 7)
    text = run('--resume', 'auto', '--epochs', '2', '--output_dir', str(out))
    assert '8 train, 4 val' in text
    text = run('--eval', '--resume', f'{out}/checkpoint.pth', '--output_dir', str(out))
    assert '4 val' in text and 'a share of 0.34 is for validation' in text
    last = [json.loads(line) for line in (out / 'log.jsonl').read_text().splitlines()][-1]
    assert json.loads((out / 'eval.json').read_text())['test_coco_eval_bbox'] == last['test_coco_eval_bbox']
    assert first['test_coco_eval_bbox'] != [] and len(last['test_coco_eval_bbox']) == 12
    text = run('--eval', '--resume', f'{out}/checkpoint.pth', '--coco_path', str(tmp_path / 'data'))
    assert '4 val' in text and 'a share of 0.34 is for validation' in text
    shutil.copytree(tmp_path / 'data', tmp_path / 'other')
    text = run('--eval', '--resume', f'{out}/checkpoint.pth', '--coco_path', str(tmp_path / 'other'))
    assert '12 val' in text and 'all of it is evaluated' in text
    explicit = f'--val_images {tmp_path}/data/x --val_ann {tmp_path}/data/my.json'
    assert '12 val' in run('--eval', '--resume', f'{out}/checkpoint.pth', *explicit.split())
    text = run('--resume', 'auto', '--epochs', '3', '--output_dir', str(out), '--split_seed', '1')
    assert 'was trained on 8 images' in text and '--split_seed 7 -> 1' in text


def test_images_at_hand_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def dry(*flags: str) -> str:
        main.main(main.get_args_parser().parse_args([*SMALL.split(), '--dry_run', *flags]))
        return capsys.readouterr().out

    for name, write in (ONE | TRAINING).items():
        write(tmp_path / name)
        assert 'an epoch of 6 images' in dry('--coco_path', str(tmp_path / name)), name
    assert 'an epoch of 4 images' in dry('--coco_path', str(tmp_path / 'VOC'), '--val_share', '0.34')
    assert 'an epoch of 4 images' in dry('--coco_path', str(tmp_path / 'CVAT'), '--val_share', '0.34')
    text = dry('--coco_path', str(tmp_path / 'gone'))
    assert 'gone does not exist: the number of images is that of COCO' in text and '118,287 images' in text
    assert '118,287 images' in dry()
    with pytest.raises(UserError, match='no data in a usual layout'):
        dry('--coco_path', str(tmp_path / 'VOC/Annotations'))


def test_all_is_checked_without_a_validation_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ONE['label-studio'](tmp_path)
    words = [*SMALL.split(), '--check_data', '--coco_path', str(tmp_path)]
    for flags in ([], ['--val_share', '0.34']):
        main.main(main.get_args_parser().parse_args([*words, *flags]))
        assert 'all images, boxes and masks can be read' in capsys.readouterr().out


def test_shards_are_written_of_a_layout(tmp_path: Path) -> None:
    pytest.importorskip('webdataset')
    ONE['label-studio, Windows'](tmp_path / 'data')
    words = ['--coco_path', str(tmp_path / 'data'), '--output', str(tmp_path / 'shards')]
    run_command(make_shards.make_shards, make_shards.get_args_parser(), words)
    flags = main.get_args_parser().parse_args(
        [*SMALL.split(), '--eval_every', '0', '--train_ann', f'{tmp_path}/shards']
    )
    shards = build_datasets(settle(flags, EVERYTHING), None)['train']
    files = build(tmp_path / 'data', '--eval_every', '0')['train']
    for idx in range(6):
        assert shards.untransformed(idx)[0].equal(files.untransformed(idx)[0])
    BOTH['VOC'](tmp_path / 'voc')
    with pytest.raises(SystemExit, match=r'convert_dataset.py'):
        run_command(
            make_shards.make_shards,
            make_shards.get_args_parser(),
            ['--coco_path', str(tmp_path / 'voc'), *words[2:-1], f'{tmp_path}/other'],
        )


def test_images_of_another_part_are_not_taken(tmp_path: Path) -> None:
    """Where both parts have the same names, these would be other images."""
    for places in (('train', 'val'), ('images/train', 'images/val')):
        root = tmp_path / places[0].replace('/', '_')
        for part, place in zip(('train', 'val'), places, strict=True):
            write_part(root, f'annotations/instances_{part}.json', place, 3)
        shutil.rmtree(root / places[0])
        with pytest.raises(UserError, match=r'none of .* exists: check --coco_path, or give --train_images'):
            build(root)


def test_a_part_called_test_is_not_trained_on(tmp_path: Path) -> None:
    (tmp_path / 'test').mkdir()
    (tmp_path / 'test/_annotations.coco.json').write_text(
        '{"images": [], "annotations": [], "categories": []}'
    )
    with pytest.raises(UserError, match=r'holds a part called test alone \(test/_annotations.coco.json\)'):
        find_layout(tmp_path)
