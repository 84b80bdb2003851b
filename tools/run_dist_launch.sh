#!/usr/bin/env bash
# Run a command in GPUS processes, each for one GPU (or none: then they talk over gloo):
#
#   GPUS_PER_NODE=8 ./tools/run_dist_launch.sh 8 python -u main.py --coco_path DATA --output_dir OUT
#   GPUS_PER_NODE=8 ./tools/run_dist_launch.sh 8 ./scripts/r50_deformable_detr.sh --coco_path DATA
#
# On several machines, GPUS counts all of them; call it on each with its NODE_RANK (0, 1, ...) and the address of the first:
#
#   MASTER_ADDR=10.0.0.1 NODE_RANK=1 GPUS_PER_NODE=8 ./tools/run_dist_launch.sh 16 COMMAND
#
# Environment: GPUS_PER_NODE (GPUS, at most 8), MASTER_ADDR (127.0.0.1), MASTER_PORT (29500), NODE_RANK (0). The processes
# get the variables of torchrun: RANK, WORLD_SIZE, LOCAL_RANK, ... When one of them fails, the others are ended.
set -euo pipefail

refuse() {
    echo "error: $1 (usage: [GPUS_PER_NODE=8] $0 GPUS COMMAND ...)" >&2
    exit 2
}

number='^[1-9][0-9]*$'
[ $# -ge 2 ] || refuse 'a number of GPUs and a command are needed'
gpus=$1
shift
[[ $gpus =~ $number ]] || refuse "GPUS must be a positive number, not '$gpus'"
per_node=${GPUS_PER_NODE:-$((gpus < 8 ? gpus : 8))}
[[ $per_node =~ $number ]] || refuse "GPUS_PER_NODE must be a positive number, not '$per_node'"
((gpus % per_node == 0)) || refuse "$gpus GPUs are no multiple of GPUS_PER_NODE=$per_node"
node=${NODE_RANK:-0}
[[ $node =~ ^[0-9]+$ ]] && ((10#$node < gpus / per_node)) || refuse "NODE_RANK must be less than the $((gpus / per_node)) nodes, not '$node'"
[[ $1 != *.sh || -x $1 ]] || set -- bash "$@"

# SIGUSR1 and SIGUSR2 (the time limit is near) are for the processes; by default they would end torchrun. Older PyTorch
# ignores this variable.
export PET_SIGNALS_TO_HANDLE=${PET_SIGNALS_TO_HANDLE:-SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2}
exec python -m torch.distributed.run --nnodes "$((gpus / per_node))" --node_rank "$node" --nproc_per_node "$per_node" \
    --master_addr "${MASTER_ADDR:-127.0.0.1}" --master_port "${MASTER_PORT:-29500}" --no_python "$@"
