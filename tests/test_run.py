"""Whole runs of main.py on the built-in images: repeatable, resumable, able to learn, clear about what is
wrong.
"""

import csv
import json
from argparse import Namespace
from pathlib import Path

import pytest
import torch

import engine
import main
from datasets.class_map import ClassMap
from datasets.shapes import ShapesDetection, export_shapes
from tests.processes import end_group, start_group
from tests.runs import TINY, assert_same, load, run
from tools import predict
from util.config.recorded import data_of
from util.errors import UserError


@pytest.mark.draws
def test_interrupted_and_resumed_equals_uninterrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights, optimizer, schedule, random numbers and rows, although the run stops in the middle of an
    epoch.
    """
    flags = '--epochs', '2', '--lr_drop', '1'
    run(tmp_path / 'whole', *flags)
    steps = [0]
    original = engine.weighted_sum

    def stop_in_second_epoch(*args: object) -> torch.Tensor:
        steps[0] += 1
        if steps[0] == 5:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(engine, 'weighted_sum', stop_in_second_epoch)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / 'stopped', *flags)
    monkeypatch.setattr(engine, 'weighted_sum', original)
    run(tmp_path / 'stopped', *flags, '--resume', 'auto')
    assert_same(load(tmp_path / 'whole'), load(tmp_path / 'stopped'))
    texts = [(tmp_path / name / 'metrics.csv').read_text() for name in ('whole', 'stopped')]
    assert texts[0] == texts[1]
    assert len(texts[0].splitlines()) == 3


@pytest.mark.slow
def test_a_run_stopped_before_its_evaluation_makes_up_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = '--shapes_train', '4', '--epochs', '2'
    run(tmp_path / 'whole', *flags)
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(main, 'finish_epoch', lambda *args: 1 / 0)
        run(tmp_path / 'stopped', *flags)
    run(tmp_path / 'stopped', *flags, '--resume', 'auto')
    assert_same(load(tmp_path / 'whole'), load(tmp_path / 'stopped'))
    assert (tmp_path / 'whole/metrics.csv').read_text() == (tmp_path / 'stopped/metrics.csv').read_text()


@pytest.mark.slow
def test_same_seed_same_run_whatever_the_workers(tmp_path: Path) -> None:
    run(tmp_path / 'a', '--epochs', '1')
    run(tmp_path / 'b', '--epochs', '1', '--num_workers', '2')
    run(tmp_path / 'c', '--epochs', '1', '--seed', '1')
    assert_same(load(tmp_path / 'a'), load(tmp_path / 'b'))
    name = 'query_embed.weight'
    assert not torch.equal(load(tmp_path / 'a')['model'][name], load(tmp_path / 'c')['model'][name])


@pytest.mark.draws
def test_a_run_leaves_what_it_promises(tmp_path: Path) -> None:
    pytest.importorskip('tensorboard')
    run(tmp_path, '--epochs', '2', '--eval_every', '2', '--save_every', '1', '--tensorboard')
    names = {path.name for path in tmp_path.iterdir()}
    assert {
        'checkpoint.pth',
        'checkpoint0000.pth',
        'checkpoint0001.pth',
        'metrics.csv',
        'log.jsonl',
        'curves.png',
        'predictions.png',
    } <= names
    assert any(name.startswith('events.out') for name in names)
    assert not [name for name in names if name.startswith('.')]
    with (tmp_path / 'metrics.csv').open() as file:
        rows = list(csv.DictReader(file))
    assert [row['epoch'] for row in rows] == ['1', '2']
    assert rows[0]['test_AP'] == '' and 0 <= float(rows[1]['test_AP']) <= 1
    records = [json.loads(line) for line in (tmp_path / 'log.jsonl').read_text().splitlines()]
    assert len(records[1]['test_coco_eval_bbox']) == 12
    assert records[1]['per_class'][0]['name'] == 'disc'
    checkpoint = load(tmp_path)
    assert ClassMap.from_dict(checkpoint['class_map']).names[0] == 'disc'
    assert checkpoint['epoch'] == 1 and checkpoint['args']['num_queries'] == 10


def test_a_run_that_is_complete_says_so(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run(tmp_path, '--epochs', '1')
    before = (tmp_path / 'checkpoint.pth').read_bytes()
    run(tmp_path, '--epochs', '1', '--resume', 'auto')
    assert 'all 1 epochs are done' in capsys.readouterr().out
    assert (tmp_path / 'checkpoint.pth').read_bytes() == before
    run(tmp_path / 'other', '--epochs', '1', '--resume', str(tmp_path / 'checkpoint.pth'))
    for name in ('checkpoint.pth', 'checkpoint_best.pth'):
        assert_same(torch.load(tmp_path / 'other' / name, weights_only=True), load(tmp_path))
    first, second = (
        json.loads((folder / 'log.jsonl').read_text()) for folder in (tmp_path, tmp_path / 'other')
    )
    assert first['test_coco_eval_bbox'] == second['test_coco_eval_bbox']


def test_evaluation_alone_gives_the_number_of_the_run(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run(tmp_path / 'run', '--epochs', '1')
    with (tmp_path / 'run/metrics.csv').open() as file:
        ap = float(next(csv.DictReader(file))['test_AP'])
    capsys.readouterr()
    run('', '--eval', '--resume', str(tmp_path / 'run/checkpoint.pth'))
    assert f'{100 * ap:.1f}' in capsys.readouterr().out.splitlines()[-1]
    for more in ('--shapes_val 2', '--dataset_file shapes --shapes_val 2'):  # the rest is that of the run
        run('', '--eval', '--resume', str(tmp_path / 'run/checkpoint.pth'), flags=f'--device cpu {more}')
        assert 'shapes, 2 val' in capsys.readouterr().out
    recorded, flags = (
        {'dataset_file': 'shapes', 'shapes_size': 64},
        Namespace(val_ann=None, dataset_file='coco'),
    )
    given = {'dataset_file', 'shapes_val'}
    assert 'shapes_size' not in data_of(flags, given, recorded | {'dataset_file': 'lvis'})
    flags.dataset_file = 'shapes'
    assert data_of(flags, given, recorded)['shapes_size'] == 64
    assert data_of(flags, {'val_ann'}, {'dataset_file': 'lvis'})['dataset_file'] == 'lvis'


def test_an_existing_run_is_not_overwritten(tmp_path: Path) -> None:
    run(tmp_path, '--epochs', '1')
    with pytest.raises(ValueError, match='--resume auto'):
        run(tmp_path, '--epochs', '1')


@pytest.mark.slow
def test_pretrained_weights_fit_another_number_of_classes(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run(tmp_path / 'six', '--epochs', '1')
    annotations = make_coco(tmp_path / 'data', ids=(7, 3, 250))
    capsys.readouterr()
    more = ['--dataset_file', 'coco', '--coco_path', str(annotations), '--num_queries', '14', '--epochs', '1']
    checkpoint = str(tmp_path / 'six/checkpoint.pth')
    run(tmp_path / 'three', *more, '--pretrained', checkpoint)
    text = capsys.readouterr().out
    assert 're-initialised: class_embed.weight, class_embed.bias, query_embed.weight' in text
    assert load(tmp_path / 'three')['class_map']['category_ids'] == [3, 7, 250]
    with pytest.raises(ValueError, match=r'6 classes .* the data has 3 classes'):
        run(tmp_path / 'other', *more, '--resume', checkpoint)


def make_coco(folder: Path, ids: tuple[int, ...]) -> Path:
    """A small data set in COCO form: two images a split, one of them without objects, a crowd and a box of
    no size.
    """
    from torchvision.io import write_png

    (folder / 'annotations').mkdir(parents=True)
    for split in ('train', 'val'):
        (folder / split).mkdir()
        images = [{'id': i, 'file_name': f'{i}.png', 'width': 48, 'height': 40} for i in (1, 2, 3, 4)]
        for image in images:
            write_png(
                torch.randint(0, 256, (3, 40, 48), dtype=torch.uint8),
                str(folder / split / image['file_name']),
            )
        boxes = [[5, 5, 20, 20], [30, 10, 30, 10], [8, 8, 0, 4], [0, 0, 40, 30]]
        annotations = [
            {
                'id': i + 1,
                'image_id': 1 + i % 3,
                'category_id': ids[i % 3],
                'bbox': box,
                'area': 1.0,
                'iscrowd': int(i == 3),
            }
            for i, box in enumerate(boxes)
        ]
        data = {
            'images': images,
            'annotations': annotations,
            'categories': [{'id': i, 'name': f'c{i}'} for i in ids],
        }
        (folder / f'annotations/instances_{split}.json').write_text(json.dumps(data))
    return folder


def test_predict_draws_and_writes_results(tmp_path: Path) -> None:
    run(tmp_path / 'run', '--epochs', '1')
    data = make_coco(tmp_path / 'data', ids=(1, 2, 3))
    args = ['--checkpoint', str(tmp_path / 'run/checkpoint.pth'), '--source', str(data / 'val')]
    out = tmp_path / 'out'
    predict.main(predict.get_args_parser().parse_args([*args, '--output_dir', str(out), '--device', 'cpu']))
    rows = json.loads((out / 'predictions.json').read_text())
    assert {(row['image_id'], row['file_name']) for row in rows} == {(i, f'{i}.png') for i in (1, 2, 3, 4)}
    assert all(
        1 <= row['category_id'] <= 6 and 0 <= row['score'] <= 1 and len(row['bbox']) == 4 for row in rows
    )
    assert len(list(out.glob('*.png'))) == 4


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        ('--eval', '--eval needs weights'),
        ('--resume no/such.pth', 'no checkpoint at no/such.pth'),
        ('--resume a.pth --pretrained b.pth', 'give one of them'),
        ('--pre_norm', '--pre_norm is for DETR, and the other flags choose conditional'),
        ('--hidden_dim 30', '--hidden_dim 30'),
        ('--dilation', '--dilation'),
        ('--backbone resnet7', "unknown backbone 'resnet7'"),
        ('--total_batch_size 6', '--total_batch_size 6 is not a multiple'),
        ('--batch_size 16', 'do not fill one step of 16'),
        ('--dataset_file coco', '--coco_path'),
        ('--dataset_file coco --coco_path no/where', 'no/where'),
        ('--device cuda', 'no usable NVIDIA GPU'),
        ('--backbone_weights no/file.pth', 'no such file'),
        ('--eval --resume auto', 'there is no checkpoint at'),
        ('--shapes_val 0', '--shapes_val must be at least 1'),
        ('--device nonsense', '--device nonsense is not known'),
        ('--backbone_norm group --backbone mobilenet_v2', '--backbone_norm group'),
        ('--set_cost_class 0 --set_cost_bbox 0 --set_cost_giou 0', 'all matching costs are 0'),
    ],
)
def test_impossible_flags_get_one_clear_error(tmp_path: Path, flags: str, message: str) -> None:
    if flags == '--device cuda' and torch.cuda.is_available():
        pytest.skip('this machine has a GPU')
    with pytest.raises(UserError, match=message):
        run(tmp_path, *flags.split())
    assert not (tmp_path / 'checkpoint.pth').exists()


def test_a_broken_checkpoint_is_named(tmp_path: Path) -> None:
    (tmp_path / 'broken.pth').write_bytes(b'no checkpoint')
    with pytest.raises(ValueError, match=r'broken\.pth is not a readable checkpoint'):
        run(tmp_path / 'out', '--resume', str(tmp_path / 'broken.pth'))


@pytest.mark.slow
def test_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    run(tmp_path, '--epochs', '1')
    before = (tmp_path / 'checkpoint.pth').read_bytes()
    checkpoint = load(tmp_path)
    checkpoint['model']['bbox_embed.layers.2.bias'][0] = float('nan')
    torch.save(checkpoint, tmp_path / 'broken.pth')
    with pytest.raises(UserError, match='not finite'):
        run(
            tmp_path,
            '--pretrained',
            str(tmp_path / 'broken.pth'),
            '--resume',
            '',
            '--output_dir',
            str(tmp_path / 'new'),
        )
    assert (tmp_path / 'checkpoint.pth').read_bytes() == before


def test_eval_uses_the_classes_of_the_checkpoint(tmp_path: Path) -> None:
    """A validation file that lists fewer categories is fine; one that names them otherwise is not."""
    data = make_coco(tmp_path / 'data', ids=(1, 2, 3))
    file = data / 'annotations/instances_val.json'
    annotations = json.loads(file.read_text())
    annotations['categories'] = annotations['categories'][:2]
    annotations['annotations'] = [a for a in annotations['annotations'] if a['category_id'] < 3]
    file.write_text(json.dumps(annotations))
    more = ['--dataset_file', 'coco', '--coco_path', str(data), '--epochs', '1']
    run(tmp_path / 'run', *more)
    checkpoint = str(tmp_path / 'run/checkpoint.pth')
    run(tmp_path / 'eval', *more, '--eval', '--resume', checkpoint)
    assert len(json.loads((tmp_path / 'eval/eval.json').read_text())['test_coco_eval_bbox']) == 12
    annotations['categories'][0]['name'], annotations['categories'][1]['name'] = 'c2', 'c1'
    file.write_text(json.dumps(annotations))
    with pytest.raises(ValueError, match='category 1 is "c2" here'):
        run(tmp_path / 'eval', *more, '--eval', '--resume', checkpoint)


@pytest.mark.slow
def test_two_processes_equal_one_with_twice_the_batch(tmp_path: Path) -> None:
    """Same weights after three epochs, one of the processes often without an object; and both can resume."""
    data = make_coco(tmp_path / 'data', ids=(1, 2, 3))
    flags = [
        '--dataset_file',
        'coco',
        '--coco_path',
        str(data),
        '--backbone_norm',
        'frozen',
        '--dropout',
        '0',
        '--aug',
        'flip',
    ]
    run(tmp_path / 'one', *flags, '--batch_size', '2')
    command = [*TINY.split(), *flags, '--batch_size', '1', '--output_dir', str(tmp_path / 'two')]
    for more in (['--epochs', '2'], ['--resume', 'auto']):
        codes = end_group(start_group(tmp_path / 'log', [*command, *more]), seconds=300)
        assert codes == [0, 0], ''.join(path.read_text() for path in sorted(tmp_path.glob('log*')))
    one, two = load(tmp_path / 'one')['model'], load(tmp_path / 'two')['model']
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-5, msg=name)
    assert len((tmp_path / 'two/metrics.csv').read_text().splitlines()) == 4


def repeated(data: dict, times: int) -> dict:
    """COCO annotations that list every image so many times, under other numbers."""
    step = 1 + max(entry['id'] for name in ('images', 'annotations') for entry in data[name])
    copies = {'images': [], 'annotations': []}
    for offset in range(0, times * step, step):
        copies['images'] += [image | {'id': image['id'] + offset} for image in data['images']]
        copies['annotations'] += [
            each | {'id': each['id'] + offset, 'image_id': each['image_id'] + offset}
            for each in data['annotations']
        ]
    return data | copies


@pytest.mark.slow
@pytest.mark.parametrize(
    ('family', 'epochs'),
    [
        pytest.param('--conditional', 40, marks=pytest.mark.exhaustive),
        pytest.param('', 40, marks=pytest.mark.exhaustive),
        ('--two_stage --with_box_refine --num_feature_levels 3', 20),
    ],
    ids=['conditional', 'detr', 'two stages'],
)
def test_overfits_8_images(tmp_path: Path, family: str, epochs: int) -> None:
    """AP > 0.9 on the 8 images that it was trained on, exported and read back as COCO data.

    An epoch is 10 steps of 8, in which each image comes 10 times: with epochs of a step, most of the time would go to
    checkpoints.
    """
    export_shapes(tmp_path / 'data', ShapesDetection(8, image_size=64))
    images = tmp_path / 'data/train2017'
    once = tmp_path / 'data/annotations/instances_train2017.json'
    often = tmp_path / 'often.json'
    often.write_text(json.dumps(repeated(json.loads(once.read_text()), 10)))
    data = [f'--train_images={images}', f'--train_ann={often}', f'--val_images={images}', f'--val_ann={once}']
    flags = f"""--dataset_file coco --aug none --epochs {epochs} --lr_drop {epochs * 4 // 5} --eval_every {epochs}
        --batch_size 8 --dropout 0 --hidden_dim 64 --num_queries 20 --print_freq 100"""
    run(tmp_path, *flags.split(), *data, flags=TINY.replace('--conditional', family))
    with (tmp_path / 'metrics.csv').open() as file:
        assert float(list(csv.DictReader(file))[-1]['test_AP']) > 0.9


@pytest.mark.slow
@pytest.mark.parametrize(
    ('family', 'schedule', 'rates'),
    [
        ('--two_stage --with_box_refine', ['--lr_drop', '2'], [1e-3, 1e-3, 1e-4, 1e-4]),
        (
            '--dino --dn_number 10 --co_aux_heads faster_rcnn atss',
            ['--lr_drop_epochs', '1', '3'],
            [1e-3, 1e-4, 1e-4, 1e-5],
        ),
    ],
    ids=['every so many', 'at these, Co-DINO'],
)
def test_deformable_run_resumes_on_any_schedule(
    family: str, schedule: list[str], rates: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted after two epochs of four: the same metrics as undisturbed, random samples and noise too, and the
    rates that were asked for.
    """
    tiny = TINY.replace('--conditional', f'{family} --hidden_dim 64')
    flags = [*schedule, '--epochs', '4', '--eval_every', '4', '--shapes_train', '4', '--batch_size', '2']
    run(tmp_path / 'whole', *flags, flags=tiny)
    finish, calls = main.finish_epoch, []

    def stop(*args: object) -> None:
        calls.append(args)
        finish(*args)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(main, 'finish_epoch', stop)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / 'parts', *flags, flags=tiny)
    run(tmp_path / 'parts', *flags, '--resume', 'auto', flags=tiny)
    rows = {}
    for name in ('whole', 'parts'):
        with (tmp_path / name / 'metrics.csv').open() as file:
            rows[name] = list(csv.DictReader(file))
    assert [float(row['lr']) for row in rows['whole']] == pytest.approx(rates)
    assert rows['whole'] == rows['parts']
    assert_same(load(tmp_path / 'whole'), load(tmp_path / 'parts'))


@pytest.mark.slow
@pytest.mark.draws
def test_auxiliary_heads_are_evaluated_on_their_own(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    heads = '--dino --dn_number 10 --co_aux_heads faster_rcnn atss --hidden_dim 64'
    tiny = TINY.replace('--conditional', heads)
    run(tmp_path / 'run', '--epochs', '1', '--shapes_train', '4', flags=tiny)
    found = {}
    for module in ('detr', 'faster_rcnn', 'atss'):
        folder = tmp_path / module
        more = ['--eval', '--resume', str(tmp_path / 'run/checkpoint.pth'), '--eval_module', module]
        run(folder, *more, flags=tiny)
        found[module] = json.loads((folder / 'eval.json').read_text())['test_coco_eval_bbox']
    assert len({tuple(stats) for stats in found.values()}) == 3, 'three detectors'
    assert 'FLOPs  not counted' in capsys.readouterr().out
