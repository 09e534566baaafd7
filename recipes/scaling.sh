#!/bin/sh
# SwiGLU and FlashMHF of several sizes at equal tokens per parameter, on a folder of text as bytes: one flashmhf compare per
# size, then the fit of benchmarks/scaling_fit.py. Run again, it continues. Not run yet.
#   SIZES="1m 3m 10m" TOKENS_PER_PARAMETER=0.25 recipes/scaling.sh DATA OUT [flags of flashmhf compare, such as --jobs 2]
set -eu
data=$1 out=$2
shift 2
here=$(dirname "$0")
for size in ${SIZES:-1m 3m 10m}; do
  case $size in  # parameters without embeddings, and sequences per step
  1m) parameters=1330176 batch=8 ;;
  3m) parameters=3348736 batch=8 ;;
  10m) parameters=10633344 batch=16 ;;
  30m) parameters=26776064 batch=16 ;;
  *) echo "scaling.sh: SIZES: expected some of 1m, 3m, 10m, 30m, got $size" >&2; exit 2 ;;
  esac
  steps=$(awk "BEGIN { print int(${TOKENS_PER_PARAMETER:-0.25} * $parameters / ($batch * 256)) }")
  flashmhf compare --variants swiglu,flashmhf --model "$here/scaling/$size.json" --seeds "${SEEDS:-0,1,2,3,4}" \
    --data "$data" --context-length 256 --per-device-train-batch-size "$batch" --max-steps "$steps" \
    --eval-steps "$steps" --save-steps "$steps" --bf16 true --output-dir "$out/$size" "$@"
done
set --
for size in ${SIZES:-1m 3m 10m}; do set -- "$@" "$out/$size"; done
python "$here/../benchmarks/scaling_fit.py" "$out/scaling" "$@"
