#!/usr/bin/env bash
# Co-DINO, Swin-L, five scales, from weights of Objects365: 64.1 AP on COCO val2017 after 16 epochs (Co-DETR's model zoo).
# Trained there with 16 images a step, 1 on each of 16 GPUs, activations of the backbone and of 6 encoder layers recomputed (here: --use_checkpoint backbone encoder); hours are not published.
# Batches are padded to multiples of 32 pixels there; here to their largest image, which moves what is found at its borders a little.
# Give --pretrained O365.pth too; those of mmdetection are https://download.openmmlab.com/mmdetection/v3.0/codetr/co_dino_5scale_swin_large_22e_o365-0a33e247.pth
source "$(dirname "$0")/recipe.sh"
recipe --backbone swin_large_window12 --drop_path_rate 0.3 --dino --num_feature_levels 5 --num_queries 900 \
    --dn_number 500 --dn_box_noise_scale 0.4 --co_aux_heads faster_rcnn atss --class_ids contiguous \
    --batches aspect --aug co_detr --img_size 1280 --max_size 2048 --train_scales 480 1536 --train_max_size 2048 \
    --lr 1e-4 --lr_backbone 1e-5 --epochs 16 --lr_drop 8 --batch_size 1 --total_batch_size 16 "$@"
