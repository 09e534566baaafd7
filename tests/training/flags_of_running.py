"""The fields of transformers.TrainingArguments on running, logging and saving, and what must come of their values."""

import math

from flag_cases import EVALUATED, Outcome, Refused, Runs, Table, other, reaches, refused, same
from transformers.utils import logging as transformers_logging


def eval_batches(run: Outcome) -> int:
    return len(run.trainer.callback_handler.eval_dataloader)


NO_METRICS = "the loss is all that is measured"
NO_HUB = "none without --push-to-hub true"
BEST = f"{EVALUATED} --save-steps 1 --load-best-model-at-end true"

RUNNING: Table = {
    "torch_empty_cache_steps": [
        same("--torch-empty-cache-steps 1"),
        *refused("--torch-empty-cache-steps", "bigger than 0", "0"),
    ],
    "auto_find_batch_size": [same("--auto-find-batch-size true")],
    "logging_strategy": [
        Runs("--logging-first-step false --logging-strategy no", lambda run: run.steps("loss") == []),
        Runs("--logging-first-step false --logging-strategy epoch", lambda run: run.steps("loss") == [3]),
        Refused("--logging-strategy x", "invalid choice"),
    ],
    "logging_steps": [
        Runs("--logging-first-step false --logging-steps 2", lambda run: run.steps("loss") == [2]),
        Runs("--logging-first-step false --logging-steps 0.6", lambda run: run.steps("loss") == [2]),
        *refused("--logging-steps", "logging-steps: expected more than 0", "0", "-1"),
        *refused("--logging-steps", "logging_steps must be an integer", "1.5"),
    ],
    "logging_first_step": [
        Runs("--logging-first-step true --logging-steps 2", lambda run: run.steps("loss") == [1, 2])
    ],
    "log_on_each_node": [reaches("--log-on-each-node false", lambda trainer: not trainer.args.log_on_each_node)],
    "logging_nan_inf_filter": [same("--logging-nan-inf-filter false")],
    "include_num_input_tokens_seen": [Refused("--include-num-input-tokens-seen false", "log and result count tokens")],
    "log_level": [
        Runs("--log-level error", lambda run: transformers_logging.get_verbosity() == transformers_logging.ERROR),
        Refused("--log-level x", "invalid choice"),
    ],
    "log_level_replica": [same("--log-level-replica error"), Refused("--log-level-replica x", "invalid choice")],
    "disable_tqdm": [same("--disable-tqdm false")],  # the bar of a terminal: tests/cli/test_progress.py
    "report_to": [
        Runs("--report-to tensorboard", lambda run: any((run.folder / "runs").rglob("events.*"))),
        Runs("--report-to all", lambda run: any((run.folder / "runs").rglob("events.*"))),
        *refused("--report-to", "report-to: expected a tracker that is installed", "wandb", "banana"),
    ],
    "run_name": [reaches("--run-name x", lambda trainer: trainer.args.run_name == "x")],
    "project": [Refused("--project x", "none without --report-to trackio")],
    "trackio_space_id": [Refused("--trackio-space-id x", "none without --report-to trackio")],
    "trackio_bucket_id": [Refused("--trackio-bucket-id x", "none without --report-to trackio")],
    "trackio_static_space_id": [Refused("--trackio-static-space-id x", "none without --report-to trackio")],
    "eval_strategy": [
        Runs("--eval-strategy no", lambda run: run.steps("eval_loss") == [3]),  # the final one is always made
        Runs("--eval-strategy epoch", lambda run: run.steps("eval_loss") == [3, 3]),
        Refused("--eval-strategy x", "invalid choice"),
    ],
    "eval_steps": [
        Runs("--eval-strategy steps --eval-steps 1", lambda run: run.steps("eval_loss") == [1, 2, 3, 3]),
        Runs("--eval-strategy steps --eval-steps 0.6", lambda run: run.steps("eval_loss")[0] == 2),
        *refused("--eval-steps", "eval-steps: expected more than 0", "0", "-1"),
    ],
    "eval_delay": [
        Runs(f"{EVALUATED} --eval-delay 2", lambda run: run.steps("eval_loss") == [2, 3, 3]),
        Refused("--eval-delay 2", "none without --eval-strategy"),
        *refused("--eval-delay", "expected 0 or more", "-1"),
    ],
    "per_device_eval_batch_size": [
        Runs(
            "--per-device-eval-batch-size 2",
            lambda run: eval_batches(run) == math.ceil(len(run.trainer.eval_dataset) / 2),
        ),
        *refused("--per-device-eval-batch-size", "expected 1 or more", "0"),
    ],
    "prediction_loss_only": [same("--prediction-loss-only true")],
    "eval_on_start": [Runs("--eval-on-start true", lambda run: run.steps("eval_loss") == [0, 3])],
    "eval_do_concat_batches": [Refused("--eval-do-concat-batches false", NO_METRICS)],
    "eval_use_gather_object": [Refused("--eval-use-gather-object true", NO_METRICS)],
    "eval_accumulation_steps": [
        same(f"{EVALUATED} --eval-accumulation-steps 1"),
        *refused("--eval-accumulation-steps", "expected 1 or more", "0"),
    ],
    "include_for_metrics": [Refused("--include-for-metrics inputs loss", NO_METRICS)],
    "batch_eval_metrics": [Refused("--batch-eval-metrics true", NO_METRICS)],
    "save_only_model": [
        Runs("--save-only-model true", lambda run: not any(run.folder.rglob("optimizer.pt")) and run.same_weights())
    ],
    "save_strategy": [
        Runs("--save-strategy no", lambda run: run.checkpoints() == []),
        Runs("--save-strategy epoch", lambda run: run.checkpoints() == ["checkpoint-3"]),
        Runs(f"{EVALUATED} --save-strategy best", lambda run: "checkpoint-3" in run.checkpoints()),
        Refused("--save-strategy best", "save-strategy: expected another than best"),
    ],
    "save_steps": [
        Runs("--save-steps 2", lambda run: run.checkpoints() == ["checkpoint-2", "checkpoint-3"]),
        *refused("--save-steps", "save-steps: expected more than 0", "0", "-1"),
    ],
    "save_on_each_node": [Refused("--save-on-each-node true", "which the nodes share")],
    "save_total_limit": [
        Runs("--save-steps 1 --save-total-limit 1", lambda run: run.checkpoints() == ["checkpoint-3"]),
        Runs("--save-steps 1 --save-total-limit 0", lambda run: len(run.checkpoints()) == 3),
        *refused("--save-total-limit", "expected 0 or more", "-1"),
    ],
    "enable_jit_checkpoint": [Refused("--enable-jit-checkpoint true", "SIGTERM saves a checkpoint anyway")],
    "push_to_hub": [],  # tests/training/test_hub.py
    "hub_token": [Refused("--hub-token x", NO_HUB)],
    "hub_private_repo": [Refused("--hub-private-repo true", NO_HUB)],
    "hub_model_id": [Refused("--hub-model-id a/b", NO_HUB)],
    "hub_strategy": [Refused("--hub-strategy checkpoint", "the finished model is uploaded")],
    "hub_always_push": [Refused("--hub-always-push true", "the finished model is uploaded")],
    "hub_revision": [Refused("--hub-revision x", NO_HUB)],
    "load_best_model_at_end": [
        Runs(BEST, lambda run: run.trainer.state.best_global_step == 3),
        Refused("--load-best-model-at-end true", "expected --eval-strategy steps or epoch with it"),
        Refused(
            f"{EVALUATED} --load-best-model-at-end true --save-strategy epoch",
            "requires the save and eval strategy to match",
        ),
        Refused(f"{EVALUATED} --load-best-model-at-end true --save-strategy no", "strategy to match"),
        Refused(f"{EVALUATED} --save-steps 2 --load-best-model-at-end true", "equal --save-steps and --eval-steps"),
    ],
    "metric_for_best_model": [
        Runs(f"{EVALUATED} --metric-for-best-model loss", lambda run: run.trainer.state.best_metric < 9),
        *refused("--metric-for-best-model", "metric-for-best-model: expected loss", "banana", "runtime"),
    ],
    "greater_is_better": [
        Runs(f"{BEST} --metric-for-best-model loss --greater-is-better true", lambda run: not run.same_weights()),
        Refused("--greater-is-better true", "none without --metric-for-best-model"),
    ],
    "ignore_data_skip": [],  # acts on resuming: test_flags_of_resuming
    "restore_callback_states_from_checkpoint": [],  # likewise
    "full_determinism": [same("--full-determinism true")],
    "seed": [other("--seed 7"), *refused("--seed", "seed: expected 0 or more and less than", "-1", "99999999999")],
    "data_seed": [other("--data-seed 7"), *refused("--data-seed", "data-seed: expected 0 or more", "-1")],
    "use_cpu": [same("--use-cpu true")],
    "accelerator_config": [
        reaches(
            "--accelerator-config '{\"split_batches\": true}'",
            lambda trainer: trainer.accelerator.dataloader_config.split_batches,
        ),
        same("--accelerator-config '{\"dispatch_batches\": true}'"),
        same("--accelerator-config '{\"even_batches\": false}'"),
        same("--accelerator-config '{\"non_blocking\": true}'"),
        same("--accelerator-config '{\"use_seedable_sampler\": false}'"),
        same('--accelerator-config \'{"gradient_accumulation_kwargs": {"sync_each_batch": true}}\''),
        Refused(
            '--accelerator-config \'{"gradient_accumulation_kwargs": {"num_steps": 2}}\'',
            "expected --gradient-accumulation-steps",
        ),
        Refused('--accelerator-config \'{"gradient_accumulation_kwargs": {"x": 2}}\'', "x"),
        Refused("--accelerator-config '{\"x\": 2}'", "x"),
        Refused("--accelerator-config no/such.json", "no/such.json"),
    ],
    "parallelism_config": [Refused("--parallelism-config '{\"tp_size\": 2}'", "parallelism")],
    "dataloader_drop_last": [
        Runs(
            "--dataloader-drop-last true --per-device-eval-batch-size 5",
            lambda run: eval_batches(run) == len(run.trainer.eval_dataset) // 5,
        )
    ],
    "dataloader_num_workers": [
        same("--dataloader-num-workers 1"),
        *refused("--dataloader-num-workers", "expected 0 or more", "-1"),
    ],
    "dataloader_pin_memory": [same("--dataloader-pin-memory true")],
    "dataloader_persistent_workers": [
        same("--dataloader-persistent-workers true --dataloader-num-workers 1"),
        Refused("--dataloader-persistent-workers true", "none without --dataloader-num-workers"),
    ],
    "dataloader_prefetch_factor": [
        same("--dataloader-prefetch-factor 2 --dataloader-num-workers 1"),
        Refused("--dataloader-prefetch-factor 2", "dataloader_num_workers > 0"),
        Refused("--dataloader-prefetch-factor 0 --dataloader-num-workers 1", "expected 1 or more"),
    ],
    "dataloader_multiprocessing_context": [
        same("--dataloader-multiprocessing-context fork --dataloader-num-workers 1"),
        Refused("--dataloader-multiprocessing-context fork", "none without --dataloader-num-workers"),
    ],
    "dataloader_in_order": [same("--dataloader-in-order false")],
    "remove_unused_columns": [Refused("--remove-unused-columns true", "messages name blocks")],
    "label_names": [same("--label-names labels"), Refused("--label-names banana", "label-names: expected labels")],
    "train_sampling_strategy": [
        other("--train-sampling-strategy random"),
        other("--train-sampling-strategy group_by_length"),
        other("--train-sampling-strategy batch_rebalance"),
        Refused("--train-sampling-strategy banana", "invalid choice"),
    ],
    "length_column_name": [Refused("--length-column-name x", "all blocks have the same length")],
    "ddp_find_unused_parameters": [
        reaches("--ddp-find-unused-parameters true", lambda trainer: trainer.args.ddp_find_unused_parameters)
    ],
    "ddp_bucket_cap_mb": [Refused("--ddp-bucket-cap-mb 1", "none without several processes")],
    "ddp_broadcast_buffers": [Refused("--ddp-broadcast-buffers true", "none without several processes")],
    "ddp_static_graph": [Refused("--ddp-static-graph true", "none without several processes")],
    "ddp_backend": [Refused("--ddp-backend gloo", "none without torchrun")],
    "ddp_timeout": [
        reaches("--ddp-timeout 10", lambda trainer: trainer.args.ddp_timeout == 10),
        *refused("--ddp-timeout", "expected 1 or more", "-1"),
    ],
    "fsdp": [Refused("--fsdp full_shard --use-cpu true", "fsdp: expected a GPU")],
    "fsdp_config": [Refused("--fsdp-config '{\"version\": 2}'", "none without --fsdp")],
    "deepspeed": [Refused("--deepspeed x.json", "use --fsdp")],
    "debug": [
        same("--debug underflow_overflow"),
        *refused("--debug", "debug: expected underflow_overflow", "tpu_metrics_debug"),
        *refused("--debug", "banana", "banana"),
    ],
    "skip_memory_metrics": [
        Runs("--skip-memory-metrics false", lambda run: run.steps("train_mem_cpu_alloc_delta") == [3])
    ],
    "do_train": [same("--do-train true")],
    "do_eval": [same("--do-eval true")],
    "do_predict": [Refused("--do-predict true", "trains and validates")],
    "resume_from_checkpoint": [Refused("--resume-from-checkpoint x", "--resume finds")],
    "local_rank": [same("--local-rank 0"), *refused("--local-rank", "the rank that torchrun gives", "3")],
}
