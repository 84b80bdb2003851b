#!/usr/bin/env bash
# Run a command in GPUS tasks of Slurm, each for one GPU, and wait for its end:
#
#   GPUS_PER_NODE=8 ./tools/run_dist_slurm.sh PARTITION JOB_NAME 16 python -u main.py --coco_path DATA --output_dir OUT
#   GPUS_PER_NODE=8 ./tools/run_dist_slurm.sh PARTITION JOB_NAME 16 ./scripts/r50_deformable_detr.sh --coco_path DATA
#
# Environment: GPUS_PER_NODE (GPUS, at most 8), CPUS_PER_TASK (4), SRUN_ARGS (more arguments of srun), GRES (gpu:GPUS_PER_NODE;
# GRES= asks for none, in clusters without GPUs). When one task fails, the others are ended. Slurm can start a job again only
# if it is a batch job: run_with_submitit.py makes one, and so does calling this from a script given to sbatch.
set -euo pipefail

refuse() {
    echo "error: $1 (usage: [GPUS_PER_NODE=8] $0 PARTITION JOB_NAME GPUS COMMAND ...)" >&2
    exit 2
}

number='^[1-9][0-9]*$'
[ $# -ge 4 ] || refuse 'a partition, a name, a number of GPUs and a command are needed'
partition=$1 name=$2 gpus=$3
shift 3
[[ $gpus =~ $number ]] || refuse "GPUS must be a positive number, not '$gpus'"
per_node=${GPUS_PER_NODE:-$((gpus < 8 ? gpus : 8))}
[[ $per_node =~ $number ]] || refuse "GPUS_PER_NODE must be a positive number, not '$per_node'"
((gpus % per_node == 0)) || refuse "$gpus GPUs are no multiple of GPUS_PER_NODE=$per_node"
command -v srun > /dev/null || refuse 'there is no Slurm here (no srun)'
[[ $1 != *.sh || -x $1 ]] || set -- bash "$@"

gres=${GRES-gpu:$per_node}
read -ra more <<< "${SRUN_ARGS:-}"
exec srun --partition="$partition" --job-name="$name" ${gres:+--gres="$gres"} --ntasks="$gpus" --ntasks-per-node="$per_node" \
    --cpus-per-task="${CPUS_PER_TASK:-4}" --kill-on-bad-exit=1 ${more[@]+"${more[@]}"} "$@"
