"""--check_data: the same lines for files and shards, built-in images, and the page with what is unusual."""

import json
import re
import shutil
from argparse import Namespace
from pathlib import Path

import numpy as np
import PIL.ExifTags
import PIL.Image
import pytest

from datasets import shards
from datasets.check_data import check_data
from datasets.image_dataset import ImageDataset
from tests.shared_data import build_data, rule_image
from tests.web import clicked, needs_browser
from tools import make_shards
from util.command_line import run_command
from util.errors import UserError

LIMITS = {'num_queries': 3, 'stride': 32, 'img_size': 64, 'max_size': 64}
NAME = '</script><b>"cat"'
# Image and box; the images are 48 x 64 (height x width).
BOXES = [
    (1, [2, 3, 20, 20]),
    (1, [30, 10, 25, 30]),
    (1, [1, 1, 9, 9]),
    (1, [5, 5, 40, 40]),
    (2, [50, 20, 30, 8]),  # leaves its image
    (3, [80, 20, 8, 8]),  # wholly outside
    (3, [12, 20, 0, 8]),  # of no size
    (4, [0, 0, 64, 48]),  # a crowd region
]


def content() -> dict:
    annotations = [
        {
            'id': number,
            'image_id': image,
            'category_id': 1 + number % 2,
            'bbox': box,
            'iscrowd': int(image == 4),
        }
        for number, (image, box) in enumerate(BOXES, start=1)
    ]
    annotations[0]['category_id'] = '2'
    images = [{'id': n, 'file_name': f'{n}.png', 'height': 48, 'width': 64} for n in range(1, 8)]
    return {
        'images': images,
        'annotations': annotations,
        'categories': [{'id': 1, 'name': NAME}, {'id': 2, 'name': 'dog'}, {'id': 5, 'name': 'bird'}],
    }


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Images 5 and 6 are the same, and 7 is of one colour."""
    for split in ('train', 'val'):
        (tmp_path / split).mkdir()
        for number in range(1, 8):
            image = rule_image(f'{split}{min(number, 5) if number < 7 else 7}', 48, 64)
            image = np.full_like(image, 90) if number == 7 else image
            PIL.Image.fromarray(image).save(tmp_path / f'{split}/{number}.png')
        (tmp_path / f'{split}.json').write_text(json.dumps(content()))
    return tmp_path


NO_FILES = {f'{part}_{kind}': None for part in ('train', 'val') for kind in ('images', 'ann')}


def datasets_of(root: Path, **flags: object) -> dict[str, ImageDataset]:
    places = {f'{part}_images': str(root / part) for part in ('train', 'val')}
    places |= {f'{part}_ann': str(root / f'{part}.json') for part in ('train', 'val')}
    args = Namespace(
        **{'aug': 'none', 'img_size': 64, 'max_size': 64, 'check_data': True, 'seed': 0} | places | flags
    )
    train = build_data('train', args)
    return {'train': train, 'val': build_data('val', args, train.class_map)}


def sharded(root: Path) -> dict[str, ImageDataset]:
    """Three images a shard, in random order."""
    for part in ('train', 'val'):
        words = (
            f'--images {root}/{part} --ann {root}/{part}.json --output {root}/shards/{part} --shard_size 3'
        )
        run_command(make_shards.make_shards, make_shards.get_args_parser(), [*words.split(), '--shuffle=5'])
    places = {f'{part}_ann': str(root / f'shards/{part}') for part in ('train', 'val')}
    return datasets_of(root, **places, train_images=None, val_images=None)


LINES = """train 7 images, 4 of them without objects; 7 objects, 1.0 an image, at most 4
train objects by class: dog 4, </script><b>"cat" 3, bird 0
train 1 boxes of no size, which training leaves out (in 3.png)
train 1 boxes that leave their image, which are cut off at its border (in 2.png)
train 1 boxes wholly outside their image, which training leaves out (in 3.png)
train 1 category_id of annotations not written as integers ('2')
train 1 crowd regions, which training leaves out (in 4.png)
warning: 1 training images have more objects than --num_queries 3 (at most 4): the rest cannot be found
warning: 1 classes have no training object: bird
warning: 71% of the training objects are narrower or lower than the finest stride of 32 pixels at --img_size 64
warning: 1 images that are twice in train (image 5 and 6)
warning: 1 images that are twice in train and val (image 7 and 7)
warning: 1 train images that are nearly of one value (7.png)
all images, boxes and masks can be read""".splitlines()


@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('kind', ['files', 'shards'])
def test_lines_are_the_same_for_files_and_shards(
    files: Path, kind: str, workers: int, capsys: pytest.CaptureFixture[str]
) -> None:
    datasets = datasets_of(files) if kind == 'files' else sharded(files)
    capsys.readouterr()
    assert check_data(datasets, workers, None, **LIMITS) == 7
    said = capsys.readouterr().out.splitlines()
    expected = LINES + [line.replace('train', 'val', 1) for line in LINES[:7]]
    expected += [line.replace('in train', 'in val') for line in LINES if 'twice in train (' in line]
    expected += [line.replace('train images', 'val images') for line in LINES if 'one value' in line]
    assert sorted(line.split(': a larger one')[0] for line in said) == sorted(expected)


def test_each_shard_is_read_once(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = sharded(files)
    opened: list[str] = []
    read = shards.read_samples
    monkeypatch.setattr(shards, 'read_samples', lambda url: opened.append(url) or read(url))
    check_data(datasets, 0, None, **LIMITS)
    assert len(opened) == len(set(opened)) == 6


@pytest.mark.parametrize('kind', ['files', 'shards'])
def test_what_cannot_be_read_is_counted(files: Path, kind: str) -> None:
    (files / 'train/2.png').write_bytes((files / 'train/2.png').read_bytes()[:-40])
    datasets = datasets_of(files) if kind == 'files' else sharded(files)
    with pytest.raises(
        UserError, match=r'1 train images or masks that cannot be read \(.*2\.png is not a read'
    ):
        check_data(datasets, 0, str(files / 'out'), **LIMITS)
    assert (files / 'out/data.html').is_file()
    with pytest.raises(UserError, match=r'leave out some.*\n  1 train images that cannot be read, in whose'):
        check_data(datasets, 0, None, most_unreadable=1, **LIMITS)


def test_the_rest_of_a_damaged_shard_is_counted(files: Path) -> None:
    """Two images in the second shard of three, whose last image cannot be reached, and no worker hangs."""
    datasets = sharded(files)
    file = Path(datasets['train'].urls[1])
    data = bytearray(file.read_bytes())
    data[len(data) // 2 :] = bytes(range(256)) * (len(data[len(data) // 2 :]) // 256)
    file.write_bytes(data)
    with pytest.raises(UserError, match=r'[12] train images or masks that cannot be read \(.*000001\.tar'):
        check_data(datasets, 2, None, **LIMITS)


def test_built_in_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Their numbers come from the images themselves."""
    flags = {'dataset_file': 'shapes', 'shapes_train': 6, 'shapes_val': 4, 'shapes_size': 64}
    datasets = datasets_of(tmp_path, **NO_FILES, **flags)
    assert check_data(datasets, 2, str(tmp_path), **LIMITS | {'num_queries': 1}) == 6
    said = capsys.readouterr().out
    for part, dataset in datasets.items():
        counts = [sum(a['image_id'] == n for a in dataset.ground_truth['annotations']) for n in dataset.ids]
        text = f'{len(counts)} images, {counts.count(0)} of them without objects; {sum(counts)} objects'
        assert f'{part} {text}, {sum(counts) / len(counts):.1f} an image, at most {max(counts)}' in said
    assert 'training images have more objects than --num_queries 1' in said
    assert 'both' not in said and 'twice' not in said and 'all images, boxes and masks can be read' in said
    assert (tmp_path / 'data.html').is_file()


# The page ----

SEEN = """<script>{
const texts = selector => [...document.querySelectorAll(selector)].map(one => one.textContent.replace(/\\s+/g, ' ').trim());
const kinds = [...document.querySelectorAll('.noted h3, .refused h3')].map(one => {
  const place = one.parentNode, rects = [...place.querySelectorAll('rect[stroke-dasharray="5 4"]')];
  return [one.textContent, place.className, place.querySelectorAll('.card').length,
    rects.map(rect => ['x', 'y', 'width', 'height'].map(name => +rect.getAttribute(name))),
    [...place.querySelectorAll('svg')].map(svg => svg.getAttribute('viewBox'))];
});
const titles = [...document.querySelectorAll('.sort th')];
const first = () => document.querySelector('.sort td').textContent;
const order = [first()]; titles[1].click(); order.push(first()); titles[1].click(); order.push(first());
document.querySelector('.card').click();
const big = document.querySelectorAll('.card.big').length;
document.title = JSON.stringify({
    kinds, order, big, pairs: document.querySelectorAll('.pair').length,
    numbers: texts('.names')[0], captions: texts('.pair figcaption').slice(0, 2), bold: document.querySelectorAll('b').length,
    warnings: texts('p.noted'), bars: texts('.bars').length, marks: texts('.pair:first-child .card:first-child title'),
});
}</script>"""


def test_the_page_needs_no_network_and_its_names_do_no_harm(
    files: Path, capsys: pytest.CaptureFixture
) -> None:
    (files / "train/1'><img src=x onerror=alert(1)>.png").write_bytes((files / 'train/1.png').read_bytes())
    data = content()
    data['images'][0]['file_name'] = "1'><img src=x onerror=alert(1)>.png"
    (files / 'train.json').write_text(json.dumps(data))
    check_data(datasets_of(files), 0, str(files / 'out'), **LIMITS)
    assert f'{files}/out/data.html: ' in capsys.readouterr().out
    text = (files / 'out/data.html').read_text()
    assert not re.search(r'https?:|\burl\(|@import|<link|(src|href)="(?!data:)', text)
    assert "default-src 'none'" in text and text.count('<script') == text.count('</script>') == 1
    assert '<img' not in text and '<b>' not in text


def test_repairs_of_names_labels_and_photographs_have_their_images(tmp_path: Path) -> None:
    (tmp_path / 'images').mkdir()
    exif = PIL.Image.Exif()
    exif[PIL.ExifTags.Base.Orientation] = 6
    for name in ('a', 'b'):
        picture = PIL.Image.fromarray(rule_image(name, 48, 64))
        picture.save(tmp_path / f'images/{name}.jpg', exif=exif)
    (tmp_path / 'images/a.txt').write_text('0 0.5 0.5 0.25 0.5\n0 0.5 0.5 0.25 0.5\n')
    (tmp_path / 'list.txt').write_text('C:\\set\\images\\a.jpg\nC:\\set\\images\\b.jpg\n')
    (tmp_path / 'data.yaml').write_text('train: list.txt\nval: list.txt\nnames: [cat]\n')
    datasets = datasets_of(tmp_path, dataset_file='yolo', coco_path=str(tmp_path), **NO_FILES)
    check_data(datasets, 0, str(tmp_path), **LIMITS)
    data = json.loads(
        re.search(r'^const data = (.*);$', (tmp_path / 'data.html').read_text(), re.MULTILINE)[1]
    )
    kinds = {kind['title']: kind['places'] for kind in data['kinds']}
    turned = next(places for title, places in kinds.items() if title.startswith('train images turned by'))
    assert turned == [['train 0', None], ['train 1', None]]
    repeated = kinds['train lines of label files that repeat another one, which are left out']
    assert repeated == [['train 0', [18, 16, 12, 32]]] and 'train 0' in data['pictures']


@needs_browser
def test_a_browser_shows_what_is_unusual_with_its_images(files: Path) -> None:
    bad = content()
    bad['annotations'][1] |= {'bbox': [1, 2], 'image_id': 6}
    (files / 'train.json').write_text(json.dumps(bad))
    shutil.copy(files / 'train/1.png', files / 'train/7.png')
    with pytest.raises(UserError, match='1 annotations that cannot be used'):
        check_data(datasets_of(files), 0, str(files / 'out'), **LIMITS)
    shown = clicked(files / 'out/data.html', SEEN)
    kinds = {title: tuple(rest) for title, *rest in shown['kinds']}
    assert kinds['1 train annotations that cannot be used'] == ('refused', 1, [], ['0 0 64 48'])
    outside = kinds['1 train boxes wholly outside their image, which training leaves out']
    assert outside == ('noted', 1, [[80, 20, 8, 8]], ['0 0 88 48'])
    assert kinds['1 train boxes of no size, which training leaves out'][2][0][:2] == [12, 20]
    assert kinds['1 train crowd regions, which training leaves out'][2] == [[0, 0, 64, 48]]
    assert kinds['2 images that are twice in train'][:2] == ('noted', 4)
    assert kinds['1 val images that are nearly of one value'][:2] == ('noted', 1)
    assert shown['order'] == [NAME, 'dog', 'bird'] and shown['big'] == 1 and shown['bold'] == 0
    assert shown['pairs'] == 14 and shown['bars'] == 3
    assert shown['captions'] == ['train: 1.png', 'as the run sees it: 64 x 48']
    assert len(shown['warnings']) == 2 and shown['marks'] == ['dog', 'dog', NAME]
