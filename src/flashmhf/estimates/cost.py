"""What a model costs, counted on tensors without data: parameters, FLOPs, and what training keeps of each token."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.initialization import no_init_weights

from flashmhf.errors import InputError
from flashmhf.models import FlashMHFConfig
from flashmhf.ops.problem import Problem
from flashmhf.ops.roofline import GPUS, backward_work, forward_work

TOKENS = 128  # enough that what does not depend on tokens vanishes in the division


@dataclass(frozen=True, kw_only=True)
class ModelCost:
    """Parameters, FLOPs/token, and the bytes that one FFN layer saves per token for its backward pass."""

    parameters: int
    parameters_without_embeddings: int
    context_length: int
    forward_flops_per_token: float
    training_flops_per_token: float
    parameters_per_ffn: int
    ffn_saved_bytes_per_token: float


def model_cost(config: PreTrainedConfig, context_length: int | None = None) -> ModelCost:
    """Counts what a model costs, without allocating it.

    Args:
        config: of a causal language model shaped like Llama.
        context_length: for the attention's FLOPs. Default: the longest.
    """
    context_length = config.max_position_embeddings if context_length is None else context_length
    with FakeTensorMode():
        with no_init_weights():
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        tokens = torch.zeros(1, context_length, dtype=torch.int64)
        with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            model(tokens, use_cache=False)
        ffn = model.model.layers[0].mlp
        ffn_bytes = saved_bytes_per_token(ffn, config.hidden_size)
    parameters = count_parameters(config)
    embeddings = model.get_input_embeddings().weight.numel() * (1 if config.tie_word_embeddings else 2)
    forward_flops = counter.get_total_flops() / context_length
    return ModelCost(
        parameters=parameters,
        parameters_without_embeddings=parameters - embeddings,
        context_length=context_length,
        forward_flops_per_token=forward_flops,
        training_flops_per_token=3 * forward_flops,
        parameters_per_ffn=sum(parameter.numel() for parameter in ffn.parameters()),
        ffn_saved_bytes_per_token=ffn_bytes,
    )


def operator_work(config: FlashMHFConfig, tokens: int, gpu: str) -> dict[str, Any]:
    """The operator of one layer by the static model of `flashmhf.ops.roofline`, in bfloat16.

    Args:
        config: with `ffn_type` "flashmhf", "mhffn" or "dense_moe".
        tokens: T, of all sequences together.
        gpu: a name of `flashmhf.ops.roofline.GPUS`.
    """
    if gpu not in GPUS:
        raise InputError(f"gpu: expected one of {', '.join(GPUS)}, got {gpu!r}")
    heads, kv_heads = (1, 1) if config.ffn_type == "dense_moe" else config.ffn_heads
    problem = Problem(
        T=tokens,
        H=heads,
        H_kv=kv_heads,
        E=config.num_subnetworks,
        F=config.subnetwork_size,
        D=config.hidden_size // heads,
        dtype=torch.bfloat16,
        device=torch.device("cuda"),
        has_gate=config.gate_type is not None and config.ffn_type != "mhffn",
    )
    passes = {"forward": forward_work(problem), "backward": backward_work(problem)}
    return {
        "tokens": tokens,
        "gpu": gpu,
        **{
            name: {
                "gflop": work.flops / 1e9,
                "read_mib": work.read_bytes / 2**20,
                "written_mib": work.written_bytes / 2**20,
                "least_ms": work.min_ms(GPUS[gpu], problem.dtype),
                "bound": work.bound(GPUS[gpu], problem.dtype),
            }
            for name, work in passes.items()
        },
    }


def count_parameters(config: PreTrainedConfig) -> int:
    """Parameters of the causal language model, tied embeddings counted once."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config).num_parameters()


def saved_bytes_per_token(layer: nn.Module, hidden_size: int) -> float:
    """Bytes a token that `layer` keeps between forward and backward, its input included, parameters not.

    Counted in the dtype of the layer's parameters.
    """
    parameter = next(layer.parameters())
    x = torch.empty(TOKENS, hidden_size, dtype=parameter.dtype, device=parameter.device, requires_grad=True)
    return saved_bytes(layer, lambda: layer(x)) / TOKENS


def saved_bytes(module: nn.Module, call: Callable[[], Any]) -> int:
    """Bytes of all storages that autograd keeps of `call` until the backward pass, `module`'s parameters left out."""
    parameters = {p.untyped_storage()._cdata for p in module.parameters()}
    saved: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            saved[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = call()  # kept alive until everything is counted, so that no storage is counted under another's address
    del out
    return sum(saved.values())
