#!/usr/bin/env bash
# Two-stage Deformable DETR, Swin-T: 49.0 AP on COCO val2017 after 36 epochs (H-Deformable-DETR's model zoo; 49.6 in a second run).
# Trained there with 16 images a step, 2 on each of 8 GPUs, blocks of Swin recomputed (here: --use_checkpoint backbone); hours are not published.
#
#   LAUNCH="torchrun --nproc_per_node 8" bash scripts/swin_tiny_two_stage_deformable_detr_36ep.sh --coco_path DATA
#   bash scripts/swin_tiny_two_stage_deformable_detr_36ep.sh --coco_path DATA --total_batch_size 16          on one GPU
set -euo pipefail
cd "$(dirname "$0")/.."
${LAUNCH:-python -u} main.py --output_dir "exps/swin_tiny_two_stage_deformable_detr_36ep" \
    --with_box_refine --two_stage --dim_feedforward 2048 --backbone swin_tiny --drop_path_rate 0.2 \
    --epochs 36 --lr_drop 30 "$@"
