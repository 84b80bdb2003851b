"""Operations and memory of a model, counted on meta tensors, which have shapes but no values."""

import copy
from collections.abc import Callable
from textwrap import shorten

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from util.errors import UserError
from util.nested_tensor import NestedTensor


def if_known(count: Callable[[], str]) -> str:
    """Return the result of `count`, or in one line why it fails: some operations need values, such as NMS.

    Raises:
        UserError: as `count` does, since the run would too.
    """
    try:
        return count()
    except UserError:
        raise
    except Exception as error:  # an operation that fails on meta tensors may run on real ones
        reason = shorten(f'{type(error).__name__}: {error}', 150, placeholder=' ...')
        return f'not known, because without values the model raises {reason}'


def meta_batch(batch_size: int, height: int, width: int) -> NestedTensor:
    """Return a batch of images [batch_size, 3, height, width] without values or padding."""
    shape = batch_size, height, width
    images = torch.zeros(batch_size, 3, height, width, device='meta')
    return NestedTensor(images, torch.zeros(shape, dtype=torch.bool, device='meta'))


def count_flops(model: nn.Module, height: int, width: int) -> int:
    """Count multiplications and additions of one image's forward pass (two per multiply-accumulate)."""
    meta_model = copy.deepcopy(model).to('meta').eval().requires_grad_(False)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        meta_model(meta_batch(1, height, width))
    return counter.get_total_flops()


def activation_bytes(model: nn.Module, batch_size: int, height: int, width: int) -> int:
    """Count the bytes that a training step stores for the backward pass.

    The losses, and modules that add queries from the objects of a batch, are left out: they depend on the
    data.
    """
    meta_model = copy.deepcopy(model).to('meta').train()
    meta_model.query_sources = nn.ModuleDict()
    weights = {p.untyped_storage()._cdata for p in meta_model.parameters()}
    activations: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            activations[storage._cdata] = storage
        return tensor

    samples = meta_batch(batch_size, height, width)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = meta_model(samples)
    del outputs
    return sum(storage.nbytes() for storage in activations.values())
