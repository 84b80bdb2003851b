"""The changes that docs/extending.md shows apply to this code, and what they add runs."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import FrameType

import pytest
import torch

import engine
import main
from models import build_model
from tests.models import random_targets
from tests.runs import TINY, parse, run
from util.config.settle import EVERYTHING, settle
from util.nested_tensor import collate_fn

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / 'docs/extending.md').read_text()
# Title -> the diff and the command of that section.
TASKS = {
    title: (
        re.search(r'```diff\n(.*?)```', body, re.DOTALL)[1],
        re.search(r'```bash\n(.*?)```', body, re.DOTALL)[1],
    )
    for title, body in re.findall(r'^## (A new .*?)\n(.*?)(?=^## |\Z)', TEXT, re.DOTALL | re.MULTILINE)
}
LEFT_OUT = shutil.ignore_patterns('.git', '.venv', 'venv', 'output', 'exps', 'build', '.*_cache')
STEPS = {
    'DETR': '',
    'H-Deformable-DETR': '--two_stage --with_box_refine --mixed_selection --num_feature_levels 3 '
    '--hidden_dim 64 --hybrid_k 2 --hybrid_queries 12',
}
SIZES = re.search(r'```\n(--.*?)```', TEXT, re.DOTALL)[1].split()


def test_the_way_of_a_batch_names_every_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced from the loader to the end of the last step."""
    rows = re.search(r'\| part \| files \|\n.*?\n(.*?)\n\n', TEXT, re.DOTALL)[1]
    named = set()
    for group in re.split(r'[|;\n]', rows):  # the first of a group has the folder of all
        files = re.findall(r'`(.+?\.py)`', group)
        named |= {str(Path(files[0]).parent / Path(file).name) for file in files}
    passed = set()

    def note(frame: FrameType, event: str, argument: object) -> None:
        file = Path(frame.f_code.co_filename)
        if event == 'call' and file.is_relative_to(ROOT) and not file.is_relative_to(sys.prefix):
            passed.add(str(file.relative_to(ROOT)))

    def traced(*arguments: object, **options: object) -> dict:
        sys.setprofile(note)
        try:
            return engine.train_one_epoch(*arguments, **options)
        finally:
            sys.setprofile(None)

    monkeypatch.setattr(main, 'train_one_epoch', traced)
    run(tmp_path, '--epochs', '1')
    passed -= {file for file in passed if file.startswith('tests/')}
    assert named == passed
    assert f'passes through {len(passed)} files' in TEXT


@pytest.mark.parametrize(('method', 'flags'), STEPS.items())
def test_readme_states_the_length_of_a_training_step(method: str, flags: str) -> None:
    """Files and functions that one step passes through, from a loaded batch to the new weights."""
    args = settle(parse('', flags=TINY.replace('--conditional', flags)), EVERYTHING)
    model, criterion, _ = build_model(args)
    batch = collate_fn(list(zip(torch.randn(2, 3, 64, 64), random_targets(2, 1), strict=True)))
    optimizer, passed = engine.build_optimizer(model, 1e-4, 1e-5, 1e-4), set()

    def note(frame: FrameType, event: str, argument: object) -> None:
        code = frame.f_code
        file, named = Path(code.co_filename), not code.co_name.startswith('<')
        if event == 'call' and named and file.is_relative_to(ROOT) and not file.is_relative_to(sys.prefix):
            passed.add((file, code.co_qualname))

    sys.setprofile(note)
    try:
        engine.train_one_epoch(model, criterion, [batch], optimizer)
    finally:
        sys.setprofile(None)
    stated = f'{method} passes through {len({file for file, _ in passed})} files and {len(passed)} functions'
    assert stated in ' '.join((ROOT / 'README.md').read_text().split()), stated


def test_every_task_of_a_researcher_is_shown() -> None:
    assert [title.split()[2] for title in TASKS] == [
        'loss',
        'backbone',
        'decoder',
        'dataset',
        'augmentation',
        'metric',
        'scheme',
        'schedule',
    ]


# Runs main.py of several folders, each in a process of its own that has PyTorch already. A line of the input is a
# folder and a command line; the output of each run goes to the file `log` in its folder.
RUN_EACH = """
import os, runpy, shlex, sys
import torch, torchvision, torch._dynamo, torchvision.transforms.v2, scipy.optimize
import hotcoco, matplotlib.backends.backend_agg, matplotlib.figure, pycocotools.mask
for line in sys.stdin:
    folder, *words = shlex.split(line)
    child = os.fork()
    if not child:
        os.chdir(folder)
        log = os.open('log', os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1), os.dup2(log, 2)
        sys.argv, sys.path[0] = words, folder
        runpy.run_path(words[0], run_name='__main__')
        sys.stdout.flush()
        os._exit(0)  # without taking apart what was loaded, which takes a second
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which('git') is None or not hasattr(os, 'fork'), reason='needs git to apply a diff, and fork'
)
def test_the_changes_apply_and_run(tmp_path: Path) -> None:
    lines = []
    for number, (diff, command) in enumerate(TASKS.values()):
        copy = tmp_path / str(number)
        shutil.copytree(ROOT, copy, ignore=LEFT_OUT)
        subprocess.run(['git', 'apply', '-'], input=diff, text=True, cwd=copy, check=True)
        words = command.replace('\\\n', ' ').split()
        assert words[:2] == ['python', 'main.py']
        lines.append(shlex.join([str(copy), *words[1:], *SIZES]))
    done = subprocess.run(
        [sys.executable, '-c', RUN_EACH], input='\n'.join(lines), capture_output=True, text=True, check=True
    )
    codes = [int(line) for line in done.stdout.split()]
    for number, (title, code) in enumerate(zip(TASKS, codes, strict=True)):
        log = (tmp_path / str(number) / 'log').read_text()
        assert code == 0 and 'epoch 1/1: loss' in log, f'{title}:\n{log}'
