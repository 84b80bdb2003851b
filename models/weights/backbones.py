"""Initial weights of backbones (`--backbone_weights`): fetch and read their files, and refuse those of other networks."""

import re

import torch
from torch import Tensor, nn

from util.download import download
from util.errors import UserError

from .read import extract_weights, read_checkpoint


def fetch_imagenet(name: str, url: str) -> str:
    """Return the path of the fetched ImageNet weights of a network."""
    try:
        return str(download(url))
    except UserError as error:
        raise UserError(no_download(name, error)) from error


def no_download(name: str, error: Exception) -> str:
    return (
        f'the ImageNet weights of {name} could not be downloaded ({error}): put the file into '
        f'{torch.hub.get_dir()}/checkpoints, or pass --backbone_weights FILE, or none to start from random numbers'
    )


def read_weights(source: str, averaged: bool = False) -> dict[str, Tensor]:
    """Return the state dict in a file (path or URL). averaged: take an average of weights if the file has one.

    Raises:
        UserError: the file is missing, or holds no weights.
    """
    try:
        checkpoint = read_checkpoint(source)
        if 'module' in checkpoint:
            checkpoint = {'model': checkpoint['module']}
        return extract_weights(checkpoint, averaged=averaged, source=source)
    except UserError as error:
        raise UserError(f'--backbone_weights: {error}') from error


def load_weights(network: nn.Module, state: dict[str, Tensor], source: str, may_lack: str) -> None:
    """Load the entries of a state dict that a network has. may_lack: pattern of names that need not be there.

    Raises:
        UserError: other entries are missing or of another shape.
    """
    ours = network.state_dict()
    unfit = [name for name, value in ours.items() if name not in state or state[name].shape != value.shape]
    unfit = [name for name in unfit if not (name not in state and re.match(may_lack, name))]
    if unfit:
        raise UserError(
            f'--backbone_weights {source} does not fit {type(network).__name__}: {len(unfit)} of {len(ours)} entries are '
            f'missing or of another shape, such as {", ".join(unfit[:3])}'
        )
    network.load_state_dict(ours | {name: state[name] for name in ours if name in state})
