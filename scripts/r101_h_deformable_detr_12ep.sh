#!/usr/bin/env bash
# H-Deformable-DETR with the tricks, R101: AP on COCO val2017 not published; 12 epochs.
# Trained there with 16 images a step, 2 on each of 8 GPUs; hours are not published.
#
#   LAUNCH="torchrun --nproc_per_node 8" bash scripts/r101_h_deformable_detr_12ep.sh --coco_path DATA
#   bash scripts/r101_h_deformable_detr_12ep.sh --coco_path DATA --total_batch_size 16          on one GPU
set -euo pipefail
cd "$(dirname "$0")/.."
${LAUNCH:-python -u} main.py --output_dir "exps/r101_h_deformable_detr_12ep" \
    --with_box_refine --two_stage --dim_feedforward 2048 --dropout 0.0 --mixed_selection --look_forward_twice \
    --hybrid_queries 1500 --hybrid_k 6 --hybrid_lambda 1.0 --backbone resnet101 --epochs 12 --lr_drop 11 "$@"
