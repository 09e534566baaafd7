#!/bin/sh
#SBATCH --job-name=flashmhf
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --signal=TERM@300
#SBATCH --requeue
# Any number of machines, one torchrun on each; DATA and OUT are folders that all of them share. Not run on a cluster yet.
# Submitted again, it resumes from the last checkpoint. Five minutes before the time limit the run gets SIGTERM and saves a
# checkpoint, for which torchrun leaves it 30 s.
#   sbatch --nodes 8 recipes/slurm.sh PRESET DATA TOKENIZER OUT [flags of flashmhf train, such as --fsdp]
set -eu
model=$1 data=$2 tokenizer=$3 out=$4
shift 4
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
resume=
[ ! -f "$out/run.json" ] || resume=--resume
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1  # otherwise restarted processes try to reach the dead ones
exec srun --kill-on-bad-exit=1 torchrun --nnodes "$SLURM_NNODES" --nproc-per-node 8 --max-restarts 3 \
  --rdzv-backend c10d --rdzv-endpoint "$head:29500" --rdzv-id "$SLURM_JOB_ID" \
  -m flashmhf train --model "$model" --data "$data" --tokenizer "$tokenizer" --output-dir "$out" \
  --context-length 4096 --bf16 true --ddp-timeout 900 --save-steps 1000 $resume "$@"
