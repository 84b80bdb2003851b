"""The changes that docs/extending.md shows apply to this code, and what they add runs."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

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
TINY = """--img_size 64 --max_size 64 --backbone_weights none --hidden_dim 32 --nheads 4 --enc_layers 1 --dec_layers 2
    --dim_feedforward 64 --num_queries 10 --epochs 1 --num_workers 0 --device cpu --shapes_train 8 --shapes_val 4"""


def test_every_task_of_a_researcher_is_shown() -> None:
    assert [title.split()[2] for title in TASKS] == ['loss', 'backbone', 'data', 'scheme', 'schedule']


@pytest.mark.slow
@pytest.mark.skipif(shutil.which('git') is None, reason='needs git to apply a diff')
@pytest.mark.parametrize('title', TASKS)
def test_the_change_applies_and_runs(title: str, tmp_path: Path) -> None:
    diff, command = TASKS[title]
    copy = tmp_path / 'code'
    shutil.copytree(ROOT, copy, ignore=LEFT_OUT)
    subprocess.run(['git', 'apply', '-'], input=diff, text=True, cwd=copy, check=True)
    words = command.replace('\\\n', ' ').split()
    assert words[:2] == ['python', 'main.py']
    done = subprocess.run(
        [sys.executable, *words[1:], *TINY.split()], cwd=copy, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert 'epoch 1/1: loss' in done.stdout
