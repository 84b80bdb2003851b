#!/usr/bin/env bash
# DETR, R50, masks on a trained detector of boxes: AP on COCO val2017 not published; 25 epochs.
# The recipe of DETR's repository for its panoptic models, on instances: the detector is frozen, its mask heads train.
# How many images a step its source trained with is not known to us: this is 1 on each GPU.
# Give --frozen_weights BOXES.pth too.
source "$(dirname "$0")/recipe.sh"
recipe --masks --epochs 25 --lr_drop 15 --batch_size 1 "$@"
