"""Models over many devices, by PyTorch's own means: heads over a mesh (tensor parallelism), parameters over another.

A FlashMHF layer is split as Megatron splits an MLP: in_proj by columns, K, U, V, the gate's and the norm's weight by
heads, out_proj by rows. Each rank runs the operator on its own heads; the layer costs one all-reduce forward and one
backward. Parameters become DTensors, so gradient norms, optimizers, FSDP2 and torch.distributed.checkpoint know what
they hold.
"""

from typing import Any, TypeVar

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    parallelize_module,
)

from flashmhf.layers import PKV, FlashMHF

Model = TypeVar("Model", bound=nn.Module)


class HeadParallel(ParallelStyle):
    """Distributes a layer's own parameters (and its norm's) by heads, their first dimension."""

    def _apply(self, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        _distribute(module, mesh, Shard(0))
        if isinstance(module, FlashMHF) and module.q_norm is not None:
            _distribute(module.q_norm, mesh, Shard(0))
        return module


class Replicated(ParallelStyle):
    """Every rank computes the whole module, whose parameters are DTensors like those of its neighbours."""

    def _apply(self, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        _distribute(module, mesh, Replicate())
        module.register_forward_pre_hook(
            lambda _, inputs: tuple(DTensor.from_local(x, mesh, (Replicate(),), run_check=False) for x in inputs)
        )
        module.register_forward_hook(lambda _, inputs, out: out.to_local())
        return module


def tensor_parallel(module: Model, mesh: DeviceMesh) -> Model:
    """Splits a layer, or a causal language model on a Llama backbone, over the ranks of a mesh, in place.

    Every rank calls this with a module of its own; the values are those of the mesh's first rank. Inputs and outputs
    are whole on every rank, and the same on all of them.

    Args:
        module: FlashMHF, MHFFN, PKV or SwiGLU, or a model with an `mlp` of these (or a Llama MLP) in each layer of
            `model.layers`.
        mesh: of one dimension; the number of heads of each kind is a multiple of its size.

    Returns:
        The same module.

    Raises:
        ValueError: an argument does not fit; names it, what was expected and what was given.
    """
    if mesh.ndim != 1:
        raise ValueError(f"mesh: expected one dimension, got {mesh.ndim}")
    check_split(module, mesh.size())  # all of it before the first change
    if not hasattr(module, "model"):
        _split_ffn(module, mesh)
        return module
    backbone: Any = module.model
    for layer in backbone.layers:
        _split_attention(layer.self_attn, mesh)
        _split_ffn(layer.mlp, mesh)
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            parallelize_module(norm, mesh, Replicated())
    parallelize_module(backbone.norm, mesh, Replicated())
    _split_vocabulary(module, backbone, mesh)
    return module


def check_split(module: nn.Module, ranks: int) -> None:
    """Raises the ValueError of `tensor_parallel` where `module` cannot be split over so many ranks."""
    if not hasattr(module, "model"):
        _check_ffn(module, ranks)
        return
    backbone: Any = module.model
    for layer in backbone.layers:
        _check_attention(layer.self_attn, ranks)
        _check_ffn(layer.mlp, ranks)


def shard_parameters(model: Model, mesh: DeviceMesh, **options: Any) -> Model:
    """FSDP2's `fully_shard` of each layer and of the rest of a model on a Llama backbone, in place.

    K, U and V, and what else has fewer heads than there are ranks, are cut along their rows or columns where the mesh
    divides these: FSDP2 would leave the ranks beyond with nothing.

    Args:
        model: as it is, or after `tensor_parallel` over another dimension of the same mesh.
        mesh: of the ranks that have different data.
        options: of `fully_shard`, such as mp_policy.
    """
    options["mesh"] = mesh
    options["shard_placement_fn"] = lambda parameter: _shard_placement(parameter, mesh.size())
    backbone: Any = model.model
    for layer in backbone.layers:
        fully_shard(layer, **options)
    fully_shard(model, **options)
    return model


def _shard_placement(parameter: nn.Parameter, ranks: int) -> Shard | None:
    """The dimension for FSDP2 to cut, None for its own choice, the first; others must be multiples of the ranks."""
    shape = parameter.to_local().shape if isinstance(parameter, DTensor) else parameter.shape
    if shape[0] % ranks == 0:
        return None
    return next((Shard(i) for i in reversed(range(1, len(shape))) if shape[i] % ranks == 0), None)


def _check_ffn(ffn: Any, ranks: int) -> None:
    if isinstance(ffn, FlashMHF):
        if ffn.in_proj is None:
            raise ValueError("projections: expected True of a layer split by heads, got False")
        _check_multiples(ranks, num_heads=ffn.num_heads, num_kv_heads=ffn.num_kv_heads)
    elif isinstance(ffn, PKV):
        _check_multiples(ranks, num_heads=ffn.num_heads)
    elif hasattr(ffn, "gate_proj"):
        _check_multiples(ranks, intermediate_size=ffn.gate_proj.out_features)
    else:
        raise ValueError(f"module: expected FlashMHF, MHFFN, PKV, SwiGLU or a model of these, got {type(ffn).__name__}")


def _check_attention(attention: Any, ranks: int) -> None:
    config = attention.config
    _check_multiples(
        ranks, num_attention_heads=config.num_attention_heads, num_key_value_heads=config.num_key_value_heads
    )


def _check_multiples(ranks: int, **sizes: int) -> None:
    for name, size in sizes.items():
        if size % ranks != 0:
            raise ValueError(f"{name}: expected a multiple of the mesh's size {ranks}, got {size}")


def _split_ffn(ffn: nn.Module, mesh: DeviceMesh) -> None:
    if isinstance(ffn, FlashMHF | PKV):
        parallelize_module(ffn, mesh, {"in_proj": ColwiseParallel(), "out_proj": RowwiseParallel()})
        parallelize_module(ffn, mesh, HeadParallel())
        return
    # The input becomes a DTensor once, so that the gradients of both projections meet before they are all-reduced.
    parallelize_module(
        ffn, mesh, {"gate_proj": ColwiseParallel(), "up_proj": ColwiseParallel(), "down_proj": RowwiseParallel()}
    )
    whole = Replicate()
    parallelize_module(ffn, mesh, PrepareModuleInput(input_layouts=whole, desired_input_layouts=whole))


def _split_attention(attention: nn.Module, mesh: DeviceMesh) -> None:
    columns = {name: ColwiseParallel() for name in ("q_proj", "k_proj", "v_proj")}
    parallelize_module(attention, mesh, {**columns, "o_proj": RowwiseParallel()})
    whole: dict[str, Placement] = {"hidden_states": Replicate()}
    parallelize_module(
        attention, mesh, PrepareModuleInput(input_kwarg_layouts=whole, desired_input_kwarg_layouts=whole)
    )


def _split_vocabulary(model: Any, backbone: Any, mesh: DeviceMesh) -> None:
    """The logits by vocabulary, the embeddings by width; tied ones are whole everywhere.

    Embeddings by vocabulary are avoided: DTensor (torch 2.13) compares padding_idx with the row within the shard.
    """
    tied = model.lm_head.weight is backbone.embed_tokens.weight
    styles: tuple[ParallelStyle, ParallelStyle] = (
        (Replicated(), Replicated())
        if tied
        else (ColwiseParallel(output_layouts=Replicate()), ColwiseParallel(output_layouts=Replicate()))
    )
    parallelize_module(backbone.embed_tokens, mesh, styles[0])
    parallelize_module(model.lm_head, mesh, styles[1])
    if tied:
        model.lm_head.weight = backbone.embed_tokens.weight


def _distribute(module: nn.Module, mesh: DeviceMesh, placement: Shard | Replicate) -> None:
    for name, parameter in list(module.named_parameters(recurse=False)):
        distributed = distribute_tensor(parameter.data, mesh, (placement,))
        module.register_parameter(name, nn.Parameter(distributed, requires_grad=parameter.requires_grad))


def whole_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers by name, whole and plain, on every rank. A collective operation."""
    return {
        name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in model.state_dict().items()
    }
