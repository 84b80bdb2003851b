"""Conversion of annotations: what each format becomes, round trips, parts, and errors that name the file."""

import base64
import io
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from tools import convert_dataset
from util.command_line import run_command

WIDTH, HEIGHT = 64, 48


def run(words: str | list[str]) -> None:
    words = words.split() if isinstance(words, str) else words
    run_command(convert_dataset.convert, convert_dataset.get_args_parser(), words)


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding='utf-8')


def pictures(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.new('L', (WIDTH, HEIGHT)).save(root / name)


def cvat(shapes: str, labels: str = '<label><name>cat</name></label><label><name>dog</name></label>') -> str:
    """A task whose first image has no objects."""
    images = ''.join(
        f'<image id="{n}" name="{name}" width="{WIDTH}" height="{HEIGHT}">{text}</image>'
        for n, (name, text) in enumerate({'empty.jpg': '', 'set/a &amp; b.jpg': shapes}.items())
    )
    return f'<annotations><meta><task><labels>{labels}</labels></task></meta>{images}</annotations>'


def labelme(*shapes: dict, name: str = 'a.jpg') -> str:
    return json.dumps({'imagePath': name, 'imageHeight': HEIGHT, 'imageWidth': WIDTH, 'shapes': shapes})


def shape(points: list, kind: str | None = 'polygon', **more: object) -> dict:
    return {'label': 'cat', 'points': points, 'shape_type': kind} | more


def painted(mask: np.ndarray) -> str:
    stream = io.BytesIO()
    PIL.Image.fromarray(mask.astype(np.uint8) * 255).save(stream, 'PNG')
    return base64.b64encode(stream.getvalue()).decode()


CUP = np.array([[1, 0, 1], [1, 1, 1]], dtype=bool)
OID = 'ImageID,LabelName,XMin,XMax,YMin,YMax,IsGroupOf\n'
# Flags, files, and what comes out: class, box, area and iscrowd of each object, and lines.
READ = {
    'boxes of CVAT': (
        '--dataset_file cvat --coco_path {}/a.xml',
        {'a.xml': cvat('<box label="dog" xtl="1.5" ytl="2.5" xbr="10.25" ybr="20"/>')},
        [('dog', [1.5, 2.5, 8.75, 17.5], 153.125, 0)],
        [],
    ),
    'rotated boxes of CVAT': (
        '--dataset_file cvat --coco_path {}',
        {'annotations.xml': cvat('<box label="cat" xtl="10" ytl="10" xbr="30" ybr="20" rotation="90"/>')},
        [('cat', [15, 5, 10, 20], 200, 0)],
        ['1 rotated boxes, kept as the upright boxes around them (in set/a & b.jpg)'],
    ),
    'regions of CVAT': (
        '--dataset_file cvat --coco_path {}/a.xml',
        {
            'a.xml': cvat(
                '<polygon label="cat" points="1,1;5,1;5,5"/><ellipse label="cat" cx="20" cy="20" rx="8" ry="4"/>'
                '<mask label="dog" rle="0, 1, 1, 4" left="3" top="4" width="3" height="2"/>'
            )
        },
        [
            ('cat', [1, 1, 4, 4], 8, 0),
            ('cat', [12, 16, 16, 8], 100.37, 0),
            ('dog', [3, 4, 3, 2], 5, 0),
        ],
        [],
    ),
    'other shapes and labels of CVAT': (
        '--dataset_file cvat --coco_path {}/a.xml',
        {
            'a.xml': cvat(
                '<polyline label="cat" points="1,1;2,2"/><points label="cat" points="1,1"/><tag label="cat"/>'
                '<polyline label="cat" points="1,1;2,2"/><box label="cow" xtl="1" ytl="2" xbr="3" ybr="5"/>'
            )
        },
        [('cow', [1, 2, 2, 3], 6, 0)],
        [
            '2 shapes of the kind polyline, which are left out',
            '1 shapes of the kind points, which',
            '1 shapes of the kind tag, which',
            '1 labels that the list of labels lacks, added to it (cow)',
        ],
    ),
    'LabelMe': (
        '--dataset_file labelme --coco_path {}/set',
        {
            'set/a.json': labelme(
                shape([[10, 20], [4, 6]], 'rectangle'),
                shape([[20, 20], [20, 25]], 'circle'),
                shape([[1, 1], [5, 1], [5, 5]], None),
                shape([[3, 4], [5, 5]], 'mask', mask=painted(CUP)),
                shape([[3, 4], [5, 5]], 'line'),
            ),
            'set/deep/b.json': labelme(name='..\\deep\\b.jpg'),
        },
        [
            ('cat', [4, 6, 6, 14], 84, 0),
            ('cat', [15, 15, 10, 10], 78.41, 0),
            ('cat', [1, 1, 4, 4], 8, 0),
            ('cat', [3, 4, 3, 2], 5, 0),
        ],
        ['1 shapes of the kind line, which are left out (in a.jpg)'],
    ),
    'one object of several shapes of LabelMe': (
        '--dataset_file labelme --coco_path {}/set/a.json',
        {
            'set/a.json': labelme(
                shape([[1, 1], [5, 1], [5, 5]], group_id=1),
                shape([[10, 10], [14, 20]], 'rectangle', group_id=1),
            )
        },
        [('cat', [1, 1, 13, 19], 48, 0)],
        [],
    ),
    'DOTA': (
        '--dataset_file dota --coco_path {}/labels --images {}/set',
        {
            'labels/a.txt': 'imagesource:x\ngsd:0.1\n0 0 20 3 22 10 1 9 large vehicle 0\n'
            '1 2 11 2 11 22 1 22 plane 1\n\n5 6 7 6 7 8 5 8 plane\n'
        },
        [
            ('large vehicle', [0, 0, 22, 10], 220, 0),
            ('plane', [1, 2, 10, 20], 200, 1),
            ('plane', [5, 6, 2, 2], 4, 0),
        ],
        [
            '1 rotated boxes, kept as the upright boxes around them (in a.jpg)',
            '1 difficult objects, kept as crowd regions, which training leaves out (in a.jpg)',
            '2 images without annotations, which are left out (deep/b.jpg, empty.jpg)',
        ],
    ),
    'Open Images': (
        '--dataset_file oid --coco_path {}/a.csv --images {}/set --class_names {}/names.csv',
        {
            'a.csv': f'{OID}a,/m/01,0.25,0.75,0.125,0.5,0\nb,/m/02,0,1,0,1,1\n',
            'names.csv': '/m/01,Cat\n',
        },
        [('Cat', [16, 6, 32, 18], 576, 0), ('/m/02', [0, 0, 64, 48], 3072, 1)],
        [
            '1 groups of objects, kept as crowd regions',
            'names.csv (/m/02)',
            '1 images without annotations, which are left out (empty.jpg)',
        ],
    ),
}


@pytest.mark.parametrize('name', READ)
def test_formats_become_coco_form(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words, files, objects, lines = READ[name]
    write(tmp_path, files)
    pictures(tmp_path / 'set', 'a.jpg', 'empty.jpg', 'deep/b.jpg')
    run([*words.replace('{}', str(tmp_path)).split(), '--output', f'{tmp_path}/out.json'])
    said, data = capsys.readouterr().out, json.loads((tmp_path / 'out.json').read_text())
    names = {category['id']: category['name'] for category in data['categories']}
    found = [(names[a['category_id']], a['bbox'], a['area'], a['iscrowd']) for a in data['annotations']]
    assert [each[::3] for each in found] == [each[::3] for each in objects]
    for (_, box, area, _), (_, expected, expected_area, _) in zip(found, objects, strict=True):
        assert box == pytest.approx(expected, rel=1e-6) and area == pytest.approx(expected_area, abs=0.01)
    assert all((image['height'], image['width']) == (HEIGHT, WIDTH) for image in data['images'])
    for line in lines:
        assert line in said
    assert said.count('\n') == len(lines) + 1, said


def test_masks_are_those_of_the_tools(tmp_path: Path) -> None:
    from pycocotools import mask as coco_mask

    write(tmp_path, {'a.json': labelme(shape([[3.4, 4.2], [5, 5]], 'mask', mask=painted(CUP)))})
    pictures(tmp_path, 'a.jpg')
    run(f'--dataset_file labelme --coco_path {tmp_path} --output {tmp_path}/out.json')
    (found,) = json.loads((tmp_path / 'out.json').read_text())['annotations']
    assert (coco_mask.decode(found['segmentation'])[4:6, 3:6] == CUP).all()


# Flags and files, of which one is bad, and the message.
BAD: dict[str, tuple[str, dict[str, str], str]] = {
    'no XML': ('cvat', {'a.xml': 'hello'}, r'a\.xml is not XML'),
    'an empty file': ('cvat', {'a.xml': ''}, r'a\.xml is not XML'),
    'another XML': (
        'cvat',
        {'a.xml': '<a><b/></a>'},
        r'a\.xml has no images: export the task as "CVAT for images 1.1"',
    ),
    'a video': (
        'cvat',
        {'a.xml': '<annotations><track><box/></track></annotations>'},
        'as "CVAT for images 1.1"',
    ),
    'a box of words': (
        'cvat',
        {'a.xml': cvat('<box label="cat" xtl="left" ytl="2" xbr="3" ybr="4"/>')},
        r'a\.xml, image set/a & b\.jpg, shape 1 is not a box of CVAT .*left.*: correct it',
    ),
    'a box without a side': (
        'cvat',
        {'a.xml': cvat('<box label="cat" xtl="1" ytl="2" ybr="4"/>')},
        'it has no xbr',
    ),
    'a reversed box': (
        'cvat',
        {'a.xml': cvat('<box label="cat" xtl="9" ytl="2" xbr="3" ybr="4"/>')},
        r'shape 1 has bbox \[9.0, 2.0, -6.0, 2.0\]',
    ),
    'a box of nan': (
        'cvat',
        {'a.xml': cvat('<box label="cat" xtl="nan" ytl="2" xbr="3" ybr="4"/>')},
        'has bbox .nan',
    ),
    'a mask of other sides': (
        'cvat',
        {'a.xml': cvat('<mask label="cat" rle="0, 900000000000" left="3" top="4" width="3" height="2"/>')},
        'shape 1 is not a mask of CVAT .run lengths of',
    ),
    'no label': ('cvat', {'a.xml': cvat('<box xtl="1" ytl="2" xbr="3" ybr="4"/>')}, 'it has no label'),
    'no JSON': ('labelme', {'a.json': '{'}, r'a\.json is not JSON'),
    'another JSON': ('labelme', {'a.json': '{"images": []}'}, r'a\.json is no file of LabelMe'),
    'a circle of one point': (
        'labelme',
        {'a.json': labelme(shape([[1, 1]], 'circle'))},
        r'a\.json, shape 1 is not a circle of LabelMe',
    ),
    'a mask that is no PNG': (
        'labelme',
        {'a.json': labelme(shape([[1, 1], [2, 2]], 'mask', mask='AAAA'))},
        'shape 1 is not a mask of LabelMe',
    ),
    'no image': (
        'labelme',
        {'a.json': labelme(shape([[1, 1], [2, 2]], 'rectangle'), name='gone.jpg')},
        r'1 of 1 images of .* are not in',
    ),
    'seven numbers': (
        'dota',
        {'a.txt': '1 2 3 4 5 6 7 plane 0'},
        r"a\.txt, line 1 is '1 2 3 4 5 6 7 plane 0', which",
    ),
    'a corner of nan': ('dota', {'a.txt': 'nan 2 3 4 5 6 7 8 plane 0'}, r'a\.txt, line 1 has bbox'),
    'no image of DOTA': ('dota', {'b.txt': ''}, r'b\.txt has no image in'),
    'no columns': (
        'oid',
        {'a.csv': 'ImageID,LabelName\na,b\n'},
        r'a\.csv has no boxes of Open Images .*xmin',
    ),
    'words in a row': ('oid', {'a.csv': f'{OID}a,x,left,1,0,1,0\n'}, r'line 2: invalid XMin: left'),
    'nan in a row': ('oid', {'a.csv': f'{OID}a,x,0,1,0,1,0\na,x,nan,1,0,1,0\n'}, r'a\.csv, line 3 has bbox'),
    'pixels in a row': (
        'oid',
        {'a.csv': f'{OID}a,x,0,40,0,30,0\n'},
        'line 2 has a box that is not in shares',
    ),
    'a reversed row': ('oid', {'a.csv': f'{OID}a,x,1,0,0,1,0\n'}, r'a\.csv, line 2 has bbox'),
    'no image of Open Images': (
        'oid',
        {'a.csv': f'{OID}gone,x,0,1,0,1,0\n'},
        r'a\.csv: image gone is not in',
    ),
}


@pytest.mark.parametrize('name', BAD)
def test_bad_files_are_named(name: str, tmp_path: Path) -> None:
    kind, files, message = BAD[name]
    write(tmp_path / 'in', files)
    pictures(tmp_path / 'set', 'a.jpg')
    place = tmp_path / 'in' / (next(iter(files)) if kind in ('cvat', 'oid') else '')
    with pytest.raises(SystemExit, match=message):
        words = [] if kind == 'cvat' else ['--images', f'{tmp_path}/set']
        run(['--dataset_file', kind, '--coco_path', str(place), '--output', f'{tmp_path}/out.json', *words])
    assert not (tmp_path / 'out.json').exists()


# Round trips ----


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    """Six images, one of them without objects, in two folders; eleven objects of three classes."""
    generator = np.random.default_rng(0)
    names = ['a.jpg', 'b.png', 'set/c.jpg', 'set/d.jpg', 'e.jpg', 'empty.jpg']
    pictures(tmp_path / 'images/train', *names)
    images = [
        {'id': 10 * n, 'file_name': name, 'height': HEIGHT, 'width': WIDTH} for n, name in enumerate(names, 1)
    ]
    annotations = []
    for number in range(1, 12):
        x, y, w, h = (generator.uniform(1, [30, 20, 30, 20])).tolist()
        one = {
            'id': number,
            'image_id': 10 * (number % 5 + 1),
            'category_id': 3 + number % 2,
            'bbox': [x, y, w, h],
        }
        annotations.append(one | {'area': w * h, 'iscrowd': 0})
    categories = [{'id': 3, 'name': 'cat'}, {'id': 4, 'name': 'a & "b"'}, {'id': 9, 'name': 'unused'}]
    content = {'images': images, 'annotations': annotations, 'categories': categories}
    (tmp_path / 'coco.json').write_text(json.dumps(content))
    return tmp_path


def objects_of(file: Path) -> list[tuple]:
    """Image, class and box of each object, in order."""
    data = json.loads(file.read_text())
    names = {image['id']: image['file_name'] for image in data['images']}
    classes = {category['id']: category['name'] for category in data['categories']}
    return sorted((names[a['image_id']], classes[a['category_id']], a['bbox']) for a in data['annotations'])


def back_from_voc(root: Path) -> str:
    (root / 'out/JPEGImages').symlink_to(root / 'images/train')
    return f'--dataset_file voc --coco_path {root}/out'


def back_from_yolo(root: Path) -> str:
    (root / 'out/images').symlink_to(root / 'images')
    return f'--dataset_file yolo --coco_path {root}/out'


# Format -> name of the output, flags that read it back, largest difference in pixels, lines, images and classes.
TRIPS: dict[str, tuple[str, Callable[[Path], str], float, list[str], int, int]] = {
    'coco': ('out.json', lambda root: f'--dataset_file coco --coco_path {root}/out.json', 0, [], 6, 3),
    'voc': ('out', back_from_voc, 1, ['boxes are rounded to whole pixels'], 6, 2),
    'yolo': ('out', back_from_yolo, 1e-4, ['boxes are rounded to millionths'], 6, 3),
    'cvat': (
        'out.xml',
        lambda root: f'--dataset_file cvat --coco_path {root}/out.xml',
        0.0101,
        ['hundredths'],
        6,
        3,
    ),
    'dota': (
        'out',
        lambda root: f'--dataset_file dota --coco_path {root}/out --images {root}/images/train',
        0.101,
        ['boxes are rounded to tenths of a pixel', '1 categories without objects are left out'],
        6,
        2,
    ),
    'oid': (
        'out.csv',
        lambda root: f'--dataset_file oid --coco_path {root}/out.csv --images {root}/images/train',
        1e-4,
        ['1 images without objects are left out', '1 categories without objects are left out'],
        5,
        2,
    ),
}


@pytest.mark.parametrize('to', TRIPS)
def test_there_and_back(coco: Path, to: str, capsys: pytest.CaptureFixture[str]) -> None:
    output, back, tolerance, lines, images, classes = TRIPS[to]
    run(f'--dataset_file coco --coco_path {coco}/coco.json --to {to} --output {coco}/{output}')
    said = capsys.readouterr().out
    assert all(line in said for line in lines), said
    run(f'{back(coco)} --output {coco}/back.json')
    ours, theirs = objects_of(coco / 'back.json'), objects_of(coco / 'coco.json')
    assert [each[:2] for each in ours] == [each[:2] for each in theirs]
    for (_, _, box), (_, _, expected) in zip(ours, theirs, strict=True):
        assert box == pytest.approx(expected, abs=tolerance)
    data = json.loads((coco / 'back.json').read_text())
    assert (len(data['images']), len(data['categories'])) == (images, classes)


@pytest.mark.parametrize(
    ('to', 'lines', 'pattern', 'number'),
    [
        (
            'voc',
            ['2 crowd regions and ignored objects are written as difficult objects', '4 masks are left out'],
            '<object>',
            11,
        ),
        (
            'yolo',
            [
                '2 crowd regions and ignored objects are left out',
                '2 masks',
                '2 boxes are cut off',
                '1 boxes outside',
            ],
            r'^\d ',
            8,
        ),
        (
            'cvat',
            ['2 crowd regions and ignored objects are left out', '1 objects of several polygons'],
            'occluded',
            10,
        ),
        (
            'dota',
            ['2 crowd regions and ignored objects are written as difficult objects', '4 masks are left out'],
            r' [01]$',
            11,
        ),
        (
            'oid',
            [
                '2 crowd regions and ignored objects are written as groups',
                '2 boxes are cut off',
                '1 boxes outside',
            ],
            r',[01]$',
            10,
        ),
    ],
)
def test_what_a_format_cannot_hold_is_said(
    coco: Path, to: str, lines: list[str], pattern: str, number: int, capsys: pytest.CaptureFixture[str]
) -> None:
    data = json.loads((coco / 'coco.json').read_text())
    triangle, runs = [5, 5, 15, 5, 15, 15], {'size': [HEIGHT, WIDTH], 'counts': [0, HEIGHT * WIDTH]}
    first = data['annotations']
    first[0] |= {'iscrowd': 1, 'segmentation': runs}
    first[1] |= {'iscrowd': 1, 'segmentation': runs}
    first[2] |= {'segmentation': [triangle]}
    first[3] |= {'segmentation': [triangle, triangle]}
    first[4] |= {'bbox': [60, 5, 10, 10], 'score': 0.5}
    first[5] |= {'bbox': [-5, 5, 10, 10]}
    first[6] |= {'bbox': [90, 5, 10, 10]}
    (coco / 'coco.json').write_text(json.dumps(data))
    output = TRIPS[to][0]
    run(f'--dataset_file coco --coco_path {coco}/coco.json --to {to} --output {coco}/{output}')
    said = capsys.readouterr().out
    for line in [*lines, '1 annotations have other fields, which are left out']:
        assert line in said, said
    files = [path for path in (coco / output).rglob('*') if path.is_file()] or [coco / output]
    text = ''.join(path.read_text() for path in files)
    assert len(re.findall(pattern, text, re.MULTILINE)) == number, text


def test_parts_have_all_images_and_their_share_of_each_class(coco: Path) -> None:
    data = json.loads((coco / 'coco.json').read_text())
    data['images'] = [data['images'][0] | {'id': n, 'file_name': f'{n}.jpg'} for n in range(1, 101)]
    data['annotations'] = [
        data['annotations'][0] | {'id': n, 'image_id': n, 'category_id': 4 if n <= 10 else 3}
        for n in range(1, 101)
    ]
    (coco / 'coco.json').write_text(json.dumps(data))
    words = f'--dataset_file coco --coco_path {coco}/coco.json --split 0.7 0.2 0.1'
    for name, more in (('one', ''), ('two', ''), ('three', '--seed 1')):
        run(f'{words} --output {coco}/{name} {more}')
    parts = [json.loads((coco / f'one/{part}.json').read_text()) for part in ('train', 'val', 'test')]
    ids = [{image['id'] for image in part['images']} for part in parts]
    assert [len(each) for each in ids] == [70, 20, 10] and len(set.union(*ids)) == 100
    assert [sum(a['category_id'] == 4 for a in part['annotations']) for part in parts] == [7, 2, 1]
    assert all(
        {a['image_id'] for a in part['annotations']} == own for part, own in zip(parts, ids, strict=True)
    )
    texts = [(coco / f'{name}/val.json').read_text() for name in ('one', 'two', 'three')]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize('to', ['voc', 'yolo'])
def test_parts_can_be_trained_on(coco: Path, to: str) -> None:
    """The folder has both parts, as --dataset_file voc and yolo read them."""
    run(f'--dataset_file coco --coco_path {coco}/coco.json --to {to} --split 0.5 0.5 --output {coco}/out')
    if to == 'voc':
        back_from_voc(coco)
    else:
        (coco / 'out/images').mkdir()
        for part in ('train', 'val'):
            (coco / f'out/images/{part}').symlink_to(coco / 'images/train')
    found = []
    for part in ('train', 'val'):
        run(f'--dataset_file {to} --coco_path {coco}/out --image_set {part} --output {coco}/{part}.json')
        found += objects_of(coco / f'{part}.json')
    assert [each[:2] for each in sorted(found)] == [each[:2] for each in objects_of(coco / 'coco.json')]


@pytest.mark.parametrize(
    ('words', 'message'),
    [
        ('--output {}/coco.json', 'exists: choose another --output'),
        ('--output {}/new.xml', r'new\.xml: --to coco writes a file that ends in \.json'),
        ('--output {}/new.json --to yolo', r'new\.json: --to yolo writes a folder'),
        ('--output {}/new.json --split 0.5 0.5', r'new\.json: --to coco with --split writes a folder'),
        ('--output {}/new --split 0.9', '--split 0.9: give two or three shares above 0 that sum to 1'),
        ('--output {}/new --split 0.9 0.2', '--split 0.9 0.2: give two or three shares'),
        ('--output {}/new --split 0.99 0.01', '6 images leave val empty'),
        ('--output {}/new.json --class_names x', '--class_names is for --dataset_file oid'),
    ],
)
def test_flags_that_contradict_each_other(coco: Path, words: str, message: str) -> None:
    before = {path: path.read_bytes() for path in coco.rglob('*') if path.is_file()}
    with pytest.raises(SystemExit, match=message):
        run(f'--dataset_file coco --coco_path {coco}/coco.json {words.replace("{}", str(coco))}')
    assert before == {path: path.read_bytes() for path in coco.rglob('*') if path.is_file()}


def test_names_that_formats_cannot_hold(coco: Path) -> None:
    """Labels of YOLO stay below the folder, and two images have different ones; sizes must be known."""
    data = json.loads((coco / 'coco.json').read_text())
    for change, message in (
        ({'file_name': '../../a.jpg'}, 'would be outside'),
        ({'file_name': 'b.jpg'}, r'two images would have the labels b\.txt'),
        ({'width': 0}, 'a.jpg has no height and width, which --to yolo needs: give --images'),
    ):
        changed = data | {'images': [data['images'][0] | change, *data['images'][1:]]}
        (coco / 'changed.json').write_text(json.dumps(changed))
        with pytest.raises(SystemExit, match=message):
            run(f'--dataset_file coco --coco_path {coco}/changed.json --to yolo --output {coco}/sub/sub/out')
        assert not list(coco.glob('**/sub/out')) and not list(coco.glob('a.txt'))


def test_class_names_stay(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also those that YAML takes for something else; formats that cannot hold a name refuse it."""
    names = ['no', 'null', '01', 'a: b', '~', 'tab\there', 'größe "x"']
    image = {'id': 1, 'file_name': 'a.jpg', 'height': HEIGHT, 'width': WIDTH}
    box = {'id': 1, 'image_id': 1, 'category_id': 3, 'bbox': [1, 2, 8, 8], 'area': 64, 'iscrowd': 0}
    categories = [{'id': number, 'name': name} for number, name in enumerate(names, start=1)]
    content = {'images': [image], 'annotations': [box], 'categories': categories}
    write(tmp_path, {'a.json': json.dumps(content)})
    pictures(tmp_path, 'a.jpg', 'out/images/train/a.jpg')
    (tmp_path / 'out').rename(tmp_path / 'images')
    run(f'--dataset_file coco --coco_path {tmp_path}/a.json --to yolo --output {tmp_path}/out')
    (tmp_path / 'images/images').rename(tmp_path / 'out/images')
    run(f'--dataset_file yolo --coco_path {tmp_path}/out --output {tmp_path}/b.json')
    back = json.loads((tmp_path / 'b.json').read_text())
    assert [each['name'] for each in back['categories']] == names
    with pytest.raises(SystemExit, match=r"--to voc: the class 'tab\\there' would have another name"):
        run(f'--dataset_file coco --coco_path {tmp_path}/a.json --to voc --output {tmp_path}/voc')
    assert not (tmp_path / 'voc').exists()
