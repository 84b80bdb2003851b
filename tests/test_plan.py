"""A run counts the operations of its model before it starts, in every family, and goes on where it cannot."""

import re
from pathlib import Path

import pytest
from torchvision.ops import nms

import main
from models.detr import DETR
from models.training import summary
from tests.runs import TINY, load, parse, run
from util.box_ops import box_cxcywh_to_xyxy
from util.errors import UserError

SHORT = ['--hidden_dim', '64', '--epochs', '1', '--shapes_train', '4', '--shapes_val', '2']
METHODS = {
    'detr': '',
    'conditional': '--conditional',
    'deformable': '--deformable',
    'hybrid': '--two_stage --with_box_refine --mixed_selection --hybrid_k 2 --hybrid_queries 12',
    'mixed': '--two_stage --with_box_refine --use_ms_detr --use_aux_ffn',
    'co_dino': '--dino --dn_number 4 --co_aux_heads faster_rcnn atss',
}


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Operations are counted in these runs, which other tests leave out."""
    monkeypatch.setattr(main, 'flops_text', summary.flops_text)


def with_nms(forward: object) -> object:
    """A forward pass with an operation that needs values."""

    def changed(self: DETR, *given: object) -> dict:
        outputs = forward(self, *given)
        nms(
            box_cxcywh_to_xyxy(outputs['pred_boxes'][0].float()), outputs['pred_logits'][0, :, 0].float(), 0.5
        )
        return outputs

    return changed


@pytest.mark.parametrize('method', METHODS)
def test_a_run_of_every_family_counts_its_operations(
    method: str, counted: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path, *SHORT, flags=TINY.replace('--conditional', METHODS[method]))
    assert re.search(r'\n +FLOPs  [\d.]+ G \([\d.]+ G multiply-adds\)', capsys.readouterr().out)
    assert load(tmp_path)['epoch'] == 0


def test_a_run_goes_on_where_its_operations_cannot_be_counted(
    counted: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(DETR, 'forward', with_nms(DETR.forward))
    run(tmp_path, *SHORT)
    said = capsys.readouterr().out
    assert re.search(
        r'\n +FLOPs  not known, because without values the model raises \w+: .{5,150}\n +\w', said
    )
    assert 'Traceback' not in said and load(tmp_path)['epoch'] == 0
    main.main(parse('', flags=f'--dry_run {TINY}'))
    said = capsys.readouterr().out
    assert (
        len(re.findall(r'\n +(?:FLOPs|memory)  not known, because', said)) == 2
        and '\n         steps  ' in said
    )


def test_errors_for_users_are_not_hidden_in_the_count(
    counted: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*given: object) -> None:
        raise UserError('this image is too small')

    monkeypatch.setattr(DETR, 'forward', refuse)
    with pytest.raises(UserError, match='this image is too small'):
        run(tmp_path, *SHORT)
