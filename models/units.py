"""
List the units of a detector that `torch.compile`, FSDP2 and the recomputation of activations work on.

The code between the units is not compiled: it has little to fuse, and would be compiled again for every
combination of query groups.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from util.config.settle import PLACES
from util.errors import UserError

# Compiled programs of one function that PyTorch may keep. There are four kinds of stages and two of layers,
# each in training and evaluation.
MOST_PROGRAMS = 64


def list_units(model: nn.Module) -> dict[str, list[nn.Module]]:
    """Return the units of a detector by place, in the order in which they run.

    Units of the backbone are stages of a ResNet, blocks of Swin, ViT and MobileNetV2, or a whole network of
    timm. Units of encoder and decoder are their layers.
    """
    transformer = model.transformer
    units = (
        model.backbone[0].body.units(),
        list(transformer.encoder.layers),
        list(transformer.decoder.layers),
    )
    return dict(zip(PLACES, units, strict=True))


def all_units(model: nn.Module) -> list[nn.Module]:
    return [unit for units in list_units(model).values() for unit in units]


def recompute(model: nn.Module, places: Sequence[str]) -> None:
    """Mark the units of some places, whose activations `call_unit` then recomputes in the backward pass."""
    for place, units in list_units(model).items():
        for unit in units:
            unit.recompute = place in places


def call_unit(unit: nn.Module, *args: object, method: Callable | None = None) -> object:
    """Call a unit, or one of its methods. Activations of units marked by `recompute` are not kept.

    Batch norms of such units update their running statistics once per batch.
    """
    call = method or unit
    if not getattr(unit, 'recompute', False) or not torch.is_grad_enabled():
        return call(*args)

    def contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
        return nullcontext(), unchanged_statistics(unit)

    return checkpoint(call, *args, use_reentrant=False, context_fn=contexts)


@contextmanager
def unchanged_statistics(unit: nn.Module) -> Iterator[None]:
    """Let batch norms normalise as in training, without updating their running statistics."""
    norms = batch_norms(unit)
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, number) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, number


def batch_norms(module: nn.Module) -> list[nn.Module]:
    return [norm for norm in module.modules() if isinstance(norm, nn.BatchNorm2d)]


def compile_units(model: nn.Module, **options: object) -> None:
    """Compile every unit in place; parameters, buffers and their names stay.

    Units that are alike share one program. Heights and widths are dynamic, so that images of other sizes
    share it too.

    Args:
        options: arguments of `torch.compile`.

    Raises:
        UserError: a unit with batch norms is to be recomputed.
    """
    if any(getattr(unit, 'recompute', False) and batch_norms(unit) for unit in all_units(model)):
        raise UserError(
            'compiled stages with batch norms cannot be computed again: leave backbone out of --use_checkpoint, or do not '
            'compile'
        )
    torch._dynamo.config.cache_size_limit = max(torch._dynamo.config.cache_size_limit, MOST_PROGRAMS)
    for unit in all_units(model):
        unit.compile(**{'dynamic': True} | options)
