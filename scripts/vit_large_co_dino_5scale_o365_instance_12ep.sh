#!/usr/bin/env bash
# Co-DINO with masks, ViT-L, five scales, from weights of Objects365: 65.8 AP on COCO val2017 (masks 56.6) after 12 epochs (Co-DETR's model zoo).
# Trained there with 1 image on each GPU, activations recomputed (here: --use_checkpoint); hours are not published.
#
#   LAUNCH="torchrun --nproc_per_node 16" bash scripts/vit_large_co_dino_5scale_o365_instance_12ep.sh --coco_path DATA --batch_size 1 --pretrained O365.pth
#   bash scripts/vit_large_co_dino_5scale_o365_instance_12ep.sh --coco_path DATA --total_batch_size 16 --pretrained O365.pth          on one GPU
set -euo pipefail
cd "$(dirname "$0")/.."
${LAUNCH:-python -u} main.py --output_dir "exps/vit_large_co_dino_5scale_o365_instance_12ep" \
    --backbone vit_large --drop_path_rate 0.4 \
    --dino --num_feature_levels 5 --num_queries 1500 --topk_eval 1000 --dn_number 300 --dn_box_noise_scale 0.4 \
    --co_aux_heads faster_rcnn atss --co_rcnn_head 4conv1fc --class_ids contiguous --group_aspect_ratio \
    --co_masks --co_mask_loss_coef 15.96 --aug co_detr --img_size 1280 --max_size 2048 --train_scales 480 1536 --train_max_size 2400 \
    --lr 5e-5 --lr_backbone 5e-6 --lr_layer_decay 0.8 --weight_decay 0.01 --warmup_steps 500 --warmup_start 0.01 \
    --ema 0.9999 --ema_warmup 2000 --epochs 12 --lr_drop 7 "$@"
