"""The page of errors: results for hand-made detections, COCO's AP, TIDE's counts, clicks in a browser."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from datasets.class_map import ClassMap
from datasets.results import coco_results
from tests.shared_data import SHARED, needs_shared
from tests.web import clicked, needs_browser
from tools import analyze_errors as tool
from util.command_line import run_command
from util.errors import FileError

CAT, DOG, CROWD = 3, 7, {'iscrowd': 1}
CATEGORIES = [{'id': DOG, 'name': 'dog'}, {'id': CAT, 'name': 'cat'}]
# One image with two cats, a dog and a crowd of cats, and one with a large dog. Areas are the file's own.
OBJECTS = [
    (1, CAT, [0, 0, 20, 20], {'area': 400}),
    (1, DOG, [50, 50, 40, 40], {'area': 1600}),
    (1, CAT, [0, 60, 30, 30], {'area': 900}),
    (1, CAT, [60, 0, 40, 40], {'area': 1600, **CROWD}),
    (2, DOG, [0, 0, 99, 99], {'area': 9300}),
]
# Detections of the first image by falling score, with what they are.
FOUND = [
    (CAT, [0, 0, 20, 20], 0.9, 'found'),
    (CAT, [0, 0, 20, 18], 0.8, 'duplicate'),
    (CAT, [50, 50, 40, 40], 0.7, 'wrong class'),
    (DOG, [50, 50, 40, 10], 0.6, 'wrong place'),
    (DOG, [0, 0, 20, 6], 0.5, 'wrong class and place'),
    (DOG, [60, 0, 10, 10], 0.4, 'background'),  # a crowd of cats is no place for dogs
    (CAT, [70, 10, 10, 10], 0.3, 'ignored'),
    (DOG, [50, 50, 40, 38], 0.2, 'found'),
]
RESULTS = [{'image_id': 1, 'category_id': c, 'bbox': box, 'score': score} for c, box, score, _ in FOUND]


def write(folder: Path, objects: list = OBJECTS, results: object = RESULTS, **images: str | int) -> list[str]:
    """Annotations of images (file name: id), their files, and results; the flags that name them."""
    names = {f'{name}.jpg': value for name, value in (images or {'one': 1, 'two': 2}).items()}
    annotations = [
        {'id': number, 'image_id': image, 'category_id': category, 'bbox': box, **more}
        for number, (image, category, box, more) in enumerate(objects, start=1)
    ]
    entries = [{'id': value, 'file_name': name, 'width': 100, 'height': 100} for name, value in names.items()]
    content = {'images': entries, 'annotations': annotations, 'categories': CATEGORIES}
    (folder / 'val.json').write_text(json.dumps(content))
    (folder / 'results.json').write_text(json.dumps(results))
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        Image.new('RGB', (100, 100), 'olive').save(folder / name)
    flags = {'predictions': 'results.json', 'ann': 'val.json', 'images': '', 'output': 'out/report.html'}
    return [f'--{flag}={folder / name}' for flag, name in flags.items()]


def read(folder: Path, *data: list, **images: str | int) -> tuple[tool.Boxes, tool.Truth]:
    write(folder, *data, **images)
    truth = tool.read_truth(folder / 'val.json')
    return tool.read_results(folder / 'results.json', truth), truth


def run(flags: list[str]) -> str:
    return tool.main(tool.get_args_parser().parse_args(flags))


def result(category: int, box: list, score: float = 0.5, **more: object) -> dict:
    return {'image_id': 1, 'category_id': category, 'bbox': box, 'score': score, **more}


def kinds(found: tool.Boxes, truth: tool.Truth, iou: float = 0.5) -> list[str]:
    judged, _ = tool.classify(found, truth.objects, iou, truth.class_map.names)
    return [(*tool.KINDS, 'ignored')[kind] for kind in judged.kinds.tolist()]


def test_every_kind_of_error_is_known(tmp_path: Path) -> None:
    shuffled = [RESULTS[at] for at in (5, 2, 7, 0, 3, 6, 1, 4)]
    assert kinds(*read(tmp_path, OBJECTS, shuffled)) == [kind for *_, kind in FOUND]


def test_kinds_have_tides_order_and_bounds(tmp_path: Path) -> None:
    objects = [(1, CAT, [0, 0, 10, 10], {}), (1, DOG, [0, 0, 10, 20], {})]
    results = [result(CAT, [0, 0, 10, 10], 0.9)]
    results += [result(CAT, [0, 0, 10, 11], 0.8)]  # IoU 0.91 with the cat, 0.55 with the dog
    results += [result(CAT, [0, 5, 10, 15], 0.7)]  # IoU 0.25 with the cat, 0.75 with the dog
    results += [result(CAT, [50, 0, 10, 10], 0.6)]  # nowhere
    assert kinds(*read(tmp_path, objects, results)) == ['found', 'wrong class', 'wrong place', 'background']
    objects = [(1, CAT, [0, 0, 10, 10], {})]
    for height, kind in ((0.9, 'background'), (1, 'wrong place'), (4.9, 'wrong place'), (5, 'found')):
        assert kinds(*read(tmp_path, objects, [result(CAT, [0, 0, 10, height])])) == [kind], height
    assert kinds(*read(tmp_path, objects, [result(CAT, [0, 0, 10, 7])]), iou=0.75) == ['wrong place']
    assert kinds(*read(tmp_path, objects, [result(CAT, [0, 0, 10, 10])]), iou=1.0) == ['found']
    assert kinds(*read(tmp_path, objects, [result(CAT, [0, 0, 0, 0])])) == ['background'], 'a box of no size'


def test_detections_choose_by_score_not_by_overlap(tmp_path: Path) -> None:
    """The second has the larger IoU with the object, and a crowd region takes any number."""
    objects = [(1, CAT, [0, 0, 10, 10], {}), (1, CAT, [40, 40, 20, 20], CROWD)]
    results = [result(CAT, [0, 0, 10, 7], 0.9), result(CAT, [0, 0, 10, 10], 0.8)]
    results += [result(CAT, [40, 40, 9, 9], score) for score in (0.7, 0.6)]
    assert kinds(*read(tmp_path, objects, results)) == ['found', 'duplicate', 'ignored', 'ignored']


def test_the_confusion_matrix_gives_an_object_to_the_best_detection_of_any_class(tmp_path: Path) -> None:
    results = [result(DOG, [0, 0, 10, 9], 0.9), result(CAT, [0, 0, 10, 10], 0.8)]
    report = tool.analyze(*read(tmp_path, [(1, CAT, [0, 0, 10, 10], {})], results), 0.5, 0.0)
    assert report['confusion'] == [[0, 1, 0], [0, 0, 0], [1, 0, 0]] and np.sum(report['missed']) == 0


def test_equal_scores_stand_or_fall_together() -> None:
    scores, right = np.array([0.5, 0.9, 0.5, 0.3]), np.array([True, True, False, False])
    curve = tool.compute_curve(scores, right, 3)
    np.testing.assert_allclose(
        curve, [[0.9, 1, 1 / 3, 0.5], [0.5, 2 / 3, 2 / 3, 2 / 3], [0.3, 0.5, 2 / 3, 4 / 7]]
    )
    assert tool.curve_to_json(curve)['best'] == pytest.approx([0.5, 2 / 3, 2 / 3, 2 / 3])
    assert tool.curve_to_json(curve)['points'] == curve.round(4).tolist()
    equal = tool.compute_curve(np.array([0.9, 0.8, 0.7, 0.6]), np.array([True, False, False, True]), 2)
    assert (
        equal[[0, 3], 3].tolist() == pytest.approx([2 / 3, 2 / 3])
        and tool.curve_to_json(equal)['best'][0] == 0.9
    )
    for nothing in (
        tool.compute_curve(scores, ~right & right, 3),
        tool.compute_curve(scores[:0], right[:0], 0),
    ):
        assert tool.curve_to_json(nothing) == {'points': [], 'best': None}
    long = np.random.default_rng(0).random(5000)
    points = tool.curve_to_json(tool.compute_curve(long, long > 0.4, 4000))['points']
    assert 150 < len(points) <= 2 * tool.PLOT_POINTS + 1


def test_report_from_the_lowest_score_on(tmp_path: Path) -> None:
    report = tool.analyze(*read(tmp_path), 0.5, 0.0)
    assert report['names'] == ['cat', 'dog', 'all classes'], 'in order of id'
    assert report['false'] == [[1, 0, 0, 1, 0], [0, 1, 1, 0, 1]]
    assert report['objects'] == [[2, 0, 0], [0, 1, 1]] and report['missed'] == [[1, 0, 0], [0, 0, 1]]
    assert report['confusion'] == [[1, 0, 1], [1, 0, 1], [1, 4, 0]], 'an object counts once'
    assert (report['images'], report['silent']) == (2, 1)
    best = [curve['best'] for curve in report['curves']]
    expected = [[0.9, 1, 1 / 2, 2 / 3], [0.2, 1 / 4, 1 / 2, 1 / 3], [0.9, 1, 1 / 4, 2 / 5]]
    np.testing.assert_allclose(best, expected)
    first, second = report['worst']
    assert (first['name'], first['errors']) == ('one.jpg', [1, 1, 1, 1, 1, 1])
    assert (second['name'], second['errors']) == ('two.jpg', [0, 0, 0, 0, 0, 1])
    assert second['marks'] == [[[0, 0, 99, 99], 5, 'dog']]
    names = [(report['kinds'][kind], text) for _, kind, text in first['marks']]
    assert names[:3] == [('missed', 'cat'), ('found', 'dog'), ('found', 'cat')]
    assert names[3:] == [
        ('background', 'dog 0.40'),
        ('wrong class and place', 'dog 0.50'),
        ('wrong place', 'dog 0.60'),
        ('wrong class', 'cat 0.70'),
        ('duplicate', 'cat 0.80'),
    ]


def test_report_from_higher_scores_on(tmp_path: Path) -> None:
    """The dog's own detection has too low a score, so that it goes to the one as a cat."""
    data = read(tmp_path)
    report = tool.analyze(*data, 0.5, 0.5)
    assert report['false'] == [[1, 0, 0, 1, 0], [0, 1, 1, 0, 0]], '0.5 itself counts'
    assert report['missed'] == [[1, 0, 0], [0, 1, 1]]
    assert report['confusion'] == [[1, 0, 1], [1, 0, 1], [1, 2, 0]]
    alone = tool.analyze(*data, 0.5)
    assert alone['threshold'] == 0.9, 'of the best F1'
    assert not np.any(alone['false']) and alone['missed'] == [[1, 0, 0], [0, 1, 1]]
    assert alone['curves'] == report['curves'] and alone['stats'] == report['stats'], 'of all scores'
    strict = tool.analyze(*data, 0.96, 0.0)
    assert np.sum(strict['missed']) == 3 and np.sum(strict['false']) == 6


def test_nothing_found_and_nothing_to_find(tmp_path: Path) -> None:
    report = tool.analyze(*read(tmp_path, OBJECTS, []), 0.5)
    assert (
        report['threshold'] == tool.DEFAULT_SCORE and report['silent'] == 2 and np.sum(report['missed']) == 4
    )
    assert [curve['best'] for curve in report['curves']] == [None] * 3 and report['stats']['AP'] == 0
    report = tool.analyze(*read(tmp_path, [], RESULTS), 0.5)
    assert np.sum(report['false'], axis=0).tolist() == [0, 0, 0, 0, 7] and report['stats']['AP'] == -1
    report = tool.analyze(*read(tmp_path, [], []), 0.5)
    assert report['worst'] == [] and not np.any(report['confusion'])
    assert len(tool.page(report, tmp_path, 'x')) > 1000


@pytest.mark.parametrize(('area', 'size'), [(1023, 0), (1024, 1), (9215, 1), (9216, 2)])
def test_sizes_are_cocos(tmp_path: Path, area: int, size: int) -> None:
    for annotation in ([0, 0, 1, 1], {'area': area}), ([0, 0, area, 1], {}):
        report = tool.analyze(*read(tmp_path, [(1, CAT, *annotation)], []), 0.5)
        assert report['missed'][0] == [int(size == at) for at in range(3)]


def random_data(folder: Path) -> tuple[tool.Boxes, tool.Truth]:
    """Objects and crowds, with detections near them, of both classes, some of equal score."""
    random = np.random.default_rng(0)
    objects, results = [], []
    for _ in range(200):
        image, category = int(random.integers(1, 3)), int(random.choice([CAT, DOG]))
        box = random.uniform(5, 60, 4)
        objects.append((image, category, box.tolist(), CROWD if random.random() < 0.1 else {}))
        for _ in range(3):
            near = np.abs(box + random.normal(0, 4, 4)).tolist()
            results.append(result(category, near, round(random.random(), 2), image_id=image))
    return read(folder, objects, results)


def check_ap(found: tool.Boxes, truth: tool.Truth) -> None:
    """AP of every class from these matches is COCO's, at two IoUs.

    Equal scores are several points of COCO's curves only, so all are made different here.
    """
    rank = np.argsort(np.argsort(-found.scores, kind='stable'), kind='stable')
    found = replace(found, scores=1 - rank / len(rank))
    names = truth.class_map.names
    summary = tool.compute_summary(found, truth.objects, names)
    for iou, key in ((0.5, 'AP50'), (0.75, 'AP75')):
        kinds = tool.classify(found, truth.objects, iou, names)[0].kinds
        for label, stats in enumerate(summary.per_class):
            mine = (found.labels == label) & (kinds != tool.IGNORED)
            if stats['objects']:
                curve = tool.compute_curve(found.scores[mine], kinds[mine] == tool.FOUND, stats['objects'])
                best = np.append(np.maximum.accumulate(curve[::-1, 1])[::-1], 0)
                places = np.searchsorted(curve[:, 2], np.linspace(0, 1, 101))
                assert best[places].mean() == pytest.approx(stats[key], abs=1e-9), (label, key)


def test_matches_give_cocos_ap(tmp_path: Path) -> None:
    found, truth = random_data(tmp_path)
    judged, _ = tool.classify(found, truth.objects, 0.5, truth.class_map.names)
    assert judged.counted.sum() <= 4 * 100 < len(found.scores), 'more than COCO counts'
    check_ap(found, truth)


@needs_shared
def test_a_hundred_coco_images_give_cocos_ap_and_tides_counts() -> None:
    """Counts are those of tidecv 1.0.1, the official code of TIDE."""
    folder = SHARED / 'data/coco_eval_reference'
    truth = tool.read_truth(folder / 'instances_val2014_100.json')
    found = tool.read_results(folder / 'fakebbox100_results.json', truth)
    check_ap(found, truth)
    for threshold, counts in ((0.0, [83, 1, 0, 1, 0]), (0.5, [38, 1, 0, 0, 0])):
        report = tool.analyze(found, truth, 0.5, threshold)
        assert np.sum(report['false'], axis=0).tolist() == counts
        confusion, shown = np.array(report['confusion']), found.scores >= threshold
        assert confusion[:-1].sum(1).tolist() == np.sum(report['objects'], axis=1).tolist()
        judged, _ = tool.classify(found, truth.objects, 0.5, truth.class_map.names)
        ignored = np.sum(judged.kinds[shown] == tool.IGNORED)
        assert confusion[:, :-1].sum() == shown.sum() - ignored


def test_images_are_known_by_name_and_by_id(tmp_path: Path) -> None:
    images = {'12': 7, 'sub/13': 12, 'a/same': 20, 'b/same': 21}
    _, truth = read(tmp_path, [], [], **images)
    assert truth.files == ['12.jpg', 'sub/13.jpg', 'a/same.jpg', 'b/same.jpg']
    for row, entry in (
        (0, {'image_id': 7}),
        (0, {'image_id': '7'}),
        (1, {'image_id': 12}),
        (0, {'image_id': 12, 'file_name': '12.jpg'}),  # tools/predict.py takes the number in the name
        (0, {'image_id': 12, 'file_name': 'elsewhere/12.jpg'}),
        (1, {'image_id': 13, 'file_name': '13.jpg'}),
        (3, {'file_name': 'b/same.jpg'}),
        (1, {'image_id': 'sub/13.jpg'}),
        (2, {'image_id': 20, 'file_name': 'same.jpg'}),  # two have that name
        (None, {'file_name': 'same.jpg'}),
        (None, {'image_id': 99}),
        (None, {'image_id': [7]}),
        (None, {}),
    ):
        assert truth.image_of(entry) == row, entry
    _, truth = read(tmp_path, [('x1', CAT, [0, 0, 9, 9], {})], [], one='x2', two='x1')
    assert truth.image_of({'image_id': 'x1'}) == 1 and truth.objects.images.tolist() == [1]
    _, truth = read(tmp_path, [(-5, CAT, [0, 0, 9, 9], {})], [], one=7, two=-5)
    assert truth.image_of({'image_id': -5}) == 1 and truth.objects.images.tolist() == [1]


def test_results_of_predict_are_understood(tmp_path: Path) -> None:
    class_map = ClassMap((CAT, DOG), ('cat', 'dog'))
    detected = {
        'scores': torch.tensor([0.75]),
        'labels': torch.tensor([1]),
        'boxes': torch.tensor([[50.0, 50, 90, 90]]),
    }
    objects = [(5, DOG, [50, 50, 40, 40], {})]
    found, truth = read(
        tmp_path, objects, coco_results('008.jpg', 8, detected, class_map), **{'007': 8, '008': 5}
    )
    report = tool.analyze(found, truth, 0.5)
    assert report['confusion'] == [[0, 0, 0], [0, 1, 0], [0, 0, 0]] and report['stats'][
        'AP50'
    ] == pytest.approx(1)


@pytest.mark.parametrize(
    ('results', 'message'),
    [
        ({'annotations': []}, r'results\.json is not a list of results, which COCO has as \[\{"image_id": 1'),
        ([RESULTS], 'is not a list of results'),
        (
            [*RESULTS, result(CAT, [0, 0, 9, 9], image_id=5)],
            r"result 8 has image \{'image_id': 5, .* not among the 2 of",
        ),
        ([result(4, [0, 0, 9, 9])], 'result 0 has category 4, but those of the annotations are 3, 7'),
        ([result(CAT, [0, 0, -9, 9])], r'result 0 has bbox \[0, 0, -9, 9\]: it must be four finite numbers'),
        ([{'image_id': 1, 'category_id': CAT, 'score': 1}], 'result 0 has bbox None'),
        ([result(CAT, [0, 0, 9, 9], float('nan'))], 'result 0 has score nan: it must be a finite number'),
    ],
)
def test_results_that_cannot_be_used_are_named(tmp_path: Path, results: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(tmp_path, OBJECTS, results)


def test_flags_and_files_that_cannot_be_used_are_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    flags = write(tmp_path)
    for bad, message in (
        ('iou=0.05', 'at least 0.1, not 0.05'),
        ('score_thr=nan', 'a finite number, not nan'),
    ):
        with pytest.raises(SystemExit, match=f'--{bad.split("=")[0]} must be {message}'):
            run_command(tool.main, tool.get_args_parser(), [*flags, f'--{bad}'])
    with pytest.raises(SystemExit):
        run([*flags, '--score_thr=best'])
    assert "--score_thr: 'best' is not a number" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r'val\.json: let it end in \.html'):
        run([*flags, f'--output={tmp_path}/val.json'])
    (tmp_path / 'one.jpg').unlink()
    with pytest.raises(FileError, match=r'1 of 2 images of .*val\.json are not in'):
        run([*flags, '--score_thr=0'])
    assert not (tmp_path / 'out').exists()
    for text in ('[{', '[' * 100_000):
        (tmp_path / 'results.json').write_text(text)
        with pytest.raises(ValueError, match=r'results\.json is not JSON'):
            run(flags)


def test_the_page_has_the_numbers_and_needs_no_network(tmp_path: Path) -> None:
    flags = write(tmp_path)
    said = run([*flags, '--score_thr=0.5'])
    assert said.endswith('report.html: 4 false positives and 3 missed, from score 0.5 on')
    text = (tmp_path / 'out/report.html').read_text()
    assert '"false": [[1, 0, 0, 1, 0], [0, 1, 1, 0, 0]]' in text
    assert '"missed": [[1, 0, 0], [0, 1, 1]]' in text
    assert '"confusion": [[1, 0, 1], [1, 0, 1], [1, 2, 0]]' in text
    assert text.count('"jpeg": "/9j/') == 2, 'JPEG files'
    assert not re.search(r'https?:|\burl\(|@import|<link|(src|href)=(?!"data:)', text)
    assert "default-src 'none'" in text and text.count('<script') == text.count('</script>') == 1


def test_names_cannot_end_the_script_and_only_the_worst_images_are_shown(tmp_path: Path) -> None:
    images = {f'{number:02}': number for number in range(1, 31)}
    objects = [(number, CAT, [0, 0, 9, 9], {}) for number in images.values() for _ in range(number)]
    write(tmp_path, objects, [], **images)
    content = json.loads((tmp_path / 'val.json').read_text())
    content['categories'][1]['name'] = '</script><b>DATA'
    (tmp_path / 'val.json').write_text(json.dumps(content))
    truth = tool.read_truth(tmp_path / 'val.json')
    report = tool.analyze(tool.read_results(tmp_path / 'results.json', truth), truth, 0.5)
    assert [image['name'] for image in report['worst']] == [f'{number:02}.jpg' for number in range(30, 6, -1)]
    text = tool.page(report, tmp_path, '<i>')
    assert text.count('</script>') == 1 and '<i>' not in text and '\\u003c/script>\\u003cb>DATA' in text


# Clicks, and writes what the page shows then into its title.
CLICKS = """<script>
const texts = selector => [...document.querySelectorAll(selector)].map(one => one.textContent);
const seen = selector => [...document.querySelectorAll(selector)].filter(one => one.getClientRects().length);
const rows = () => texts('.sort')[0] && [...document.querySelector('.sort').tBodies[0].rows].map(row => row.cells[0].textContent);
const title = [...document.querySelectorAll('.sort th')].find(one => one.textContent === 'at score');
const shown = {head: texts('p')[0].replace(/\\s+/g, ' ').trim(), matrix: texts('.matrix td'), all: seen('.card').length};
shown.curves = document.querySelectorAll('.plot polyline').length;
shown.rows = [rows()]; title.click(); shown.rows.push(rows()); title.click(); shown.rows.push(rows());
document.querySelector('.bars [data-kind="1"]').click();
shown.place = [seen('.card').length, seen('[data-mark]').map(one => one.querySelector('title').textContent)];
document.querySelector('#chips [data-kind="1"]').click();
shown.again = seen('.card').length;
document.querySelector('select').value = 1; document.querySelector('select').onchange();
shown.note = texts('#note')[0];
document.title = JSON.stringify(shown);
</script>"""


@needs_browser
def test_a_browser_shows_the_page_and_its_clicks_work(tmp_path: Path) -> None:
    run([*write(tmp_path), '--score_thr=0'])
    shown = clicked(tmp_path / 'out/report.html', CLICKS)
    assert shown['head'] == (
        '2 images, 4 objects. At IoU 0.5 and from score 0 on: 2 found, 5 false positives, 2 missed. '
        'The file has no detection in 1 of the images.'
    )
    assert shown['matrix'] == ['cat', '1', '', '1', 'dog', '1', '', '1', 'background', '1', '4', '']
    assert shown['rows'] == [['cat', 'dog', 'all classes']] * 2 + [['dog', 'cat', 'all classes']]
    assert shown['curves'] == 6 and shown['all'] == shown['again'] == 2
    cards, marks = shown['place']
    assert cards == 1 and sorted(marks) == [
        'cat: found',
        'cat: missed',
        'dog 0.60: wrong place',
        'dog: found',
    ]
    assert shown['note'] == 'best F1 33.3 from score 0.20000 on, with precision 25.0 and recall 50.0'
