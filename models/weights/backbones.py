"""Initial weights of backbones (`--backbone_weights`): fetch, read, resize and check their files."""

import re

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from util.download import download
from util.errors import UserError

from .read import extract_weights, read_checkpoint

# Entries that may be missing or of another shape: classifiers and counters, which detectors do not need,
# norms of returned maps, and indices that follow from the window.
DISPENSABLE = re.compile(
    r'(fc|classifier)\.|.*num_batches_tracked$|(norm\d|out_norm)\.|.*relative_position_index$'
)


def fetch_imagenet(name: str, url: str) -> str:
    """Return the path of the fetched ImageNet weights of a network."""
    try:
        return str(download(url))
    except UserError as error:
        raise UserError(no_download(name, error)) from error


def no_download(name: str, error: Exception) -> str:
    return (
        f'the ImageNet weights of {name} could not be downloaded ({error}): put the file into '
        f'{torch.hub.get_dir()}/checkpoints, or pass --backbone_weights FILE, or none to start from random '
        'numbers'
    )


def read_weights(source: str, averaged: bool = False) -> dict[str, Tensor]:
    """Return the state dict in a file (path or URL).

    averaged: take an average of weights if the file has one.

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


def load_backbone(
    network: nn.Module, source: str, name: str = '', averaged: bool = False, whole: bool = False
) -> None:
    """Fill a network with the weights in a file (path or URL), resized to its windows, patches and positions.

    Self-supervised files have the names of the network behind `encoder.` (MoBY), `backbone.` or `module.`.

    Args:
        name: the network's, for messages.
        averaged: take an average of weights if the file has one.
        whole: refuse entries that the network lacks.

    Raises:
        UserError: the file is missing, or has no weights that fit.
    """
    expected = network.state_dict()
    state = {
        re.sub(r'^(encoder|backbone|module)\.', '', entry): value
        for entry, value in read_weights(source, averaged).items()
    }
    refusal = f'--backbone_weights {source} does not fit {name or type(network).__name__}'
    unknown = [name for name in state if name not in expected and not DISPENSABLE.match(name)]
    if whole and unknown:
        raise UserError(
            f'{refusal}, which lacks {len(unknown)} of its entries, such as {", ".join(unknown[:3])}'
        )
    for name, value in state.items():
        for end, resize in RESIZE.items():
            if name.endswith(end) and name in expected and value.shape != expected[name].shape:
                state[name] = resize(value, expected[name])
    fitting = {name for name, value in expected.items() if name in state and state[name].shape == value.shape}
    unfit = [name for name in expected if name not in fitting and not DISPENSABLE.match(name)]
    if unfit:
        raise UserError(
            f'{refusal}: {len(unfit)} of {len(expected)} entries are missing or of another shape, such as '
            f'{", ".join(unfit[:3])}'
        )
    network.load_state_dict(expected | {name: state[name] for name in fitting})


def resize_table(table: Tensor, rows: int) -> Tensor:
    """Resize a table [side^2, C] of the places in a square to one of `rows` places (bicubic)."""
    old, new = (round(number**0.5) for number in (len(table), rows))
    grid = F.interpolate(
        table.T.unflatten(1, (old, old))[None], size=(new, new), mode='bicubic', align_corners=False
    )
    return grid[0].flatten(1).T.contiguous()


def resize_positions(table: Tensor, target: Tensor) -> Tensor:
    """Resize ViT's positions [1, 1 + side^2, C], of which the first, that of the class token, stays."""
    return torch.cat([table[:, :1], resize_table(table[0, 1:].float(), target.shape[1] - 1)[None]], dim=1)


def resize_patches(kernel: Tensor, target: Tensor) -> Tensor:
    """Resize ViT's projection of patches, [C, 3, h, w] (bicubic)."""
    return F.interpolate(kernel.float(), size=target.shape[-2:], mode='bicubic', align_corners=False)


# End of a name -> function that gives an entry of a file the size that it has in the network.
RESIZE = {
    'relative_position_bias_table': lambda table, target: resize_table(table, len(target)),
    'pos_embed': resize_positions,
    'patch_embed.proj.weight': resize_patches,
}
