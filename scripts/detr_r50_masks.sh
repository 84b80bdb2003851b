#!/usr/bin/env bash
# DETR, R50, masks on a trained detector of boxes: AP on COCO val2017 not published; 25 epochs.
# The recipe of DETR's repository for its panoptic models, on instances: the detector is frozen, its mask heads train.
#
#   LAUNCH="torchrun --nproc_per_node 8" bash scripts/detr_r50_masks.sh --coco_path DATA --frozen_weights BOXES.pth --batch_size 1
set -euo pipefail
cd "$(dirname "$0")/.."
${LAUNCH:-python -u} main.py --output_dir "exps/detr_r50_masks" --masks --epochs 25 --lr_drop 15 "$@"
