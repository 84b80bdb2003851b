"""Files of weights of any kind are read as plain data, and nothing in them is run."""

import argparse
import json
import os
import pickle
import subprocess
from collections import Counter, deque
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from models.weights.read import extract_weights, read_checkpoint
from models.weights.write import write_safetensors
from tests.models import SMALL


class Program:
    """An object that would call a function with arguments when its pickle is read."""

    def __init__(self, function: object, *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple:
        return self.call


def programs(proof: Path) -> dict[str, object]:
    """Three ways to run code on loading; each would make the file `proof`."""
    touch = f'open({str(proof)!r}, "w").close()'
    return {
        'a command': Program(os.system, f'touch {proof}'),
        'a function of Python': Program(exec, touch),
        'a process': Program(subprocess.Popen, ['touch', str(proof)]),
    }


@pytest.mark.parametrize('old_format', [False, True], ids=['zip', 'before 1.6'])
@pytest.mark.parametrize('way', programs(Path()))
def test_no_program_is_run(
    way: str, old_format: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    proof, path = tmp_path / 'proof', tmp_path / 'weights.pth'
    content = {'model': {'a': torch.ones(2)}, 'other': programs(proof)[way]}
    torch.save(content, path, _use_new_zipfile_serialization=not old_format)
    assert torch.equal(read_checkpoint(path)['model']['a'], torch.ones(2))
    assert 'nothing of that was run' in capsys.readouterr().out
    path.write_bytes(pickle.dumps(programs(proof)[way]))
    with pytest.raises(ValueError, match='nothing of that was run'):
        read_checkpoint(path)
    assert not proof.exists()


def test_plain_data_beside_foreign_objects_are_kept(tmp_path: Path) -> None:
    content = {
        'model': {'a': torch.nn.Parameter(torch.randn(3).bfloat16())},
        'args': argparse.Namespace(lr=1e-4, folder=Path('/a/b')),
        'numbers': [np.float64(0.5), np.int64(2), deque([1])],
        'milestones': Counter([3, 3]),
        'history': deque([1]),
        'dtype': torch.float16,
    }
    torch.save(content, tmp_path / 'mixed.pth')
    found = read_checkpoint(tmp_path / 'mixed.pth')
    assert found['args'] == argparse.Namespace(lr=1e-4, folder='/a/b')
    assert found['numbers'] == [0.5, 2] and found['milestones'] == Counter({3: 2})
    assert 'history' not in found and found['dtype'] == 'torch.float16'
    assert torch.equal(found['model']['a'], content['model']['a'])


def test_safetensors_and_folders_of_transformers(tmp_path: Path) -> None:
    state = {'a': torch.randn(2, 3), 'b': torch.arange(3)}
    write_safetensors(tmp_path / 'whole.safetensors', {'model': state, 'args': {'lr': 1}})
    found = read_checkpoint(tmp_path / 'whole.safetensors')
    assert found['args'] == {'lr': 1} and same(found['model'], state)
    folder = tmp_path / 'folder'
    folder.mkdir()
    with pytest.raises(ValueError, match='name the file of weights'):
        read_checkpoint(folder)
    for name in state:
        write_safetensors(folder / f'{name}.safetensors', {'model': {name: state[name]}})
    index = folder / 'model.safetensors.index.json'
    index.write_text(json.dumps({'weight_map': {name: f'{name}.safetensors' for name in state}}))
    (folder / 'config.json').write_text('{"model_type": "detr"}')
    found = read_checkpoint(folder)
    assert same(found['model'], state) and found['config'] == {'model_type': 'detr'}
    index.write_text(json.dumps({'weight_map': {'a': '../whole.safetensors'}}))
    with pytest.raises(ValueError, match='not a file of this folder'):
        read_checkpoint(folder)


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_what_is_no_file_of_weights_is_refused_in_a_sentence(tmp_path: Path) -> None:
    whole, path = tmp_path / 'whole.pth', tmp_path / 'other.pth'
    torch.save({'a': torch.ones(100)}, whole)
    for content in (b'', b'some text', whole.read_bytes()[:300], b'PK\x03\x04', b'\x80\x02'):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=str(path)) as error:
            read_checkpoint(path)
        assert len(str(error.value).splitlines()) == 1 and len(str(error.value)) < 400
    for value in ([1], torch.ones(2)):
        torch.save(value, path)
        with pytest.raises(ValueError, match='not a dictionary of weights'):
            read_checkpoint(path)
    torch.jit.script(torch.nn.Linear(2, 2)).save(path)
    with pytest.raises(ValueError, match='TorchScript'):
        read_checkpoint(path)
    for checkpoint in ({'model': None}, {}, {'epoch': 3}):
        with pytest.raises(ValueError, match='holds no weights'):
            extract_weights(checkpoint)


def test_names_of_ddp_lose_their_prefix() -> None:
    assert list(extract_weights({'model': {'module.a': torch.ones(1)}})) == ['a']


def test_backbone_weights_go_through_the_same_reader(tmp_path: Path) -> None:
    from argparse import Namespace

    from models import build_model

    proof, path = tmp_path / 'proof', tmp_path / 'backbone.pth'
    torch.save({'model': {'conv1.weight': torch.ones(1)}, 'x': programs(proof)['a command']}, path)
    with pytest.raises(ValueError, match=r'--backbone_weights .* another shape'):
        build_model(Namespace(**SMALL | {'backbone_weights': str(path)}))
    path.write_bytes(b'')
    with pytest.raises(ValueError, match=r'--backbone_weights.*empty'):
        build_model(Namespace(**SMALL | {'backbone_weights': str(path)}))
    assert not proof.exists()


def test_a_small_file_cannot_ask_for_much_memory(tmp_path: Path) -> None:
    """A large memo index makes C's unpickler allocate an array of that size: 11 GB for 19 bytes (found by fuzzing)."""
    resource = pytest.importorskip('resource')
    (tmp_path / 'bomb.pth').write_bytes(b'\x80\x02K\x01r' + (673_710_081).to_bytes(4, 'little') + b'.')
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=r'bomb\.pth'):
        read_checkpoint(tmp_path / 'bomb.pth')
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1e6  # kB
