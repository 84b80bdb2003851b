#!/usr/bin/env bash
# DETR, R50, DC5: 35.3 AP on COCO val2017 after 50 epochs (Deformable DETR's model zoo).
# The short schedule that later methods compare with; evaluate with one image a GPU, because padding lowers the AP.
#
#   LAUNCH="torchrun --nproc_per_node 8" bash scripts/detr_r50dc5_50ep.sh --coco_path DATA
#   bash scripts/detr_r50dc5_50ep.sh --coco_path DATA --total_batch_size 8          on one GPU
set -euo pipefail
cd "$(dirname "$0")/.."
${LAUNCH:-python -u} main.py --output_dir "exps/detr_r50dc5_50ep" \
    --dilation --batch_size 1 --epochs 50 --lr_drop 40 "$@"
