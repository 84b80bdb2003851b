#!/usr/bin/env bash
# H-Deformable-DETR with the tricks, Swin-L, 900 queries: 56.1 AP on COCO val2017 after 12 epochs (H-Deformable-DETR's model zoo).
# Trained there with 16 images a step, 2 on each of 8 GPUs, blocks of Swin recomputed (here: --use_checkpoint backbone); hours are not published.
#
#   LAUNCH="torchrun --nproc_per_node 8" bash scripts/swin_large_h_deformable_detr_900_12ep.sh --coco_path DATA
#   bash scripts/swin_large_h_deformable_detr_900_12ep.sh --coco_path DATA --total_batch_size 16          on one GPU
set -euo pipefail
cd "$(dirname "$0")/.."
${LAUNCH:-python -u} main.py --output_dir "exps/swin_large_h_deformable_detr_900_12ep" \
    --with_box_refine --two_stage --dim_feedforward 2048 --dropout 0.0 --mixed_selection \
    --look_forward_twice --hybrid_queries 1500 --hybrid_k 6 --hybrid_lambda 1.0 --backbone swin_large \
    --drop_path_rate 0.2 --num_queries 900 --epochs 12 --lr_drop 11 "$@"
