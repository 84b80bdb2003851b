#!/usr/bin/env bash
# Deformable DETR, R50, one feature level: 39.4 AP on COCO val2017 after 50 epochs (Deformable DETR's model zoo).
# Trained there with 32 images a step, 2 on each of 16 V100s, 160 GPU hours.
#
#   bash scripts/r50_deformable_detr_single_scale.sh --coco_path DATA
#   LAUNCH="torchrun --nproc_per_node 8" bash scripts/r50_deformable_detr_single_scale.sh --coco_path DATA --total_batch_size 32
set -euo pipefail
cd "$(dirname "$0")/.."
${LAUNCH:-python -u} main.py --output_dir "exps/r50_deformable_detr_single_scale" --num_feature_levels 1 "$@"
