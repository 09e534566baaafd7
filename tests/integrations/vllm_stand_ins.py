"""Stand-ins for what `flashmhf.integrations.vllm` uses of vLLM, which pins another torch and is too large to install.

They have the signatures of vLLM 0.33. What they compute is checked against transformers' model, not against vLLM.
"""

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

RANK = {"rank": 0, "size": 1}
REGISTERED: dict[str, str] = {}


class RMSNorm(nn.Module):
    def __init__(self, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((hidden_size,), float("nan")))


def load(parameter: nn.Parameter, loaded: Tensor) -> None:
    assert parameter.shape == loaded.shape
    parameter.data.copy_(loaded)


class _ParallelLinear(nn.Module):
    """A linear layer of which this rank holds a part, along `dim` of the weight."""

    dim: int

    def __init__(
        self, input_size: int, output_size: int, bias: bool = True, *, quant_config=None, prefix="", return_bias=True
    ) -> None:
        super().__init__()
        shape = [output_size, input_size]
        shape[self.dim] //= RANK["size"]
        self.prefix, self.quant_config, self.return_bias = prefix, quant_config, return_bias
        self.weight: Any = nn.Parameter(torch.full(shape, float("nan")))
        self.weight.weight_loader = self._load
        self.bias: Any = nn.Parameter(torch.full((shape[0],), float("nan"))) if bias else None
        if bias and self.dim == 0:
            self.bias.weight_loader = self._load

    def _load(self, parameter: nn.Parameter, loaded: Tensor) -> None:
        load(parameter, loaded.chunk(RANK["size"], self.dim)[RANK["rank"]])

    def forward(self, x: Tensor) -> Any:
        bias = self.bias if self.dim == 0 or RANK["rank"] == 0 else None  # ranks are summed
        out = nn.functional.linear(x, self.weight, bias)
        return (out, None) if self.return_bias else out


class ColumnParallelLinear(_ParallelLinear):
    dim = 0


class RowParallelLinear(_ParallelLinear):
    """Without the sum over ranks, which is the test's."""

    dim = 1


class LlamaAttention(nn.Module):
    """With the names of the checkpoint; vLLM fuses q, k and v."""

    def __init__(self, *, hidden_size, num_heads, num_kv_heads, prefix, head_dim=None, **others: Any) -> None:
        super().__init__()
        head_dim = head_dim or hidden_size // num_heads
        linear = {"bias": others.get("bias", False), "device": "meta"}
        self.q_proj = nn.Linear(hidden_size, num_heads * head_dim, **linear)
        self.k_proj, self.v_proj = (nn.Linear(hidden_size, num_kv_heads * head_dim, **linear) for _ in range(2))
        self.o_proj = nn.Linear(num_heads * head_dim, hidden_size, **linear)
        self.to_empty(device="cpu")


class Qwen3Attention(LlamaAttention):
    def __init__(self, *, head_dim, rms_norm_eps, rope_parameters, max_position, **others: Any) -> None:
        super().__init__(head_dim=head_dim, **others)
        self.q_norm, self.k_norm = RMSNorm(head_dim, rms_norm_eps), RMSNorm(head_dim, rms_norm_eps)


class LlamaMLP(nn.Module):
    def __init__(self, hidden_size, intermediate_size, hidden_act, quant_config=None, bias=False, prefix="") -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (
            ColumnParallelLinear(hidden_size, intermediate_size, bias, return_bias=False) for _ in range(2)
        )
        self.down_proj = RowParallelLinear(intermediate_size, hidden_size, bias, return_bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class LlamaDecoderLayer(nn.Module):
    def get_quant_config(self, vllm_config: Any) -> Any:
        return vllm_config.quant_config


class LlamaForCausalLM(nn.Module):
    def __init__(self, *, vllm_config: Any, prefix: str = "", layer_type: type[nn.Module] = LlamaDecoderLayer) -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.model.layers = nn.ModuleList(
            layer_type(vllm_config=vllm_config, prefix=f"model.layers.{i}") for i in range(config.num_hidden_layers)
        )
        self.model.norm = RMSNorm(config.hidden_size)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def load_weights(self, weights) -> set[str]:
        parameters = dict(self.named_parameters())
        names = set()
        for name, loaded in weights:
            getattr(parameters[name], "weight_loader", load)(parameters[name], loaded)
            names.add(name)
        return names


def vllm_config(hf_config: Any) -> SimpleNamespace:
    return SimpleNamespace(
        model_config=SimpleNamespace(hf_config=hf_config), cache_config="cache", quant_config="quantised"
    )


def install(monkeypatch, rank: int = 0, size: int = 1) -> None:
    """Puts the stand-ins into sys.modules, for one test."""
    monkeypatch.setitem(RANK, "rank", rank)
    monkeypatch.setitem(RANK, "size", size)
    registry = SimpleNamespace(register_model=REGISTERED.__setitem__)
    modules: dict[str, dict[str, Any]] = {
        "vllm": {"ModelRegistry": registry},
        "vllm.config": {"VllmConfig": SimpleNamespace},
        "vllm.distributed": {
            "get_tensor_model_parallel_rank": lambda: RANK["rank"],
            "get_tensor_model_parallel_world_size": lambda: RANK["size"],
        },
        "vllm.model_executor": {},
        "vllm.model_executor.layers": {},
        "vllm.model_executor.layers.layernorm": {"RMSNorm": RMSNorm},
        "vllm.model_executor.layers.linear": {
            "ColumnParallelLinear": ColumnParallelLinear,
            "RowParallelLinear": RowParallelLinear,
        },
        "vllm.model_executor.models": {},
        "vllm.model_executor.models.llama": {
            cls.__name__: cls for cls in (LlamaAttention, LlamaDecoderLayer, LlamaForCausalLM, LlamaMLP)
        },
        "vllm.model_executor.models.qwen3": {"Qwen3Attention": Qwen3Attention},
    }
    for name, members in modules.items():
        module = ModuleType(name)
        module.__dict__.update(members)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "flashmhf.integrations.vllm.model", raising=False)
