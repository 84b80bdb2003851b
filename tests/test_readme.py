"""Every command of README.md and docs/*.md runs, on small made files that have the names of the text."""

import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from argparse import Namespace
from functools import partial
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

import main
from datasets.class_map import ClassMap
from datasets.shapes import ShapesDetection
from datasets.shapes import export_shapes as write_shapes
from models import build_model, hub
from tests.runs import ROOT
from util.config.recipes import find_row
from util.config.settle import settle

# Flags that are added, by the beginning of a command; the first that fits.
SMALL = """--img_size 64 --max_size 64 --backbone resnet18 --backbone_weights none
    --hidden_dim 32 --nheads 4 --enc_layers 1 --dec_layers 2 --dim_feedforward 64 --num_queries 10 --batch_size 2
    --num_workers 0 --epochs 1 --device cpu --conditional"""
FLAGS = {
    'main.py --help': '',
    'main.py --eval --resume': '--device cpu',
    'main.py --coco_path DATA --eval --model': '--img_size 64 --max_size 64 --num_workers 0 --device cpu',
    'main.py --coco_path DATA --conditional --dry_run': '',
    'main.py --model co_dino_resnet50 --dry_run': '',
    'main.py --coco_path DATA --two_stage': SMALL.replace('--conditional', '--img_size 128 --max_size 160'),
    'main.py': SMALL,
    'tools/predict.py': '--device cpu',
    'tools/visualize_attention.py': '--device cpu',
    'tools/': '',
}
# Commands that other tests run, or that a test cannot.
ELSEWHERE = {
    'bash scripts/quickstart.sh': 'below, with fewer images',
    'bash scripts/test.sh': 'this',
    'bash scripts/build_ops.sh': 'test.sh calls it',
    'bash scripts/gpu_check.sh': 'test_gpu_check.py',
    'bash scripts/compare_': 'hours of training; below, its flags are checked',
    'python -m tests.ops_check': 'test_ops.py',
    'python tools/benchmark.py op': 'test_gpu_check.py, smaller',
    'torchrun --nproc_per_node 8': 'test_faults.py, with two processes',
    './tools/run_dist_launch.sh': 'test_launch.py',
    './tools/run_dist_slurm.sh': 'test_slurm.py',
    'python run_with_submitit.py': 'test_submit.py and test_slurm.py',
    'python tools/convert_checkpoint.py co_dino': 'test_convert_checkpoint.py, with files of that layout',
    'python tools/demo.py': 'test_demo.py, in a browser',
    'python tools/export.py': 'test_export.py',
    'python tools/predict.py --model ms_detr_resnet50': 'test_zoo.py, with a smaller row',
    'python main.py --dataset_file voc': 'test_foreign_data.py',
    'python main.py --dataset_file yolo': 'test_foreign_data.py',
    'python tools/convert_dataset.py': 'test_foreign_data.py',
    'python main.py --dataset_file lvis': 'test_lvis.py',
    'python main.py --coco_path MINE --model': 'test_zoo.py, with a smaller row',
}


def blocks(language: str) -> list[tuple[str, str]]:
    """Return the blocks of a language, with the names of their files; README comes first."""
    return [
        (path.name, text)
        for path in (ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md')))
        if path.name != 'extending.md'  # test_extending.py runs it, with its diffs
        for text in re.findall(rf'```{language}\n(.*?)```', path.read_text(), re.DOTALL)
    ]


def commands() -> list[tuple[str, str]]:
    """Return commands as one line each, without comments."""
    found = []
    for name, text in blocks('bash'):
        for line in re.sub(r'\\\n\s*', '', text).splitlines():
            if line := re.sub(r'\s+#.*', '', line).strip():
                found.append((name, line))
    return found


def is_elsewhere(command: str) -> bool:
    words = re.sub(r'^(\w+=("[^"]*"|\S*) )+', '', command)
    return words.startswith(tuple(ELSEWHERE))


def added(command: str) -> list[str] | None:
    """Return the flags that are added to a command; None if the command is not known."""
    program = command.removeprefix('python ')
    return next((flags.split() for start, flags in FLAGS.items() if program.startswith(start)), None)


@pytest.fixture(scope='module')
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the code, and with the files that the text names."""
    folder = tmp_path_factory.mktemp('user')
    for name in ('main.py', 'tools', 'scripts', 'docs'):
        (folder / name).symlink_to(ROOT / name)
    train, val = ShapesDetection(4, 'train', image_size=64), ShapesDetection(3, 'val', image_size=64)
    coco = ClassMap.coco()
    for data in (train, val):
        write_shapes(folder / 'MINE', data)
        write_shapes(folder / 'DATA', data)
        path = folder / f'DATA/annotations/instances_{data.split}2017.json'
        classes = [{'id': number, 'name': name} for number, name in enumerate(coco.names) if name]
        path.write_text(json.dumps(json.loads(path.read_text()) | {'categories': classes}))
    (folder / 'DIR').symlink_to('DATA')
    (folder / 'my').mkdir()
    for part in ('train', 'val'):
        (folder / f'my/{part}').symlink_to(f'../DATA/{part}2017')
        (folder / f'my/{part}.json').symlink_to(f'../DATA/annotations/instances_{part}2017.json')
    (folder / 'photos').mkdir()
    for number in range(2):
        image = PIL.Image.fromarray(val[number][0].permute(1, 2, 0).numpy())
        for name in (f'photos/{number}.jpg', 'image.jpg'):
            image.save(folder / name)
    (folder / 'IMAGE').symlink_to('image.jpg')
    (folder / 'val.json').symlink_to('my/val.json')
    (folder / 'val').symlink_to('my/val')
    (folder / 'WEIGHTS.pth').symlink_to('OUT/checkpoint.pth')
    return folder


def write_weights(name: str, path: Path) -> None:
    """Write random weights of a row of the zoo."""
    model, _ = hub.build_row(find_row(name))
    torch.save({'model': model.state_dict()}, path)


def write_video(path: Path) -> None:
    av = pytest.importorskip('av')
    with av.open(str(path), 'w') as film:
        stream = film.add_stream('libx264', rate=5)
        stream.width, stream.height, stream.pix_fmt = 64, 48, 'yuv420p'
        for shade in (40, 120):
            film.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((48, 64, 3), shade, np.uint8))))
        film.mux(stream.encode())


@pytest.fixture
def user(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Someone in that folder, for whom published weights are fetched already: random ones of DETR."""
    (tmp_path / 'checkpoints').mkdir()
    file = tmp_path / 'checkpoints' / Path(find_row('detr_resnet50').source()).name
    write_weights('detr_resnet50', file)
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    monkeypatch.chdir(place)
    return monkeypatch


def test_none_is_left_out_in_silence() -> None:
    unknown = [command for _, command in commands() if not is_elsewhere(command) and added(command) is None]
    assert not unknown and len(commands()) > 40


@pytest.mark.slow
@pytest.mark.draws
def test_commands(user: pytest.MonkeyPatch) -> None:
    """In the order of the text: what one leaves, the next reads."""
    write_video(Path('video.mp4'))
    for file, command in commands():
        if is_elsewhere(command):
            continue
        words = [*shlex.split(command)[1:], *(added(command) or [])]
        if words[0] == 'main.py' and 'OUT' in words and not {'--resume', '--check_data'} & set(words):
            shutil.rmtree('OUT', ignore_errors=True)  # another run
        user.setattr(sys, 'argv', words)
        try:
            runpy.run_path(words[0], run_name='__main__')
        except SystemExit as end:
            assert not end.code, f'{file}: {command}\n{end.code}'
    for name in ('OUT/predictions.png', 'attention.png', 'report.html', 'small.safetensors'):
        assert Path(name).is_file(), name


@pytest.mark.slow
def test_lines_of_python(user: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    user.setattr(torch.hub, 'load', partial(torch.hub.load, source='local'))
    images, target_sizes = [torch.zeros(3, 64, 64, dtype=torch.uint8)], torch.tensor([[64, 64]])
    ran = 0
    for _, text in blocks('python'):
        if 'torch.hub.load' in text:
            names = {'torch': torch, 'REPO': str(ROOT), 'images': images, 'target_sizes': target_sizes}
            exec(text, names)
            assert isinstance(names['detect']('image.jpg'), list)
            ran += 1
    assert ran >= 3


def script(name: str, *flags: str, **environment: str) -> str:
    """Run a script with this Python in place of an environment of its own; return what it prints."""
    path = f'{environment.pop("first", "")}:{Path(sys.executable).parent}:{os.environ["PATH"]}'
    done = subprocess.run(
        ['bash', str(ROOT / 'scripts' / name), *flags],
        env=os.environ | {'VENV': 'none', 'PATH': path} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def printing_python(folder: Path) -> str:
    """A folder with a `python` that prints its words."""
    folder.mkdir()
    (folder / 'python').write_text('#!/bin/sh\necho "$@"\n')
    (folder / 'python').chmod(0o755)
    return str(folder)


@pytest.mark.slow
def test_the_quickstart_with_few_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Twice: the second run, of the same words, finds that all is done."""
    out = tmp_path / 'out'
    small = f'--output_dir {out} --device cpu --shapes_train 16 --shapes_val 4 --epochs 1'.split()
    assert f'The results lie in {out}:' in script('quickstart.sh', *small)
    for name in ('predictions.png', 'curves.png', 'metrics.csv', 'log.jsonl', 'checkpoint.pth'):
        assert (out / name).is_file(), name
    printed = script('quickstart.sh', *small, first=printing_python(tmp_path / 'bin'))
    words = next(line.split() for line in printed.splitlines() if line.startswith('main.py '))
    main.main(main.get_args_parser().parse_args(words[1:]))
    assert 'all 1 epochs are done' in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize('data', ['', '--coco_path DATA'])
def test_the_comparison_asks_for_flags_that_fit(data: str, tmp_path: Path) -> None:
    """Of every scheme; nothing is trained."""
    names = [
        'plain',
        'hybrid',
        'mixed',
        'hybrid+mixed',
        'co-deformable',
        'all',
        'co-dino',
        'detr',
        'conditional',
        'bf16',
        'fp16',
    ]
    out = {'OUT': str(tmp_path / 'out'), 'NAMES': ' '.join(names), 'SEEDS': '0', 'DATA': data}
    script('compare_schemes.sh', first=printing_python(tmp_path / 'bin'), **out)
    for name in names:
        words = (tmp_path / f'out/{name}/seed0/train.log').read_text().split()
        assert words[:2] == ['-u', 'main.py']
        args = settle(main.get_args_parser().parse_args(words[2:]))
        assert args.dataset_file == ('auto' if data else 'shapes')
        with torch.device('meta'):
            build_model(Namespace(**vars(args) | {'backbone_weights': 'none'}))
