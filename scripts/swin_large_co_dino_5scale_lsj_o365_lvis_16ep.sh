#!/usr/bin/env bash
# Co-DINO, Swin-L, five scales, large-scale jitter, from weights of Objects365: 64.5 AP on LVIS v1 val after 16 epochs (Co-DETR's model zoo).
# Trained there with 16 images a step, 1 on each of 16 GPUs, activations of 6 encoder layers recomputed (here: --use_checkpoint encoder); hours are not published.
# A reading: Co-DETR's config cannot run as a training, since its mixed data lose their annotation file.
# The published AP counts 1000 detections of an image (--topk_eval).
# Give --pretrained O365.pth too; those of mmdetection are https://download.openmmlab.com/mmdetection/v3.0/codetr/co_dino_5scale_swin_large_22e_o365-0a33e247.pth
source "$(dirname "$0")/recipe.sh"
recipe --dataset_file lvis --backbone swin_large_window12 --drop_path_rate 0.3 --dino --num_feature_levels 5 \
    --num_queries 900 --topk_eval 1000 --dn_number 500 --dn_box_noise_scale 0.4 --co_aux_heads faster_rcnn atss \
    --aug lsj --img_size 1536 --lr 1e-4 --lr_backbone 1e-5 --epochs 16 --lr_drop 8 --batch_size 1 \
    --total_batch_size 16 "$@"
