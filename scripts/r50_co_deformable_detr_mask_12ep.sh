#!/usr/bin/env bash
# Co-Deformable-DETR, R50, masks on its RoI head (co_deformable_detr_mask_r50): AP on COCO val2017 not published; 12 epochs.
# Only --eval_module faster_rcnn predicts masks; the decoder gives boxes as without.
# Trained there with 16 images a step, 2 on each of 8 GPUs; hours are not published.
source "$(dirname "$0")/recipe.sh"
recipe --with_box_refine --two_stage --dim_feedforward 2048 --dropout 0.0 --mixed_selection --look_forward_twice \
    --co_aux_heads faster_rcnn atss --co_rcnn_masks --aug co_detr --class_ids contiguous --batches aspect \
    --epochs 12 --lr_drop 11 --total_batch_size 16 "$@"
