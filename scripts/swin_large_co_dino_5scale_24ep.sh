#!/usr/bin/env bash
# Co-DINO, Swin-L, five scales: 59.8 AP on COCO val2017 after 24 epochs (Co-DETR's model zoo).
# Trained there with 16 images a step, 1 on each of 16 GPUs, activations of 6 encoder layers recomputed (here: --use_checkpoint encoder); hours are not published.
#
#   LAUNCH="torchrun --nproc_per_node 16" bash scripts/swin_large_co_dino_5scale_24ep.sh --coco_path DATA --batch_size 1
#   bash scripts/swin_large_co_dino_5scale_24ep.sh --coco_path DATA --total_batch_size 16          on one GPU
set -euo pipefail
cd "$(dirname "$0")/.."
${LAUNCH:-python -u} main.py --output_dir "exps/swin_large_co_dino_5scale_24ep" \
    --backbone swin_large_window12 --drop_path_rate 0.5 \
    --dino --num_feature_levels 5 --num_queries 900 --dn_number 100 \
    --co_aux_heads faster_rcnn atss --aug co_detr --class_ids contiguous --group_aspect_ratio \
    --epochs 24 --lr_drop 20 "$@"
