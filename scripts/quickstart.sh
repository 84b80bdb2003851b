#!/usr/bin/env bash
# Train a small detector on built-in pictures, evaluate it, and draw what it finds: output/quickstart/.
#
#   bash scripts/quickstart.sh
#
# About 10 minutes on two CPU cores after the installation. Run it again and it goes on where it stopped.
set -euo pipefail
source "$(dirname "$0")/env.sh" requirements.txt

out=output/quickstart
python main.py --output_dir "$out" --resume auto \
    --dataset_file shapes --conditional "$@"

echo
echo "The results lie in $out:"
echo "  predictions.png   ground truth beside predictions"
echo "  curves.png        losses and AP against epochs"
echo "  metrics.csv       the same as numbers; log.jsonl has everything"
echo "  checkpoint.pth    the detector: python tools/predict.py --checkpoint $out/checkpoint.pth --source PICTURE"
