#!/bin/sh
# Compares feed-forward layers on a folder of books, then FlashMHF with its parts changed: docs/results.
# About two hours on two cores; run again, it continues.
#   recipes/compare_books.sh BOOKS OUT [further flags, such as --jobs 2]
set -eu
books=$1 out=$2
shift 2
[ -d "$out/tokenizer" ] || flashmhf tokenizer "$books" "$out/tokenizer" --vocab-size 4096

compare() {
  flashmhf compare --data "$books" --tokenizer "$out/tokenizer" --context-length 256 --per-device-train-batch-size 4 \
    --max-steps 400 --eval-strategy no --save-strategy no --bf16 true --report-to none \
    --validation-tokens 32768 --document-bytes 32768 "$@"
}

compare --variants swiglu,flashmhf,mhffn,dense_moe,pkv --learning-rate 2.8e-3,4e-3,5.6e-3,8e-3 --seeds 0,1,2,3,4 \
  --output-dir "$out/layers" "$@"
compare --variants flashmhf --gate-type none --q-norm off --head-dim 32,64 --subnetworks 12 --learning-rate 8e-3 --seeds 0,1,2,3,4 \
  --output-dir "$out/ablations" "$@"
