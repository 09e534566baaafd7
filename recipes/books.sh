#!/bin/sh
# A model on a folder of books: BPE tokenizer, training, loss on held-out books, a sample, a report.
#   recipes/books.sh TRAIN VALIDATION OUT tiny|128m [flags of flashmhf train]
# Run again after a crash or a kill, it resumes from the last complete checkpoint. tiny is for a CPU (an hour on two cores), 128m for
# one GPU with 80 GB (10,000 steps of 262,144 tokens; batch sizes unmeasured).
set -eu
train=$1 validation=$2 out=$3 size=$4
shift 4
case $size in
tiny)
  vocabulary=4096 context=256
  sizes="--per-device-train-batch-size 16 --max-steps 1500 --eval-steps 100 --save-steps 50 --logging-steps 5"
  ;;
128m)
  vocabulary=32768 context=4096
  sizes="--per-device-train-batch-size 8 --gradient-accumulation-steps 8 --max-steps 10000 --warmup-steps 150 --eval-steps 500
    --save-steps 250 --logging-steps 10 --bf16 true --optimizer adamw --learning-rate 1e-3"
  ;;
*)
  echo "books.sh: expected tiny or 128m, got $size" >&2
  exit 2
  ;;
esac
[ -d "$out/tokenizer" ] || flashmhf tokenizer "$train" "$out/tokenizer" --vocab-size "$vocabulary"
resume=
[ ! -e "$out/model/run.json" ] || resume=--resume
# shellcheck disable=SC2086  # words, not one argument
flashmhf train --model "flashmhf-$size" --data "$train" --tokenizer "$out/tokenizer" --output-dir "$out/model" \
  --context-length "$context" --validation-tokens 131072 $sizes $resume "$@"
flashmhf eval "$out/model" --data "$validation" --split all --context-length "$context"
flashmhf generate "$out/model" --prompt "It was a dark and stormy night" --max-new-tokens 150
flashmhf report "$out/model"
