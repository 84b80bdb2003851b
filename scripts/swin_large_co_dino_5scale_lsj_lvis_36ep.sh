#!/usr/bin/env bash
# Co-DINO, Swin-L, five scales, large-scale jitter: 56.9 AP on LVIS v1 val after 36 epochs (Co-DETR's model zoo).
# Trained there with 16 images a step, 2 on each of 8 GPUs, activations of 6 encoder layers recomputed (here: --use_checkpoint encoder); hours are not published.
#
#   LAUNCH="torchrun --nproc_per_node 8" bash scripts/swin_large_co_dino_5scale_lsj_lvis_36ep.sh --coco_path DATA
#   bash scripts/swin_large_co_dino_5scale_lsj_lvis_36ep.sh --coco_path DATA --total_batch_size 16          on one GPU
set -euo pipefail
cd "$(dirname "$0")/.."
${LAUNCH:-python -u} main.py --output_dir "exps/swin_large_co_dino_5scale_lsj_lvis_36ep" \
    --dataset_file lvis --backbone swin_large_window12 --drop_path_rate 0.5 \
    --dino --num_feature_levels 5 --num_queries 900 --dn_number 100 \
    --co_aux_heads faster_rcnn atss \
    --aug lsj --lsj_size 1280 --epochs 36 --lr_drop 30 "$@"
