#!/usr/bin/env bash
# Start a stage on several nodes by Slurm, which starts it again when a node fails:
#
#     sbatch --nodes 4 --gpus-per-node 8 --cpus-per-task 72 --mem 0 --time 2-0 stages/cluster/slurm.sh stage3 \
#         --config paper/stage3_lora --data data/mine_128
#
#SBATCH --job-name=med3dvlm
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
export NODES=$SLURM_JOB_NUM_NODES GPUS=${SLURM_GPUS_ON_NODE:-${GPUS:-8}} JOB=$SLURM_JOB_ID
read -r FIRST < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export FIRST PORT=${PORT:-$((20000 + SLURM_JOB_ID % 10000))}
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK # srun does not take it from the job since Slurm 22.05
exec srun --kill-on-bad-exit=1 bash "${CLUSTER:-stages/cluster}/torchrun.sh" "$@"
