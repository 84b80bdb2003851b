#!/usr/bin/env bash
# Train a small detector on built-in images, evaluate it, and draw its detections: output/quickstart/.
#
#   bash scripts/quickstart.sh
#
# About 10 minutes on two CPU cores, 8 of them training, after the installation. Run it again to resume where it stopped.
set -euo pipefail
source "$(dirname "$0")/env.sh" requirements.txt
bash scripts/build_ops.sh

out=output/quickstart previous=''
for word in "$@"; do
    [ "$previous" != --output_dir ] || out=$word
    [[ $word != --output_dir=* ]] || out=${word#*=}
    previous=$word
done
python main.py --output_dir "$out" --resume auto \
    --dataset_file shapes --shapes_train 4200 --img_size 96 --max_size 96 --aug flip --num_workers 0 \
    --two_stage --with_box_refine --mixed_selection --look_forward_twice --num_queries 80 \
    --num_feature_levels 3 --hidden_dim 64 --nheads 4 --enc_layers 1 --dec_layers 3 --dim_feedforward 256 \
    --dropout 0 --pe_temperature 20 --backbone resnet10 --backbone_weights none --backbone_norm batch \
    --backbone_stages 3 --batch_size 8 --lr 1e-3 --lr_backbone 1e-3 --lr_linear_proj_mult 1 --epochs 8 --lr_drop 6 \
    --eval_every 2 --print_freq 105 "$@"

echo
echo "The results lie in $out:"
echo "  predictions.png   ground truth beside predictions"
echo "  curves.png        losses and AP against epochs"
echo "  metrics.csv       the same as numbers; log.jsonl has everything"
echo "  checkpoint.pth    the detector: python tools/predict.py --checkpoint $out/checkpoint.pth --source IMAGE"
