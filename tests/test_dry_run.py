"""`--dry_run`: what a run would need, without data, weights or a step."""

import re
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import main
from models import build_model
from models.costs import activation_bytes
from models.detr import DETR
from models.ops.functions import use_implementation
from tests.models import FAMILIES, SMALL, build
from tests.runs import parse


def printed(flags: str, capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    main.main(parse('', flags=f'--dry_run {flags}'))
    rows = (line.strip().split('  ', 1) for line in capsys.readouterr().out.splitlines())
    return {row[0]: row[-1] for row in rows}


def test_nothing_is_read_downloaded_or_written(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr('util.download.fetch', lambda *arguments: pytest.fail('downloads'))
    main.main(
        parse(
            tmp_path / 'out',
            flags='--dry_run --coco_path no/where --conditional --batch_size 4 --total_batch_size 16',
        )
    )
    text = capsys.readouterr().out
    for found in (
        '43,418,401, 43,196,001 trainable',
        '90.06 G multiply-adds for one image of 800 x 1136',
        '19,963,489 parameters at 0.0001; 23,232,512 parameters at 1e-05',
        '16 images a step (4 x 4 accumulated x 1 processes)',
        '7392 an epoch of 118,287 images, 369600 in 50 epochs',
        'divided by 10 every 40 epochs',
        'one2one  300 queries',
    ):
        assert found in text
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize(
    ('named', 'parameters', 'images'),
    [
        ('--recipe r50_co_dino_5scale_lsj_lvis_12ep', '75,802,540', '100,170'),
        ('--model co_dino_resnet50_lsj_lvis --pretrained FILE', '75,802,540', '100,170'),
        ('--model co_dino_resnet50_lsj_lvis --pretrained FILE --coco_path DIR', '65,255,220', '118,287'),
        ('--recipe r50_co_deformable_detr_12ep', '65,076,774', '118,287'),
    ],
)
def test_classes_and_images_are_those_of_the_data(
    named: str, parameters: str, images: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """1203 classes of LVIS v1, also for a row of the zoo; 80 of COCO with --class_ids contiguous."""
    rows = printed(named, capsys)
    assert rows['parameters'].startswith(parameters) and f'of {images} images' in rows['steps']


def test_contradictions_are_refused_too() -> None:
    with pytest.raises(ValueError, match='--total_batch_size 3 is not a multiple'):
        main.main(parse('', flags='--dry_run --total_batch_size 3'))
    with pytest.raises(ValueError, match='3 training images do not fill one step of 4'):
        main.main(parse('', flags='--dry_run --dataset_file shapes --shapes_train 3 --batch_size 4'))
    with pytest.raises(ValueError, match=r'no model .resnet. is known'):
        main.main(parse('', flags='--dry_run --model resnet'))


@pytest.mark.parametrize('name', ['detr', 'conditional', 'deformable', 'mixed', 'dino'])
def test_estimated_activations_are_those_of_a_real_step(name: str) -> None:
    """Of what autograd keeps on the CPU, without parameters. The operator keeps its inputs."""
    model = build(FAMILIES[name])[0].train()
    estimated = activation_bytes(model, 2, 128, 160)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        use_implementation('operator'),
    ):
        outputs = model(torch.randn(2, 3, 128, 160))
    measured = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    dense = isinstance(model, DETR)
    assert outputs and estimated == pytest.approx(measured, rel=0.01 if dense else 0.2)


@pytest.mark.slow
def test_recomputing_lowers_the_estimate(capsys: pytest.CaptureFixture[str]) -> None:
    def gibibytes(flags: str) -> float:
        return float(re.search(r'about ([\d.]+) GiB', printed(flags, capsys)['memory'])[1])

    plain = gibibytes('--deformable')
    assert gibibytes('--deformable --use_checkpoint') < 0.4 * plain
    assert gibibytes('--deformable --batch_size 4') > 1.5 * plain


def test_memory_is_that_of_the_largest_training_image(capsys: pytest.CaptureFixture[str]) -> None:
    flags = '--aug co_detr --img_size 640 --max_size 1024 --train_scales 480 768 --train_max_size 1200'
    assert 'images of 768 x 1200 ' in printed(flags, capsys)['memory']


def test_modules_stay_as_they_are() -> None:
    model = build_model(Namespace(**SMALL | {'dino': True, 'dn_number': 4}))[0]
    activation_bytes(model, 1, 64, 64 * 4)
    assert isinstance(model.query_sources['denoising'], nn.Module) and not next(model.parameters()).is_meta
