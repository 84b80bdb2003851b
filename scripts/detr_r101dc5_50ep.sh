#!/usr/bin/env bash
# DETR, R101, DC5: AP on COCO val2017 not published; 50 epochs.
# The short schedule that later methods compare with; evaluate with one image a GPU, because padding lowers the AP.
#
#   LAUNCH="torchrun --nproc_per_node 8" bash scripts/detr_r101dc5_50ep.sh --coco_path DATA
#   bash scripts/detr_r101dc5_50ep.sh --coco_path DATA --total_batch_size 8          on one GPU
set -euo pipefail
cd "$(dirname "$0")/.."
${LAUNCH:-python -u} main.py --output_dir "exps/detr_r101dc5_50ep" \
    --backbone resnet101 --dilation --batch_size 1 --epochs 50 --lr_drop 40 "$@"
