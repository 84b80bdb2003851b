#!/usr/bin/env bash
# Co-DINO, R50, five scales: AP on LVIS v1 val not published; 12 epochs.
# Trained there with 16 images a step, 2 on each of 8 GPUs; hours are not published.
#
#   LAUNCH="torchrun --nproc_per_node 8" bash scripts/r50_co_dino_5scale_lvis_12ep.sh --coco_path DATA
#   bash scripts/r50_co_dino_5scale_lvis_12ep.sh --coco_path DATA --total_batch_size 16          on one GPU
set -euo pipefail
cd "$(dirname "$0")/.."
${LAUNCH:-python -u} main.py --output_dir "exps/r50_co_dino_5scale_lvis_12ep" \
    --dataset_file lvis --dino --num_feature_levels 5 --num_queries 900 --dn_number 100 \
    --co_aux_heads faster_rcnn atss --aug co_detr --group_aspect_ratio --repeat_threshold 0.001 \
    --epochs 12 --lr_drop 11 "$@"
