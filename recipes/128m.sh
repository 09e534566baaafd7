#!/bin/sh
# The paper's 128m recipe on one node: 64 sequences of 4096 tokens per step. Batch sizes are guesses for 80 GB GPUs, unmeasured.
#   GPUS=8 recipes/128m.sh DATA TOKENIZER OUT [flags of flashmhf train]
set -eu
data=$1 tokenizer=$2 out=$3
shift 3
gpus=${GPUS:-1}
torchrun --standalone --nproc-per-node "$gpus" -m flashmhf train --model flashmhf-128m --data "$data" --streaming \
  --tokenizer "$tokenizer" --output-dir "$out" --context-length 4096 --per-device-train-batch-size 8 \
  --gradient-accumulation-steps $((8 / gpus > 0 ? 8 / gpus : 1)) --max-steps 245760 --optimizer adamw \
  --learning-rate 3e-3 --lr-scheduler-type cosine_with_min_lr --lr-scheduler-kwargs '{"min_lr": 1e-5}' --warmup-steps 0.015 \
  --adam-beta1 0.9 --adam-beta2 0.95 --weight-decay 0.1 --bf16 true --eval-steps 2000 --save-steps 2000 "$@"
