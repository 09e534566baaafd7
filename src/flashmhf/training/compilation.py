"""torch.compile of a model block by block: compiled once for all of them, and no name changes."""

import torch
from torch import nn
from transformers import PreTrainedModel, TrainingArguments

from flashmhf.errors import InputError


def compile_layers(model: PreTrainedModel) -> None:
    """Compiles each decoder layer in place, when it first runs; names in state dicts stay.

    Layers of the same shapes share what was compiled. A second batch size or length makes it dynamic, so that training
    and validation each compile twice at most, whatever sizes follow.

    Raises:
        InputError: the model has no list of layers.
    """
    layers = getattr(model.base_model, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise InputError(f"regional-compilation: expected a model with a list of layers, got {type(model).__name__}")
    # DDP would have dynamo cut graphs where its buckets end; blocks are cuts enough, and cannot hold a checkpoint's cut
    torch._dynamo.config.optimize_ddp = False
    for layer in layers:
        layer.compile()


def check_not_compiled_whole(arguments: TrainingArguments) -> None:
    """Raises InputError where the Trainer is asked to compile the model, too."""
    if arguments.torch_compile:
        raise InputError("regional-compilation: expected no --torch-compile beside it, got both; one of them is enough")
