"""
The official CUDA extension, and a model that computes as the official code does.

The extension (`models/ops/src` of Deformable DETR, which H-Deformable-DETR and MS-DETR copy) is not part of
this repository; it is compiled for the installed PyTorch. The model has the modules and weights of this
repository. It samples with the extension or grid_sample, lets all query groups attend under one mask, and
keeps frozen norms behind their convolutions. Matching and losses are those of this repository.
"""

import os
import re
import sys
import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

import torch
from torch import Tensor, nn

from models import build_model
from models.ops.functions import use_implementation
from models.ops.modules import MSDeformAttn
from models.structures import AttentionBlock, QueryGroup, attention_blocks
from models.transformer import Blocks
from util.errors import UserError

# Names that PyTorch has changed: dtype and device of a tensor, its pointer, checks, and a removed header.
SUBSTITUTIONS = (
    (r'\.type\(\)\.is_cuda\(\)', '.is_cuda()'),
    (r'(AT_DISPATCH_\w+\(\s*\w+)\.type\(\)', r'\1.scalar_type()'),
    (r'\.data<', '.data_ptr<'),
    (r'\bAT_ASSERTM?\(', 'TORCH_CHECK('),
    (r'\bAT_ERROR\(', 'TORCH_CHECK(false, '),
    (r'#include\s*<THC/[^>]*>', ''),
)
# Operators of 16-bit numbers that its build leaves out.
NO_HALF = [f'-D__CUDA_NO_HALF{kind}__' for kind in ('_OPERATORS', '_CONVERSIONS', '2_OPERATORS')]


def add_official(parser: ArgumentParser) -> None:
    parser.add_argument(
        '--official',
        type=Path,
        metavar='DIR',
        help='models/ops/src of an official repository, which is compiled and timed too (GPU)',
    )


def modernise(source: str) -> str:
    for old, new in SUBSTITUTIONS:
        source = re.sub(old, new, source)
    return source


def load_official(folder: Path) -> ModuleType:
    """Compile a changed copy, which has `ms_deform_attn_forward` and `ms_deform_attn_backward`.

    With TORCH_EXTENSIONS_DIR in the environment a second call finds it compiled.

    Raises:
        UserError: the sources are not there, or do not compile.
    """
    from torch.utils.cpp_extension import load

    suffixes = ('.cpp', '.cu', '.cuh', '.h')
    sources = [path for path in sorted(folder.rglob('*')) if path.suffix in suffixes]
    if not any(path.suffix == '.cu' for path in sources):
        raise UserError(
            f'--official {folder} has no CUDA sources: give models/ops/src of an official repository'
        )
    cache_folder = os.environ.get('TORCH_EXTENSIONS_DIR')
    copy = Path(cache_folder, 'official_sources') if cache_folder else Path(tempfile.mkdtemp())
    for path in sources:
        target = copy / path.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        text = modernise(path.read_text())
        if not target.is_file() or target.read_text() != text:
            target.write_text(text)
    compiled = [str(copy / path.relative_to(folder)) for path in sources if path.suffix in ('.cpp', '.cu')]
    try:
        return load(
            'official_ms_deform_attn',
            compiled,
            extra_cflags=['-DWITH_CUDA'],
            extra_cuda_cflags=['-DWITH_CUDA', '-DCUDA_HAS_FP16=1', *NO_HALF],
            extra_include_paths=[str(copy)],
        )
    except (RuntimeError, ImportError, OSError) as error:
        raise UserError(f'the official extension in {folder} does not compile: {error}') from error


@contextmanager
def official_path(extension: ModuleType | None = None) -> Iterator[None]:
    """Use grid_sample or the official extension, and one attention over all queries under a mask."""

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
    """The official extension in autograd, as in its repository."""

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


def official_model(flags: Namespace, weights: dict[str, Tensor]) -> tuple[nn.Module, nn.Module]:
    """Build the model of the flags, with frozen norms behind their convolutions, and its criterion."""
    with patch('models.backbone.fold_frozen_norms', lambda network: None):
        model, criterion, _ = build_model(flags)
    model.load_state_dict(weights)
    return model, criterion
