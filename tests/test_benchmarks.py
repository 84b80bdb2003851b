"""Each command of tools/benchmark.py runs on its smallest input; contenders must agree. Programs start."""

import os
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from models import build_model
from models.ops.functions import backward_pytorch, forward_pytorch, implementation
from tests.models import SMALL, TWO_STAGE, random_targets
from tests.ops_check import module_inputs
from tests.runs import ROOT
from tools.benchmark import get_args_parser
from tools.benchmarks import cases, checkouts, common, op, step
from tools.benchmarks.official import official_path
from util.command_line import run_command
from util.errors import UserError
from util.precision import Precision

SIZE = '--height 64 --width 96 --batch_size 1'
ONCE = f'{SIZE} --rounds 1 --threads 1 --device cpu'
COMMANDS = {
    'data': '--num_images 2 --rounds 1',
    'op': '--only 160x192 --rounds 0 --device cpu',
    'model': ONCE,
    'train': ONCE,
    'criterion': f'{ONCE} --objects 2',
    'fps': f'{ONCE} --models DETR --precisions fp32',
    'step': f'{ONCE} --models H-Deformable-DETR --precisions fp32',
    'profile': f'{SIZE} --method DETR --device cpu',
}


@pytest.fixture
def small_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of ResNet-50 with six layers and hundreds of queries."""

    def shrink(settle: Callable, flags: Namespace) -> Namespace:
        small = SMALL | {'num_queries': 20, 'backbone_stages': 4}
        return settle(Namespace(**small | vars(flags) | {'num_classes': 91}))

    monkeypatch.setattr(common, 'settle', partial(shrink, common.settle))
    flags = {task: SMALL | flags | {'num_classes': 91} for task, flags in cases.FLAGS.items()}
    monkeypatch.setattr(cases, 'FLAGS', flags)


def test_every_command_is_listed() -> None:
    commands = next(action for action in get_args_parser()._actions if action.choices)
    assert list(commands.choices) == list(COMMANDS)


def test_usual_threads_are_those_of_pytorch() -> None:
    assert get_args_parser().parse_args(['step']).threads == torch.get_num_threads()


@pytest.mark.parametrize('name', step.PRECISIONS)
def test_a_step_computes_in_the_precision_of_its_name(name: str) -> None:
    model, found = torch.nn.Linear(2, 1), []

    def forward(precision: Precision) -> torch.Tensor:
        with precision.autocast():
            output = model(torch.ones(1, 2))
        found.append(output.dtype)
        return output.float().sum()

    step.build_contender(model, forward, name, torch.ones(1)).step()
    assert found == [torch.bfloat16 if 'bf16' in name else torch.float32]


@pytest.mark.parametrize('name', COMMANDS)
def test_the_command_runs(name: str, small_models: None, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    try:
        run_command(lambda args: args.run(args), get_args_parser(), [name, *COMMANDS[name].split()])
    finally:
        torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    assert '| official path, fp32 |' in printed or name != 'step'


def case_inputs(task: str) -> dict:
    """Inputs of `checkouts.build_case` for a case that takes little time."""
    if task == 'op':
        return op.checkout_inputs(op.Case('160x192', 1, queries=5), 'cpu')
    flags = SMALL | TWO_STAGE | {'dropout': 0.0}
    model = build_model(Namespace(**flags))[0]
    images = torch.rand(1, 3, 64, 96)
    return {
        'task': task,
        'flags': flags,
        'weights': model.state_dict(),
        'images': images,
        'targets': random_targets(2),
    }


@pytest.mark.parametrize('task', ['op', 'model', 'train', 'criterion'])
def test_a_case_has_equal_results_each_time(task: str) -> None:
    call = checkouts.build_case(case_inputs(task))
    first, second = call(), call()
    assert all(result.abs().max() > 0 for result in first)
    torch.testing.assert_close(first, second)


@pytest.mark.slow
def test_this_checkout_is_compared_with_another(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The other one is a link to this one; a checkout of another program is named."""
    (tmp_path / 'link').symlink_to(ROOT)
    args = Namespace(against=tmp_path / 'link', device='cpu', threads=1, rounds=1)
    common.compare_checkouts(args, [('train', case_inputs('train'))])
    assert '| train |' in capfd.readouterr().out
    torch.save(case_inputs('op'), tmp_path / 'case.pt')
    with pytest.raises(UserError, match='does not run this benchmark'):
        checkouts.Worker(tmp_path, tmp_path / 'case.pt', args)


def test_a_wrong_gradient_is_found_before_anything_is_timed() -> None:
    case = op.Case('160x192', 1, queries=20)
    value, locations, weights = op.draw_inputs(case, 'cpu')
    inputs = value, [side for shape in case.shapes() for side in shape], locations, weights
    grad = torch.randn(1, 20, op.HEADS * case.channels)
    peers = op.peer_calls(grad, inputs, None)
    forward, backward = peers['grid_sample']

    def halved() -> tuple:
        of_value, of_locations, of_weights = backward()
        return of_value, of_locations / 2, of_weights

    op.check_contenders('small', peers, torch.float32)
    with pytest.raises(ValueError, match='gradient of locations of mine differs from that of grid_sample'):
        op.check_contenders('small', peers | {'mine': (forward, halved)}, torch.float32)


@pytest.mark.parametrize(
    'case', [op.Case('160x192', 2, spread=3.0, levels=5), op.Case('160x192', 1, 9, float('inf'))]
)
def test_points_stay_clear_of_the_middle_of_pixels(case: op.Case) -> None:
    _, locations, weights = op.draw_inputs(case, 'cpu')
    pixels = locations.double() * torch.tensor(case.shapes()).flip(-1)[:, None] - 0.5
    assert (pixels - pixels.round()).abs().min() > 0.009
    torch.testing.assert_close(weights.sum((-1, -2)), torch.ones(weights.shape[:3]))


def test_the_official_extension_takes_the_place_of_the_operator() -> None:
    """One of its interface that computes in PyTorch."""
    calls = []

    def flat(shapes: torch.Tensor, starts: torch.Tensor) -> list[int]:
        assert starts.tolist() == [0, 30]
        return shapes.flatten().tolist()

    def forward(value, shapes, starts, locations, weights, step):
        calls.append('forward')
        return forward_pytorch(value, flat(shapes, starts), locations, weights)

    def backward(value, shapes, starts, locations, weights, grad, step):
        calls.append('backward')
        return list(backward_pytorch(grad, value, flat(shapes, starts), locations, weights))

    extension = SimpleNamespace(ms_deform_attn_forward=forward, ms_deform_attn_backward=backward)
    module, (query, *rest) = module_inputs('cpu')
    results = []
    for way in (extension, None):
        with official_path(way):
            assert way or implementation('cpu') == 'pytorch'
            output = module(query, *rest)
        results.append([output, *torch.autograd.grad(output.square().sum(), list(module.parameters()))])
    assert calls == ['forward', 'backward']
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.skipif(
    implementation('cpu') == 'pytorch', reason='the kernels are not built: bash scripts/build_ops.sh'
)
def test_a_step_without_the_operator_is_reported() -> None:
    module, inputs = module_inputs('cpu')
    flags = Namespace(family='deformable')
    assert not step.lacks_operator(flags, 'cpu', lambda: module(*inputs))
    assert step.lacks_operator(flags, 'cpu', lambda: None)
    assert not step.lacks_operator(Namespace(family='detr'), 'cpu', lambda: None)


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='starts programs by fork, so that PyTorch is loaded once')
def test_every_program_starts_from_any_folder() -> None:
    """With its --help, and nothing of this code on the path."""
    programs = [
        str(path) for path in (*ROOT.glob('tools/*.py'), ROOT / 'main.py', ROOT / 'run_with_submitit.py')
    ]
    code = f"""
import os, runpy, sys
import torch, torchvision, torch._dynamo, torch.distributed.fsdp, torchvision.transforms.v2, scipy.optimize
import hotcoco, matplotlib.backends.backend_agg, matplotlib.figure, pycocotools.mask
for program in {programs}:
    if os.fork() == 0:
        sys.argv = [program, '--help']
        sys.path.insert(0, os.path.dirname(program))
        try:
            runpy.run_path(program, run_name='__main__')
        except SystemExit as end:
            os._exit(bool(end.code))  # without taking apart what was loaded, which takes a second
    status = os.wait()[1]
    if status:
        sys.exit(f'{{program}} ends with {{status}}')
"""
    environment = {name: value for name, value in os.environ.items() if name != 'PYTHONPATH'}
    done = subprocess.run(
        [sys.executable, '-c', code], cwd='/', env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert len(programs) > 10
