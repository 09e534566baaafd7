#!/bin/sh
# Compares feed-forward layers on a folder of books, and ablates the parts of FlashMHF: docs/results.
# About two and a half hours on two cores; run again, it continues.
#   recipes/compare_books.sh BOOKS OUT [further flags, such as --jobs 2]
set -eu
books=$1 out=$2
shift 2
[ -d "$out/tokenizer" ] || flashmhf tokenizer "$books" "$out/tokenizer" --vocab-size 4096

compare() {
  flashmhf compare --variants swiglu,mhffn,pkv,flashmhf --learning-rate 1e-3,2e-3,4e-3 \
    --data "$books" --tokenizer "$out/tokenizer" --context-length 256 --per-device-train-batch-size 8 \
    --max-steps 360 --warmup-steps 36 --eval-steps 120 --save-steps 120 --save-total-limit 1 --bf16 true \
    --validation-tokens 32768 --document-bytes 32768 "$@"
}

compare --seeds 0,1,2,3,4 --output-dir "$out/layers" "$@"
compare --seeds 0,1,2 --gate-type none --q-norm off --head-dim 32,128 --output-dir "$out/ablations" "$@"
