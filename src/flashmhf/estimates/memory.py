"""What a training takes of each GPU, in memory and in time, by layout: estimates, see docs/scaling.md."""

from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.initialization import no_init_weights

from flashmhf.errors import InputError
from flashmhf.estimates.cost import model_cost, saved_bytes
from flashmhf.layers import PKV, FlashMHF
from flashmhf.ops.roofline import GPUS

LAYOUTS = ("ddp", "fsdp", "tp")
BYTES = 4  # of a parameter, a gradient and each of Adam's two moments: float32, under autocast too
LOGIT_COPIES = 2  # float32, made by the loss's backward while the logarithms of the probabilities are still there
GATHERED_LAYERS = 2  # of FSDP: the one at work and the next


def plan(
    config: PreTrainedConfig,
    gpus: int,
    *,
    tokens: int,
    sequences: int,
    context_length: int | None = None,
    bf16: bool = True,
    gpu: str = "h200",
    utilisation: float = 0.4,
) -> dict[str, Any]:
    """Memory of each GPU in MiB by layout, and the time that the training takes.

    Args:
        config: of a causal language model shaped like Llama.
        gpus: how many.
        tokens: of the whole training.
        sequences: that a GPU takes at once; with "tp", that all take together.
        context_length: tokens of a sequence. Default: the longest.
        bf16: autocast, as `--bf16` sets it.
        gpu: a name of `flashmhf.ops.roofline.GPUS`, for the time.
        utilisation: the share of its 16-bit (or 32-bit) throughput that goes into the model's FLOPs.

    Raises:
        InputError: an argument does not fit.
    """
    if gpu not in GPUS:
        raise InputError(f"gpu: expected one of {', '.join(GPUS)}, got {gpu!r}")
    if not 0 < utilisation <= 1:
        raise InputError(f"utilisation: expected more than 0, at most 1, got {utilisation}")
    length = config.max_position_embeddings if context_length is None else context_length
    peak_tflops = GPUS[gpu].tflops_16bit if bf16 else GPUS[gpu].tflops_32bit
    flops = tokens * model_cost(config, length).training_flops_per_token
    hours = flops / (gpus * peak_tflops * 1e12 * utilisation) / 3600
    return {
        "gpus": gpus,
        "gpu": gpu,
        "tokens": tokens,
        "sequences": sequences,
        "context_length": length,
        "utilisation": utilisation,
        "hours": hours,
        "gpu_hours": hours * gpus,
        "memory": {layout: layout_memory(config, layout, gpus, sequences, length, bf16) for layout in LAYOUTS},
    }


def layout_memory(
    config: PreTrainedConfig, layout: str, gpus: int, sequences: int, context_length: int, bf16: bool
) -> dict[str, float] | str:
    """MiB of one GPU: "parameters", "gradients", "optimizer", "activations" and their "peak"; or why it cannot be."""
    with FakeTensorMode(), no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.tie_weights()  # which no_init_weights leaves out
        divided = 0
        if layout == "tp":
            try:
                divided = _keep_one_share(model, config, gpus)
            except InputError as error:
                return str(error)
        saved = _saved_bytes(model, torch.zeros(sequences, context_length, dtype=torch.int64), bf16)
        count = sum(p.numel() for p in model.parameters())
        layer = sum(p.numel() for p in model.model.layers[0].parameters())
    count -= divided
    held = count / gpus if layout == "fsdp" else count
    gathered = GATHERED_LAYERS * layer if layout == "fsdp" and gpus > 1 else 0
    buckets = count if layout == "ddp" and gpus > 1 else 0  # DDP's copy of the gradients
    parts = {
        "parameters": BYTES * (held + gathered),
        "gradients": BYTES * (held + buckets),
        "optimizer": BYTES * 2 * held,
        "activations": saved + LOGIT_COPIES * 4 * sequences * context_length * config.vocab_size,
    }
    # Gradients come as activations go, but for DDP's buckets and what the last step's optimizer keeps.
    moving = max(BYTES * buckets + parts["activations"], parts["gradients"])
    peak = parts["parameters"] + parts["optimizer"] + moving
    return {name: size / 2**20 for name, size in {**parts, "peak": peak}.items()}


def _saved_bytes(model: Any, tokens: Tensor, bf16: bool) -> int:
    """What the model keeps between forward and backward of a training step, its parameters left out."""
    model.train()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        return saved_bytes(model, lambda: model(tokens, labels=tokens, use_cache=False))


def _keep_one_share(model: Any, config: PreTrainedConfig, ranks: int) -> int:
    """Cuts a model to one rank's part by heads; returns what it holds less than that of its whole embeddings."""
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
    whole = sum(p.numel() for m in (model.model.embed_tokens, model.lm_head) for p in m.parameters())
    return whole - whole // ranks


def _cut(module: nn.Module, ranks: int) -> None:
    """A module's own parameters by heads, its projections by columns on the way in and by rows on the way out."""
    for name, parameter in list(module.named_parameters(recurse=False)):
        setattr(module, name, nn.Parameter(parameter[: parameter.shape[0] // ranks].clone()))
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            dim = 1 if name in ("out_proj", "down_proj", "o_proj") else 0
            child.weight = nn.Parameter(child.weight.narrow(dim, 0, child.weight.shape[dim] // ranks).clone())
            if child.bias is not None and dim == 0:
                child.bias = nn.Parameter(child.bias[: len(child.bias) // ranks].clone())
