"""What a model costs, counted on fake tensors: parameters, FLOPs, and the activations that training saves."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedConfig
from transformers.initialization import no_init_weights

from flashmhf.errors import InputError
from flashmhf.models import FlashMHFConfig
from flashmhf.models.loading import new_model
from flashmhf.ops.problem import Problem
from flashmhf.ops.roofline import GPUS, backward_work, forward_work

TOKENS = 128  # enough to make what does not depend on tokens negligible


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
        config: of a causal language model with Llama's structure.
        context_length: for the attention's FLOPs. Default: the model's maximum.

    Raises:
        InputError: a model of another structure.
    """
    context_length = config.max_position_embeddings if context_length is None else context_length
    with FakeTensorMode():
        with no_init_weights():
            model: Any = new_model(config, torch.bfloat16)
        layers = getattr(getattr(model, "model", None), "layers", [None])
        if not hasattr(layers[0], "mlp"):
            raise InputError(f"model: expected Llama's structure, model.layers with an mlp, got {type(model).__name__}")
        tokens = torch.zeros(1, context_length, dtype=torch.int64)
        with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            model(tokens, use_cache=False)
        ffn = layers[0].mlp
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


@dataclass(frozen=True, kw_only=True)
class PassCost:
    """Work of one pass of the operator, its lower bound in time, and what bounds it ("compute" or "memory")."""

    gflop: float
    read_mib: float
    written_mib: float
    min_ms: float
    bound: str


@dataclass(frozen=True, kw_only=True)
class OperatorCost:
    """The operator of one layer in bfloat16, by the static model of `flashmhf.ops.roofline`."""

    tokens: int
    gpu: str
    forward: PassCost
    backward: PassCost


def operator_cost(config: FlashMHFConfig, tokens: int, gpu: str) -> OperatorCost:
    """What the operator of one layer costs on a GPU at least.

    Args:
        config: with `ffn_type` "flashmhf", "mhffn" or "dense_moe".
        tokens: T, of all sequences together.
        gpu: a name in `flashmhf.ops.roofline.GPUS`.

    Raises:
        InputError: `gpu` is unknown.
    """
    check_gpu(gpu)
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
    forward, backward = (
        PassCost(
            gflop=work.flops / 1e9,
            read_mib=work.read_bytes / 2**20,
            written_mib=work.written_bytes / 2**20,
            min_ms=work.min_ms(GPUS[gpu], problem.dtype),
            bound=work.bound(GPUS[gpu], problem.dtype),
        )
        for work in (forward_work(problem), backward_work(problem))
    )
    return OperatorCost(tokens=tokens, gpu=gpu, forward=forward, backward=backward)


def check_gpu(name: str) -> None:
    """Raises InputError unless `flashmhf.ops.roofline.GPUS` has the name."""
    if name not in GPUS:
        raise InputError(f"gpu: expected one of {', '.join(GPUS)}, got {name!r}")


def count_parameters(config: PreTrainedConfig) -> int:
    """Parameters of the causal language model, tied embeddings counted once."""
    with torch.device("meta"):
        return new_model(config).num_parameters()


def saved_bytes_per_token(layer: nn.Module, hidden_size: int) -> float:
    """Bytes per token that `layer` saves for its backward pass, input included, parameters not.

    Counted in the dtype of the layer's parameters.
    """
    parameter = next(layer.parameters())
    x = torch.empty(TOKENS, hidden_size, dtype=parameter.dtype, device=parameter.device, requires_grad=True)
    return saved_bytes(layer, lambda: layer(x)) / TOKENS


def saved_bytes(module: nn.Module, call: Callable[[], Any]) -> int:
    """Bytes of all storages that autograd saves in `call`, except `module`'s parameters."""
    parameters = {p.untyped_storage()._cdata for p in module.parameters()}
    saved: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            saved[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = call()  # keeps every storage alive until all are counted, so that none is reused
    del out
    return sum(saved.values())
