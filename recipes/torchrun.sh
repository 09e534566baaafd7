#!/bin/sh
# Any preset on the GPUs of one machine, or on its CPU (GPUS=2 for two processes); a dead process restarts the run from its
# last checkpoint, at most three times. `flashmhf info PRESET --gpus 8` estimates memory and time beforehand.
#   GPUS=8 recipes/torchrun.sh PRESET DATA TOKENIZER OUT [flags of flashmhf train, such as --fsdp or --tensor-parallel 2]
set -eu
model=$1 data=$2 tokenizer=$3 out=$4
shift 4
resume=
[ ! -f "$out/run.json" ] || resume=--resume
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1  # otherwise restarted processes try to reach the dead ones
exec torchrun --standalone --nproc-per-node "${GPUS:-1}" --max-restarts 3 -m flashmhf train --model "$model" \
  --data "$data" --tokenizer "$tokenizer" --output-dir "$out" $resume "$@"
