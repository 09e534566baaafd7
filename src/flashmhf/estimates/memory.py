"""What training needs of each GPU, in memory and in time, by parallelism: estimates, see docs/scaling.md."""

from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedConfig
from transformers.initialization import no_init_weights

from flashmhf.errors import InputError
from flashmhf.estimates.cost import check_gpu, model_cost, saved_bytes
from flashmhf.layers import PKV, FlashMHF
from flashmhf.models.loading import new_model
from flashmhf.ops.roofline import GPUS

Parallelism = Literal["ddp", "fsdp", "tp"]
BYTES = 4  # per parameter, gradient and each of Adam's two moments: float32, under autocast too
LOGIT_COPIES = 2  # float32, made by the loss's backward while the log-probabilities are still there
GATHERED_LAYERS = 2  # by FSDP: the current one and the prefetched one


@dataclass(frozen=True, kw_only=True)
class TrainingSetup:
    """A training run to estimate.

    Attributes:
        gpus: their number.
        gpu: a name in `flashmhf.ops.roofline.GPUS`.
        tokens: of the complete training run.
        sequences: per GPU and step; with "tp" per step of all GPUs together.
        context_length: tokens per sequence; None is the model's maximum.
        bf16: autocast, as with `--bf16`.
        utilisation: MFU, by the data sheet's 16-bit (or 32-bit) throughput.
    """

    gpus: int
    gpu: str
    tokens: int
    sequences: int
    context_length: int | None
    bf16: bool
    utilisation: float


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """MiB on one GPU."""

    parameters: float
    gradients: float
    optimizer: float
    activations: float
    peak: float


@dataclass(frozen=True, kw_only=True)
class TrainingEstimate:
    """`memory` by parallelism; a string is the reason why the model cannot be trained that way."""

    setup: TrainingSetup
    hours: float
    gpu_hours: float
    memory: dict[Parallelism, MemoryEstimate | str]


def estimate_training(config: PreTrainedConfig, setup: TrainingSetup) -> TrainingEstimate:
    """Memory of each GPU and the training time.

    Args:
        config: of a causal language model with Llama's structure.

    Raises:
        InputError: a value of `setup` is out of range.
    """
    check_gpu(setup.gpu)
    if not 0 < setup.utilisation <= 1:
        raise InputError(f"utilisation: expected more than 0, at most 1, got {setup.utilisation}")
    length = config.max_position_embeddings if setup.context_length is None else setup.context_length
    setup = replace(setup, context_length=length)
    peak_tflops = GPUS[setup.gpu].tflops_16bit if setup.bf16 else GPUS[setup.gpu].tflops_32bit
    flops = setup.tokens * model_cost(config, length).training_flops_per_token
    hours = flops / (setup.gpus * peak_tflops * 1e12 * setup.utilisation) / 3600
    memory: dict[Parallelism, MemoryEstimate | str] = {}
    for parallelism in get_args(Parallelism):
        try:
            memory[parallelism] = estimate_memory(config, parallelism, setup.gpus, setup.sequences, length, setup.bf16)
        except InputError as error:
            memory[parallelism] = str(error)
    return TrainingEstimate(setup=setup, hours=hours, gpu_hours=hours * setup.gpus, memory=memory)


def estimate_memory(
    config: PreTrainedConfig, parallelism: Parallelism, gpus: int, sequences: int, context_length: int, bf16: bool
) -> MemoryEstimate:
    """What one GPU holds.

    Raises:
        InputError: the model cannot be split over that many GPUs.
    """
    with FakeTensorMode(), no_init_weights():
        model = new_model(config, torch.float32)
        model.tie_weights()  # which no_init_weights skips
        sharded = _keep_one_shard(model, config, gpus) if parallelism == "tp" else 0
        saved = _saved_bytes(model, torch.zeros(sequences, context_length, dtype=torch.int64), bf16)
        count = sum(p.numel() for p in model.parameters()) - sharded
        layer = sum(p.numel() for p in model.model.layers[0].parameters())
    held = count / gpus if parallelism == "fsdp" else count
    gathered = GATHERED_LAYERS * layer if parallelism == "fsdp" and gpus > 1 else 0
    buckets = count if parallelism == "ddp" and gpus > 1 else 0  # DDP's copy of the gradients
    parameters, optimizer = BYTES * (held + gathered), BYTES * 2 * held
    gradients = BYTES * (held + buckets)
    activations = saved + LOGIT_COPIES * 4 * sequences * context_length * config.vocab_size
    # Gradients replace activations during the backward, except for DDP's buckets; then the optimizer has all gradients.
    peak = parameters + optimizer + max(BYTES * buckets + activations, gradients)
    return MemoryEstimate(
        parameters=parameters / 2**20,
        gradients=gradients / 2**20,
        optimizer=optimizer / 2**20,
        activations=activations / 2**20,
        peak=peak / 2**20,
    )


def _saved_bytes(model: Any, tokens: Tensor, bf16: bool) -> int:
    """What the model saves for the backward of a training step, parameters excluded."""
    model.train()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        return saved_bytes(model, lambda: model(tokens, labels=tokens, use_cache=False))


def _keep_one_shard(model: Any, config: PreTrainedConfig, ranks: int) -> int:
    """Cuts layers to one rank's heads; returns the number of embedding parameters that belong to other ranks."""
    heads = {"num_attention_heads": config.num_attention_heads, "num_key_value_heads": config.num_key_value_heads}
    for layer in model.model.layers:
        ffn, attention = layer.mlp, layer.self_attn
        if isinstance(ffn, FlashMHF | PKV):
            if ffn.in_proj is None:
                raise InputError("projections: expected True of a layer split by heads, got False")
            heads |= {name: getattr(ffn, name) for name in ("num_heads", "num_kv_heads") if hasattr(ffn, name)}
        else:
            heads |= {"intermediate_size": config.intermediate_size}
        for name, size in heads.items():
            if size % ranks != 0:
                raise InputError(f"{name}: expected a multiple of the number of GPUs {ranks}, got {size}")
        for module in (ffn, attention, getattr(ffn, "q_norm", None)):
            if module is not None:
                _cut(module, ranks)
    if config.tie_word_embeddings:
        return 0
    total = sum(p.numel() for m in (model.model.embed_tokens, model.lm_head) for p in m.parameters())
    return total - total // ranks


def _cut(module: nn.Module, ranks: int) -> None:
    """Shards a module's own parameters by heads, input projections by columns, output projections by rows."""
    for name, parameter in list(module.named_parameters(recurse=False)):
        setattr(module, name, nn.Parameter(parameter[: parameter.shape[0] // ranks].clone()))
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            dim = 1 if name in ("out_proj", "down_proj", "o_proj") else 0
            child.weight = nn.Parameter(child.weight.narrow(dim, 0, child.weight.shape[dim] // ranks).clone())
            if child.bias is not None and dim == 0:
                child.bias = nn.Parameter(child.bias[: len(child.bias) // ranks].clone())
