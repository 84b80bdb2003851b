#!/usr/bin/env bash
# Build the kernels of deformable attention that this machine can build: CPU, and CUDA where nvcc and a GPU are.
#
#   bash scripts/build_ops.sh
#   TORCH_CUDA_ARCH_LIST="8.0 9.0" bash scripts/build_ops.sh    for GPUs that are not visible here
#
# Nothing depends on it: without it (or where it fails) the operator runs on Triton or plain PyTorch.
# PYTHON=... chooses the interpreter; the active environment's by default.
set -euo pipefail
cd "$(dirname "$0")/../models/ops"
PYTHON=${PYTHON:-python}

if ! command -v "${CXX:-c++}" >/dev/null; then
    echo 'no C++ compiler: deformable attention stays on plain PyTorch (on Debian: apt install g++)'
    exit 0
fi
library=$("$PYTHON" -c 'import torch; print("_C_torch" + torch.__version__.replace(".", "_").replace("+", "_") + ".so")')
newer=$(find src setup.py -newer "$library" 2>/dev/null | head -n 1 || true)
if [ -f "$library" ] && [ -z "$newer" ] && [ -z "${TORCH_CUDA_ARCH_LIST:-}" ]; then
    exit 0
fi
echo 'building the kernels of deformable attention (about half a minute)'
log=$(mktemp)
if "$PYTHON" setup.py build_ext --inplace >"$log" 2>&1; then
    grep '^without CUDA' "$log" || true
else
    tail -n 20 "$log"
    echo 'the kernels did not build; deformable attention stays on plain PyTorch'
fi
rm -f "$log"
