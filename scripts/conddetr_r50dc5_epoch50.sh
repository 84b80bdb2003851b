#!/usr/bin/env bash
# Conditional DETR, R50, DC5: 43.7 AP on COCO val2017 after 50 epochs (Conditional DETR's model zoo).
# Trained there with 8 images a step, 1 on each of 8 GPUs; hours are not published.
#
#   LAUNCH="torchrun --nproc_per_node 8" bash scripts/conddetr_r50dc5_epoch50.sh --coco_path DATA
#   bash scripts/conddetr_r50dc5_epoch50.sh --coco_path DATA --total_batch_size 8          on one GPU
set -euo pipefail
cd "$(dirname "$0")/.."
${LAUNCH:-python -u} main.py --output_dir "exps/conddetr_r50dc5_epoch50" \
    --conditional --dilation --batch_size 1 --epochs 50 --lr_drop 40 "$@"
