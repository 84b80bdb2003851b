"""Data in VOC's and YOLO's formats: the same targets and metrics as their COCO form, and errors that name the
file.
"""

import json
import re
import shutil
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from xml.sax.saxutils import escape

import PIL.ExifTags
import PIL.Image
import PIL.ImageOps
import pytest
import torch
from torch import Tensor

import main
from datasets import shape_scenes, yolo
from datasets.annotations import AnnotationTable
from datasets.coco_eval import CocoEvaluator
from datasets.coco_json import Issues
from datasets.image_io import UnreadableImage, read_header
from datasets.shapes import ShapesDetection, export_shapes
from datasets.voc import read_voc_lists
from datasets.yolo import YoloDetection
from tests.runs import TINY, load
from tests.shared_data import build_data
from tools import convert_dataset
from util.command_line import run_command
from util.errors import FileError, UserError

KINDS = sorted(kind.__name__ for kind in shape_scenes.KINDS)


def arguments(kind: str, root: Path) -> Namespace:
    names = ('train_images', 'train_ann', 'val_images', 'val_ann', 'max_size')
    return Namespace(
        **dict.fromkeys(names), dataset_file=kind, coco_path=str(root), img_size=64, aug='none', seed=0
    )


def write_voc(root: Path, data: dict, split: str) -> None:
    """As VOC's development kit: corners counted from 1, which belong to the box."""
    for folder in ('Annotations', 'ImageSets/Main'):
        (root / folder).mkdir(parents=True, exist_ok=True)
    names = {category['id']: category['name'] for category in data['categories']}
    lines = []
    for image in data['images']:
        objects = ''
        for a in data['annotations']:
            if a['image_id'] == image['id']:
                x, y, w, h = a['bbox']
                corners = zip(('xmin', 'ymin', 'xmax', 'ymax'), (x + 1, y + 1, x + w, y + h), strict=True)
                box = ''.join(f'<{key}>{value!r}</{key}>' for key, value in corners)
                objects += (
                    f'<object><name>{escape(names[a["category_id"]])}</name><bndbox>{box}</bndbox></object>'
                )
        stem = Path(image['file_name']).stem
        size = f'<size><width>{image["width"]}</width><height>{image["height"]}</height></size>'
        text = f'<annotation><filename>{image["file_name"]}</filename>{size}{objects}</annotation>'
        (root / 'Annotations' / f'{stem}.xml').write_text(text)
        lines.append(stem)
    (root / f'ImageSets/Main/{split}.txt').write_text('\n'.join(lines) + '\n')


def write_yolo(root: Path, data: dict, split: str) -> None:
    (root / 'labels' / split).mkdir(parents=True, exist_ok=True)
    for image in data['images']:
        lines = []
        for a in data['annotations']:
            if a['image_id'] == image['id']:
                x, y, w, h = a['bbox']
                values = (
                    (x + w / 2) / image['width'],
                    (y + h / 2) / image['height'],
                    w / image['width'],
                    h / image['height'],
                )
                lines.append(' '.join(map(repr, (a['category_id'] - 1, *values))))
        if lines:
            (root / 'labels' / split / Path(image['file_name']).with_suffix('.txt').name).write_text(
                '\n'.join(lines)
            )
    names = ''.join(f'  {c["id"] - 1}: {c["name"]}\n' for c in data['categories'])
    (root / 'data.yaml').write_text(f'path: .\ntrain: images/train\nval: images/val\nnames:\n{names}')


@pytest.fixture(scope='module')
def copies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same images and objects in three formats. Categories in alphabetical order have ids 1 to K in all
    of them.
    """
    root = tmp_path_factory.mktemp('copies')
    places = {kind: root / kind for kind in ('coco', 'voc', 'yolo')}
    for split, count in (('train', 8), ('val', 6)):
        export_shapes(places['coco'], ShapesDetection(count, split, image_size=64))
        file = places['coco'] / f'annotations/instances_{split}2017.json'
        data = json.loads(file.read_text())
        ordered = sorted(category['name'] for category in data['categories'])
        ids = {c['id']: ordered.index(c['name']) + 1 for c in data['categories']}
        data['categories'] = [{'id': number, 'name': name} for number, name in enumerate(ordered, start=1)]
        for a in data['annotations']:
            a['category_id'] = ids[a['category_id']]
            a.pop('area', None)
            a.pop('segmentation', None)
        file.write_text(json.dumps(data))
        images = next(f for f in places['coco'].rglob('*') if f.is_dir() and f.name.startswith(split))
        (places['yolo'] / 'images').mkdir(parents=True, exist_ok=True)
        (places['yolo'] / 'images' / split).symlink_to(images)
        (places['voc'] / 'JPEGImages').mkdir(parents=True, exist_ok=True)
        for image in data['images']:
            (places['voc'] / 'JPEGImages' / f'{split}_{image["file_name"]}').symlink_to(
                images / image['file_name']
            )
        renamed = [{**image, 'file_name': f'{split}_{image["file_name"]}'} for image in data['images']]
        write_voc(places['voc'], {**data, 'images': renamed}, split)
        write_yolo(places['yolo'], data, split)
    return places


def same(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize('kind', ['voc', 'yolo'])
@pytest.mark.parametrize('split', ['train', 'val'])
def test_targets_equal_those_of_the_coco_form(copies: dict[str, Path], kind: str, split: str) -> None:
    theirs = build_data(split, arguments('coco', copies['coco']))
    ours = build_data(split, arguments(kind, copies[kind]))
    assert len(ours) == len(theirs) and ours.class_map.names == theirs.class_map.names
    for (image, target), (other, expected) in zip(ours, theirs, strict=True):
        assert torch.equal(image, other) and torch.equal(target['labels'], expected['labels'])
        same(target['boxes'], expected['boxes'])


@pytest.mark.parametrize('kind', ['voc', 'yolo'])
def test_metrics_equal_those_of_the_coco_form(copies: dict[str, Path], kind: str) -> None:
    """To the last digit, of predictions of every quality."""
    results = []
    for name in ('coco', kind):
        dataset = build_data('val', arguments(name, copies[name]))
        evaluator = CocoEvaluator(dataset.ground_truth, dataset.class_map)
        torch.manual_seed(0)
        for idx, image_id in enumerate(dataset.ids):
            boxes = dataset.untransformed(idx)[1]['boxes'].round(decimals=3)
            labels = dataset.untransformed(idx)[1]['labels']
            boxes = torch.cat([boxes + torch.randn(len(boxes), 4) * 2 for _ in range(3)])
            boxes[:, 2:] = torch.maximum(boxes[:, 2:], boxes[:, :2] + 1)
            found = {'boxes': boxes, 'labels': labels.repeat(3), 'scores': torch.rand(len(boxes))}
            evaluator.update({image_id: found})
        results.append(evaluator.summaries()['bbox'])
    assert 0.1 < results[0].numbers['AP'] < 0.9
    assert results[0].numbers == results[1].numbers
    assert [row['AP'] for row in results[0].per_class] == [row['AP'] for row in results[1].per_class]


@pytest.mark.parametrize('kind', ['voc', 'yolo'])
def test_a_run_trains_and_its_evaluation_needs_no_flag(
    copies: dict[str, Path], kind: str, tmp_path: Path
) -> None:
    words = [word for word in TINY.split() if word not in ('--dataset_file', 'shapes')]
    flags = [
        *words,
        *f'--dataset_file {kind} --coco_path {copies[kind]} --epochs 1 --output_dir {tmp_path}'.split(),
    ]
    main.main(main.get_args_parser().parse_args(flags))
    trained = json.loads((tmp_path / 'log.jsonl').read_text())['test_coco_eval_bbox']
    assert load(tmp_path)['class_map']['names'] == sorted(load(tmp_path)['class_map']['names'])
    again = f'--eval --resume {tmp_path}/checkpoint.pth --output_dir {tmp_path} --num_workers 0'
    main.main(main.get_args_parser().parse_args(again.split()))
    assert json.loads((tmp_path / 'eval.json').read_text())['test_coco_eval_bbox'] == trained


@pytest.mark.parametrize('kind', ['voc', 'yolo'])
def test_conversion_gives_the_coco_form(copies: dict[str, Path], kind: str, tmp_path: Path) -> None:
    words = f'--dataset_file {kind} --coco_path {copies[kind]} --image_set val --output {tmp_path}/val.json'
    run_command(convert_dataset.convert, convert_dataset.get_args_parser(), words.split())
    theirs = json.loads((copies['coco'] / 'annotations/instances_val2017.json').read_text())
    ours = json.loads((tmp_path / 'val.json').read_text())
    assert (
        len(ours['annotations']) == len(theirs['annotations']) and ours['categories'] == theirs['categories']
    )
    for annotation in ours['annotations']:  # pycocotools needs both
        width, height = annotation['bbox'][2:]
        assert annotation['iscrowd'] == 0 and annotation['area'] == width * height
    with pytest.raises(SystemExit, match='exists: choose another'):
        run_command(convert_dataset.convert, convert_dataset.get_args_parser(), words.split())


def test_polygons_of_yolo_have_boxes_and_masks(copies: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / 'images').mkdir()
    (tmp_path / 'images/train').symlink_to(copies['yolo'] / 'images/train')
    (tmp_path / 'labels/train').mkdir(parents=True)
    (tmp_path / 'data.yaml').write_text('train: images/train\nnames: [shape]\n')
    first = min((tmp_path / 'images/train').iterdir()).stem
    (tmp_path / f'labels/train/{first}.txt').write_text('0 0.25 0.25 0.75 0.25 0.75 0.5 0.25 0.5\n')
    args = arguments('yolo', tmp_path)
    args.masks = True
    target = build_data('train', args)[0][1]
    same(target['boxes'], torch.tensor([[0.5, 0.375, 0.5, 0.25]]))
    assert target['masks'].float().mean().item() == pytest.approx(0.125, abs=0.02)


@pytest.mark.parametrize('suffix', ['png', 'jpg'])
@pytest.mark.parametrize('orientation', range(1, 9))
def test_boxes_of_yolo_belong_to_the_image_as_it_is_shown(
    tmp_path: Path, orientation: int, suffix: str
) -> None:
    """As a viewer turns it by its EXIF data."""
    stored = PIL.Image.new('L', (40, 60))
    stored.paste(255, (4, 12, 16, 30))
    exif = PIL.Image.Exif()
    exif[PIL.ExifTags.Base.Orientation] = orientation
    (tmp_path / 'images').mkdir()
    stored.save(tmp_path / f'images/a.{suffix}', exif=exif, quality=100)
    with PIL.Image.open(tmp_path / f'images/a.{suffix}') as image:
        shown = PIL.ImageOps.exif_transpose(image).point(lambda value: 255 * (value > 127))
    left, top, right, bottom = shown.getbbox()
    shares = (
        (left + right) / 2 / shown.width,
        (top + bottom) / 2 / shown.height,
        (right - left) / shown.width,
        (bottom - top) / shown.height,
    )
    corners = (left, top, right, top, right, bottom)
    polygon = [value / (shown.height if index % 2 else shown.width) for index, value in enumerate(corners)]
    lines = [' '.join(map(str, (0, *values))) for values in (shares, polygon)]
    (tmp_path / 'images/a.txt').write_text('\n'.join(lines))  # beside the image, where no labels/ is
    (tmp_path / 'data.yaml').write_text('train: images\nnames: [a]\n', encoding='utf-8-sig')
    pixels, target = build_data('train', arguments('yolo', tmp_path)).untransformed(0)
    rows, columns = (pixels[0] > 127).nonzero(as_tuple=True)
    edges = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    same(target['boxes'], torch.stack(edges).float().expand(2, 4))


def test_label_files_do_not_depend_on_the_folder_of_the_program(
    copies: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor on a folder called images above them."""
    root = tmp_path / 'images/set/train'
    root.mkdir(parents=True)
    (root / 'pictures').symlink_to(copies['yolo'] / 'images/train')
    (root / 'labels').symlink_to(copies['yolo'] / 'labels/train')
    text = (copies['yolo'] / 'data.yaml').read_text().replace('images/train', 'train/pictures')
    (root.parent / 'data.yaml').write_text(text)
    numbers = []
    for folder, place in ((tmp_path, 'images/set'), (root.parent, '.'), (tmp_path, str(root.parent))):
        monkeypatch.chdir(folder)
        numbers.append(build_data('train', arguments('yolo', Path(place))).summary)
    assert len(set(numbers)) == 1 and ' 0 objects' not in numbers[0], numbers
    (root / 'labels').unlink()
    with pytest.raises(FileError, match='none of the 8 training images has a label file'):
        build_data('train', arguments('yolo', root.parent))


def test_folders_as_roboflow_writes_them(copies: dict[str, Path], tmp_path: Path) -> None:
    for part in ('images', 'labels'):
        (tmp_path / 'train').mkdir(exist_ok=True)
        (tmp_path / 'train' / part).symlink_to(copies['yolo'] / part / 'train')
    text = (copies['yolo'] / 'data.yaml').read_text().replace('path: .\n', '')
    (tmp_path / 'data.yaml').write_text(text.replace('images/train', '../train/images'))
    expected = build_data('train', arguments('yolo', copies['yolo']))
    assert build_data('train', arguments('yolo', tmp_path)).summary == expected.summary


def list_file(root: Path, before: str, images: list[Path] | None = None, name: str = 'list.txt') -> str:
    """Write a list of images with this text before their names."""
    images = images or sorted((root / 'images/train').iterdir())
    (root / name).write_text('\n'.join(f'{before}{image.name}' for image in images))
    return name


def divided(root: Path) -> list[str]:
    """Move three images and their labels to another folder."""
    for part, suffix in (('images', 'png'), ('labels', 'txt')):
        (root / 'more' / part).mkdir(parents=True)
        for number in range(3):
            file = root / part / f'train/{number:012d}.{suffix}'
            if file.is_file():
                file.rename(root / 'more' / part / file.name)
    return ['images/train', 'more/images']


FOUND = 'image names found by their last parts'
# Entries of data.yaml, and what a run says. All of them mean the same images and objects.
LAYOUTS: dict[str, tuple[Callable[[Path], dict], str]] = {
    'a list file': (lambda root: {'train': list_file(root, 'images/train/')}, ''),
    'a list file with dots': (lambda root: {'train': list_file(root, './images/train/')}, ''),
    'a list file beside its images': (
        lambda root: {'train': list_file(root, '', name='images/train/list.txt') and 'images/train/list.txt'},
        '',
    ),
    'a list file of this machine': (lambda root: {'train': list_file(root, f'{root}/images/train/')}, ''),
    'a list file of another machine': (
        lambda root: {'train': list_file(root, '/home/them/set/images/train/')},
        FOUND,
    ),
    'a list file of Windows': (lambda root: {'train': list_file(root, 'C:\\set\\images\\train\\')}, FOUND),
    'several folders': (lambda root: {'train': divided(root)}, ''),
    'a folder and a list file': (
        lambda root: {
            'train': [divided(root)[0], list_file(root, 'more/images/', [*(root / 'more/images').iterdir()])]
        },
        '',
    ),
    'images in a folder and in a list': (
        lambda root: {'train': ['images/train', list_file(root, 'images/train/')]},
        '8 images that are listed again, which count once',
    ),
    'path of another machine': (lambda root: {'path': '/home/them/set'}, ''),
    'places of another machine': (lambda root: {'train': f'D:\\them\\{root.name}\\images\\train'}, ''),
    'names by text': (lambda root: {'names': {str(n): name for n, name in enumerate(KINDS)}}, ''),
    'another nc': (lambda root: {'nc': 3}, 'data.yaml has nc 3 and 6 names'),
}


@pytest.mark.parametrize('name', LAYOUTS)
def test_layouts_of_yolo(name: str, copies: dict[str, Path], tmp_path: Path) -> None:
    root = tmp_path / 'set'
    shutil.copytree(copies['yolo'], root)
    expected = objects_by_name(build_data('train', arguments('yolo', root)))
    change, said = LAYOUTS[name]
    settings = {'path': '.', 'train': 'images/train', 'val': 'images/val', 'names': KINDS}
    (root / 'data.yaml').write_text(json.dumps(settings | change(root)))
    data = build_data('train', arguments('yolo', root))
    assert list(data.class_map.names) == KINDS
    found = objects_by_name(data)
    assert found.keys() == expected.keys()
    for key, boxes in expected.items():
        assert torch.equal(found[key], boxes)
    assert said in ' '.join(data.issues.lines()) and bool(said) == bool(data.issues.lines())


def objects_by_name(data: YoloDetection) -> dict[str, Tensor]:
    names = [Path(name).name for name in data.inventory().names]
    return {name: data.untransformed(idx)[1]['boxes'] for idx, name in enumerate(names)}


def test_classes_of_yolo_without_names_are_numbers(copies: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(copies['yolo'], tmp_path, symlinks=True, dirs_exist_ok=True)
    (tmp_path / 'data.yaml').write_text('train: images/train\nvalid: images/val\nnc: 6\n')
    assert build_data('train', arguments('yolo', tmp_path)).class_map.names == tuple('012345')
    assert len(build_data('val', arguments('yolo', tmp_path))) == 6
    assert yolo.has_part('val', tmp_path)
    (tmp_path / 'data.yaml').write_text('train: images/train\nval:\nnc: 6\n')
    assert not yolo.has_part('val', tmp_path)


# Lines of a label file -> number of objects, and what a run says.
LINES = {
    'a polygon among boxes': (
        '0 0.5 0.5 0.1 0.1\n1 0.1 0.1 0.3 0.1 0.3 0.3',
        2,
        'made from the segmentation',
    ),
    'scores': (
        '0 0.5 0.5 0.1 0.1 0.9\n1 0.1 0.1 0.3 0.1 0.3 0.3 0.75',
        2,
        '2 scores behind boxes and polygons',
    ),
    'a line twice': (
        '0 0.5 0.5 0.1 0.1\n1 0.5 0.5 0.1 0.1\n\n0  0.50 0.5 0.1 0.1',
        2,
        '1 lines of label files that repeat another one, which are left out (FILE, line 4)',
    ),
    'a class with a point': ('1.0 0.5 0.5 0.1 0.1', 1, ''),
    'nothing': ('\n', 0, ''),
    'rounding': ('0 1.005 0.5 0.1 0.1', 1, '1 boxes that leave their image, which are cut off'),
    'keypoints': (
        '0 0.5 0.5 0.1 0.1 0.4 0.5 2 0 0 0\n0 0.4 0.5 0.1 0.1',
        2,
        '1 keypoints behind boxes, which are not read',
    ),
}


@pytest.mark.parametrize('name', LINES)
def test_lines_of_yolo(name: str, tmp_path: Path) -> None:
    text, number, said = LINES[name]
    (tmp_path / 'images').mkdir()
    PIL.Image.new('L', (64, 48)).save(tmp_path / 'images/a.png')
    (tmp_path / 'images/a.txt').write_text(text)
    shape = 'kpt_shape: [2, 3]\n' if name == 'keypoints' else ''
    (tmp_path / 'data.yaml').write_text(f'train: images\nnames: [a, b]\n{shape}')
    data = build_data('train', arguments('yolo', tmp_path))
    assert len(data.untransformed(0)[1]['boxes']) == number
    lines = ' '.join(data.issues.lines()).replace(str(tmp_path / 'images/a.txt'), 'FILE')
    assert said in lines and bool(said) == bool(lines)


def test_images_of_yolo_without_a_readable_header(copies: dict[str, Path], tmp_path: Path) -> None:
    """A training image stays in the dataset, with an error when it is read, whatever is there then."""
    shutil.copytree(copies['yolo'], tmp_path, dirs_exist_ok=True)
    for part in ('train', 'val'):
        (tmp_path / f'images/{part}/000000000000.png').write_bytes(b'')
    with pytest.raises(UnreadableImage, match=r'val/000000000000\.png is not a readable image'):
        build_data('val', arguments('yolo', tmp_path))
    data = build_data('train', arguments('yolo', tmp_path))
    assert len(data) == 8 and len(data.untransformed(1)[1]['boxes'])
    for program in (lambda: data.untransformed(0), lambda: data.ground_truth):
        with pytest.raises(UnreadableImage, match=r'train/000000000000\.png is not a readable image'):
            program()
    shutil.copy(tmp_path / 'images/train/000000000001.png', tmp_path / 'images/train/000000000000.png')
    with pytest.raises(UnreadableImage, match='was not readable when this program began'):
        data.untransformed(0)


def test_lists_of_voc(copies: dict[str, Path], tmp_path: Path) -> None:
    """A byte-order mark, names with spaces, and whether an image has the class behind its name."""
    shutil.copytree(copies['voc'], tmp_path, symlinks=True, dirs_exist_ok=True)
    file = tmp_path / 'ImageSets/Main/train.txt'
    first, second, *_ = file.read_text().split()
    (tmp_path / f'Annotations/{first}.xml').rename(tmp_path / 'Annotations/with a space.xml')
    file.write_text(f'with a space\n{second}  -1\n', encoding='utf-8-sig')
    assert len(build_data('train', arguments('voc', tmp_path))) == 2
    last = tmp_path / f'Annotations/{(tmp_path / "ImageSets/Main/val.txt").read_text().split()[-1]}.xml'
    last.write_text(re.sub('<name>[a-z]+</name>', '<name>cow</name>', last.read_text()))
    problems, counted = Issues(), last.read_text().count('<name>cow')
    AnnotationTable(file.with_name('val.txt'), read=lambda path, _: read_voc_lists(path), problems=problems)
    assert problems.counts == {'annotations that cannot be used': counted}
    with pytest.raises(
        ValueError, match=f"{last.name} has the class 'cow', which no image of .*train.txt has"
    ):
        build_data('val', arguments('voc', tmp_path))


def test_broken_exif_data_cost_nothing(tmp_path: Path) -> None:
    """Nor are a PNG's pixels decoded to look for some behind them."""
    for data in (b'Exif\0\0II*\0', b'Exif\0\0' + bytes(range(200))):
        PIL.Image.new('L', (4, 6)).save(tmp_path / 'a.jpg', exif=data)
        assert read_header(tmp_path / 'a.jpg').orientation == 1
    PIL.Image.new('L', (400, 600)).save(tmp_path / 'a.png')
    (tmp_path / 'cut.png').write_bytes((tmp_path / 'a.png').read_bytes()[:60])
    assert read_header(tmp_path / 'cut.png').orientation == 1


@pytest.mark.parametrize('flag', ['val_images', 'train_ann'])
def test_flags_of_the_coco_form_are_refused(flag: str) -> None:
    words = ['--dataset_file', 'yolo', '--coco_path', 'somewhere', f'--{flag}', 'elsewhere']
    with pytest.raises(ValueError, match='--dataset_file yolo is one folder: give --coco_path'):
        main.main(main.get_args_parser().parse_args(words))
    with pytest.raises(ValueError, match='--dataset_file shapes reads no files: leave --coco_path'):
        main.main(main.get_args_parser().parse_args(['--dataset_file', 'shapes', '--coco_path', 'somewhere']))


BAD = {
    'no list': ('voc', 'ImageSets/Main/train.txt', None, 'does not exist'),
    'no XML': ('voc', 'Annotations/train_{first}.xml', 'text', 'is not XML'),
    'a missing XML': ('voc', 'Annotations/train_{first}.xml', None, 'take its name out of the list'),
    'no file name': ('voc', 'Annotations/train_{first}.xml', '<annotation/>', 'must name the image file'),
    'a box of words': (
        'voc',
        'Annotations/train_{first}.xml',
        '<annotation><filename>a.jpg</filename><object><name>disc</name><bndbox><xmin>left</xmin></bndbox>'
        '</object></annotation>',
        'is not an annotation of VOC',
    ),
    'an infinite side': (
        'voc',
        'Annotations/train_{first}.xml',
        '<annotation><filename>a.jpg</filename><size><height>inf</height></size></annotation>',
        'is not an annotation of VOC',
    ),
    'a box without a side': (
        'voc',
        'Annotations/train_{first}.xml',
        '<annotation><filename>a.jpg</filename><object><name>disc</name><bndbox><ymin>1</ymin></bndbox>'
        '</object></annotation>',
        r'train_.*xml has an object of the corners \[nan, 1.0',
    ),
    'a negative number': (
        'yolo',
        'labels/train/{first}.txt',
        '0 0.5 0.5 0.1 -0.1',
        '-0.1., which is neither a box nor a polygon .a size is negative',
    ),
    'no number': ('yolo', 'labels/train/{first}.txt', '0 0.5 nan 0.1 0.1', 'line 1 is .* number not finite'),
    'no data.yaml': ('yolo', 'data.yaml', None, 'must be the folder of data.yaml'),
    'no YAML': ('yolo', 'data.yaml', 'a: [', 'is not YAML'),
    'deep YAML': ('yolo', 'data.yaml', '[' * 5000, 'is not YAML'),
    'a month of 99': ('yolo', 'data.yaml', 'names: 2001-99-99', 'is not YAML'),
    'no names': ('yolo', 'data.yaml', 'train: images/train', 'must list the class names'),
    'no folder': ('yolo', 'data.yaml', 'train: gone\nnames: [a]', 'are in none of'),
    'a line of words': ('yolo', 'labels/train/{first}.txt', '0 a b c d', 'is neither a box nor a polygon'),
    'three numbers': ('yolo', 'labels/train/{first}.txt', '0 0.5 0.5 0.1', 'line 1'),
    'a class that is not named': (
        'yolo',
        'labels/train/{first}.txt',
        '77 0.5 0.5 0.1 0.1',
        'line 1 has class 77; the classes are 0 to 5: ',
    ),
    'half a class': ('yolo', 'labels/train/{first}.txt', '0.5 0.5 0.5 0.1 0.1', 'its class is 0.5'),
    'pixels': ('yolo', 'labels/train/{first}.txt', '0 1607 797 20 30', 'line 1 has 1607, .* divide pixels'),
    'a corner far away': ('yolo', 'labels/train/{first}.txt', '0 0 0 0.1 -0.02 0 0.2', 'line 1 has -0.02, '),
    'a track number': ('yolo', 'labels/train/{first}.txt', '0 0.5 0.5 0.1 0.1 7', '7 at its end is no score'),
    'a class name twice': ('yolo', 'data.yaml', 'train: images/train\nnames: {0: a, "0": b}', 'class names'),
    'an unknown file': (
        'yolo',
        'data.yaml',
        'train: data.yaml\nnames: [a]',
        'neither a folder nor a list file',
    ),
    'a place without text': ('yolo', 'data.yaml', 'train: [images/train, 3]\nnames: [a]', 'has train'),
    'an empty list file': ('yolo', 'data.yaml', 'train: empty.txt\nnames: [a]', 'empty.txt is empty'),
    'a list of what is missing': (
        'yolo',
        'data.yaml',
        'train: missing.txt\nnames: [a]',
        '1 of 1 images of .*missing.txt are not in',
    ),
    'two places that are one': (
        'yolo',
        'data.yaml',
        'path: /gone\ntrain: train/images\nval: val/images\nnames: [a]',
        'could be it or another place',
    ),
}


@pytest.mark.parametrize('name', BAD)
def test_bad_files_are_named(name: str, copies: dict[str, Path], tmp_path: Path) -> None:
    kind, file, text, message = BAD[name]
    shutil.copytree(copies[kind], tmp_path / kind, symlinks=True)
    first = min((copies['yolo'] / 'images/train').iterdir()).stem
    path = tmp_path / kind / file.format(first=first)
    path.with_name('empty.txt').write_text('')
    path.with_name('missing.txt').write_text('gone/1.png')
    if text is None:
        path.unlink()
    else:
        path.write_text(text)
    with pytest.raises(UserError, match=message) as error:
        build_data('train', arguments(kind, tmp_path / kind))
    assert str(tmp_path) in str(error.value)


def test_images_without_a_label_file_are_counted(copies: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(copies['yolo'], tmp_path, symlinks=True, dirs_exist_ok=True)
    for label in sorted((tmp_path / 'labels/train').iterdir())[:2]:
        label.unlink()
    dataset = build_data('train', arguments('yolo', tmp_path))
    assert dataset.issues.counts['images without a label file, taken as images without objects'] == 2
