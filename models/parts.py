"""
Compiled parts: `torch.compile` on backbone stages, encoder layers and decoder layers.

What lies between them has little to fuse, and would compile anew for every combination of query groups. Layers that
are alike share one program; heights and widths stay variable, so that images of other sizes need no other.
"""

import torch
from torch import nn

from .backbone import StageBody, TimmBody
from .swin import SwinTransformer

# More of them than PyTorch usually allows: stages of four kinds, layers of two, training and evaluation.
MOST_PROGRAMS = 64


def compile_parts(model: nn.Module, **options: object) -> None:
    """In place; parameters, buffers and their names stay. model: a detector. options: of `torch.compile`.

    ValueError: stages with batch norms are to be computed again in the backward pass.
    """
    body = model.backbone[0].body
    if getattr(body, 'use_checkpoint', False) and has_batch_norms(body):
        raise ValueError(
            'compiled stages with batch norms cannot be computed again: leave backbone out of --use_checkpoint, or do not '
            'compile'
        )
    torch._dynamo.config.cache_size_limit = max(torch._dynamo.config.cache_size_limit, MOST_PROGRAMS)
    for part in parts(model):
        part.compile(**{'dynamic': True} | options)


def has_batch_norms(body: nn.Module) -> bool:
    return any(isinstance(module, nn.BatchNorm2d) for module in body.modules())


def parts(model: nn.Module) -> list[nn.Module]:
    """Stages of the backbone (blocks of Swin and MobileNetV2, a network of timm as a whole) and layers of encoder and
    decoder.
    """
    transformer = model.transformer
    layers = [*transformer.encoder.layers, *transformer.decoder.layers]
    return [*backbone_regions(model.backbone[0].body), *layers]


def backbone_regions(body: nn.Module) -> list[nn.Module]:
    if isinstance(body, SwinTransformer):
        return [block for stage in body.layers for block in stage.blocks]
    if isinstance(body, TimmBody):
        return [body.network]
    return body.stages() if isinstance(body, StageBody) else []
