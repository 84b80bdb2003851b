#!/usr/bin/env bash
# Check the code base on an NVIDIA GPU in two calls of at most seven minutes: kernels and speed; tests and trainings.
#
#   bash scripts/gpu_check.sh kernels operator steps      correctness of each kernel first, then its speed
#   bash scripts/gpu_check.sh tests train convergence
#   bash scripts/gpu_check.sh                             every stage, in the environment of scripts/env.sh
#   bash scripts/gpu_check.sh --cpu                       every stage in a tiny size without a GPU, to test the script
#
#   --data DIR                data in COCO form for `train`, which is skipped without them
#   --backbone_weights FILE   pretrained MobileNetV2 (torchvision's names) for `train`; random weights without it
#   --official DIR            models/ops/src of an official repository, compiled and timed in `operator` and `steps` too
#   --wheels DIR              use the python of this machine and install these packages for the check only (no network)
#   --limit SECONDS           of the whole call (420; 840 for every stage); each step has its own limit too
#
# The folder for --wheels, for a machine with Python 3.12, torch, torchvision, scipy, matplotlib, tqdm and pytest:
#
#   pip download --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
#       --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
#       -d WHEELS -c constraints.txt hotcoco pycocotools termcolor submitit
#
# Results go to $OUT (output/gpu_check): summary.md, log.txt with every table, images, and files.tar.gz with all logs and
# curves. The exit status is 1 if a step failed.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

arguments=("$@") stages=() device=cuda data='' weights=none official='' wheels='' limit=''
while [ $# -gt 0 ]; do
    case $1 in
        --cpu) device=cpu ;;
        --data) data=$2; shift ;;
        --backbone_weights) weights=$2; shift ;;
        --official) official=$2; shift ;;
        --wheels) wheels=$2; shift ;;
        --limit) limit=$2; shift ;;
        kernels | operator | steps | tests | train | convergence) stages+=("$1") ;;
        *) echo "error: unknown argument $1; see the head of $0" >&2; exit 2 ;;
    esac
    shift
done
[ ${#stages[@]} -gt 0 ] || { stages=(kernels operator steps tests train convergence); limit=${limit:-840}; }
limit=${limit:-420}

OUT=${OUT:-output/gpu_check}
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
if [ -z "${GPU_CHECK_LOGGED:-}" ]; then # once more, with all output in log.txt too
    GPU_CHECK_LOGGED=yes OUT=$OUT bash "scripts/${BASH_SOURCE[0]##*/}" "${arguments[@]}" 2>&1 | tee "$OUT/log.txt"
    exit "${PIPESTATUS[0]}"
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/logs" "$work/runs"
export PATH="$PATH:/usr/local/cuda/bin" # compute-sanitizer, ncu
export TORCH_EXTENSIONS_DIR="$work/official"

if [ -n "$wheels" ]; then
    VENV=none
    mkdir "$work/bin"
    printf '#!/bin/sh\nexec python3 "$@"\n' > "$work/bin/python"
    chmod +x "$work/bin/python"
    export PATH="$work/bin:$PATH" PYTHONPATH="$work/site${PYTHONPATH:+:$PYTHONPATH}"
    python3 -m pip install -q --no-index --no-deps --no-compile --target "$work/site" "$wheels"/*.whl || exit 1
fi
source scripts/env.sh requirements-dev.txt
export VENV=none PYTHONUNBUFFERED=1 OMP_NUM_THREADS=2
SECONDS=0 # the installation does not count

if [ $device = cuda ] && ! python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo 'error: PyTorch sees no NVIDIA GPU here; --cpu tries the script without one' >&2
    exit 2
fi

row() { # step, result, seconds, note
    printf '| %s | %s | %s | %s |\n' "$@" >> "$work/rows"
}

right_kernels() { # the log of a step on a GPU names the kernels that it uses
    case $device/$1 in
        cuda/operator | cuda/*step* | cuda/fps | cuda/train_off | cuda/train_bf16 | cuda/quickstart)
            grep -q 'cuda kernels of deformable attention on cuda' "$work/logs/$1.txt" ;;
    esac
}

# step NAME SECONDS COMMAND...: run a command within the remaining time, and save its output.
step() {
    local name=$1 most=$2 begin=$SECONDS status log="$work/logs/$1.txt"
    shift 2
    local left=$((limit - SECONDS))
    [ $device = cuda ] || most=$limit # cores may be busy with other work
    if [ $left -lt 5 ]; then
        row "$name" 'NOT RUN' 0 'no time was left'
        return
    fi
    timeout -s INT -k 15 $((most < left ? most : left)) "$@" > "$log" 2>&1 < /dev/null
    status=$?
    case $status in
        0) status=ok; right_kernels "$name" || status='FAILED (not on the CUDA kernels)' ;;
        124 | 130 | 137) status='TIME OVER' ;;
        *) status="FAILED ($status)" ;;
    esac
    local note
    note=$(grep -v '^ *$' "$log" | tail -n 1 | tr '|' '/' | cut -c 1-110)
    row "$name" "$status" $((SECONDS - begin)) "$note"
    echo
    echo "=== $name: $status after $((SECONDS - begin)) s"
    if [ "$status" = ok ]; then grep '^|' "$log" || tail -n 3 "$log"; else grep '^|' "$log"; tail -n 15 "$log"; fi
}

only_gpu() { # a step that needs a GPU; without one the table gives this reason
    if [ $device = cuda ]; then step "$@"; else row "$1" 'left out' 0 'needs an NVIDIA GPU'; fi
}

pack() { # copy images into OUT, write files.tar.gz without weights, and the summary
    cp "$work"/runs/*.png "$OUT" 2> /dev/null
    tar czf "$OUT/files.tar.gz" -C "$work" --exclude='*.pth' --exclude=site --exclude=bin --exclude=official . 2> /dev/null
    {
        echo "# GPU check: $machine"
        echo
        echo "Commit $(git rev-parse --short HEAD 2> /dev/null || echo unknown), ${stages[*]}, $SECONDS s"
        echo
        echo '| step | result | seconds | last line |'
        echo '| --- | --- | --- | --- |'
        cat "$work/rows"
    } > "$OUT/summary.md"
}

# Compile with the report of the assembler, and check that there are CUDA kernels.
build='NVCC_APPEND_FLAGS="-Xptxas -v" python models/ops/setup.py build_ext --inplace --force 2>&1 || exit 1
python - <<END
import sys
from models.ops.functions import problems
sys.exit(problems.get("cuda"))
END'
report='log="$1"/build.txt; grep -E "warning|error" "$log" | sort | uniq -c
grep -oE "Used [0-9]+ registers" "$log" | sort | uniq -c
echo "$(grep -c "Compiling entry" "$log") kernels; spills: $(grep -oE "[1-9][0-9]* bytes spill" "$log" | sort -u | xargs)"'

stage_kernels() {
    only_gpu build 180 bash -c "$build"
    only_gpu compiler_report 10 bash -c "$report" report "$work/logs"
    local what=(--device cuda --only cuda)
    [ $device = cuda ] || what=(--device cpu --brief)
    step operator_test 90 python -m tests.ops_check "${what[@]}"
}

stage_operator() {
    local sizes=(--rounds 10)
    [ $device = cuda ] || sizes=(--rounds 1 --only 160x192)
    step operator 120 python tools/benchmark.py op --device $device "${sizes[@]}" ${official:+--official "$official"}
    # The first four launches are those of a self-test.
    if command -v ncu > /dev/null; then
        only_gpu ncu 60 ncu --clock-control none --kernel-name 'regex:^(forward|backward)_kernel$' --launch-skip 4 \
            --section SpeedOfLight --section MemoryWorkloadAnalysis --section Occupancy --section SchedulerStats \
            --metrics l1tex__t_sector_hit_rate.pct,lts__t_sector_hit_rate.pct,lts__t_sectors_op_red.sum \
            python tools/benchmark.py op --device cuda --rounds 0 --only 'encoder 800x1333 b2'
    else
        row ncu 'left out' 0 'needs Nsight Compute'
    fi
}

stage_steps() {
    local sizes=(--rounds 8) all=()
    if [ $device = cpu ]; then
        sizes=(--rounds 1 --height 64 --width 96 --batch_size 1 --threads 1)
        all=(--models DETR 'Deformable DETR, two stages')
    fi
    only_gpu step_profile 60 python tools/benchmark.py profile --device $device
    step steps 120 python tools/benchmark.py step --device $device "${sizes[@]}" "${all[@]}" --precisions fp32 tf32 bf16 \
        ${official:+--official "$official"}
    step fps 60 python tools/benchmark.py fps --device $device "${sizes[@]}" "${all[@]}"
    only_gpu steps_compiled 240 python tools/benchmark.py step --device $device "${sizes[@]}" \
        --precisions bf16 'bf16 + compile' --models DETR 'Deformable DETR, two stages'
}

# What is not timed runs side by side.
stage_tests() {
    local tool ours='' # other kernels than ours are not for us to check, and take long
    if compute-sanitizer --help 2> /dev/null | grep -q -- '--kernel-name '; then ours='--kernel-name kns=ms_deform_attn'; fi
    only_gpu all_kernels 300 python -m tests.ops_check --device cuda &
    only_gpu gpu_tests 300 python -m pytest -q -m gpu -n 4 -p no:cacheprovider $(grep -l 'mark\.gpu' tests/test_*.py) &
    for tool in memcheck racecheck synccheck initcheck; do
        only_gpu $tool 200 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $tool --error-exitcode 9 $ours \
            python -m tests.ops_check --device cuda --only cuda --brief &
    done
    wait $(jobs -rp)
}

# A real training twice, with and without 16 bits, beside the quickstart.
stage_train() {
    local flags=(--coco_path "$data" --backbone mobilenet_v2 --backbone_weights "$weights" --device $device
        --two_stage --with_box_refine --mixed_selection --look_forward_twice --num_queries 100)
    local short=() mode
    if [ $device = cuda ]; then
        flags+=(--img_size 320 --max_size 427 --batch_size 4 --num_workers 4 --epochs 12 --lr_drop 9 --eval_every 3)
    else
        flags+=(--img_size 96 --max_size 128 --num_queries 20 --hidden_dim 32 --enc_layers 1 --dec_layers 1
            --dim_feedforward 64 --nheads 4 --num_workers 0 --epochs 1)
        short=(--epochs 1 --shapes_train 16 --shapes_val 8 --device cpu)
    fi
    for mode in off bf16; do
        if [ -n "$data" ]; then
            step "train_$mode" 130 python main.py --output_dir "$work/runs/train/$mode" --amp $mode "${flags[@]}" &
        else
            row "train_$mode" 'left out' 0 'needs --data DIR'
        fi
    done
    step quickstart 130 bash scripts/quickstart.sh --output_dir "$work/runs/quickstart" "${short[@]}" &
    wait $(jobs -rp)
    if [ -f "$work/runs/train/off/metrics.csv" ] && [ -f "$work/runs/train/bf16/metrics.csv" ]; then
        step train_comparison 30 python tools/compare_runs.py --logs_only --output "$work/runs/train" "$work"/runs/train/{off,bf16}
        cp "$work/runs/train/comparison.png" "$work/runs/train_comparison.png"
    fi
    cp "$work/runs/quickstart/curves.png" "$work/runs/quickstart_curves.png"
    cp "$work/runs/quickstart/predictions.png" "$work/runs/quickstart_predictions.png"
}

# Two schemes in 16 bits, for as many of their epochs as there is time for.
stage_convergence() {
    local names='hybrid co-dino' short=(--amp bf16)
    if [ $device = cpu ]; then
        names='plain co-dino'
        short=(--epochs 1 --shapes_train 8 --shapes_val 4 --device cpu)
    fi
    step schemes 400 env OUT="$work/runs/schemes" NAMES="$names" SEEDS=0 JOBS=2 COMPARE_FLAGS=--logs_only \
        bash scripts/compare_schemes.sh "${short[@]}"
    limit=$((limit + 30)) # what has been trained is looked at in any case
    local finished=() name
    for name in $names; do
        [ -f "$work/runs/schemes/$name/seed0/metrics.csv" ] && finished+=("$work/runs/schemes/$name/seed0")
    done
    step convergence 30 python tools/compare_runs.py --logs_only --output "$work/runs/schemes" "${finished[@]}"
    cp "$work/runs/schemes/comparison.png" "$work/runs/convergence.png"
}

if [ $device = cuda ]; then
    machine=$(python -c 'import torch; print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}")')
    nvidia-smi
else
    machine='CPU only, tiny sizes'
fi
for stage in "${stages[@]}"; do
    "stage_$stage"
    pack
done
echo
cat "$OUT/summary.md"
! grep -qE '^\| [^|]* \| (FAILED|TIME OVER|NOT RUN)' "$work/rows"
