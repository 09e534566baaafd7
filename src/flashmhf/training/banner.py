"""What is about to be trained, in a few lines before the first step: a wrong setting is seen before it costs a day."""

import platform
from typing import Any

import torch
from transformers import PreTrainedModel, TrainingArguments

from flashmhf.layers import FlashMHF
from flashmhf.ops.backends import BACKENDS, select
from flashmhf.ops.problem import Problem
from flashmhf.training.config import TrainConfig
from flashmhf.training.warmup import MOST, SHARE, warms_up, warmup_steps

WIDTH = 15  # of names


def banner(config: TrainConfig, arguments: TrainingArguments, model: PreTrainedModel) -> list[str]:
    """Lines of a name and a value.

    Args:
        config: of the run.
        arguments: of the run; where `max_steps` is not given, the number of tokens follows from the data.
        model: as it is trained.
    """
    processes = arguments.world_size // config.tensor_parallel
    sequences = arguments.train_batch_size * arguments.gradient_accumulation_steps * processes
    tokens = sequences * config.data.context_length
    embeddings = {id(layer.weight): layer.weight.numel() for layer in _embeddings(model)}
    parameters = model.num_parameters()
    lines = {
        "model": f"{config.model}, {parameters:,} parameters, {parameters - sum(embeddings.values()):,} "
        "without embeddings",
        "device": f"{_device(arguments)}, {_dtype(arguments)}, {_backend(model, arguments, tokens // processes)}",
        "batch": f"{sequences:,} x {config.data.context_length:,} = {tokens:,} tokens per step",
        "tokens": f"{arguments.max_steps * tokens:,} in {_count(arguments.max_steps, 'step')}"
        if arguments.max_steps > 0
        else f"those of the data, {arguments.num_train_epochs:g} times",
        "learning rate": f"{arguments.learning_rate:g}, {config.optimizer}, {_schedule(arguments)}"
        f"{_warmup(arguments)}, weight decay {arguments.weight_decay:g}",
        "output": str(arguments.output_dir),
    }
    return [f"{name:<{WIDTH}}{value}" for name, value in lines.items()]


def _embeddings(model: PreTrainedModel) -> list[Any]:
    return [layer for layer in (model.get_input_embeddings(), model.get_output_embeddings()) if layer is not None]


def _device(arguments: TrainingArguments) -> str:
    gpu = torch.cuda.get_device_name(arguments.device) if arguments.device.type == "cuda" else ""
    name = gpu or f"{arguments.device.type} ({platform.machine()}, {_count(torch.get_num_threads(), 'thread')})"
    return name if arguments.world_size == 1 else f"{arguments.world_size} x {name}"


def _dtype(arguments: TrainingArguments) -> str:
    half = "bfloat16" if arguments.bf16 else "float16" if arguments.fp16 else None
    return "float32" if half is None else f"{half} autocast"


def _backend(model: PreTrainedModel, arguments: TrainingArguments, tokens: int) -> str:
    """That of the first FlashMHF layer, for the tokens of one process."""
    layer = next((module for module in model.modules() if isinstance(module, FlashMHF)), None)
    if layer is None:
        return "PyTorch's operators"
    H_kv, (E, F, D) = layer.num_kv_heads, (layer.num_subnetworks, layer.subnetwork_size, layer.head_dim)
    dtype = torch.bfloat16 if arguments.bf16 else torch.float16 if arguments.fp16 else torch.float32
    problem = Problem(tokens, layer.num_heads, H_kv, E, F, D, dtype, arguments.device, layer.gate_type is not None)
    module = select(problem, layer.backend).__name__
    return "backend " + next(backend.name for backend in BACKENDS if backend.module == module)


def _schedule(arguments: Any) -> str:
    return str(arguments.lr_scheduler_type.value)


def _warmup(arguments: TrainingArguments) -> str:
    if not warms_up(arguments):
        return ""
    if arguments.max_steps > 0:
        return f", warm-up {_count(warmup_steps(arguments, arguments.max_steps), 'step')}"
    given = arguments.warmup_steps
    if given is None:
        return f", warm-up {SHARE:.0%}, at most {MOST:,} steps"
    return f", warm-up {given:.0%}" if given < 1 else f", warm-up {_count(int(given), 'step')}"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"
