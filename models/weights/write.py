"""Write weights in the safetensors format, also as a folder that transformers opens."""

import json
from collections.abc import Mapping
from pathlib import Path

from models.weights.layouts import State, to_transformers
from models.weights.read import CLASSES_KEY, FLAGS_KEY, SAFETENSORS, safetensors
from models.weights.records import write_config
from util.files import save_atomically


def write_safetensors(path: Path, checkpoint: dict) -> None:
    """Write the weights in 'model', and as metadata flags and classes.

    Each of several tensors that share memory is written in full.

    Raises:
        OSError: the file cannot be written.
    """
    metadata = {key: json.dumps(checkpoint[key]) for key in (FLAGS_KEY, CLASSES_KEY) if key in checkpoint}
    state = {name: value.detach().clone().contiguous() for name, value in checkpoint['model'].items()}
    library = safetensors()
    try:
        library.torch.save_file(state, path, metadata | {'format': 'pt'})
    except library.SafetensorError as error:
        raise OSError(f'{error}') from error


def write_transformers(folder: Path, state: State, flags: Mapping, names: list[str | None]) -> None:
    """Write weights and configuration for `from_pretrained` of transformers, whole or not at all.

    Args:
        flags: settled flags of the detector, with `family`.
        names: name of each class index; None: no class.

    Raises:
        UserError: transformers has no such detector.
    """
    config = write_config(flags, names)
    weights = to_transformers(state, flags['family'])

    def save(path: Path) -> None:
        path.mkdir()
        write_safetensors(path / f'model{SAFETENSORS}', {'model': weights})
        (path / 'config.json').write_text(json.dumps(config, indent=1))

    save_atomically(folder, save)
