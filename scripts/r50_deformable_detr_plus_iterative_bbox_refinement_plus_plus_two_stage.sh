#!/usr/bin/env bash
# Two-stage Deformable DETR with iterative box refinement, R50: 46.9 AP on COCO val2017 after 50 epochs (Deformable DETR's model zoo).
# Trained there with 32 images a step, 2 on each of 16 V100s, 340 GPU hours.
#
#   bash scripts/r50_deformable_detr_plus_iterative_bbox_refinement_plus_plus_two_stage.sh --coco_path DATA
#   LAUNCH="torchrun --nproc_per_node 8" bash scripts/r50_deformable_detr_plus_iterative_bbox_refinement_plus_plus_two_stage.sh --coco_path DATA --total_batch_size 32
set -euo pipefail
cd "$(dirname "$0")/.."
${LAUNCH:-python -u} main.py --output_dir "exps/r50_deformable_detr_plus_iterative_bbox_refinement_plus_plus_two_stage" --with_box_refine --two_stage "$@"
