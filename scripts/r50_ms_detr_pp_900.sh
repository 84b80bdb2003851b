#!/usr/bin/env bash
# MS-DETR on Deformable-DETR++, R50, 900 queries: 50.0 AP on COCO val2017 after 12 epochs (MS-DETR's model zoo).
# Trained there with 16 images a step, 2 on each of 8 GPUs; hours are not published.
#
#   LAUNCH="torchrun --nproc_per_node 8" bash scripts/r50_ms_detr_pp_900.sh --coco_path DATA
#   bash scripts/r50_ms_detr_pp_900.sh --coco_path DATA --total_batch_size 16          on one GPU
set -euo pipefail
cd "$(dirname "$0")/.."
${LAUNCH:-python -u} main.py --output_dir "exps/r50_ms_detr_pp_900" \
    --with_box_refine --two_stage --dim_feedforward 2048 --dropout 0.0 --mixed_selection --look_forward_twice \
    --use_ms_detr --use_aux_ffn --cls_loss_coef 1 --o2m_cls_loss_coef 2 --enc_cls_loss_coef 2 \
    --enc_bbox_loss_coef 5 --enc_giou_loss_coef 2 --epochs 12 --lr_drop 11 --num_queries 900 --topk_eval 300 "$@"
