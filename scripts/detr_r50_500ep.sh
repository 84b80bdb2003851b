#!/usr/bin/env bash
# DETR, R50: 42.0 AP on COCO val2017 after 500 epochs (DETR's model zoo).
# Trained there with 64 images a step, 2 on each of 32 GPUs; the learning rates are not scaled with it.
#
#   LAUNCH="torchrun --nproc_per_node 8" bash scripts/detr_r50_500ep.sh --coco_path DATA --total_batch_size 64
#   bash scripts/detr_r50_500ep.sh --coco_path DATA --total_batch_size 64          on one GPU
set -euo pipefail
cd "$(dirname "$0")/.."
${LAUNCH:-python -u} main.py --output_dir "exps/detr_r50_500ep" --epochs 500 --lr_drop 400 "$@"
