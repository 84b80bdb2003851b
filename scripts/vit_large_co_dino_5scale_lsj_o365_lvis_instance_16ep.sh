#!/usr/bin/env bash
# Co-DINO with masks, ViT-L, five scales, large-scale jitter, from weights of Objects365: 67.3 AP on LVIS v1 val (masks 60.7) after 16 epochs (Co-DETR's model zoo).
# Trained there with 1 image on each GPU, activations recomputed (here: --use_checkpoint); hours are not published.
#
#   LAUNCH="torchrun --nproc_per_node 16" bash scripts/vit_large_co_dino_5scale_lsj_o365_lvis_instance_16ep.sh --coco_path DATA --batch_size 1 --pretrained O365.pth
#   bash scripts/vit_large_co_dino_5scale_lsj_o365_lvis_instance_16ep.sh --coco_path DATA --total_batch_size 16 --pretrained O365.pth          on one GPU
set -euo pipefail
cd "$(dirname "$0")/.."
${LAUNCH:-python -u} main.py --output_dir "exps/vit_large_co_dino_5scale_lsj_o365_lvis_instance_16ep" \
    --dataset_file lvis --backbone vit_large_lsj --drop_path_rate 0.3 \
    --dino --num_feature_levels 5 --num_queries 900 --topk_eval 1000 --dn_number 300 --dn_box_noise_scale 0.4 \
    --co_aux_heads faster_rcnn atss \
    --co_masks --aug lsj --lsj_size 1536 --lr 5e-5 --lr_backbone 5e-6 --weight_decay 0.05 --warmup_steps 500 --warmup_start 0.01 \
    --clip_max_norm 0 --epochs 16 --lr_drop_epochs 9 15 "$@"
