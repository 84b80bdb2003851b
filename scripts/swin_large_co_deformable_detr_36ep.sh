#!/usr/bin/env bash
# Co-Deformable-DETR, Swin-L, 900 queries: 58.5 AP on COCO val2017 after 36 epochs (Co-DETR's model zoo).
# Trained there with 16 images a step, 2 on each of 8 GPUs; hours are not published.
#
#   LAUNCH="torchrun --nproc_per_node 8" bash scripts/swin_large_co_deformable_detr_36ep.sh --coco_path DATA
#   bash scripts/swin_large_co_deformable_detr_36ep.sh --coco_path DATA --total_batch_size 16          on one GPU
set -euo pipefail
cd "$(dirname "$0")/.."
${LAUNCH:-python -u} main.py --output_dir "exps/swin_large_co_deformable_detr_36ep" \
    --backbone swin_large_window12 --drop_path_rate 0.6 --weight_decay 0.05 \
    --with_box_refine --two_stage --dim_feedforward 2048 --dropout 0.0 --mixed_selection --look_forward_twice \
    --co_aux_heads faster_rcnn atss --aug co_detr --class_ids contiguous --group_aspect_ratio --num_queries 900 --topk_eval 300 \
    --epochs 36 --lr_drop 30 "$@"
