"""transformers.TrainingArguments from flags, with this package's defaults for pretraining."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
from transformers import HfArgumentParser, TrainingArguments

from flashmhf.errors import InputError
from flashmhf.serialization import as_plain
from flashmhf.training.argument_checks import check_flags, check_together
from flashmhf.training.argument_trials import try_arguments
from flashmhf.training.config import MUON, TrainConfig
from flashmhf.training.defaults import DEFAULTS, DEPENDENT, KEPT, LEARNING_RATES, MIN_LR_RATE, SAVE_STEPS
from flashmhf.training.flags import transformers_defaults, unknown_flag
from flashmhf.training.precision import computes_bfloat16
from flashmhf.training.run_files import read_fingerprints, was_begun
from flashmhf.training.warmup import WITHOUT, check_warmup

OF_MACHINE = ("use_cpu", "dataloader_pin_memory")
OF_PROCESS = ("output_dir", "local_rank", "hub_token", "resume_from_checkpoint")


def parse_arguments(
    flags: list[str], output_dir: str, *, optimizer: str = TrainConfig.optimizer, resume: bool = False
) -> TrainingArguments:
    """`transformers.TrainingArguments` from command-line flags, with this package's defaults.

    Args:
        flags: such as ["--max-steps", "300"].
        output_dir: the run's folder.
        optimizer: that of `TrainConfig`, which decides the default learning rate.
        resume: whether the run in the folder goes on: schedule and precision are then those that it was begun with.

    Returns:
        The arguments. Unless given, `warmup_steps` is None: the Trainer sets it when it knows the number of steps.

    Raises:
        InputError: an unknown flag or a value that does not fit.
    """
    parser = _Parser(cast(Any, TrainingArguments), prog="flashmhf train", add_help=False, allow_abbrev=False)
    gpu = torch.cuda.is_available()
    parser.set_defaults(
        **{**DEFAULTS, **dict.fromkeys(DEPENDENT)},
        dataloader_pin_memory=gpu,
        use_cpu=not torch.accelerator.is_available(),  # otherwise each process of torchrun would train on its own
        output_dir=output_dir,
    )
    try:
        values, unknown = parser.parse_known_args(flags)
        if unknown:
            raise InputError(unknown_flag(unknown[0], transformers_defaults()))
        _complete(values, _kept(Path(output_dir)) if resume else {}, optimizer)
        check_flags(values)
        settings = _settings(values, parser)
        if values.ddp_backend is not None and not torch.distributed.is_torchelastic_launched():
            raise InputError(f"ddp-backend: expected none without torchrun, got {values.ddp_backend}")
        arguments = TrainingArguments(**{**vars(values), "warmup_steps": values.warmup_steps or 0})
        cast(Any, arguments).warmup_steps = values.warmup_steps
        cast(Any, arguments).settings = settings
    except (ValueError, TypeError, LookupError, RuntimeError, OSError, ImportError, NotImplementedError) as error:
        raise InputError(str(error).splitlines()[0]) from error
    _check(arguments)
    return arguments


def settings_of(arguments: TrainingArguments) -> dict[str, Any]:
    """Every flag of `parse_arguments` with its value, for a run's record: `flashmhf train --config` reads them again.

    Left out is what differs from machine to machine, unless it was given, and what belongs to one process.
    """
    settings: dict[str, Any] = getattr(arguments, "settings", {})
    return settings


def _settings(values: argparse.Namespace, parser: argparse.ArgumentParser) -> dict[str, Any]:
    left_out = [name for name in OF_MACHINE if getattr(values, name) == parser.get_default(name)]
    kept = {name: value for name, value in vars(values).items() if name not in (*left_out, *OF_PROCESS)}
    return as_plain(kept, default=str)


def _check(arguments: TrainingArguments) -> None:
    """Raises InputError for what does not fit together, or what a library refuses."""
    if torch.distributed.is_torchelastic_launched() and arguments.parallel_mode.value == "not_parallel":
        raise InputError("use-cpu: expected true under torchrun on a machine without a GPU, got false")
    if arguments.fsdp and arguments.use_cpu:
        raise InputError("fsdp: expected a GPU, got the CPU, on which accelerate would train with DDP instead")
    check_together(arguments)
    check_warmup(arguments, arguments.max_steps)
    try_arguments(arguments)


def _kept(output_dir: Path) -> dict[str, Any]:
    """The values of `KEPT` in a run that was begun; none of a run by a version that did not record them."""
    prints = read_fingerprints(output_dir) if was_begun(output_dir) else None
    return {} if prints is None else {name: prints.arguments[name] for name in KEPT if name in prints.arguments}


def _complete(values: argparse.Namespace, kept: Mapping[str, Any], optimizer: str = TrainConfig.optimizer) -> None:
    """Sets what was not given to what the earlier run had (`kept`), or else to what fits the values that were."""
    _complete_schedule(values, kept)
    if values.learning_rate is None:
        values.learning_rate = LEARNING_RATES.get(optimizer, LEARNING_RATES[MUON])  # another name is refused later
    best = values.load_best_model_at_end and values.eval_strategy != "no"  # each evaluated model is saved
    if values.save_strategy is None:
        values.save_strategy = values.eval_strategy if best else "steps"
    if values.save_steps is None:
        values.save_steps = values.eval_steps if best else SAVE_STEPS
    if values.save_strategy == "best" and values.metric_for_best_model is None:
        values.metric_for_best_model = "loss"
    if values.bf16 is None:
        values.bf16 = not values.fp16 and kept.get("bf16", computes_bfloat16(use_cpu=values.use_cpu))


def _complete_schedule(values: argparse.Namespace, kept: Mapping[str, Any]) -> None:
    earlier = kept.get("lr_scheduler_type", DEFAULTS["lr_scheduler_type"])
    if values.lr_scheduler_type is None:
        values.lr_scheduler_type = earlier
    kind = getattr(values.lr_scheduler_type, "value", values.lr_scheduler_type)
    if values.lr_scheduler_kwargs is None and kind == earlier:
        values.lr_scheduler_kwargs = kept.get("lr_scheduler_kwargs")
    if values.lr_scheduler_kwargs is None and kind.endswith("with_min_lr"):
        values.lr_scheduler_kwargs = {"min_lr_rate": MIN_LR_RATE}
    if values.warmup_steps is None and kind not in WITHOUT:
        values.warmup_steps = kept.get("warmup_steps")


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(message)
