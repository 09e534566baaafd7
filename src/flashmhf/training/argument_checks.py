"""What `flashmhf train` refuses among the values of transformers.TrainingArguments, before it writes anything.

Three tables: the range of each number, flags that would change nothing here, and flags that need another one. What only
a library can judge (an optimizer's options, say) is tried in `argument_trials`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers.integrations.integration_utils import get_available_reporting_integrations

from flashmhf.errors import InputError
from flashmhf.training.warmup import warms_up

SEEDS = 2**32  # numpy's
NO_METRICS = "the loss is all that is measured"
ONCE = "the finished model is uploaded; while a run goes on, its folder is not complete at every moment"


@dataclass(frozen=True, kw_only=True)
class Range:
    """Numbers from `low` up to, but not including, `below`; `above` excludes the lower end."""

    low: float = -math.inf
    above: float = -math.inf
    below: float = math.inf

    def __contains__(self, value: float) -> bool:
        return self.low <= value < self.below and self.above < value

    def __str__(self) -> str:
        lower = f"{self.low:g} or more" if self.low > -math.inf else f"more than {self.above:g}"
        return lower if self.below == math.inf else f"{lower} and less than {self.below:,}"


RANGES = {
    "per_device_train_batch_size": Range(low=1),
    "per_device_eval_batch_size": Range(low=1),
    "gradient_accumulation_steps": Range(low=1),
    "learning_rate": Range(low=0),
    "warmup_steps": Range(low=0),
    "weight_decay": Range(low=0),
    "adam_beta1": Range(low=0, below=1),
    "adam_beta2": Range(low=0, below=1),
    "adam_epsilon": Range(low=0),
    "max_grad_norm": Range(low=0),
    "label_smoothing_factor": Range(low=0, below=1),
    "neftune_noise_alpha": Range(low=0),
    "logging_steps": Range(above=0),
    "eval_steps": Range(above=0),
    "eval_delay": Range(low=0),
    "eval_accumulation_steps": Range(low=1),
    "save_steps": Range(above=0),
    "save_total_limit": Range(low=0),  # 0 keeps all, as in transformers
    "dataloader_num_workers": Range(low=0),
    "dataloader_prefetch_factor": Range(low=1),
    "ddp_bucket_cap_mb": Range(low=1),
    "ddp_timeout": Range(low=1),
    "seed": Range(low=0, below=SEEDS),
    "data_seed": Range(low=0, below=SEEDS),
}


@dataclass(frozen=True)
class Fixed:
    """The only `values` of a flag (spellings of one value), and why there is no other."""

    reason: str
    values: tuple[Any, ...] = (False,)


FIXED = {
    "include_num_input_tokens_seen": Fixed("log and result count tokens", (True, "all")),
    "remove_unused_columns": Fixed("messages name blocks by their number"),
    "include_for_metrics": Fixed(NO_METRICS, ([],)),
    "batch_eval_metrics": Fixed(NO_METRICS),
    "eval_do_concat_batches": Fixed(NO_METRICS, (True,)),
    "eval_use_gather_object": Fixed(NO_METRICS),
    "length_column_name": Fixed("all blocks have the same length", ("length",)),
    "do_predict": Fixed("flashmhf train trains and validates"),
    "resume_from_checkpoint": Fixed("--resume finds the last complete checkpoint in the folder", (None,)),
    "enable_jit_checkpoint": Fixed("SIGTERM saves a checkpoint anyway"),
    "use_liger_kernel": Fixed("it does not know this model family; its loss is --fused-loss on"),
    "deepspeed": Fixed("steps without a finite gradient could not be skipped; use --fsdp", (None,)),
    "save_on_each_node": Fixed("one process writes and checks the folder, which the nodes share"),
    "hub_strategy": Fixed(ONCE, ("end", "every_save")),  # the second is TrainingArguments' default
    "hub_always_push": Fixed(ONCE),
}


@dataclass(frozen=True, kw_only=True)
class Need:
    """A value other than `default` has no effect unless `met`; `text` says what is expected then."""

    default: Any
    met: Callable[[Any], bool]
    text: str


def _checkpoints_activations(arguments: Any) -> bool:
    return bool(arguments.gradient_checkpointing)  # mirrors activation_checkpointing, which older versions lack


def _evaluates(arguments: Any) -> bool:
    return arguments.eval_strategy != "no"


def _saves_evaluated_models(arguments: Any) -> bool:
    return arguments.save_strategy != "steps" or arguments.eval_steps == arguments.save_steps


def _has_options(arguments: Any) -> bool:
    return arguments.lr_scheduler_type.value not in ("constant", "constant_with_warmup")


def _has_workers(arguments: Any) -> bool:
    return arguments.dataloader_num_workers > 0


def _reports_to_trackio(arguments: Any) -> bool:
    return "trackio" in arguments.report_to


def _pushes(arguments: Any) -> bool:
    return bool(arguments.push_to_hub)


def _torchrun(arguments: Any) -> bool:
    return arguments.world_size > 1


NEEDS = {
    "warmup_steps": Need(
        default=None, met=warms_up, text="none without a schedule that warms up, such as constant_with_warmup"
    ),
    "lr_scheduler_kwargs": Need(default=None, met=_has_options, text="none with a constant schedule"),
    "optim_target_modules": Need(
        default=None,
        met=lambda a: a.optim.value.startswith(("galore", "apollo")),
        text="none without --optim galore_... or apollo_...",
    ),
    "fp16": Need(
        default=False, met=lambda a: a.device.type != "cpu", text="false on the CPU, which would train in float32"
    ),
    "activation_checkpointing_kwargs": Need(
        default=None, met=_checkpoints_activations, text="none without --activation-checkpointing true"
    ),
    "gradient_checkpointing_kwargs": Need(
        default=None, met=_checkpoints_activations, text="none without --gradient-checkpointing true"
    ),
    "project": Need(default="huggingface", met=_reports_to_trackio, text="none without --report-to trackio"),
    "trackio_space_id": Need(default=None, met=_reports_to_trackio, text="none without --report-to trackio"),
    "trackio_bucket_id": Need(default=None, met=_reports_to_trackio, text="none without --report-to trackio"),
    "trackio_static_space_id": Need(default=None, met=_reports_to_trackio, text="none without --report-to trackio"),
    "hub_token": Need(default=None, met=_pushes, text="none without --push-to-hub true"),
    "hub_private_repo": Need(default=None, met=_pushes, text="none without --push-to-hub true"),
    "hub_model_id": Need(default=None, met=_pushes, text="none without --push-to-hub true"),
    "hub_revision": Need(default=None, met=_pushes, text="none without --push-to-hub true"),
    "eval_delay": Need(default=0, met=_evaluates, text="none without --eval-strategy steps or epoch"),
    "load_best_model_at_end": Need(
        default=False,
        met=_saves_evaluated_models,
        text="equal --save-steps and --eval-steps, so that every evaluated model is saved",
    ),
    "greater_is_better": Need(
        default=None,
        met=lambda a: a.metric_for_best_model is not None,
        text="none without --metric-for-best-model loss",
    ),
    "metric_for_best_model": Need(
        default=None,
        met=lambda a: a.metric_for_best_model in ("loss", "eval_loss"),
        text=f"loss, since {NO_METRICS}",
    ),
    "fsdp": Need(default=None, met=_torchrun, text="none without several processes of torchrun"),
    "fsdp_config": Need(default=None, met=lambda a: bool(a.fsdp), text="none without --fsdp"),
    "dataloader_persistent_workers": Need(
        default=False, met=_has_workers, text="none without --dataloader-num-workers of 1 or more"
    ),
    "dataloader_multiprocessing_context": Need(
        default=None, met=_has_workers, text="none without --dataloader-num-workers of 1 or more"
    ),
    "ddp_bucket_cap_mb": Need(default=None, met=_torchrun, text="none without several processes of torchrun"),
    "ddp_broadcast_buffers": Need(default=None, met=_torchrun, text="none without several processes of torchrun"),
    "ddp_static_graph": Need(default=None, met=_torchrun, text="none without several processes of torchrun"),
    "local_rank": Need(
        default=-1,
        met=lambda a: a.local_rank == a.local_process_index,
        text="the rank that torchrun gives this process",
    ),
    "label_names": Need(default=None, met=lambda a: a.label_names == ["labels"], text="labels, as the data has them"),
}


def check_flags(values: Any) -> None:
    """Checks values on their own, before TrainingArguments acts on them.

    Args:
        values: a namespace with the fields of TrainingArguments.

    Raises:
        InputError: names the flag, what was expected and what was given.
    """
    for name, value in vars(values).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"{_flag(name)}: expected a finite number, got {value}")
        if name in RANGES and value is not None and value not in RANGES[name]:
            raise InputError(f"{_flag(name)}: expected {RANGES[name]}, got {value:g}")
        if name in FIXED and value not in FIXED[name].values:
            expected = str(FIXED[name].values[0]).lower()
            raise InputError(f"{_flag(name)}: expected {expected}, got {value}: {FIXED[name].reason}")
    if values.max_steps < 1 and values.max_steps != -1:
        raise InputError(f"max-steps: expected 1 or more, or -1 for --num-train-epochs, got {values.max_steps}")
    if values.max_steps == -1 and values.num_train_epochs <= 0:
        raise InputError(f"num-train-epochs: expected more than 0, got {values.num_train_epochs:g}")
    if values.load_best_model_at_end and values.eval_strategy == "no":
        raise InputError("load-best-model-at-end: expected --eval-strategy steps or epoch with it, got no")
    if values.warmup_steps is not None and values.warmup_steps >= 1 and values.warmup_steps != int(values.warmup_steps):
        raise InputError(f"warmup-steps: expected a whole number or a share below 1, got {values.warmup_steps:g}")


def check_together(arguments: Any) -> None:
    """Checks what only has an effect, or only works, together with something else.

    Args:
        arguments: TrainingArguments, which declares some fields as either a text or what it turns into.

    Raises:
        InputError: names the flag, what was expected and what was given.
    """
    for name, need in NEEDS.items():
        value = getattr(arguments, name, need.default)
        if value and value != need.default and not need.met(arguments):
            shown = "a token" if name == "hub_token" else repr(value)
            raise InputError(f"{_flag(name)}: expected {need.text}, got {shown}")
    if arguments.save_strategy == "best" and not _evaluates(arguments):
        raise InputError("save-strategy: expected another than best without --eval-strategy steps or epoch, got best")
    missing = set(arguments.report_to) - set(get_available_reporting_integrations())
    if missing:
        raise InputError(f"report-to: expected a tracker that is installed, got {min(missing)!r}")
    if "tpu_metrics_debug" in [option.value for option in arguments.debug]:
        raise InputError("debug: expected underflow_overflow, got tpu_metrics_debug without a TPU")


def _flag(name: str) -> str:
    return name.replace("_", "-")
