#!/bin/sh
# A tiny model on a folder of text, on a laptop's CPU: BPE tokenizer, training, evaluation, a sample.
#   recipes/cpu_tiny.sh DATA OUT [flags of flashmhf train]
set -eu
data=$1 out=$2
shift 2
[ -d "$out/tokenizer" ] || flashmhf tokenizer "$data" "$out/tokenizer" --vocab-size 4096
resume=
[ ! -d "$out/model" ] || resume=--resume
flashmhf train --model flashmhf-tiny --data "$data" --tokenizer "$out/tokenizer" --output-dir "$out/model" \
  --context-length 256 --per-device-train-batch-size 16 --max-steps 1200 \
  --eval-steps 200 --save-steps 200 --validation-tokens 131072 $resume "$@"
flashmhf eval "$out/model" --data "$data" --context-length 256 --stride 128
flashmhf generate "$out/model" --prompt "It was a dark and stormy night" --max-new-tokens 150
