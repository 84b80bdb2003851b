"""
Official CUDA extension of Deformable DETR, compiled for today's PyTorch as a peer to compare with.

Its sources (`models/ops/src`, which H-Deformable-DETR and MS-DETR copy) are not part of this repository.
"""

import os
import re
import tempfile
from argparse import ArgumentParser
from pathlib import Path
from types import ModuleType

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
NVCC_FLAGS = (
    'CUDA_HAS_FP16=1',
    '__CUDA_NO_HALF_OPERATORS__',
    '__CUDA_NO_HALF_CONVERSIONS__',
    '__CUDA_NO_HALF2_OPERATORS__',
)


def add_official(parser: ArgumentParser) -> None:
    parser.add_argument(
        '--official',
        type=Path,
        metavar='DIR',
        help="models/ops/src of an official repository, which is compiled and timed too (GPU); any copy of Deformable DETR's",
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
    kept = os.environ.get('TORCH_EXTENSIONS_DIR')
    copy = Path(kept, 'official_sources') if kept else Path(tempfile.mkdtemp())
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
            extra_cuda_cflags=['-DWITH_CUDA', *(f'-D{name}' for name in NVCC_FLAGS)],
            extra_include_paths=[str(copy)],
        )
    except (RuntimeError, ImportError, OSError) as error:
        raise UserError(f'the official extension in {folder} does not compile: {error}') from error
