"""Values that are not finite: the step is left out, the report names layer and images, and replay shows the
same.
"""

import re
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import engine
from datasets.shapes import ShapesDetection
from engine import build_optimizer, train_one_epoch
from models import build_model
from models.structures import Prediction
from models.training.criterion import weighted_sum
from tests.models import HEADS, SCHEMES, SMALL, random_targets, with_masks
from tests.processes import in_processes
from tests.runs import load, run
from tools import replay
from util.errors import UserError
from util.nan_guard import NonFiniteGuard
from util.nested_tensor import collate_fn

BAD = float('nan')


def report_of(printed: str) -> str:
    found = re.search(
        r'it is not finite: (.*?)(\. Saved: python tools/replay\.py (\S+) runs it again)?$',
        printed,
        re.MULTILINE,
    )
    assert found, printed
    return found[1]


def replayed(folder: Path) -> str:
    files = sorted((folder / 'black_box').iterdir())
    return replay.main(replay.get_args_parser().parse_args([str(files[0]), '--device', 'cpu']))


def test_a_bad_weight_stops_the_run_and_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = engine.losses_of

    def spoilt(model: nn.Module, *args: object) -> tuple:
        with torch.no_grad():
            model.bbox_embed.layers[1].weight[0, 0] = BAD
        return original(model, *args)

    with monkeypatch.context() as patch:
        patch.setattr(engine, 'losses_of', spoilt)
        with pytest.raises(
            UserError,
            match=r'3 steps in a row are not finite \(weight bbox_embed\.layers\.1\.weight, 1 of',
        ):
            run(tmp_path, '--epochs', '1')
    report = report_of(capsys.readouterr().out)
    assert report.startswith('weight bbox_embed.layers.1.weight, 1 of 1,024 values; images ')
    assert replayed(tmp_path) == report
    assert not (tmp_path / 'checkpoint.pth').exists()


def test_a_bad_image_is_named_and_the_run_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = ShapesDetection.__getitem__

    def spoilt(self: ShapesDetection, idx: int) -> tuple[Tensor, dict]:
        image, target = original(self, idx)
        image = image / 255 if self.split == 'train' else image
        if idx == 7 and self.split == 'train':
            image[1, 3, 3] = BAD
        return image, target

    monkeypatch.setattr(ShapesDetection, '__getitem__', spoilt)
    run(tmp_path, '--epochs', '2')
    report = report_of(capsys.readouterr().out)
    assert report == 'the image itself; images 7'
    assert replayed(tmp_path) == report
    assert all(
        value.isfinite().all() for value in load(tmp_path)['model'].values() if value.is_floating_point()
    )
    assert len(list((tmp_path / 'black_box').iterdir())) == 2


def test_an_overflow_in_a_layer_is_named_with_its_image(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batch norms would spread it over the batch; group norms do not."""
    original = ShapesDetection.__getitem__

    def spoilt(self: ShapesDetection, idx: int) -> tuple[Tensor, dict]:
        image, target = original(self, idx)
        return (image / 255 * (3e38 if idx == 2 else 1) if self.split == 'train' else image), target

    monkeypatch.setattr(ShapesDetection, '__getitem__', spoilt)
    run(tmp_path, '--epochs', '1', '--backbone_norm', 'group')
    report = report_of(capsys.readouterr().out)
    assert re.fullmatch(
        r'output of backbone\.0\.body\.bn1 \(GroupNorm\), 65,536 of 262,144 values; images 2', report
    ), report
    assert replayed(tmp_path) == report


@pytest.mark.parametrize(
    ('module', 'expected'),
    [
        ('class_embed', r'output of class_embed \(ExactLinear\), 1 of 480 values; images .*'),
        (
            'transformer.decoder.layers.0.linear1',
            r'output of transformer\.decoder\.layers\.0\.linear1 \(Linear\), 1 of .*',
        ),
    ],
)
def test_a_bad_prediction_is_named_and_matched(
    module: str,
    expected: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = [0]

    def spoil(layer: nn.Module, inputs: object, output: Tensor) -> Tensor:
        calls[0] += 1
        spoilt = output.clone()
        if calls[0] == 1 or spoil.again:
            spoilt.view(-1)[0] = BAD
        return spoilt

    spoil.again = True

    build = build_model

    def hooked(args: Namespace) -> tuple:
        model, *rest = build(args)
        model.get_submodule(module).register_forward_hook(spoil)
        return model, *rest

    monkeypatch.setattr('main.build_model', hooked)
    monkeypatch.setattr(replay, 'build_model', hooked)
    with pytest.raises(UserError, match='3 steps in a row'):
        run(tmp_path, '--epochs', '1')
    report = report_of(capsys.readouterr().out)
    assert re.fullmatch(expected, report), report
    assert replayed(tmp_path) == report


def tiny() -> tuple[nn.Module, nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model, criterion, _ = build_model(Namespace(**SMALL | {'dropout': 0.0}))
    return model, criterion, build_optimizer(model, 1e-3, 1e-3, 1e-4)


def batches(*spoilt: int) -> list[tuple]:
    """Four batches of two images with ids; those of some numbers have a bad pixel in the second image."""
    torch.manual_seed(1)
    made = []
    for number in range(4):
        items = [
            (torch.randn(3, 64, 64), target | {'image_id': torch.tensor([10 * number + index])})
            for index, target in enumerate(random_targets(2, 1))
        ]
        if number in spoilt:
            items[1][0][0, 0, 0] = BAD
        made.append(collate_fn(items))
    return made


def test_a_step_that_is_left_out_changes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """Weights, moments, statistics and random numbers are as if the batch had not been there."""
    ends = []
    for spoilt, chosen in (((1,), [0, 1, 2, 3]), ((), [0, 2, 3])):
        model, criterion, optimizer = tiny()
        counts: list[int] = []
        averages = train_one_epoch(
            model,
            criterion,
            [batches(*spoilt)[number] for number in chosen],
            optimizer,
            max_norm=0.1,
            end_step=lambda made, criterion=criterion, counts=counts: counts.append(
                criterion.pair_counts['objects']
            ),
        )
        assert counts[-1] == 9
        ends.append((model.state_dict(), optimizer.state_dict()['state'], averages, torch.rand(3)))
    for (ours, theirs), part in zip(
        zip(*ends, strict=True), ('model', 'moments', 'averages', 'random'), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, msg=part)
    assert (
        'train step 2 is left out, it is not finite: the image itself; images 11' in capsys.readouterr().out
    )


def test_a_bad_gradient_names_its_parameter(capsys: pytest.CaptureFixture[str]) -> None:
    model, criterion, optimizer = tiny()
    parameter = model.transformer.encoder.layers[1].linear2.bias
    parameter.register_hook(lambda gradient: gradient * BAD)
    with pytest.raises(UserError, match='2 steps in a row'):
        train_one_epoch(model, criterion, batches(), optimizer, guard=NonFiniteGuard(limit=2))
    assert 'gradient of transformer.encoder.layers.1.linear2.bias; images 0, 1' in capsys.readouterr().out


def spoilt_in_one(rank: int) -> tuple[dict, list[str]]:
    import contextlib
    import io

    from util.distributed.parallel import replicate

    model, criterion, optimizer = tiny()
    parallel = replicate(model, [Prediction], 1)
    with contextlib.redirect_stdout(io.StringIO()) as said:
        train_one_epoch(parallel, criterion, batches(*((2,) if rank else ())), optimizer, max_norm=0.1)
    return model.state_dict(), [line for line in said.getvalue().splitlines() if 'left out' in line]


@pytest.mark.slow
def test_all_processes_leave_the_same_step_out() -> None:
    (ours, said), (theirs, _) = in_processes(2, spoilt_in_one)
    assert all(value.isfinite().all() for value in ours.values())
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert (
        len(said) == 1 and 'train step 3 is left out' in said[0] and 'the image itself; images 21' in said[0]
    )


EVERYTHING = SCHEMES | {
    'masks': {'masks': True},
    'co_masks': HEADS | {'dino': True, 'co_masks': True, 'dn_number': 4},
    'rcnn masks': SCHEMES['co_deformable'] | {'co_rcnn_masks': True},
}


@pytest.mark.parametrize(
    ('scheme', 'value'),
    [
        *((scheme, BAD) for scheme in SCHEMES),
        *(
            pytest.param(scheme, BAD, marks=pytest.mark.slow)
            for scheme in EVERYTHING
            if scheme not in SCHEMES
        ),
        ('detr', float('inf')),
        ('co_deformable', float('inf')),
    ],
)
def test_bad_predictions_are_matched_and_never_raise(scheme: str, value: float) -> None:
    """The losses tell; matchers, box losses and auxiliary heads do not stop."""
    torch.manual_seed(0)
    model, criterion, _ = build_model(Namespace(**SMALL | EVERYTHING[scheme]))
    images, targets = torch.randn(2, 3, 64, 64), with_masks(random_targets(2, 1), (64, 64))

    def spoil(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        return output + value

    places: list[Callable] = [
        model.backbone.register_forward_hook(lambda m, i, o: ([spoil_map(x, value) for x in o[0]], o[1]))
    ]
    losses = criterion(model.train()(images, targets), targets)
    assert not weighted_sum(losses, criterion.weight_dict).isfinite()
    weighted_sum(losses, criterion.weight_dict).backward()
    places[0].remove()
    for head in {id(m): m for m in model.bbox_embed.modules() if isinstance(m, nn.Linear)}.values():
        head.register_forward_hook(spoil)
    losses = criterion(model(images, targets), targets)
    weighted_sum(losses, criterion.weight_dict).backward()


def spoil_map(features: object, value: float) -> object:
    features.tensors = features.tensors + value
    return features
