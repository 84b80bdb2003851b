"""Annotation files: the same as Python reads them, for any JSON, and errors that name the place."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from datasets.annotations import AnnotationTable, PackedList
from datasets.coco_json import LISTS, Issues, decode_entry, read_annotations, read_lists
from datasets.targets import Reading, is_trained_on
from util.errors import UserError

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=12)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
)
ENTRIES = st.lists(st.dictionaries(st.text(max_size=5), VALUES, max_size=4) | VALUES, max_size=9)
FILES = st.fixed_dictionaries(dict.fromkeys(LISTS, ENTRIES), optional={'info': VALUES})
FAST = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150)


def content(file: Path) -> dict[str, list]:
    lists = read_lists(file, Issues())
    return {name: [decode_entry(raw) for raw in lists[name]] for name in LISTS}


@pytest.mark.slow
@FAST
@given(data=FILES, indent=st.sampled_from([None, 1]), ascii=st.booleans())
def test_lists_hold_what_the_whole_file_holds(
    tmp_path: Path, data: dict, indent: int | None, ascii: bool
) -> None:
    file = tmp_path / 'data.json'
    try:
        file.write_text(json.dumps(data, indent=indent, ensure_ascii=ascii), encoding='utf-8')
    except UnicodeEncodeError:  # half a surrogate pair
        file.write_text(json.dumps(data, indent=indent))
    assert content(file) == {name: data[name] for name in LISTS}


@pytest.mark.slow
@FAST
@given(data=FILES, cut=st.floats(0, 1), junk=st.sampled_from(['', ']', '}', ',', '"', 'x', 'NaN']))
def test_a_damaged_file_is_refused_or_json(tmp_path: Path, data: dict, cut: float, junk: str) -> None:
    text = json.dumps(data)
    place = round(cut * len(text))
    text = text[:place] + junk + (text[place:] if junk else '')
    (tmp_path / 'data.json').write_text(text)
    try:
        expected = json.loads(text)
    except ValueError:
        expected = None
    if isinstance(expected, dict) and all(isinstance(expected.get(name), list) for name in LISTS):
        found = content(tmp_path / 'data.json')
        assert repr(found) == repr({name: expected[name] for name in LISTS})  # NaN is not equal to itself
    else:
        with pytest.raises(UserError, match=r'data\.json (is not JSON|has no list)'):
            content(tmp_path / 'data.json')


@pytest.mark.parametrize('encoding', ['utf-8', 'utf-8-sig', 'utf-16'])
def test_encodings_of_json(tmp_path: Path, encoding: str) -> None:
    text = '{"images": [{"name": "Käfer"}], "annotations": [], "categories": []}'
    (tmp_path / 'data.json').write_text(text, encoding=encoding)
    assert content(tmp_path / 'data.json')['images'] == [{'name': 'Käfer'}]


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        (b'', 'is not JSON .it is empty'),
        (b'{"images": [1, 2', r'is not JSON .*\(char 16\)'),
        (b'{"images": [{"b": 1}, {"b": }]}', r'is not JSON .*Expecting value.*\(char 28\)'),
        (b'{"images": [1]} x', 'is not JSON .*Extra data'),
        (b'[1, 2]', 'has no list "images"'),
        (b'{"images": 3}', 'has no list "images"'),
        (b'{"a": ' + b'[' * 100_000, 'is nested too deep'),
        (b'\xff\xff\xff\xff', "is not JSON .*can't decode byte"),
        (b'{"images": [], "annotations": [], "categories": ["\xff\xff"]}', "can't decode byte"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_is_not_json_is_named(tmp_path: Path, text: bytes, message: str) -> None:
    (tmp_path / 'data.json').write_bytes(text)
    with pytest.raises(UserError, match=rf'data\.json.*{message}'):
        AnnotationTable(tmp_path / 'data.json')


def write(folder: Path, **changes: list) -> Path:
    """Two images and three objects; ids in no order, and the lists in an unusual order."""
    data = {
        'annotations': [
            {
                'id': 1,
                'image_id': 9,
                'category_id': 3,
                'bbox': [1, 2, 3, 4],
                'segmentation': [[1, 2, 4, 2, 4, 6]],
            },
            {'id': 2, 'image_id': 4, 'category_id': 2, 'bbox': [0, 0, 5, 5], 'area': 7},
            {'id': 3, 'image_id': 9, 'category_id': 2, 'bbox': [2.5, 0, 0, 1], 'iscrowd': 1},
        ],
        'categories': [{'id': 2, 'name': 'two'}, {'id': 3}],
        'images': [
            {'id': 9, 'file_name': 'nine.png', 'height': 8, 'width': 6},
            {'id': 4, 'file_name': 'four.png'},
        ],
    }
    (folder / 'data.json').write_text(json.dumps(data | changes))
    return folder / 'data.json'


def test_columns_are_sorted_by_image_and_keep_everything(tmp_path: Path) -> None:
    table = AnnotationTable(write(tmp_path), with_masks=True)
    objects = table.objects
    assert table.image_ids.tolist() == [4, 9]
    assert list(table.file_names) == ['four.png', 'nine.png']
    assert table.sizes.tolist() == [[0, 0], [8, 6]]
    assert table.starts.tolist() == [0, 1, 3]
    assert objects.category_ids.tolist() == [2, 3, 2]
    assert objects.boxes_xywh.tolist() == [[0, 0, 5, 5], [1, 2, 3, 4], [2.5, 0, 0, 1]]
    assert objects.areas.tolist() == [7, 12, 0]
    assert objects.crowd.tolist() == [False, False, True]
    assert objects.segmented.tolist() == [False, True, False]
    assert is_trained_on(Reading(), objects).tolist() == [True, True, False]
    objects.crowd[:] = False
    assert is_trained_on(Reading(), objects).tolist() == [True, True, True]
    assert is_trained_on(Reading(drop_tiny=True), objects).tolist() == [True, True, False]
    assert list(PackedList(table.segmentations, objects.starts, objects.stops)) == [
        None,
        [[1, 2, 4, 2, 4, 6]],
        None,
    ]
    assert not table.issues.counts


def test_ids_that_other_tools_write_are_repaired(tmp_path: Path) -> None:
    """Text of digits and whole floats are integers; other image ids are numbered. So in evaluation."""
    annotations = [
        {'id': 1, 'image_id': 'b', 'category_id': '3', 'bbox': [1, 2, 3, 4]},
        {'id': 2, 'image_id': 7.0, 'category_id': 2.0, 'bbox': [1, 2, 3, 4]},
    ]
    images = [{'id': '7', 'file_name': 'x'}, {'id': 'b', 'file_name': 'y'}]
    categories = [{'id': '2', 'name': 'two'}, {'id': 3}]
    file = write(tmp_path, annotations=annotations, images=images, categories=categories)
    table = AnnotationTable(file)
    assert table.image_ids.tolist() == [1, 2]
    assert table.objects.image_ids.tolist() == [1, 2]
    assert table.objects.category_ids.tolist() == [2, 3]
    assert table.issues.counts['image ids that are text or negative, numbered from 1'] == 2
    data = read_annotations(file)
    assert [image['id'] for image in data['images']] == [1, 2]
    assert [(a['image_id'], a['category_id']) for a in data['annotations']] == [(2, 3), (1, 2)]


def test_crowd_regions_written_as_text_are_repaired(tmp_path: Path) -> None:
    annotations = [
        {'id': number, 'image_id': 1, 'category_id': 2, 'bbox': [1, 2, 3, 4], 'iscrowd': value}
        for number, value in enumerate(['0', '1', None, 0, 1, True, 1.0])
    ]
    images, categories = [{'id': 1, 'file_name': 'x'}], [{'id': 2}]
    file = write(tmp_path, annotations=annotations, images=images, categories=categories)
    assert AnnotationTable(file).objects.crowd.tolist() == [False, True, False, False, True, True, True]
    assert [a['iscrowd'] for a in read_annotations(file)['annotations']] == [0, 1, None, 0, 1, 1, 1]
    assert AnnotationTable(file).issues.counts == {'iscrowd of annotations not written as integers': 4}
    for bad in ('yes', 2, [0]):
        annotations[3]['iscrowd'] = bad
        file = write(tmp_path, annotations=annotations, images=images, categories=categories)
        with pytest.raises(ValueError, match=r'annotation 3 \(image 1\) has iscrowd .*: it must be 0 or 1'):
            AnnotationTable(file)


def test_negative_ids(tmp_path: Path) -> None:
    """Of images they are numbered, since hotcoco knows none; of categories refused."""
    annotations = [{'id': 1, 'image_id': -5, 'category_id': 2, 'bbox': [1, 2, 3, 4]}]
    images = [{'id': 7, 'file_name': 'x'}, {'id': -5, 'file_name': 'y'}]
    file = write(tmp_path, annotations=annotations, images=images, categories=[{'id': 2}])
    assert AnnotationTable(file).objects.image_ids.tolist() == [2]
    assert read_annotations(file)['annotations'][0]['image_id'] == 2
    file = write(tmp_path, annotations=[], images=images, categories=[{'id': -2}])
    with pytest.raises(ValueError, match='needs an integer id, not negative'):
        AnnotationTable(file)


@pytest.mark.parametrize(
    'segmentation',
    [
        [[10, 20, 40, 20, 40, 60], [12, 5, 13, 5, 13, 6]],
        {
            'size': [100, 80],
            'counts': [10 * 100 + 5, 55, 2900 - 5 - 50, 55, 8000 - 1000 - 55 - 2900 - 55 + 50],
        },
    ],
    ids=['polygons', 'run lengths'],
)
def test_boxes_follow_from_segmentations(tmp_path: Path, segmentation: list | dict) -> None:
    annotation = {'id': 1, 'image_id': 9, 'category_id': 3, 'segmentation': segmentation}
    file = write(tmp_path, annotations=[annotation])
    table = AnnotationTable(file)
    assert table.objects.boxes_xywh.tolist() == [[10, 5, 30, 55]]
    assert 'annotations without bbox' in table.issues.lines()[0]
    assert read_annotations(file)['annotations'][0]['bbox'] == [10, 5, 30, 55]


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'annotations': [3]}, r'"annotations" has .3., which is not an object'),
        ({'images': ['a.jpg']}, r'"images" has .a\.jpg., which is not an object'),
        ({'images': [{'id': None, 'file_name': 'a'}]}, 'needs an id'),
        ({'images': [{'id': 2**70, 'file_name': 'a'}]}, 'needs an id'),
        ({'images': [{'id': 1, 'file_name': 'a', 'height': -2}]}, 'image 1 has height -2'),
        ({'images': [{'id': 1, 'file_name': 'a', 'width': '9'}]}, "image 1 has width '9'"),
        ({'images': []}, '"images" is empty'),
        ({'categories': [{'id': 2**70}]}, 'integer id'),
    ],
    ids=lambda value: str(value)[:30],
)
def test_bad_entries_are_named(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=rf'data\.json: .*{message}'):
        AnnotationTable(write(tmp_path, **changes))


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'bbox': [1e30, 0, 1, 1]}, 'no image reaches 1e[+]30 pixels'),
        ({'bbox': [True, None, 1, 1]}, 'four finite numbers'),
        ({'bbox': [2**80, 0, 1, 1]}, 'no image reaches'),
        ({'bbox': None, 'segmentation': [[1], []]}, 'its segmentation gives none'),
        ({'bbox': None, 'segmentation': {'size': [1, 2]}}, 'its segmentation gives none'),
        ({'bbox': None, 'segmentation': 'polygon'}, 'its segmentation gives none'),
        ({'image_id': 2**70}, 'belongs to an image'),
        ({'image_id': None}, 'belongs to an image'),
        ({'image_id': 'x'}, 'belongs to an image'),
        ({'image_id': 5}, 'belongs to an image'),
        ({'category_id': 'two'}, "has category 'two', but the categories are 2, 3"),
        ({'category_id': 2.5}, 'has category 2.5, but the categories are 2, 3'),
        ({'area': 'large'}, 'has area large'),
    ],
    ids=lambda value: str(value)[:30],
)
def test_the_first_bad_annotation_of_many_is_named(tmp_path: Path, change: dict, message: str) -> None:
    good = {'image_id': 9, 'category_id': 3, 'bbox': [1, 2, 3, 4]}
    annotations = [good | {'id': number} | (change if number in (30, 40) else {}) for number in range(50)]
    with pytest.raises(ValueError, match=rf'data\.json: annotation 30 \(image .*{message}'):
        AnnotationTable(write(tmp_path, annotations=annotations))


@FAST
@given(values=st.lists(VALUES, max_size=6))
def test_packed_lists_give_back_what_they_got(values: list) -> None:
    packed = PackedList.of(values)
    assert list(packed) == values
    assert list(packed.chosen(np.arange(len(packed))[::-2])) == values[::-2]
