"""Validation by the Trainer that hides nothing and leaves the model as it was."""

import contextlib
from collections.abc import Iterator

from torch import nn
from transformers import TrainingArguments


@contextlib.contextmanager
def losses_unfiltered(arguments: TrainingArguments) -> Iterator[None]:
    """Within the context, losses that are not finite count: the mean over the others would hide them."""
    before = arguments.logging_nan_inf_filter
    arguments.logging_nan_inf_filter = False
    try:
        yield
    finally:
        arguments.logging_nan_inf_filter = before


@contextlib.contextmanager
def weights_kept(model: nn.Module, arguments: TrainingArguments) -> Iterator[None]:
    """Puts back the weights that --bf16-full-eval and --fp16-full-eval convert after training."""
    converted = arguments.bf16_full_eval or arguments.fp16_full_eval
    tensors = [*model.parameters(), *model.buffers()] if converted else []
    kept = [tensor.data for tensor in tensors]
    yield
    for tensor, data in zip(tensors, kept, strict=True):
        tensor.data = data
