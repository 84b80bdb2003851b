#!/usr/bin/env bash
# Compare how fast schemes of supervision learn: train small detectors with the same seeds and the same images, and write
# output/compare/comparison.png and comparison.md.
#
#   bash scripts/compare_schemes.sh                       built-in images, random weights; about two hours on two CPU cores
#   JOBS=4 SEEDS="0 1 2" bash scripts/compare_schemes.sh --epochs 16
#   NAMES="plain co-deformable co-dino" bash scripts/compare_schemes.sh
#   NAMES="plain bf16 fp16" bash scripts/compare_schemes.sh       plain in 16 bits
#
# With DATA, flags of a dataset of photographs, the backbone is a frozen MobileNetV2 with the weights of a file (or of ImageNet):
#
#   DATA="--coco_path DIR" WEIGHTS=FILE NAMES="plain hybrid mixed hybrid+mixed all" bash scripts/compare_schemes.sh
#   DATA="--coco_path DIR" WEIGHTS=FILE NAMES="detr conditional" bash scripts/compare_schemes.sh --epochs 150 --lr_drop 120
#
# DATA is split at spaces; quote words with spaces: DATA="--coco_path 'my data'".
set -euo pipefail
source "$(dirname "$0")/env.sh" requirements.txt
bash scripts/build_ops.sh

out=${OUT:-output/compare}
if [ -z "${DATA:-}" ]; then
    setting=(--dataset_file shapes --shapes_train 1600 --img_size 96 --max_size 96 --aug flip --num_workers 0
        --num_queries 40 --hidden_dim 64 --nheads 4 --enc_layers 1 --dec_layers 3 --dim_feedforward 256
        --dropout 0 --pe_temperature 20 --backbone resnet10 --backbone_weights none --backbone_norm batch
        --backbone_stages 3 --batch_size 8 --lr 1e-3 --lr_backbone 1e-3 --lr_linear_proj_mult 1 --epochs 8
        --lr_drop 7 --save_every 1 --print_freq 50)
    hybrid="--hybrid_k 4 --hybrid_queries 80"
else
    words=$(xargs printf '%s\n' <<< "$DATA")
    mapfile -t setting <<< "$words"
    setting+=(--img_size 160 --max_size 214 --aug flip --num_workers 0
        --num_queries 60 --hidden_dim 128 --nheads 8 --enc_layers 1 --dec_layers 3 --dim_feedforward 512
        --dropout 0 --pe_temperature 20 --backbone mobilenet_v2 --backbone_weights "${WEIGHTS:-imagenet}"
        --backbone_stages 3 --lr_backbone 0 --batch_size 4 --lr 4e-4 --epochs 30 --lr_drop 25 --eval_every 3 --print_freq 73)
    hybrid="--hybrid_k 6 --hybrid_queries 240"
fi
two_stage="--two_stage --with_box_refine --mixed_selection --look_forward_twice --num_feature_levels 3"
mixed="--use_ms_detr --use_aux_ffn --cls_loss_coef 1"
heads="--co_aux_heads faster_rcnn atss"
declare -A schemes=(
    [plain]="$two_stage"
    [hybrid]="$two_stage $hybrid"
    [mixed]="$two_stage $mixed"
    [hybrid+mixed]="$two_stage $hybrid $mixed"
    [co-deformable]="$two_stage $heads"
    [all]="$two_stage $hybrid $mixed $heads"
    [co-dino]="--dino --num_feature_levels 3 --dn_number 20 $heads"
    [detr]=""
    [conditional]="--conditional"
    [bf16]="$two_stage --amp bf16"
    [fp16]="$two_stage --amp fp16"
)
commands=()
read -r -a names <<< "${NAMES:-plain hybrid mixed hybrid+mixed co-deformable co-dino conditional}"
read -r -a seeds <<< "${SEEDS:-0 1}"
for seed in "${seeds[@]}"; do
    for name in "${names[@]}"; do
        folder="$out/$name/seed$seed"
        mkdir -p "$folder"
        read -r -a scheme <<< "${schemes[$name]}"
        run=(python -u main.py --output_dir "$folder" --resume auto --seed "$seed" "${setting[@]}" "${scheme[@]}" "$@")
        commands+=("${run[*]@Q} >> ${folder@Q}/train.log 2>&1")
    done
done
# Several runs of one thread each share the cores better than one run of many threads.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
printf '%s\0' "${commands[@]}" | xargs -0 -n 1 -P "${JOBS:-2}" bash -c
runs=()
for name in "${names[@]}"; do
    runs+=("$out/$name"/seed*)
done
read -r -a flags <<< "${COMPARE_FLAGS:-}"
python tools/compare_runs.py "${runs[@]}" --output "$out" "${flags[@]}"
