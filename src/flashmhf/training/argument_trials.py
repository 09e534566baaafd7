"""Tries on a tiny layer what only a library can judge: optimizers, schedules and their options, before a run starts."""

import contextlib
import copy
import math
from collections.abc import Iterator
from typing import Any

import torch
from accelerate.utils import GradientAccumulationPlugin, TorchDynamoPlugin
from torch import nn
from transformers import Trainer, get_scheduler

from flashmhf.errors import InputError, one_line_message
from flashmhf.training.warmup import warmup_steps

STEP_IN_BACKWARD = ("lomo", "adalomo")  # as do those that end in "layerwise"
CHECKPOINTING = ("use_reentrant", "preserve_rng_state", "determinism_check", "debug", "early_stop")  # torch's options
PROBES = ("0.123", "7", "true", "false", "bfloat16")  # values that an optimizer's option may have
NO_STEPS = 1000  # of a schedule, where the number is known only from the data


def try_arguments(arguments: Any) -> None:
    """Makes what the arguments ask for, and takes one step with it.

    Args:
        arguments: TrainingArguments, which declares some fields as either a text or what it turns into.

    Raises:
        InputError: names the flag; the reason is the library's.
    """
    name = arguments.optim.value
    if name in STEP_IN_BACKWARD or name.endswith("layerwise"):
        raise InputError(f"optim: expected one that steps after the backward, got {name}, whose steps nothing can skip")
    given = [word.split("=") for word in (arguments.optim_args or "").replace(" ", "").split(",") if word]
    if any(len(words) != 2 for words in given):
        raise InputError(f"optim-args: expected name=value, name=value, ..., got {arguments.optim_args!r}")
    with _refused_as(f"optim: {name}"):
        optimizer = _optimizer(arguments)
    for option, value in given:
        _check_option_is_read(arguments, option, value, [f"{o}={v}" for o, v in given if o != option])
    with _refused_as(f"lr-scheduler-type: {arguments.lr_scheduler_type.value}: lr-scheduler-kwargs"):
        _try_schedule(arguments, optimizer)
    _check_checkpointing(arguments)
    with _refused_as("accelerator-config: gradient_accumulation_kwargs"):
        _try_accumulation(arguments)
    with _refused_as("torch-compile"):
        TorchDynamoPlugin(backend=arguments.torch_compile_backend, mode=arguments.torch_compile_mode)
        if arguments.torch_compile:
            torch.compile(nn.Identity(), backend=arguments.torch_compile_backend, mode=arguments.torch_compile_mode)


def _optimizer(arguments: Any) -> torch.optim.Optimizer:
    """As the Trainer makes it, for a tiny layer, after one step."""
    layer: Any = nn.Linear(4, 4, device=arguments.device)
    made, options = Trainer.get_optimizer_cls_and_kwargs(_for_any_layer(arguments), layer)
    groups = options.pop("params", layer.parameters())
    optimizer = made(groups, **options) if isinstance(made, type) else made()(layer, **options)
    layer(torch.ones(4, 4, device=arguments.device)).sum().backward()
    optimizer.step()
    return optimizer


def _for_any_layer(arguments: Any) -> Any:
    """With target modules that the tiny layer has, too."""
    if arguments.optim_target_modules is None:
        return arguments
    changed = copy.copy(arguments)
    changed.optim_target_modules = "all-linear"
    return changed


def _check_option_is_read(arguments: Any, name: str, value: str, others: list[str]) -> None:
    """An option that an optimizer does not read is misspelt, or meant for another one."""
    without = _options_made(arguments, others)
    if all(_options_made(arguments, [*others, f"{name}={probe}"]) == without for probe in (value, *PROBES)):
        raise InputError(f"optim-args: expected options that {arguments.optim.value} reads, got {name}")


def _options_made(arguments: Any, words: list[str]) -> str:
    """What the Trainer passes to the optimizer, as text; the error if it fails."""
    changed = copy.copy(_for_any_layer(arguments))
    changed.optim_args = ",".join(words)
    layer: Any = nn.Linear(4, 4)
    try:
        return str(Trainer.get_optimizer_cls_and_kwargs(changed, layer)[1])
    except Exception as error:  # a probe of the wrong type: the option is read
        return str(error)


def _try_schedule(arguments: Any, optimizer: torch.optim.Optimizer) -> None:
    steps = arguments.max_steps if arguments.max_steps > 0 else NO_STEPS
    warmup = warmup_steps(arguments, steps)
    schedule = get_scheduler(
        arguments.lr_scheduler_type,
        optimizer,
        num_warmup_steps=warmup,
        num_training_steps=steps,
        scheduler_specific_kwargs=arguments.lr_scheduler_kwargs,
    )
    for factor in getattr(schedule, "lr_lambdas", []):
        for step in (0, warmup, steps // 2, steps - 1):
            if not math.isfinite(factor(step)):
                raise ValueError(f"expected a finite learning rate at step {step}, got {factor(step)}")


def _check_checkpointing(arguments: Any) -> None:
    options = dict(arguments.gradient_checkpointing_kwargs or {})
    known = set(CHECKPOINTING)
    if hasattr(arguments, "activation_checkpointing"):  # the versions of transformers that know these two
        known |= {"every_n_layers", "offload"}
    if unknown := options.keys() - known:
        raise InputError(f"activation-checkpointing-kwargs: expected {', '.join(sorted(known))}, got {min(unknown)}")
    every = options.get("every_n_layers", 1)
    if not isinstance(every, int) or every < 1:
        raise InputError(f"activation-checkpointing-kwargs: every_n_layers: expected 1 or more, got {every!r}")


def _try_accumulation(arguments: Any) -> None:
    options = dict(arguments.accelerator_config.gradient_accumulation_kwargs or {})
    if "num_steps" in options:
        raise ValueError("expected --gradient-accumulation-steps for num_steps")
    GradientAccumulationPlugin(num_steps=1, **options)


@contextlib.contextmanager
def _refused_as(what: str) -> Iterator[None]:
    """Whatever a library raises becomes one line that begins with `what`."""
    try:
        yield
    except Exception as error:  # libraries raise what they like
        raise InputError(f"{what}: {one_line_message(error)}") from error
