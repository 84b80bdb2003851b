#!/usr/bin/env bash
# MS-DETR, variant a (second class heads on the usual layers), R50, 300 queries: AP on COCO val2017 not published; 12 epochs.
# Trained there with 16 images a step, 2 on each of 8 GPUs; hours are not published.
#
#   LAUNCH="torchrun --nproc_per_node 8" bash scripts/r50_ms_detr_a_300.sh --coco_path DATA
#   bash scripts/r50_ms_detr_a_300.sh --coco_path DATA --total_batch_size 16          on one GPU
set -euo pipefail
cd "$(dirname "$0")/.."
${LAUNCH:-python -u} main.py --output_dir "exps/r50_ms_detr_a_300" \
    --with_box_refine --two_stage --dim_feedforward 2048 --use_ms_detr --ms_variant a --cls_loss_coef 1 \
    --o2m_cls_loss_coef 2 --epochs 12 --lr_drop 11 --num_queries 300 "$@"
