"""The comparison of runs: its measurements on hand-made cases, and the tool on real small runs."""

import json
from pathlib import Path

import PIL.Image
import pytest
import torch

from tests.runs import run
from tools import compare_runs


def test_duplicate_detections_are_counted() -> None:
    boxes = torch.tensor([[10.0, 10, 30, 30], [50, 50, 90, 90]])
    labels = torch.tensor([1, 2])
    found = torch.tensor(
        [[10.0, 10, 30, 30], [11, 10, 30, 30], [12, 10, 30, 30], [50, 50, 90, 90], [0, 0, 5, 5]]
    )
    result = {'boxes': found, 'labels': torch.tensor([1, 1, 2, 2, 1]), 'scores': torch.full((5,), 0.5)}
    assert compare_runs.count_duplicates(result, labels, boxes) == 1, 'one of another class, one elsewhere'
    result['scores'][1] = 0.1
    assert compare_runs.count_duplicates(result, labels, boxes) == 0, 'too low a score'
    assert compare_runs.count_duplicates(result, labels[:0], boxes[:0]) == 0


def test_losses_have_the_weights_that_the_run_trained_with(tmp_path: Path) -> None:
    flags = [
        '--epochs',
        '1',
        '--eval_every',
        '0',
        '--shapes_train',
        '4',
        '--cls_loss_coef',
        '0.5',
        '--giou_loss_coef',
        '3',
    ]
    run(tmp_path, *flags)
    record = json.loads((tmp_path / 'log.jsonl').read_text())
    assert {name: record['coefficients'][name] for name in ('ce', 'bbox', 'giou')} == {
        'ce': 0.5,
        'bbox': 5,
        'giou': 3,
    }
    (epoch,), _ = compare_runs.read_run(tmp_path)
    terms = {name: record[f'train_loss_{name}'] for name in ('ce', 'bbox', 'giou')}
    assert epoch['loss'] == pytest.approx(0.5 * terms['ce'] + 5 * terms['bbox'] + 3 * terms['giou'])


@pytest.mark.slow
def test_runs_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Two repetitions with their checkpoints, and a run without."""
    for seed in (0, 1):
        run(
            tmp_path / f'many/seed{seed}',
            '--hybrid_k',
            '2',
            '--hybrid_queries',
            '8',
            '--save_every',
            '1',
            '--seed',
            str(seed),
        )
    run(tmp_path / 'plain', '--epochs', '2', '--save_every', '9')
    folders = [tmp_path / 'plain', tmp_path / 'many/seed0', tmp_path / 'many/seed1']
    args = ['--output', str(tmp_path / 'out'), '--device', 'cpu', *map(str, folders)]
    compare_runs.main(compare_runs.get_args_parser().parse_args(args))
    text = (tmp_path / 'out/comparison.md').read_text()
    assert text in capsys.readouterr().out
    head, _, plain, many = (line.split(' | ') for line in text.splitlines())
    assert head[-2:] == ['queries changed', 'duplicates |']
    assert plain[:2] == ['| plain', '1'] and plain[-2] == '-'
    assert many[:2] == ['| many', '2'] and 0 <= float(many[-2].split()[0]) <= 1
    assert PIL.Image.open(tmp_path / 'out/comparison.png').width == 1200, 'three panels in a row'
    args = ['--output', str(tmp_path / 'out'), '--logs_only', '--by', 'epoch', '--', str(folders[0])]
    compare_runs.main(compare_runs.get_args_parser().parse_args(args))
    assert PIL.Image.open(tmp_path / 'out/comparison.png').width == 800, 'AP and loss'


def test_curves_are_means_of_repetitions() -> None:
    def epochs(*aps: float | None) -> list[dict]:
        return [{'epoch': i + 1} | ({} if ap is None else {'test_AP': ap}) for i, ap in enumerate(aps)]

    scheme = compare_runs.Scheme('x', 'test_AP', [epochs(0.1, None, 0.3), epochs(0.2, 0.4, 0.5, 0.6)])
    place, middle, low, high = scheme.curve('epoch', 'test_AP')
    assert (
        place == [1, 3] and middle == pytest.approx([0.15, 0.4]) and low == [0.1, 0.3] and high == [0.2, 0.5]
    )


def test_folders_that_are_no_runs_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r'no log\.jsonl in it'):
        compare_runs.read_run(tmp_path)
    record = {
        'epoch': 1,
        'images': 5,
        'train_seconds': 30,
        'train_loss_ce': 1,
        'train_loss_bbox': 1,
        'train_loss_giou': 1,
    }
    with_weights = record | {'coefficients': {'ce': 2, 'bbox': 5, 'giou': 2}}
    (tmp_path / 'log.jsonl').write_text(json.dumps(with_weights) + '\n')
    (epoch,), metric = compare_runs.read_run(tmp_path)
    assert epoch == {'epoch': 1, 'images': 5, 'minutes': 0.5, 'loss': 9}
    for more, main, value in (
        ({'test_coco_eval_bbox': [0.25, 0.5, 0.1]}, 'test_AP', 0.25),
        ({'test_F1': 0.75, 'main_metric': 'test_F1'}, 'test_F1', 0.75),
    ):
        (tmp_path / 'log.jsonl').write_text(json.dumps(with_weights | more) + '\n')
        (epoch,), metric = compare_runs.read_run(tmp_path)
        assert (metric, epoch[main]) == (main, value)
    (tmp_path / 'log.jsonl').write_text(json.dumps(record) + '\n')
    with pytest.raises(ValueError, match=r'no checkpoint at .*checkpoint\.pth'):
        compare_runs.read_run(tmp_path)
    torch.save({'args': {'cls_loss_coef': 1.0, 'bbox_loss_coef': 4}}, tmp_path / 'checkpoint.pth')
    assert compare_runs.read_run(tmp_path)[0][0]['loss'] == 1 + 4 + 2, 'of an older version'
    for text in ('{', '[' * 100_000):
        (tmp_path / 'log.jsonl').write_text('{}\n' + text)
        with pytest.raises(ValueError, match=r'log\.jsonl, line 2 is not JSON'):
            compare_runs.read_run(tmp_path)


def test_repetitions_have_the_name_of_their_scheme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folders = ['plain/seed0', 'plain/seed1', 'x/a', 'y/a', 'b']
    assert compare_runs.scheme_names([Path(name) for name in folders]) == [
        'plain',
        'plain',
        'x/a',
        'y/a',
        'b',
    ]
    (tmp_path / 'plain').mkdir()
    monkeypatch.chdir(tmp_path / 'plain')
    for name in ('seed0', '.'):
        assert compare_runs.scheme_names([Path(name)]) == ['plain']
