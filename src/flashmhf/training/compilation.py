"""Regional compilation: torch.compile of each decoder layer in place, with one set of graphs for all of them.

accelerate 1.15 has two forms of it. `compile_regions` renames weights (`model.layers.0._orig_mod.self_attn...`), and
with them checkpoints. `compile_regions_fsdp2` keeps the names but also compiles the embedding, the norms and the head:
6 graphs and 35 s instead of 2 graphs and 16 s for three batch sizes of a three-layer model on a CPU.
"""

import torch
from torch import nn
from transformers import PreTrainedModel, TrainingArguments

from flashmhf.errors import InputError


def compile_layers(model: PreTrainedModel) -> None:
    """Compiles each decoder layer in place when it first runs; names in state dicts stay.

    Layers of equal shapes share the compiled code. A second batch size or length makes it dynamic, so that training
    and validation each compile at most twice.

    Raises:
        InputError: the model has no list of layers.
    """
    layers = getattr(model.base_model, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise InputError(f"regional-compilation: expected a model with a list of layers, got {type(model).__name__}")
    # DDP would have dynamo split graphs at its buckets, which fails within activation checkpointing.
    torch._dynamo.config.optimize_ddp = False
    for layer in layers:
        layer.compile()


def check_no_other_compilation(arguments: TrainingArguments) -> None:
    """Raises InputError if the Trainer is to compile the model, too."""
    if arguments.torch_compile:
        raise InputError("regional-compilation: expected no --torch-compile together with it, got both")
