"""
The way of the official code through a training step, with the modules and weights of ours.

It samples with grid_sample or the official extension, lets all query groups attend under one mask, keeps frozen norms
behind their convolutions, matches and computes losses layer by layer, and reads each term on the host.
"""

import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from types import ModuleType
from unittest.mock import patch

import torch
from torch import Tensor, nn

from models import build_model
from models.ops.functions import use_implementation
from models.ops.modules import MSDeformAttn
from models.structures import AttentionBlock, QueryGroup, attention_blocks
from models.training.criterion import weighted_sum
from models.transformer import Blocks
from tools.benchmarks.reference_criterion import reference_losses
from util.precision import Precision


@contextmanager
def official_path(extension: ModuleType | None = None) -> Iterator[None]:
    """Use grid_sample or, if given, the official extension, and one attention over all queries with a mask between groups."""

    def one_block(groups: list[QueryGroup]) -> Blocks:
        return [under_one_mask(attention_blocks(groups), groups[0].tgt.device)]

    def attend(value: Tensor, shapes: list[tuple[int, int]], locations: Tensor, weights: Tensor) -> Tensor:
        sides = *shape_tensors(tuple(shapes), value.device), locations, weights
        return OfficialAttention.apply(extension, value.float(), *sides)

    with ExitStack() as stack:
        stack.enter_context(patch('models.deformable_transformer.attention_blocks', one_block))
        if extension is None:
            stack.enter_context(use_implementation('pytorch'))
        else:
            module = sys.modules[MSDeformAttn.__module__]
            stack.enter_context(patch.object(module, 'ms_deform_attn', attend))
        yield


class OfficialAttention(torch.autograd.Function):
    """The official extension in autograd, as its own repository has it."""

    @staticmethod
    def forward(ctx: object, extension: ModuleType, *tensors: Tensor) -> Tensor:
        ctx.extension, tensors = extension, tuple(x.contiguous() for x in tensors)
        ctx.save_for_backward(*tensors)
        return extension.ms_deform_attn_forward(*tensors, 64)

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> tuple:
        value, locations, weights = ctx.extension.ms_deform_attn_backward(
            *ctx.saved_tensors, grad.contiguous(), 64
        )
        return None, value, None, None, locations, weights


@cache
def shape_tensors(shapes: tuple[tuple[int, int], ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return (height, width) of each level, [L, 2], and the first token of each, [L]."""
    sides = torch.tensor(shapes, device=device)
    return sides, torch.cat([sides.new_zeros(1), sides.prod(1).cumsum(0)[:-1]])


def under_one_mask(blocks: Blocks, device: torch.device | None = None) -> AttentionBlock:
    """Return the same attention as one block over all queries."""
    total = blocks[-1].queries.stop
    hidden = torch.ones(total, total, dtype=torch.bool)
    for block in blocks:
        columns = block.pick(torch.arange(total), dim=0)
        hidden[block.queries, columns] = False if block.hidden is None else block.hidden.cpu()
    everything = slice(0, total)
    return AttentionBlock(everything, [everything], hidden.to(device))


def official_model(flags: Namespace, weights: dict[str, Tensor]) -> nn.Module:
    """Build the model of the flags with frozen norms behind their convolutions."""
    with patch('models.backbone.fold_frozen_norms', lambda network: None):
        model = build_model(flags)[0]
    model.load_state_dict(weights)
    return model


def official_loss(
    model: nn.Module, coefficients: dict[str, float], k: int, batch: tuple, extension: ModuleType | None
) -> Callable[[Precision], Tensor]:
    """Make the loss of Deformable DETR or, with every object `k` times, of H-DETR. batch: images and their objects."""

    def loss(precision: Precision) -> Tensor:
        with official_path(extension), precision.autocast():
            outputs = model(*batch)
        losses, _ = reference_losses(outputs['predictions'], batch[1], k)
        for value in losses.values():
            value.item()
        return weighted_sum(losses, coefficients)

    return loss
