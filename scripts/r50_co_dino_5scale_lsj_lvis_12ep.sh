#!/usr/bin/env bash
# Co-DINO, R50, five scales, large-scale jitter: AP on LVIS v1 val not published; 12 epochs.
# Nobody published a training of it, and Co-DETR's config cannot run: its mixed data lose their annotation file. It says 16 images a step,
# 2 on each of 8 GPUs, and 4 encoder layers recomputed (here: --use_checkpoint encoder).
source "$(dirname "$0")/recipe.sh"
recipe --dataset_file lvis --dino --num_feature_levels 5 --num_queries 900 --dn_number 100 \
    --co_aux_heads faster_rcnn atss --aug lsj --img_size 1024 --epochs 12 --lr_drop 11 --total_batch_size 16 "$@"
