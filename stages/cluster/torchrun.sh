#!/usr/bin/env bash
# Start a stage on several nodes by torchrun. The same line on every node:
#
#     NODES=2 FIRST=node1 GPUS=8 bash stages/cluster/torchrun.sh stage3 --config paper/stage3_lora --data data/mine_128
#
# FIRST is the node where the others meet, which has to stay. RESTARTS=3 starts all processes again, from the last checkpoint, up to three
# times when one of them or another node has failed. A node that was lost is then started by the same line within JOIN seconds.
set -euo pipefail
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # else processes that are started again find addresses of those before (pytorch issue 135712)
export TORCH_CPP_LOG_LEVEL=${TORCH_CPP_LOG_LEVEL:-ERROR}
exec torchrun --nnodes "${NODES:?the number of nodes}" --nproc-per-node "${GPUS:-8}" \
    --rdzv-backend c10d --rdzv-endpoint "${FIRST:?the host name of the first node}:${PORT:-29500}" --rdzv-id "${JOB:-med3dvlm}" \
    --rdzv-conf "join_timeout=${JOIN:-600}" --max-restarts "${RESTARTS:-0}" -m med3dvlm.cli train "$@"
