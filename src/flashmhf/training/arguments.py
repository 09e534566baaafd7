"""transformers.TrainingArguments from flags, with this package's defaults for pretraining."""

import argparse
from typing import Any, NoReturn, cast

import torch
from transformers import HfArgumentParser, TrainingArguments

from flashmhf.errors import InputError
from flashmhf.training.argument_checks import check_flags, check_together
from flashmhf.training.argument_trials import try_arguments

SAVE_STEPS = 500
MIN_LR_RATE = 0.1  # of a schedule that ends at a share of the learning rate
DEPENDENT = ("lr_scheduler_kwargs", "metric_for_best_model", "save_strategy", "save_steps", "bf16")  # see `_complete`
DEFAULTS: dict[str, Any] = {
    "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine_with_min_lr",
    "warmup_steps": 0.02,
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


def parse_arguments(flags: list[str], output_dir: str) -> TrainingArguments:
    """`transformers.TrainingArguments` from command-line flags, with this package's defaults.

    Raises:
        InputError: an unknown flag or a value that does not fit.
    """
    parser = _Parser(cast(Any, TrainingArguments), prog="flashmhf train", add_help=False, allow_abbrev=False)
    gpu = torch.cuda.is_available()
    parser.set_defaults(
        **DEFAULTS,
        **dict.fromkeys(DEPENDENT),
        dataloader_pin_memory=gpu,
        use_cpu=not torch.accelerator.is_available(),  # otherwise each process of torchrun would train on its own
        output_dir=output_dir,
    )
    try:
        values, unknown = parser.parse_known_args(flags)
        if unknown:
            raise InputError(
                f"flags: expected those of flashmhf train or transformers.TrainingArguments, got {unknown[0]!r}"
            )
        _complete(values)
        check_flags(values)
        if values.ddp_backend is not None and not torch.distributed.is_torchelastic_launched():
            raise InputError(f"ddp-backend: expected none without torchrun, got {values.ddp_backend}")
        arguments = TrainingArguments(**vars(values))
    except (ValueError, TypeError, LookupError, RuntimeError, OSError, ImportError, NotImplementedError) as error:
        raise InputError(str(error).splitlines()[0]) from error
    if torch.distributed.is_torchelastic_launched() and arguments.parallel_mode.value == "not_parallel":
        raise InputError("use-cpu: expected true under torchrun on a machine without a GPU, got false")
    if arguments.fsdp and arguments.use_cpu:
        raise InputError("fsdp: expected a GPU, got the CPU, on which accelerate would train with DDP instead")
    check_together(arguments)
    try_arguments(arguments)
    return arguments


def _complete(values: argparse.Namespace) -> None:
    """Sets what was not given to what fits the values that were."""
    if values.lr_scheduler_kwargs is None and str(values.lr_scheduler_type).endswith("with_min_lr"):
        values.lr_scheduler_kwargs = {"min_lr_rate": MIN_LR_RATE}
    best = values.load_best_model_at_end and values.eval_strategy != "no"  # each evaluated model is saved
    if values.save_strategy is None:
        values.save_strategy = values.eval_strategy if best else "steps"
    if values.save_steps is None:
        values.save_steps = values.eval_steps if best else SAVE_STEPS
    if values.save_strategy == "best" and values.metric_for_best_model is None:
        values.metric_for_best_model = "loss"
    if values.bf16 is None:
        half = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        values.bf16 = half and not values.use_cpu and not values.fp16


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(message)
