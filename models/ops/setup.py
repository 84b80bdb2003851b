"""
Build the kernels of deformable attention that this machine can build, into models/ops:

    cd models/ops && python setup.py build_ext --inplace

CUDA kernels are built if there is nvcc, for the visible GPUs or for TORCH_CUDA_ARCH_LIST (such as "8.0 9.0").
If there is none, or they do not compile, only the CPU kernels are built. All of them are optional: without
them the operator runs on Triton (CUDA) or plain PyTorch.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from setuptools import Extension, setup


def find_toolkit() -> None:
    """Set CUDA_HOME to the toolkit that the nvcc in PATH reports, because nvcc may be a link or a script."""
    if 'CUDA_HOME' in os.environ or not shutil.which('nvcc'):
        return
    output = subprocess.run(
        ['nvcc', '--dryrun', 'none.cu'], capture_output=True, text=True, check=False
    ).stderr
    top = re.search(r'^#\$ TOP=(.*)$', output, re.MULTILINE)
    if top:
        os.environ['CUDA_HOME'] = str(Path(top[1]).resolve())


find_toolkit()  # must come before the next import, in which PyTorch reads CUDA_HOME
from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension  # noqa: E402

# The name of the file contains the version of PyTorch, because several environments may share a checkout.
NAME = f'_C_torch{torch.__version__}'.replace('.', '_').replace('+', '_')
CPU_SOURCES = ['src/cpu/ms_deform_attn_cpu.cpp']
CUDA_SOURCES = ['src/cuda/ms_deform_attn_cuda.cpp', 'src/cuda/ms_deform_attn_kernels.cu']
# These let the compiler reorder sums and so vectorise loops. NaN and infinity keep their meaning.
CXX_FLAGS = [
    '-O3',
    '-fopenmp',
    '-fno-math-errno',
    '-fno-trapping-math',
    '-fno-signed-zeros',
    '-fassociative-math',
]
if platform.machine() == 'x86_64':
    CXX_FLAGS.append('-mprefer-vector-width=512')
LINK_FLAGS = ['-fopenmp']
if os.name == 'nt':
    CXX_FLAGS, LINK_FLAGS = ['/O2', '/openmp'], []


def cpu_extension() -> Extension:
    return CppExtension(NAME, CPU_SOURCES, extra_compile_args=CXX_FLAGS, extra_link_args=LINK_FLAGS)


def cuda_extension() -> Extension:
    return CUDAExtension(
        NAME,
        CPU_SOURCES + CUDA_SOURCES,
        include_dirs=pip_cuda_headers(),
        extra_compile_args={'cxx': CXX_FLAGS, 'nvcc': ['-O3', '-lineinfo']},
        extra_link_args=LINK_FLAGS,
    )


def pip_cuda_headers() -> list[str]:
    """List the folders of CUDA headers in PyTorch's `nvidia-*` packages, since a toolkit may lack them."""
    packages = Path(torch.__file__).resolve().parents[1] / 'nvidia'
    return [str(folder) for folder in sorted(packages.glob('*/include')) if folder.is_dir()]


def why_no_cuda() -> str | None:
    """Return why CUDA kernels cannot be built, or None if they can."""
    if torch.version.cuda is None:
        return 'this PyTorch has no CUDA'
    if CUDA_HOME is None:
        return 'there is no nvcc (set CUDA_HOME to its toolkit)'
    if not torch.cuda.is_available() and 'TORCH_CUDA_ARCH_LIST' not in os.environ:
        return 'no GPU is visible (set TORCH_CUDA_ARCH_LIST to build for others)'
    return None


def build(extension: Extension) -> None:
    command = BuildExtension.with_options(no_python_abi_suffix=True, use_ninja=False)
    setup(name='ms_deform_attn', ext_modules=[extension], cmdclass={'build_ext': command})


if __name__ == '__main__':
    os.chdir(Path(__file__).resolve().parent)
    sys.argv[1:] = sys.argv[1:] or ['build_ext', '--inplace']
    reason = why_no_cuda()
    if reason is None:
        try:
            build(cuda_extension())
        except (Exception, SystemExit) as error:  # whatever compilers and build tools raise
            reason = f'it did not compile ({error})'
    if reason is not None:
        print(f'without CUDA kernels: {reason}', file=sys.stderr)
        build(cpu_extension())
