"""Tensor parallelism by heads, and FSDP2 over another dimension of the mesh, both with PyTorch's DTensors.

A FlashMHF layer is split as Megatron splits an MLP: in_proj by columns, K, U, V, the gate's and the norm's weight by
heads, out_proj by rows. Each rank runs the operator on its own heads; the layer costs one all-reduce in the forward
pass and one in the backward pass. Parameters become DTensors, which gradient norms, optimizers, FSDP2 and
torch.distributed.checkpoint understand.
"""

from typing import Any, TypeVar

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from flashmhf.layers import PKV, FlashMHF

Model = TypeVar("Model", bound=nn.Module)


class HeadParallel(ParallelStyle):
    """Shards a layer's own parameters (and its norm's) by heads, their first dimension."""

    def _apply(self, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        _distribute(module, mesh, Shard(0))
        if isinstance(module, FlashMHF) and module.q_norm is not None:
            _distribute(module.q_norm, mesh, Shard(0))
        return module


class Replicated(ParallelStyle):
    """Every rank computes the complete module; its parameters are DTensors, like all others."""

    def _apply(self, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        _distribute(module, mesh, Replicate())
        module.register_forward_pre_hook(
            lambda _, inputs: tuple(DTensor.from_local(x, mesh, (Replicate(),), run_check=False) for x in inputs)
        )
        module.register_forward_hook(lambda _, inputs, out: out.to_local())
        return module


def tensor_parallel(module: Model, mesh: DeviceMesh) -> Model:
    """Splits a layer, or a causal language model on a Llama backbone, over the ranks of a mesh, in place.

    Every rank calls this with its own copy; the values of the mesh's first rank are used. Inputs and outputs are
    replicated on all ranks.

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
    check_split(module, mesh.size())  # everything, before the first change
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
    """Raises the ValueError of `tensor_parallel` if `module` cannot be split over this number of ranks."""
    if not hasattr(module, "model"):
        _check_ffn(module, ranks)
        return
    backbone: Any = module.model
    for layer in backbone.layers:
        _check_attention(layer.self_attn, ranks)
        _check_ffn(layer.mlp, ranks)


def shard_parameters(model: Model, mesh: DeviceMesh, **options: Any) -> Model:
    """FSDP2's `fully_shard` on each layer and on the rest of a model on a Llama backbone, in place.

    K, U, V and other parameters with fewer heads than ranks are sharded by rows or columns if their number is a
    multiple of the ranks; sharded by heads, some ranks would hold nothing.

    Args:
        model: unsplit, or after `tensor_parallel` over another dimension of the same mesh.
        mesh: of the ranks that have different data.
        options: for `fully_shard`, such as mp_policy.

    Returns:
        The same model; its parameters are DTensors.
    """
    options["mesh"] = mesh
    options["shard_placement_fn"] = lambda parameter: _shard_placement(parameter, mesh.size())
    backbone: Any = model.model
    for layer in backbone.layers:
        fully_shard(layer, **options)
    fully_shard(model, **options)
    return model


def _shard_placement(parameter: nn.Parameter, ranks: int) -> Shard | None:
    """The dimension to shard; None for FSDP2's default, the first. Others must be multiples of the ranks."""
    shape = parameter.to_local().shape if isinstance(parameter, DTensor) else parameter.shape
    if shape[0] % ranks == 0:
        return None
    return next((Shard(i) for i in reversed(range(1, len(shape))) if shape[i] % ranks == 0), None)


def _check_ffn(ffn: Any, ranks: int) -> None:
    if isinstance(ffn, FlashMHF):
        if ffn.in_proj is None:
            raise ValueError("projections: expected True for a layer split by heads, got False")
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
    # The input becomes a DTensor once, so that the gradients of both projections are added before their all-reduce.
    parallelize_module(
        ffn, mesh, {"gate_proj": ColwiseParallel(), "up_proj": ColwiseParallel(), "down_proj": RowwiseParallel()}
    )
    replicated = Replicate()
    prepare = PrepareModuleInput(input_layouts=replicated, desired_input_layouts=replicated)
    parallelize_module(ffn, mesh, prepare)


def _split_attention(attention: nn.Module, mesh: DeviceMesh) -> None:
    columns = {name: ColwiseParallel() for name in ("q_proj", "k_proj", "v_proj")}
    parallelize_module(attention, mesh, {**columns, "o_proj": RowwiseParallel()})
    for name in ("q_norm", "k_norm"):  # of Qwen3's; queries and keys are (batch, length, heads, head_dim)
        if hasattr(attention, name):
            parallelize_module(getattr(attention, name), mesh, SequenceParallel(sequence_dim=2, use_local_output=True))
    replicated: dict[str, Placement] = {"hidden_states": Replicate()}
    prepare = PrepareModuleInput(input_kwarg_layouts=replicated, desired_input_kwarg_layouts=replicated)
    parallelize_module(attention, mesh, prepare)


def _split_vocabulary(model: Any, backbone: Any, mesh: DeviceMesh) -> None:
    """Shards the logits by vocabulary and the embeddings by width; tied ones are replicated.

    Embeddings are not sharded by vocabulary: DTensor (torch 2.13) compares padding_idx with the row within the shard.
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
