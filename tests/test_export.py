"""tools/export.py: programs of any size that compute the same, and are refused if they do not."""

import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor

from datasets.shapes import ShapesDetection
from datasets.shapes import export_shapes as write_shapes
from models.detector import load_detector
from tests.models import FAMILIES as MODELS
from tests.models import build
from tests.runs import TINY, run
from tools import export
from util.command_line import run_command

PLAIN = ' '.join(word for word in TINY.split() if word != '--conditional')
TRANSFORMER = PLAIN.replace('--backbone_norm batch', '').replace('--backbone_stages 3', '')
TWO_STAGE = '--two_stage --with_box_refine'
STAGES = f'{PLAIN} {TWO_STAGE}'
FAMILIES = {
    'conditional': TINY,
    'detr': PLAIN,
    'two stages': f'{STAGES} --num_feature_levels 3',
    'deformable': f'{PLAIN} --deformable --num_feature_levels 3',
    'hybrid': f'{STAGES} --mixed_selection --hybrid_k 2 --hybrid_queries 20 --num_feature_levels 2 --dec_layers 1',
    'dino': f'{PLAIN} --dino --num_feature_levels 1 --dec_layers 1',
    'mixed': f'{STAGES} --use_ms_detr --num_feature_levels 3',
    'swin': f'{TRANSFORMER.replace("resnet10", "swin_tiny")} {TWO_STAGE} --num_feature_levels 3',
    'vit': f'{TRANSFORMER.replace("resnet10", "vit_mini")} --dino --num_feature_levels 5',
}
needs_onnx = pytest.mark.skipif(
    any(find_spec(name) is None for name in export.PACKAGES), reason=f'needs {", ".join(export.PACKAGES)}'
)


def trained(folder: Path, family: str) -> Path:
    run(folder, '--epochs', '1', '--eval_every', '0', '--shapes_train', '4', flags=FAMILIES[family])
    return folder / 'checkpoint.pth'


def exported(checkpoint: Path, output: Path, *more: str) -> None:
    words = ['--checkpoint', str(checkpoint), '--output', str(output), *more]
    run_command(export.main, export.get_args_parser(), words)


@needs_onnx
@pytest.mark.slow
@pytest.mark.parametrize(
    'family',
    [pytest.param(name, marks=() if name == 'hybrid' else pytest.mark.exhaustive) for name in FAMILIES],
)
def test_onnx_equals_torch(
    family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At three sizes and two numbers of images; then the AP of both, and the same in fp16."""
    half, drop = tmp_path / 'half.onnx', export.drop_proposals
    monkeypatch.setattr(export, 'drop_proposals', lambda path: (shutil.copy(path, half), drop(path)))
    checkpoint = trained(tmp_path / 'run', family)
    write_shapes(tmp_path / 'data', ShapesDetection(3, 'val', image_size=64))
    exported(checkpoint, tmp_path / 'detector.onnx', '--coco_path', str(tmp_path / 'data'))
    printed = capsys.readouterr().out
    assert printed.count('largest difference of scores') == 3
    first, second = printed.split('PyTorch AP ')[1].splitlines()[0].split('; exported AP ')
    assert first == second
    export.halve(half)
    detector = load_detector(weights=checkpoint)
    program = export.build_program(detector, False)
    program.output_proposals()
    export.verify(detector, program, export.load(half), half=True)
    assert capsys.readouterr().out.count('largest difference of scores') == 3
    assert 1e6 < half.stat().st_size < 0.75 * (tmp_path / 'detector.onnx').stat().st_size


def test_other_proposals_move_every_query_and_are_judged_by_their_scores(tmp_path: Path) -> None:
    """In another order of proposals all queries change; the scores reveal proposals that are not the best."""
    detector = load_detector(weights=trained(tmp_path, 'hybrid'))
    program = export.build_program(detector, False)
    program.output_proposals()
    images = export.draw_images(1, 96, 96)
    program.expected(images)
    best = program.selection.taken
    logits, _ = program.expected(images, best)
    assert program.selection.difference == 0
    order = torch.arange(best.shape[1]).roll(1)
    moved = program.expected(images, best[:, order])[0]
    assert 0 < program.selection.difference < 1
    # Its content is learned for a place in the order, so no query stays what it was anywhere.
    assert torch.cdist(moved[0], logits[0]).amin(1).min() > 0
    program.expected(images, torch.zeros_like(best))
    assert program.selection.difference > 0


@pytest.mark.parametrize('family', ['two stages', 'dino'])
def test_a_program_makes_the_choice_of_its_first_stage(family: str) -> None:
    """Whatever the first stage passes to it."""

    def worst(scores: Tensor, num_proposals: int, largest: bool = False) -> Tensor:
        return scores.topk(num_proposals, dim=1, largest=largest).indices

    model = build(MODELS[family])[0].eval()
    model.first_stage.choose = worst
    images = export.draw_images(2, 128, 96)
    with torch.no_grad():
        expected = model(images)
        program = export.Program(model, None).eval()
        program.output_proposals()
        logits, boxes, taken = program(images)
    assert torch.equal(logits, expected['pred_logits']) and torch.equal(boxes, expected['pred_boxes'])
    scores = torch.rand(2, taken.max() + 1)
    choose = program.selection
    assert choose is model.first_stage.choose
    choose.asked = scores.topk(3, dim=1).indices
    assert torch.equal(choose(scores, 3, largest=True), choose.asked) and choose.difference == 0
    choose(scores, 3)
    assert choose.difference > 0


@pytest.mark.slow
def test_a_program_of_torch_export_and_what_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = trained(tmp_path / 'run', 'conditional')
    exported(checkpoint, tmp_path / 'out', '--format', 'pt2', '--postprocess')
    assert capsys.readouterr().out.count('largest difference of scores') == 3
    with pytest.raises(SystemExit, match='exists: choose another name'):
        exported(checkpoint, tmp_path / 'out', '--format', 'pt2')
    with pytest.raises(SystemExit, match='--half is for --format onnx'):
        exported(checkpoint, tmp_path / 'half', '--format', 'pt2', '--half')
    with pytest.raises(SystemExit, match=r'let it end in \.pt2'):
        exported(checkpoint, tmp_path / 'detector.onnx', '--format', 'pt2')
    written = export.load(tmp_path / 'out/detector.pt2')
    monkeypatch.setattr(export, 'export', lambda program, images, path: path.touch())
    monkeypatch.setattr(export, 'load', lambda path: lambda images: tuple(x + 0.01 for x in written(images)))
    with pytest.raises(SystemExit, match=r'is not the detector .*: no file is kept'):
        exported(checkpoint, tmp_path / 'wrong', '--format', 'pt2', '--postprocess')
    assert not (tmp_path / 'wrong/detector.pt2').exists()
    monkeypatch.setattr(export, 'find_spec', lambda name: None)
    with pytest.raises(SystemExit, match='pip install onnx'):
        exported(checkpoint, tmp_path / 'other', '--format', 'onnx')
