"""From a detector of COCO's 91 classes to the 3 of a small data set: one command, and none of its flags again."""

import json
from pathlib import Path

import pytest
import torch

import main
from datasets.class_map import ClassMap
from models.weights.load import load_checkpoint
from models.weights.records import shared_classes
from tests.models import build
from tests.runs import TINY, load
from tests.shared_data import SHARED, needs_shared
from tools import predict

WORDS = [word for word in TINY.split() if word not in ('--dataset_file', 'shapes')]
TWO_STAGE = {'two_stage': True, 'with_box_refine': True, 'num_feature_levels': 3}
FLAGS = [*WORDS, '--epochs', '1', '--img_size', '96', '--max_size', '96', '--batch_size', '8']


@needs_shared
@pytest.mark.slow
def test_from_91_classes_to_3(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    coco = [
        '--coco_path',
        str(SHARED / 'data/coco_mini'),
        '--eval_every',
        '0',
        '--output_dir',
        str(tmp_path / 'coco'),
    ]
    main.main(main.get_args_parser().parse_args([*FLAGS, *coco]))
    assert load(tmp_path / 'coco')['model']['class_embed.bias'].shape == (91,)
    tuned = ['--coco_path', str(SHARED / 'data/bccd'), '--pretrained', str(tmp_path / 'coco/checkpoint.pth')]
    capsys.readouterr()
    main.main(main.get_args_parser().parse_args([*FLAGS, *tuned, '--output_dir', str(tmp_path / 'bccd')]))
    printed = capsys.readouterr().out
    checkpoint = load(tmp_path / 'bccd')
    names = checkpoint['class_map']['names']
    assert len(names) == 3 and checkpoint['model']['class_embed.bias'].shape == (3,)
    assert 're-initialised: class_embed.weight, class_embed.bias\n' in printed
    assert 'train objects by class: RBC 3,348' in printed
    trained = json.loads((tmp_path / 'bccd/log.jsonl').read_text())['test_coco_eval_bbox']
    again = [
        '--eval',
        '--resume',
        str(tmp_path / 'bccd/checkpoint.pth'),
        '--output_dir',
        str(tmp_path / 'eval'),
    ]
    main.main(main.get_args_parser().parse_args([*again, '--num_workers', '0', '--device', 'cpu']))
    assert json.loads((tmp_path / 'eval/eval.json').read_text())['test_coco_eval_bbox'] == trained
    image = min((SHARED / 'data/bccd').rglob('*.jp*g'))
    words = [
        '--checkpoint',
        str(tmp_path / 'bccd/checkpoint.pth'),
        '--source',
        str(image),
        '--output_dir',
        str(tmp_path / 'out'),
    ]
    predict.main(predict.get_args_parser().parse_args([*words, '--device', 'cpu']))
    rows = json.loads((tmp_path / 'out/predictions.json').read_text())
    assert rows and {row['category_name'] for row in rows} <= set(names)


def test_class_heads_follow_the_names_of_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a file whose classes are partly those of the data, in another order; other rows start anew."""
    for family in ({'conditional': True}, {}, {'dino': True, 'num_feature_levels': 3}, TWO_STAGE):
        model, _, _ = build(family | {'num_classes': 4})
        names = ('cat', 'dog', 'emu', 'fox')
        checkpoint = {'model': model.state_dict(), 'class_map': ClassMap((0, 1, 2, 3), names).to_dict()}
        mine = ClassMap((0, 1, 2), ('fox', 'hen', 'cat'))
        tuned, _, _ = build(family | {'num_classes': 3})
        before = {name: x.clone() for name, x in tuned.state_dict().items()}
        shared = shared_classes(checkpoint, mine)
        report = load_checkpoint(tuned, checkpoint, resize=True, classes=shared)
        assert (
            report.kept_classes == ['cat', 'fox']
            and not report.reinitialised
            and 'kept for cat, fox' in str(report)
        )
        for name, x in tuned.state_dict().items():
            if name.startswith('class_embed'):
                theirs = checkpoint['model'][name]
                if family is TWO_STAGE and name.startswith(
                    'class_embed.3.'
                ):  # of the proposals: row 0 means 'object'
                    assert torch.equal(x[0], theirs[0]) and torch.equal(x[1:], before[name][1:])
                    continue
                assert torch.equal(x[0], theirs[3]) and torch.equal(x[2], theirs[0])
                assert torch.equal(x[1], before[name][1]) and (len(x) == 3 or torch.equal(x[3], theirs[4]))
    assert shared_classes(checkpoint, ClassMap((0, 1, 2, 3), names)) is None
    for name in list(checkpoint['model']):  # the usual advice for another number of classes
        if name.startswith('class_embed'):
            del checkpoint['model'][name]
    del checkpoint['class_map']
    report = load_checkpoint(tuned, checkpoint, resize=True, classes=shared_classes(checkpoint, mine))
    assert any(name.startswith('class_embed') for name in report.reinitialised)
