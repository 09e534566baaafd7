"""The reference code's checkpoint format: translation of configurations, tensor names and layouts, in both directions.

Source: github.com/FoundationResearch/FlashMHF, models/flashmhf and configs, as of 2025-12.
"""

import math
import re
from typing import Any

from torch import Tensor
from transformers import LlamaConfig, PreTrainedConfig

from flashmhf.errors import InputError
from flashmhf.models import FlashMHFConfig
from flashmhf.untrusted import reading

ARCHITECTURES = {"mhffnmoe": "MHFFNMoEForCausalLM", "mhffn": "MHFFNForCausalLM"}
FFN_TYPES = {"mhffnmoe": "flashmhf", "mhffn": "mhffn"}
OUTPUT_SCALE = math.sqrt(3 / 8)  # apply_final_scaling of the reference code

NUMBERS = {"num_heads", "num_kuv_heads", "num_experts"}
SWITCHES = {
    "skip_linear",
    "apply_rmsnorm",
    "disable_original_mlp_rmsnorm",
    "apply_dot_scaling",
    "apply_dot_scaling_theory",
    "apply_final_scaling",
}
OTHER_FLAGS = {  # initialisation and kernel selection: no effect on a trained model
    "use_flash",
    "use_legacy_flash",
    "custom_init",
    "init_wself_identity",
    *(f"init_{name}_gain" for name in ("w_self", "w_self_2", "gate", "up", "down", "router")),
}
OLDER_KEYS = {  # written by transformers 4; renamed or removed in 5
    "rope_theta",
    "rope_scaling",
    "torch_dtype",
    "_name_or_path",
    "_attn_implementation_autoset",
    "transformers_version",
    "model_type",
    "architectures",
    "dtype",
}
RENAMED = {  # theirs -> ours, under model.layers.N.mlp.; their gate_weight is K, ours is the gate's weight
    "w_self.weight": "in_proj.weight",
    "w_self.bias": "in_proj.bias",
    "w_self_2.weight": "out_proj.weight",
    "w_self_2.bias": "out_proj.bias",
    "gate_weight": "k",
    "up_weight": "u",
    "down_weight": "v",
    "router": "gate_weight",
    "q_norm.weight": "q_norm.weight",
}


def from_reference_config(theirs: dict[str, Any]) -> FlashMHFConfig:
    """Our configuration of the same function; keeps `theirs` for the conversion back.

    Raises:
        InputError: another model_type, a flag that neither the reference code nor transformers has, or invalid sizes.
    """
    family, flags, backbone = _split_config(theirs)
    _check_flags(family, flags)
    heads = flags.get("num_heads", 1)
    score_scale = 1.0
    if flags.get("apply_dot_scaling", False):
        score_scale = float(heads) if flags.get("apply_dot_scaling_theory", False) else math.sqrt(heads)
    kept = {
        key: value for key, value in backbone.items() if key not in ("model_type", "architectures", "_name_or_path")
    }
    with reading("config.json"):
        return FlashMHFConfig(
            **{key: value for key, value in kept.items() if value is not None or key.endswith("_token_id")},
            ffn_type=FFN_TYPES[family],
            num_ffn_heads=heads,
            num_ffn_kv_heads=flags.get("num_kuv_heads") or heads,
            num_subnetworks=flags.get("num_experts", 1) if family == "mhffnmoe" else 1,
            gate_type="sigmoid",
            q_norm=flags.get("apply_rmsnorm", False),
            ffn_projections=not flags.get("skip_linear", False),
            ffn_norm=not flags.get("disable_original_mlp_rmsnorm", False),
            score_scale=score_scale,
            gate_scale=1.0,
            output_scale=OUTPUT_SCALE if flags.get("apply_final_scaling", False) else 1.0,
            reference_config=theirs,
        )


def _check_flags(family: str, flags: dict[str, Any]) -> None:
    for name in NUMBERS & flags.keys():
        value, optional = flags[name], name == "num_kuv_heads"
        if not (type(value) is int and value > 0) and not (optional and value in (None, 0)):
            raise InputError(f"config.json: {family}_{name}: expected a whole number above 0, got {value!r:.80}")
    for name in SWITCHES & flags.keys():
        if not isinstance(flags[name], bool):
            raise InputError(f"config.json: {family}_{name}: expected true or false, got {flags[name]!r:.80}")


def _split_config(theirs: dict[str, Any]) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """The family, its flags without their prefix, and the backbone's values, after checking that all are known."""
    family = theirs.get("model_type")
    if not isinstance(family, str) or family not in ARCHITECTURES:
        raise InputError(f"config.json: expected model_type {' or '.join(ARCHITECTURES)}, got {family!r:.80}")
    flags = {key.removeprefix(f"{family}_"): value for key, value in theirs.items() if key.startswith(f"{family}_")}
    backbone = {key: value for key, value in theirs.items() if not key.startswith(f"{family}_")}
    known = set(LlamaConfig().to_dict()) | set(PreTrainedConfig().to_dict()) | OLDER_KEYS
    unknown = [f"{family}_{flag}" for flag in flags.keys() - NUMBERS - SWITCHES - OTHER_FLAGS]
    unknown += [key for key in backbone if key not in known]
    if unknown:
        raise InputError(
            f"config.json: expected flags of the reference code, got the unknown {', '.join(sorted(unknown))}"
        )
    if backbone.get("hidden_act", "silu") != "silu":
        raise InputError(f"config.json: expected hidden_act 'silu', got {backbone['hidden_act']!r}")
    return family, flags, backbone


def to_reference_config(ours: FlashMHFConfig) -> dict[str, Any]:
    """The reference code's configuration of our model: the original one if it still describes the same function.

    Raises:
        InputError: the reference code has no flag for what this model does.
    """
    if ours.reference_config is not None:
        original = from_reference_config(ours.reference_config)
        if _function(original) == _function(ours):
            return ours.reference_config
    family, flags = _reference_flags(ours)
    with reading("config.json"):
        backbone = LlamaConfig(
            **{key: value for key, value in ours.to_dict().items() if key in LlamaConfig().to_dict()}
        ).to_dict()
    rope = backbone.pop("rope_parameters")
    if rope.get("rope_type", "default") != "default":
        raise InputError(
            f"rope_parameters: expected rope_type default, all that the reference code has, got {rope['rope_type']!r}"
        )
    backbone |= {"rope_theta": rope["rope_theta"], "rope_scaling": None, "torch_dtype": backbone.pop("dtype", None)}
    backbone |= {"model_type": family, "architectures": [ARCHITECTURES[family]]}
    return backbone | {f"{family}_{flag}": value for flag, value in flags.items()}


def _reference_flags(ours: FlashMHFConfig) -> tuple[str, dict[str, Any]]:
    """The family and its flags; raises InputError for what they cannot express."""
    (heads, kv_heads), scales = ours.ffn_heads, ours.ffn_scales
    score_flags = {1.0: (False, False), math.sqrt(heads): (True, False), float(heads): (True, True)}
    output_flags = {1.0: False, OUTPUT_SCALE: True}
    for name, value, choices in (
        ("ffn_type", ours.ffn_type, tuple(FFN_TYPES.values())),
        ("gate_type", ours.gate_type if ours.ffn_type == "flashmhf" else "sigmoid", ("sigmoid",)),
        ("score_scale", scales.score, tuple(score_flags)),
        ("gate_scale", scales.gate, (1.0,)),
        ("output_scale", scales.output, tuple(output_flags)),
    ):
        if value not in choices:
            expected = " or ".join(map(str, choices))
            raise InputError(f"{name}: expected {expected}, all that the reference code has, got {value!r}")
    family = next(family for family, ffn_type in FFN_TYPES.items() if ffn_type == ours.ffn_type)
    dot_scaling, theory = score_flags[scales.score]
    flags = {
        "num_heads": heads,
        "num_kuv_heads": kv_heads,
        "skip_linear": not ours.ffn_projections,
        "apply_rmsnorm": ours.q_norm,
        "disable_original_mlp_rmsnorm": not ours.ffn_norm,
        "apply_dot_scaling": dot_scaling,
        "apply_dot_scaling_theory": theory,
        "apply_final_scaling": output_flags[scales.output],
    }
    if family == "mhffnmoe":
        flags["num_experts"] = ours.num_subnetworks
    return family, flags


def our_name(name: str) -> str:
    """Our name for a tensor of the reference code."""
    prefix, rest = split_name(name)
    return name if prefix is None else prefix + RENAMED.get(rest, rest)


def their_name(name: str) -> str:
    """The reference code's name for one of our tensors."""
    prefix, rest = split_name(name)
    theirs = {ours: theirs for theirs, ours in RENAMED.items()}
    return name if prefix is None else prefix + theirs.get(rest, rest)


def rows_from_reference(rows: Tensor, config: FlashMHFConfig) -> Tensor:
    """K, U or V from (d_ff, H_kv D) to (H_kv E, F, D); column block h is head h, row block e is sub-network e."""
    E, F = config.num_subnetworks, config.subnetwork_size
    return rows.view(E, F, config.ffn_heads[1], -1).permute(2, 0, 1, 3).flatten(0, 1).contiguous()


def rows_to_reference(rows: Tensor, config: FlashMHFConfig) -> Tensor:
    """K, U or V from (H_kv E, F, D), or the former (H_kv, E, F, D), to (d_ff, H_kv D)."""
    E, F = config.num_subnetworks, config.subnetwork_size
    return rows.reshape(-1, E, F, rows.shape[-1]).permute(1, 2, 0, 3).reshape(E * F, -1).contiguous()


def split_name(name: str) -> tuple[str | None, str]:
    match = re.fullmatch(r"(model\.layers\.\d+\.mlp\.)(.+)", name)
    return (None, name) if match is None else (match[1], match[2])


def _function(config: FlashMHFConfig) -> dict[str, Any]:
    """The values of a configuration that affect what the model computes."""
    ignored = {"reference_config", "architectures", "transformers_version", "init", "backend", "dtype", "use_cache"}
    ignored |= {"_name_or_path"}
    return {name: value for name, value in config.to_dict().items() if name not in ignored}
