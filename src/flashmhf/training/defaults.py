"""This package's defaults for transformers.TrainingArguments. Imports nothing heavy: `train --help` shows them."""

from typing import Any

from flashmhf.training.config import ADAMW, MUON

SAVE_STEPS = 500
LEARNING_RATES = {MUON: 4e-3, ADAMW: 1e-3}
MIN_LR_RATE = 0.1  # of a schedule that ends at a share of the learning rate
# Those whose defaults depend on the machine or have changed between versions: a resumed run keeps its values of them.
KEPT = ("lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "bf16")
# Those whose defaults depend on other values.
DEPENDENT = (*KEPT, "learning_rate", "metric_for_best_model", "save_strategy", "save_steps")
DEFAULTS: dict[str, Any] = {
    "lr_scheduler_type": "cosine_with_min_lr",
    "adam_beta2": 0.95,
    "weight_decay": 0.1,
    "num_train_epochs": 1.0,
    "train_sampling_strategy": "sequential",  # the blocks come shuffled
    "logging_steps": 10,
    "logging_first_step": True,
    "eval_strategy": "steps",
    "eval_steps": 500,
    "save_total_limit": 2,
    "report_to": ["tensorboard"],
    "include_num_input_tokens_seen": True,
    "remove_unused_columns": False,  # keeps the numbers of the blocks
    "ddp_find_unused_parameters": False,
}
