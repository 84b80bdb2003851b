"""torch.hub beside packages of other people that are called `datasets`, `models` and `util` too."""

import os
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import torch

from models import build_model
from tests.models import SMALL, TRICKS
from tests.runs import ROOT
from util.config.recorded import settle_recorded

NAMES = 'datasets', 'models', 'util'
# A program of a user: where nothing of these names is imported yet, and then beside theirs, from another copy of ours.
PROGRAM = """
import copy, pickle, sys, torch

def named():
    return {name: module for name, module in sys.modules.items() if name.split('.')[0] in ('datasets', 'models', 'util')}

def load(*given, **flags):
    return torch.hub.load(*given, **flags, source='local')

repo, other, weights = sys.argv[1:]
path, finders = list(sys.path), list(sys.meta_path)
image = torch.randint(0, 256, (3, 128, 128), dtype=torch.uint8)
detect = load(repo, 'detector', '', weights, 'cpu')
assert {'name', 'score', 'box'} == set(detect(image, score_threshold=0)[0])
assert not named() and sys.path == path

import datasets, models.misc, util
theirs = named()
assert models.misc.NAME == 'models' and set(theirs) == {'datasets', 'models', 'models.misc', 'util'}
second = load(other, 'detector', '', weights, 'cpu')
assert type(second) is not type(detect)
torch.testing.assert_close(second.detect(image), detect.detect(image))
assert type(load(other, 'detector', '', weights, 'cpu')) is type(second)
assert len(sys.meta_path) == len(finders) + 2

torch.testing.assert_close(pickle.loads(pickle.dumps(second)).detect(image), second.detect(image))
copied = copy.deepcopy(second.model).train()
copied(torch.rand(2, 3, 128, 128))['pred_logits'].sum().backward()
backbone = sys.modules[type(second).__module__.replace('detector', 'backbone')]
backbone.fetch_imagenet = lambda *_: weights  # no network
backbone.read_weights, backbone.load_backbone = (lambda *_: {}), (lambda *_, **more: None)
with torch.device('meta'):
    model, postprocess = load(other, 'detr_resnet50', return_postprocessor=True)
    outputs = model.eval()(torch.zeros(1, 3, 64, 64))
    assert postprocess(outputs, torch.ones(1, 2))[0]['boxes'].shape == (100, 4)
    try:
        load(other, 'ms_detr_resnet50', weights='no/such.pth')
    except ValueError as error:
        assert 'no checkpoint at no/such.pth' in str(error)

import datasets.more
assert datasets.more.NAME == 'datasets' and sys.path == path
assert named() == theirs | {'datasets.more': sys.modules['datasets.more']}
"""


def stand_ins(folder: Path) -> Path:
    """Packages of the same names that hold something else."""
    for name in (*NAMES, 'scripts'):
        (folder / name).mkdir(parents=True)
        (folder / name / '__init__.py').touch()
        for module in ('misc', 'more'):
            (folder / name / f'{module}.py').write_text(f'NAME = {name!r}\n')
    return folder


def unpacked(folder: Path) -> Path:
    """A copy of what the hub reads, as from an archive: without what is built."""
    for name in (*NAMES, 'scripts'):
        shutil.copytree(
            ROOT / name, folder / name, ignore=shutil.ignore_patterns('*.so', '__pycache__', 'src')
        )
    shutil.copy(ROOT / 'hubconf.py', folder)
    return folder


def test_entries_and_detectors_work_beside_packages_of_the_same_names(tmp_path: Path) -> None:
    """Theirs stay as they are, whoever comes first, and ours go on working."""
    weights, flags = tmp_path / 'small.pth', SMALL | TRICKS | {'hidden_dim': 64, 'num_classes': 91}
    torch.save(
        {'model': build_model(Namespace(**flags))[0].state_dict(), 'args': vars(settle_recorded(flags))},
        weights,
    )
    folders = [str(ROOT), str(unpacked(tmp_path / 'copy'))]
    environment = os.environ | {'PYTHONPATH': str(stand_ins(tmp_path / 'theirs')), 'OMP_NUM_THREADS': '1'}
    command = [sys.executable, '-c', PROGRAM, *folders, str(weights)]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
