"""FlashMHFForCausalLM for vLLM: its Llama with this package's feed-forward layer, the heads split over ranks.

Importing this module imports vLLM. Written against the interface of vLLM 0.33.
"""

from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import ColumnParallelLinear, RowParallelLinear
from vllm.model_executor.models.llama import LlamaAttention, LlamaDecoderLayer, LlamaForCausalLM, LlamaMLP
from vllm.model_executor.models.qwen3 import Qwen3Attention

from flashmhf.layers import FlashMHF
from flashmhf.layers.former_shapes import ROWS, from_former_shape
from flashmhf.models.configuration import FlashMHFConfig
from flashmhf.models.modeling import build_ffn


def parallel_ffn(config: FlashMHFConfig, *, quant_config: Any, prefix: str) -> nn.Module:
    """This rank's heads of the feed-forward layer; its output is the sum over ranks.

    The projections are quantised as `quant_config` says; K, U, V, the gate's and the norm's weight are not.

    Raises:
        ValueError: ffn_type "pkv", or heads that cannot be split over the ranks.
    """
    if config.ffn_type == "swiglu":
        return LlamaMLP(
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            hidden_act="silu",
            quant_config=quant_config,
            bias=config.mlp_bias,
            prefix=prefix,
        )
    layer = build_ffn(config)
    if not isinstance(layer, FlashMHF):
        raise ValueError(f"ffn_type: expected flashmhf, mhffn, dense_moe or swiglu for vLLM, got {config.ffn_type}")
    ranks = get_tensor_model_parallel_world_size()
    if layer.num_kv_heads % ranks != 0:
        raise ValueError(f"tensor_parallel_size: expected a divisor of {layer.num_kv_heads} heads, got {ranks}")
    if layer.in_proj is None and ranks > 1:
        raise ValueError(f"tensor_parallel_size: expected 1 for a layer without projections, got {ranks}")
    if layer.in_proj is not None:
        linear = {"bias": config.mlp_bias, "quant_config": quant_config, "return_bias": False}
        sizes = (config.hidden_size, config.hidden_size)
        layer.in_proj = ColumnParallelLinear(*sizes, **linear, prefix=f"{prefix}.in_proj")
        layer.out_proj = RowParallelLinear(*sizes, **linear, prefix=f"{prefix}.out_proj")
    for module, name in ((layer, "k"), (layer, "u"), (layer, "v"), (layer, "gate_weight"), (layer.q_norm, "weight")):
        if module is not None and getattr(module, name) is not None:
            former = layer.rows_shape if name in ROWS else None
            setattr(module, name, _shard(getattr(module, name), ranks, former))
    return layer


def _shard(parameter: nn.Parameter, ranks: int, former: torch.Size | None) -> nn.Parameter:
    """This rank's part of the first dimension, which is heads; vLLM calls its `weight_loader` with the full tensor."""
    rows = parameter.shape[0] // ranks
    shard: Any = nn.Parameter(torch.empty_like(parameter[:rows]), requires_grad=False)

    def load(target: nn.Parameter, loaded: Tensor) -> None:
        if former is not None:
            loaded = from_former_shape(loaded, former)
        target.data.copy_(loaded.narrow(0, rows * get_tensor_model_parallel_rank(), rows))

    shard.weight_loader = load
    return shard


class ResidualOnly(nn.Module):
    """In place of the norm before the feed-forward layer, with `ffn_norm=False`."""

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        total = x + residual
        return total, total


class FlashMHFDecoderLayer(LlamaDecoderLayer):
    """vLLM's Llama layer, with the attention and the feed-forward layer of the configuration."""

    def __init__(self, vllm_config: VllmConfig, prefix: str = "", config: FlashMHFConfig | None = None) -> None:
        nn.Module.__init__(self)  # not Llama's, which would build an MLP first
        config = config or vllm_config.model_config.hf_config
        quant_config = self.get_quant_config(vllm_config)
        self.hidden_size = config.hidden_size
        self.self_attn = _attention(config, vllm_config.cache_config, quant_config, f"{prefix}.self_attn")
        self.mlp = parallel_ffn(config, quant_config=quant_config, prefix=f"{prefix}.mlp")
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps) if config.ffn_norm else ResidualOnly()
        self.post_attention_layernorm = norm


def _attention(config: FlashMHFConfig, cache_config: Any, quant_config: Any, prefix: str) -> nn.Module:
    common: dict[str, Any] = {
        "hidden_size": config.hidden_size,
        "num_heads": config.num_attention_heads,
        "num_kv_heads": config.num_key_value_heads,
        "cache_config": cache_config,
        "quant_config": quant_config,
        "prefix": prefix,
    }
    if not config.qk_norm:
        bias = config.attention_bias
        positions = {"max_position_embeddings": config.max_position_embeddings}
        return LlamaAttention(config=config, bias=bias, bias_o_proj=bias, **positions, **common)
    if config.attention_bias:
        raise ValueError("attention_bias: expected False with qk_norm for vLLM, got True")
    return Qwen3Attention(
        rope_parameters=config.rope_parameters,
        max_position=config.max_position_embeddings,
        head_dim=config.head_dim,
        rms_norm_eps=config.rms_norm_eps,
        **common,
    )


class FlashMHFForCausalLM(LlamaForCausalLM):
    """vLLM's `LlamaForCausalLM`, which also does pipeline parallelism, LoRA and loading, with other layers."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=FlashMHFDecoderLayer)
