#!/usr/bin/env bash
# DETR, R101: 36.9 AP on COCO val2017 after 50 epochs (Conditional DETR's model zoo).
# The short schedule that later methods compare with.
#
#   LAUNCH="torchrun --nproc_per_node 8" bash scripts/detr_r101_50ep.sh --coco_path DATA
#   bash scripts/detr_r101_50ep.sh --coco_path DATA --total_batch_size 16          on one GPU
set -euo pipefail
cd "$(dirname "$0")/.."
${LAUNCH:-python -u} main.py --output_dir "exps/detr_r101_50ep" \
    --backbone resnet101 --epochs 50 --lr_drop 40 "$@"
