"""
Answer what a detector is made of, in one place: `torch.compile`, FSDP2 and the recomputation of activations all ask here.

What lies between the parts has little to fuse, and would compile anew for every combination of query groups.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

PLACES = ('backbone', 'encoder', 'decoder')
# Programs of one function that PyTorch keeps: more than usual, for stages of four kinds, layers of two, training and
# evaluation.
MOST_PROGRAMS = 64


def parts(model: nn.Module) -> dict[str, list[nn.Module]]:
    """Return the parts of a detector by place, in the order in which they run.

    backbone: what its body names (stages of a ResNet, blocks of Swin and MobileNetV2, a network of timm as a whole). encoder,
    decoder: their layers.
    """
    transformer = model.transformer
    return {
        'backbone': model.backbone[0].body.parts(),
        'encoder': list(transformer.encoder.layers),
        'decoder': list(transformer.decoder.layers),
    }


def all_parts(model: nn.Module) -> list[nn.Module]:
    return [part for each in parts(model).values() for part in each]


def recompute(model: nn.Module, places: Sequence[str]) -> None:
    """Mark the parts of some places: `call_part` computes their activations again in the backward pass."""
    for place, each in parts(model).items():
        for part in each:
            part.recompute = place in places


def call_part(part: nn.Module, *args: object, method: Callable | None = None) -> object:
    """Call a part, or one of its methods; if it is marked by `recompute`, without keeping its activations.

    Running statistics of its batch norms count the batch once.
    """
    call = method or part
    if not getattr(part, 'recompute', False) or not torch.is_grad_enabled():
        return call(*args)

    def contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
        return nullcontext(), unchanged_statistics(part)

    return checkpoint(call, *args, use_reentrant=False, context_fn=contexts)


@contextmanager
def unchanged_statistics(part: nn.Module) -> Iterator[None]:
    """Normalise, and keep for the backward pass what batch norms always keep, but leave their statistics alone."""
    norms = batch_norms(part)
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


def compile_parts(model: nn.Module, **options: object) -> None:
    """Compile every part in place; parameters, buffers and their names stay.

    Parts that are alike share one program; heights and widths stay variable, so that images of other sizes need no other.
    options: of `torch.compile`. ValueError: parts with batch norms are recomputed.
    """
    if any(getattr(part, 'recompute', False) and batch_norms(part) for part in all_parts(model)):
        raise ValueError(
            'compiled stages with batch norms cannot be computed again: leave backbone out of --use_checkpoint, or do not '
            'compile'
        )
    torch._dynamo.config.cache_size_limit = max(torch._dynamo.config.cache_size_limit, MOST_PROGRAMS)
    for part in all_parts(model):
        part.compile(**{'dynamic': True} | options)
