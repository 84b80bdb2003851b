#!/usr/bin/env bash
# Co-DINO, Swin-L, five scales, from weights of Objects365: 64.1 AP on COCO val2017 after 16 epochs (Co-DETR's model zoo).
# Trained there with 16 images a step, 1 on each of 16 GPUs, activations of 6 encoder layers recomputed (here: --use_checkpoint encoder); hours are not published.
#
#   LAUNCH="torchrun --nproc_per_node 16" bash scripts/swin_large_co_dino_5scale_o365_16ep.sh --coco_path DATA --batch_size 1 --pretrained O365.pth
#   bash scripts/swin_large_co_dino_5scale_o365_16ep.sh --coco_path DATA --total_batch_size 16 --pretrained O365.pth          on one GPU
set -euo pipefail
cd "$(dirname "$0")/.."
${LAUNCH:-python -u} main.py --output_dir "exps/swin_large_co_dino_5scale_o365_16ep" \
    --backbone swin_large_window12 --drop_path_rate 0.3 \
    --dino --num_feature_levels 5 --num_queries 900 --dn_number 500 --dn_box_noise_scale 0.4 \
    --co_aux_heads faster_rcnn atss --class_ids contiguous --group_aspect_ratio \
    --aug co_detr --img_size 1280 --max_size 2048 --train_scales 480 1536 --train_max_size 2048 \
    --lr 1e-4 --lr_backbone 1e-5 --epochs 16 --lr_drop 8 "$@"
