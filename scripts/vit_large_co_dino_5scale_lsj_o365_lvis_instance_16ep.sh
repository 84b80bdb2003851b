#!/usr/bin/env bash
# Co-DINO with masks, ViT-L, five scales, large-scale jitter, from weights of Objects365: 67.3 AP on LVIS v1 val (masks 60.7) after 16 epochs (Co-DETR's model zoo).
# Trained there with 1 image on each GPU, activations recomputed (here: --use_checkpoint); hours are not published.
# A reading: Co-DETR's config is for testing and cannot run as a training. It has no optimizer_config, hence no clipping (elsewhere 0.1);
# it repeats rare classes (--repeat_threshold 0.001), which is left out here, around a pipeline that begins with copy-paste; and schedule
# and optimizer are those of the config for COCO before it was corrected (12 epochs, layer decay 0.8, an average of the weights).
# The published AP counts 1000 detections of an image (--topk_eval).
# Give --pretrained O365.pth too.
source "$(dirname "$0")/recipe.sh"
recipe --dataset_file lvis --backbone vit_large_lsj --drop_path_rate 0.3 --dino --num_feature_levels 5 \
    --num_queries 900 --topk_eval 1000 --dn_number 300 --dn_box_noise_scale 0.4 --co_aux_heads faster_rcnn atss \
    --co_masks --aug lsj --img_size 1536 --lr 5e-5 --lr_backbone 5e-6 --weight_decay 0.05 --warmup_steps 500 \
    --warmup_start 0.01 --clip_max_norm 0 --epochs 16 --lr_drop_epochs 9 15 --batch_size 1 --total_batch_size 16 "$@"
