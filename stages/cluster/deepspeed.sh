#!/usr/bin/env bash
# Start a stage on several nodes by DeepSpeed. HOSTS is a file with a line `node1 slots=8` for each node. Either once, on the first node, from
# which ssh reaches all without a password, and where pdsh is installed:
#
#     HOSTS=hosts bash stages/cluster/deepspeed.sh stage3 --config paper/stage3_lora --data data/mine_128
#
# or, without ssh, on every node with its number, from 0:
#
#     HOSTS=hosts NODE_RANK=0 FIRST=node1 bash stages/cluster/deepspeed.sh stage3 --config paper/stage3_lora --data data/mine_128
set -euo pipefail
ways=(--hostfile "${HOSTS:?a file with the nodes}" --master_port "${PORT:-29500}")
[[ -z ${FIRST:-} ]] || ways+=(--master_addr "$FIRST")
[[ -z ${NODE_RANK:-} ]] || ways+=(--no_ssh --node_rank "$NODE_RANK")
exec deepspeed "${ways[@]}" --no_local_rank --module med3dvlm.cli train "$@"
