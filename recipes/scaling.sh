#!/bin/sh
# SwiGLU and FlashMHF of several sizes at equal tokens per parameter, on a folder of text as bytes: one flashmhf compare
# per size, then the fit of benchmarks/scaling_fit.py (OUT/scaling.md, .json, .png). Run again, it continues.
#   SIZES="1m 3m 10m" TOKENS_PER_PARAMETER=0.1 SEEDS=0,1,2 recipes/scaling.sh DATA OUT [flags of flashmhf compare]
# Optimizer and learning rate are the defaults, chosen with models of size 3m and not tuned at the others.
set -eu
data=$1 out=$2
shift 2
here=$(dirname "$0")
sizes=${SIZES:-1m 3m 10m} tokens=${TOKENS_PER_PARAMETER:-0.1} batch=${BATCH:-8}  # sequences of 256 bytes per step

parameters() {  # without embeddings
  case $1 in
  1m) echo 1330176 ;;
  3m) echo 3348736 ;;
  10m) echo 10633344 ;;
  30m) echo 26776064 ;;
  *) echo "scaling.sh: SIZES: expected some of 1m, 3m, 10m, 30m, got $1" >&2; exit 2 ;;
  esac
}

for size in $sizes; do
  number=$(parameters "$size")
  steps=$(awk "BEGIN { print int($tokens * $number / ($batch * 256) + 0.5) }")
  if [ "$steps" -lt 20 ]; then  # with fewer, rounding would make tokens per parameter differ by more than 5 %
    echo "scaling.sh: TOKENS_PER_PARAMETER: expected at least 20 steps of $batch x 256 tokens, got $steps at $size;" \
      "raise it or lower BATCH" >&2
    exit 2
  fi
  plan="${plan:-} $size:$steps"
done
for run in $plan; do
  size=${run%:*}
  flashmhf compare --variants swiglu,flashmhf --model "$here/scaling/$size.json" --seeds "${SEEDS:-0,1,2}" \
    --data "$data" --context-length 256 --per-device-train-batch-size "$batch" --max-steps "${run#*:}" \
    --eval-strategy no --save-strategy no --report-to none --validation-tokens 65536 --document-bytes 4096 \
    --output-dir "$out/$size" "$@"
done
set --
for size in $sizes; do set -- "$@" "$out/$size"; done
python "$here/../benchmarks/scaling_fit.py" "$out/scaling" "$@"
