"""
Read files of weights of any project as plain data: numbers, text, lists, dictionaries and tensors.

Nothing in a file is ever executed. A pickle may name any function; here it gets the few that make plain data,
and inert stand-ins for everything else. Entries that would have held such objects are left out, and their
names are printed.
"""

import argparse
import json
import pickle
import re
import types
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from util.distributed.collectives import is_main_process
from util.download import download, is_url
from util.errors import UserError

SAFETENSORS = '.safetensors'
# Files of a folder that transformers has saved, the preferred first.
TRANSFORMERS_FILES = (
    'model.safetensors',
    'model.safetensors.index.json',
    'pytorch_model.bin',
    'pytorch_model.bin.index.json',
)
TORCH_DTYPES = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
AVERAGED = ('model_ema', 'ema_state', 'ema_model', 'state_dict_ema')  # where projects keep EMA weights
FLAGS_KEY, CLASSES_KEY = 'args', 'class_map'  # in a checkpoint, and in a safetensors file's metadata


class Inert:
    """Stand-in for an object that is not plain data. Calling, filling or setting it does nothing."""

    def __new__(cls, *args: object, **kwargs: object) -> 'Inert':
        return object.__new__(cls)

    def __init__(self, *args: object, **kwargs: object) -> None: ...

    def __call__(self, *args: object, **kwargs: object) -> 'Inert':
        return self

    def __setstate__(self, state: object) -> None: ...

    def __setitem__(self, key: object, value: object) -> None: ...

    def append(self, *items: object) -> None: ...

    extend = add = append


class Flags:
    """Stand-in for argparse.Namespace; a class of each reading, so that no file can change the real one."""


NUMBERS = complex | float | int
COLLECTIONS = dict | list | tuple | set | frozenset
PLAIN = Tensor | torch.dtype | str | bytes | NUMBERS | COLLECTIONS | Flags | None


class NumberType:
    """Stand-in for numpy.dtype, which makes Python numbers of numpy's scalars."""

    def __init__(self, text: str = '', *others: object) -> None:
        self.text, self.order = text, '='

    def __setstate__(self, state: tuple) -> None:
        self.order = state[1]

    def number(self, raw: object = b'') -> object:
        """Return the Python number that numpy stores in these bytes."""
        if not isinstance(raw, bytes) or not re.fullmatch(r'[biuf]\d', self.text):
            raise pickle.UnpicklingError(f'a numpy number of type {self.text!r} is not known')
        order = self.order if self.order in '<>' else '='
        return np.frombuffer(raw, np.dtype(order + self.text))[0].item()


def plain_functions() -> dict[str, Any]:
    """Return the functions that a file may name, new ones for each reading."""

    def tensor(storage: Any, offset: int, size: tuple, stride: tuple, *hooks: object) -> Tensor:
        return torch._utils._rebuild_tensor(storage, offset, size, stride)

    def encode(text: str, encoding: str) -> bytes:
        if encoding != 'latin1':
            raise pickle.UnpicklingError(f'text in {encoding} is not expected')
        return text.encode('latin1')

    functions: dict[str, Any] = {
        'collections.OrderedDict': OrderedDict,
        'builtins.set': set,
        'builtins.frozenset': frozenset,
        'argparse.Namespace': type('Flags', (Flags,), {}),
        'numpy.dtype': type('NumberType', (NumberType,), {}),
        'collections.Counter': lambda *counts: Counter(*counts),
        '_codecs.encode': encode,
        'torch.Size': lambda *sizes: tuple(*sizes),
        'torch.device': lambda *names: ':'.join(map(str, names)),
        'torch._utils._rebuild_tensor': tensor,
        'torch._utils._rebuild_tensor_v2': tensor,
        'torch._utils._rebuild_parameter': lambda data, *others: data,
        'torch._utils._rebuild_parameter_with_state': lambda data, *others: data,
    }
    for package in ('numpy.core', 'numpy._core'):
        functions[f'{package}.multiarray.scalar'] = lambda dtype, *raw: dtype.number(*raw)
    for module in ('pathlib', 'pathlib._local'):
        for name in ('Path', 'PosixPath', 'WindowsPath', 'PurePath', 'PurePosixPath', 'PureWindowsPath'):
            functions[f'{module}.{name}'] = lambda *parts: str(PurePosixPath(*parts))
    return functions


def restricted_pickle(refused: set[str]) -> types.ModuleType:
    """Return a `pickle_module` for torch.load. Names that are not plain data are added to `refused`."""

    # The unpickler in Python: in the one in C a large memo index in a file of a hundred bytes allocates
    # gigabytes.
    class Unpickler(pickle._Unpickler):  # type: ignore[misc,name-defined]  # private, but as old as Python 3
        def __init__(self, file: IO[bytes], **options: Any) -> None:
            super().__init__(file, **options)
            self.functions = plain_functions()

        def find_class(self, module: str, name: str) -> Any:
            full = f'{module}.{name}'.replace('__builtin__', 'builtins')
            if full in self.functions:
                return self.functions[full]
            if module == 'torch' and name in TORCH_DTYPES:
                return TORCH_DTYPES[name]
            refused.add(full)
            return type('Inert', (Inert,), {})

    module = types.ModuleType('restricted_pickle')
    module.Unpickler, module.UnpicklingError = Unpickler, pickle.UnpicklingError  # type: ignore[attr-defined]
    module.load = lambda file, **options: Unpickler(file, **options).load()  # type: ignore[attr-defined]
    return module


def to_plain(value: Any) -> Any:
    """Return `value` without the entries that are not plain data."""
    if isinstance(value, torch.dtype):
        return str(value)
    if isinstance(value, Flags):
        return argparse.Namespace(**to_plain(vars(value)))
    if isinstance(value, dict):
        pairs = {
            key: to_plain(entry)
            for key, entry in value.items()
            if isinstance(key, PLAIN) and isinstance(entry, PLAIN)
        }
        return Counter(pairs) if isinstance(value, Counter) else pairs
    if isinstance(value, list | tuple | set | frozenset):
        kind = list if isinstance(value, list) else tuple
        return kind(to_plain(entry) for entry in value if isinstance(entry, PLAIN))
    return value if isinstance(value, PLAIN) else None


def read_checkpoint(source: str | Path) -> dict:
    """Read a file or folder of weights, or the file at an http(s) URL (kept in torch.hub's folder).

    Known are files of torch.save (also of old versions), safetensors, and folders that transformers has
    saved. Objects that are not plain data are left out and named in a printed line.

    Raises:
        UserError: there is no such file, or it holds no dictionary of weights; the message names it.
    """
    path = download(str(source)) if is_url(source) else Path(source)
    if path.is_dir():
        return read_folder(path)
    if not path.is_file():
        raise UserError(f'no checkpoint at {path}: check the path')
    refused: set[str] = set()
    try:
        checkpoint = read_safetensors(path) if is_safetensors(path) else to_plain(read_torch(path, refused))
        if not isinstance(checkpoint, dict):
            is_program = checkpoint is None and refused
            content = 'an object of a program' if is_program else f'a {type(checkpoint).__name__}'
            raise UserError(f'{path} holds {content}, not a dictionary of weights')
    except UserError as error:
        raise UserError(f'{error}{names_text(refused)}') from error
    except RecursionError:
        raise UserError(f'{path} is not a readable checkpoint: it is nested without end') from None
    except Exception as error:  # a damaged file can end in almost any of them
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f'{path} is not a readable checkpoint ({reason[:200]}): is it whole?{names_text(refused)}'
        ) from error
    if refused and is_main_process():
        print(f'{path}: objects that are not plain data were left out{names_text(refused)}', flush=True)
    return checkpoint


def extract_weights(
    checkpoint: Mapping, averaged: bool = True, source: str = 'the file'
) -> dict[str, Tensor]:
    """Return the weights in a checkpoint, which may also be a plain state dict, without the prefix of DDP.

    Args:
        averaged: return the EMA weights if the file has them, because those were evaluated.
        source: name of the file, for messages.

    Raises:
        UserError: the checkpoint has no weights.
    """
    names = (*AVERAGED * averaged, 'model', 'state_dict')
    state = next((checkpoint[name] for name in names if name in checkpoint), checkpoint)
    entries = state.items() if isinstance(state, Mapping) else ()
    weights = {name: value for name, value in entries if isinstance(value, Tensor) and isinstance(name, str)}
    if not weights:
        raise UserError(
            f'{source} holds no weights, but {", ".join(map(str, checkpoint)) or "nothing"}: expected a '
            'state dict, or one below "model" or "state_dict"'
        )
    if all(name.startswith('module.') for name in weights):
        weights = {name.removeprefix('module.'): value for name, value in weights.items()}
    return weights


def names_text(refused: set[str]) -> str:
    """List what a file names that is not plain data, '' if nothing."""
    names = sorted(refused)
    dots = ', ...' if len(names) > 6 else ''
    return f' (it names {", ".join(names[:6])}{dots}; nothing of that was run)' if names else ''


def read_torch(path: Path, refused: set[str]) -> object:
    """Read a file of torch.save with inert stand-ins for objects that are not plain data."""
    with path.open('rb') as file:
        start = file.read(2)
    if not start:
        raise UserError(f'{path} is empty: download or copy it again')
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = [PurePosixPath(name).name for name in archive.namelist()]
        if 'constants.pkl' in names:
            raise UserError(
                f'{path} is a TorchScript archive, which holds a program: save its state_dict() instead'
            )
        if 'data.pkl' not in names:
            raise UserError(f'{path} is a zip archive without weights: name the file of weights in it')
    elif start == b'PK':
        raise UserError(f'{path} is not a readable checkpoint: it is cut off, so download or copy it again')
    elif start[:1] != b'\x80':
        raise UserError(f'{path} is not a readable checkpoint: neither torch.save nor safetensors wrote it')
    return torch.load(path, map_location='cpu', pickle_module=restricted_pickle(refused), weights_only=False)


def is_safetensors(path: Path) -> bool:
    with path.open('rb') as file:
        start = file.read(9)
    length = int.from_bytes(start[:8], 'little')
    return path.suffix == SAFETENSORS or (start[8:] == b'{' and length < path.stat().st_size)


def safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise UserError(
            'files in the safetensors format need its package: pip install safetensors'
        ) from error
    return safetensors


def read_safetensors(path: Path) -> dict:
    """Read a file of safetensors; flags and classes are in its metadata if `write_safetensors` wrote it."""
    with safetensors().safe_open(path, 'pt') as file:
        metadata = file.metadata() or {}
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dictionary
    extras = {key: json.loads(metadata[key]) for key in (FLAGS_KEY, CLASSES_KEY) if key in metadata}
    return {'model': state} | extras


def read_folder(folder: Path) -> dict:
    """Read a folder of transformers: weights in one file or in several with an index, and its `config`."""
    name = next((name for name in TRANSFORMERS_FILES if (folder / name).is_file()), None)
    if name is None:
        raise UserError(
            f'{folder} is a folder without {" or ".join(TRANSFORMERS_FILES)}: name the file of weights'
        )
    files = {name}
    if name.endswith('.json'):
        index = read_json(folder / name).get('weight_map')
        if not isinstance(index, dict) or not index:
            raise UserError(f'{folder / name} has no weight_map, so the files of weights are not known')
        files = {str(file) for file in index.values()}
        if outside := [file for file in files if Path(file).name != file]:
            raise UserError(f'{folder / name} names {outside[0]}, which is not a file of this folder')
    state: dict[str, Tensor] = {}
    for file in sorted(files):
        part = read_checkpoint(folder / file)
        state |= part['model'] if Path(file).suffix == SAFETENSORS else part
    config = folder / 'config.json'
    return {'model': state} | ({'config': read_json(config)} if config.is_file() else {})


def read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding='utf-8'))
    except (ValueError, RecursionError) as error:
        raise UserError(f'{path} is not a readable JSON file ({error})') from error
    if not isinstance(content, dict):
        raise UserError(f'{path} holds a {type(content).__name__}, not an object')
    return content
