"""An independent implementation of the reference code's two model families, as the oracle of conversion.

It does not use the package. Sources: arXiv 2512.06989, section 3, for the function; the published checkpoints' tensor
names and layouts for the state dict; transformers' Llama for the backbone.
"""

import json
import math
from pathlib import Path

import torch
import torch.nn.functional as nnf
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM


class ReferenceFFN(nn.Module):
    """One layer, with the reference code's parameter names and shapes."""

    def __init__(self, config: dict, family: str) -> None:
        super().__init__()
        self.flags = {key.removeprefix(f"{family}_"): v for key, v in config.items() if key.startswith(f"{family}_")}
        d, d_ff = config["hidden_size"], config["intermediate_size"]
        self.H = self.flags["num_heads"]
        self.H_kv = self.flags.get("num_kuv_heads") or self.H
        self.E = self.flags.get("num_experts", 1)
        self.D = d // self.H
        self.eps = config["rms_norm_eps"]
        if not self.flags.get("skip_linear"):
            self.w_self = nn.Linear(d, d, bias=config.get("mlp_bias", False))
            self.w_self_2 = nn.Linear(d, d, bias=config.get("mlp_bias", False))
        for name in ("gate_weight", "up_weight", "down_weight"):
            setattr(self, name, nn.Parameter(torch.randn(d_ff, self.H_kv * self.D) * 0.3))
        if family == "mhffnmoe":
            self.router = nn.Parameter(torch.randn(self.H, self.D, self.E))
        self.q_norm = nn.Module()
        self.q_norm.weight = nn.Parameter(torch.rand(self.H, self.D) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        flags = self.flags
        q = x if flags.get("skip_linear") else self.w_self(x)
        scale = 1.0
        if flags.get("apply_dot_scaling"):
            scale = self.H if flags.get("apply_dot_scaling_theory") else math.sqrt(self.H)
        final = math.sqrt(3 / 8) if flags.get("apply_final_scaling") else 1.0
        heads = []
        for h in range(self.H):
            q_h = q[..., h * self.D : (h + 1) * self.D]
            if flags.get("apply_rmsnorm"):
                rms = torch.sqrt(q_h.square().mean(-1, keepdim=True) + self.eps)
                q_h = q_h / rms * self.q_norm.weight[h]
            g = h // (self.H // self.H_kv)
            columns = slice(g * self.D, (g + 1) * self.D)
            if hasattr(self, "router"):
                scores = torch.sigmoid(q_h @ self.router[h])
                r = scores / scores.sum(-1, keepdim=True)
            else:
                r = torch.ones(*q_h.shape[:-1], 1)
            width = self.gate_weight.shape[0] // self.E
            total = torch.zeros_like(q_h)
            for e in range(self.E):
                rows = slice(e * width, (e + 1) * width)
                k, u, v = (w[rows, columns] for w in (self.gate_weight, self.up_weight, self.down_weight))
                m, n = scale * (q_h @ k.T), scale * (q_h @ u.T)
                total = total + r[..., e : e + 1] * ((nnf.silu(m) * n) @ v) * final
            heads.append(total)
        out = torch.cat(heads, -1)
        return out if flags.get("skip_linear") else self.w_self_2(out)


def reference_config(family: str = "mhffnmoe", **flags) -> dict:
    """config.json as the reference code writes it; `flags` are given without the family's prefix."""
    config = {
        "_name_or_path": None,
        "architectures": ["MHFFNMoEForCausalLM" if family == "mhffnmoe" else "MHFFNForCausalLM"],
        "model_type": family,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "hidden_act": "silu",
        "hidden_size": 32,
        "initializer_range": 0.02,
        "intermediate_size": 48,
        "max_position_embeddings": 64,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "transformers_version": "4.45.2",
        "use_cache": True,
        "vocab_size": 90,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
    }
    own = {"num_heads": 4, "num_kuv_heads": 4, "skip_linear": False, "apply_rmsnorm": False}
    own |= {"custom_init": True, "init_w_self_gain": 0.707, "init_gate_gain": 1.0}
    if family == "mhffnmoe":
        own["num_experts"] = 3
    for key, value in flags.items():
        (config if key in config else own)[key] = value
    return config | {f"{family}_{key}": value for key, value in own.items()}


def reference_model(config: dict) -> LlamaForCausalLM:
    """transformers' Llama with the reference's FFN in place of its own, float32, random weights."""
    family = config["model_type"]
    kept = {
        k: v for k, v in config.items() if k in LlamaConfig().to_dict() and k not in ("model_type", "architectures")
    }
    model = LlamaForCausalLM(LlamaConfig(**kept, rope_theta=config["rope_theta"])).eval()
    for layer in model.model.layers:
        layer.mlp = ReferenceFFN(config, family).eval()
        nn.init.normal_(layer.input_layernorm.weight, 1.0, 0.1)
        if config.get(f"{family}_disable_original_mlp_rmsnorm"):
            layer.post_attention_layernorm = nn.Identity()
    return model


def save_reference(model: LlamaForCausalLM, config: dict, folder: Path, shards: int = 1) -> None:
    """Writes a checkpoint: config.json, safetensors in `shards` files, and an index if there are several."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if config["tie_word_embeddings"]:
        del state["lm_head.weight"]
    if shards == 1:
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names = list(state)
    weight_map = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: state[name] for name in names[number::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    size = sum(tensor.nbytes for tensor in state.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
