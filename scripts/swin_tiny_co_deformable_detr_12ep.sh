#!/usr/bin/env bash
# Co-Deformable-DETR, Swin-T: 51.7 AP on COCO val2017 after 12 epochs (Co-DETR's model zoo).
# Trained there with 16 images a step, 2 on each of 8 GPUs; hours are not published.
#
#   LAUNCH="torchrun --nproc_per_node 8" bash scripts/swin_tiny_co_deformable_detr_12ep.sh --coco_path DATA
#   bash scripts/swin_tiny_co_deformable_detr_12ep.sh --coco_path DATA --total_batch_size 16          on one GPU
set -euo pipefail
cd "$(dirname "$0")/.."
${LAUNCH:-python -u} main.py --output_dir "exps/swin_tiny_co_deformable_detr_12ep" \
    --backbone swin_tiny --drop_path_rate 0.2 --weight_decay 0.05 \
    --with_box_refine --two_stage --dim_feedforward 2048 --dropout 0.0 --mixed_selection --look_forward_twice \
    --co_aux_heads faster_rcnn atss --aug co_detr --class_ids contiguous --group_aspect_ratio \
    --epochs 12 --lr_drop 11 "$@"
