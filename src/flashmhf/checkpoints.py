"""The two-way map between checkpoints of the reference code (`mhffnmoe`, `mhffn`) and this package's.

Tensors are renamed and permuted, never computed with, shard by shard, so that a way there and back returns every bit.
What the reference stores without using it (the per-head norm's weight where the norm is off, the output layer where it
is tied) has no place in our models; it goes to `unused.safetensors` beside them.

Source of the format: github.com/FoundationResearch/FlashMHF, models/flashmhf, as of 2025-12.
"""

import json
import logging
import math
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig

from flashmhf.errors import InputError
from flashmhf.models import FlashMHFConfig
from flashmhf.models.loading import INDEX, WEIGHTS, check_safetensors, read_json

logger = logging.getLogger(__name__)

ARCHITECTURES = {"mhffnmoe": "MHFFNMoEForCausalLM", "mhffn": "MHFFNForCausalLM"}
FFN_TYPES = {"mhffnmoe": "flashmhf", "mhffn": "mhffn"}
UNUSED = "unused.safetensors"
OUTPUT_SCALE = math.sqrt(3 / 8)  # of the reference's apply_final_scaling

FUNCTION_FLAGS = {
    "num_heads",
    "num_kuv_heads",
    "num_experts",
    "skip_linear",
    "apply_rmsnorm",
    "disable_original_mlp_rmsnorm",
    "apply_dot_scaling",
    "apply_dot_scaling_theory",
    "apply_final_scaling",
}
OTHER_FLAGS = {  # of initialisation and of the choice of kernel: no trained model depends on them
    "use_flash",
    "use_legacy_flash",
    "custom_init",
    "init_wself_identity",
    *(f"init_{name}_gain" for name in ("w_self", "w_self_2", "gate", "up", "down", "router")),
}
OLDER_KEYS = {  # that transformers 4 wrote and 5 knows by another name or not at all
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
RENAMED = {  # theirs -> ours, below model.layers.N.mlp.; their gate_weight is K, ours is the gate's
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
ROWS = ("k", "u", "v")  # stored by the reference as (d_ff, H_kv D)
COPIED_SUFFIXES = {".json", ".txt", ".model", ".jinja"}  # tokenizer and generation settings


def convert(source: Path, destination: Path, *, to: str = "flashmhf") -> dict[str, Any]:
    """Converts a checkpoint folder.

    Args:
        source: with config.json and safetensors, whole or sharded.
        destination: a folder that does not exist yet or is empty; nothing is left there on failure.
        to: "flashmhf" or "reference".

    Returns:
        "to", "tensors", "parameters", "files".

    Raises:
        InputError: a missing, extra or misshapen tensor, an unknown flag, a torn file, or a model that the reference
            code cannot express; names it.
    """
    if to not in ("flashmhf", "reference"):
        raise InputError(f"to: expected flashmhf or reference, got {to!r}")
    _check_folders(source, destination)
    config = read_json(source / "config.json")
    if to == "flashmhf":
        ours = from_reference_config(config)
        new_config, rename = {**ours.to_dict(), "architectures": ["FlashMHFForCausalLM"]}, our_name
    else:
        ours = _our_config(config, source)
        new_config, rename = to_reference_config(ours), their_name
    files = check_safetensors(source)
    unused = _read_unused(source) if to == "reference" else {}
    expected = _expected(ours, theirs=to == "flashmhf")
    _check_tensors(files, expected, _unused_names(ours) if to == "flashmhf" else set())
    destination.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=destination.parent, prefix=f".{destination.name}-") as folder:
        written = Path(folder) / "whole"
        written.mkdir()
        _write_shards(source, written, files, ours, rename, unused)
        (written / "config.json").write_text(json.dumps(new_config, indent=2, sort_keys=True) + "\n")
        _copy_rest(source, written)
        if destination.exists():
            destination.rmdir()
        written.rename(destination)
    parameters = sum(math.prod(shape) for shape in expected.values())
    return {"to": to, "tensors": len(files), "parameters": parameters, "files": len(set(files.values()))}


def from_reference_config(theirs: dict[str, Any]) -> FlashMHFConfig:
    """Our configuration of a reference checkpoint's function; keeps `theirs` whole for the way back.

    Raises:
        InputError: another model_type, a flag that neither the reference code nor transformers knows, or sizes that do
            not fit.
    """
    family = theirs.get("model_type")
    if family not in ARCHITECTURES:
        raise InputError(f"config.json: expected model_type {' or '.join(ARCHITECTURES)}, got {family!r}")
    flags = {key.removeprefix(f"{family}_"): value for key, value in theirs.items() if key.startswith(f"{family}_")}
    trunk = {key: value for key, value in theirs.items() if not key.startswith(f"{family}_")}
    known = set(LlamaConfig().to_dict()) | set(PreTrainedConfig().to_dict()) | OLDER_KEYS
    unknown = [f"{family}_{flag}" for flag in flags.keys() - FUNCTION_FLAGS - OTHER_FLAGS]
    unknown += [key for key in trunk if key not in known]
    if unknown:
        raise InputError(f"config.json: expected flags of the reference code, got the unknown {', '.join(sorted(unknown))}")
    if trunk.get("hidden_act", "silu") != "silu":
        raise InputError(f"config.json: expected hidden_act 'silu', got {trunk['hidden_act']!r}")
    heads = flags.get("num_heads", 1)
    score_scale = 1.0
    if flags.get("apply_dot_scaling", False):
        score_scale = float(heads) if flags.get("apply_dot_scaling_theory", False) else math.sqrt(heads)
    kept = {key: value for key, value in trunk.items() if key not in ("model_type", "architectures", "_name_or_path")}
    try:
        return FlashMHFConfig(
            **{key: value for key, value in kept.items() if value is not None or key.endswith("_token_id")},
            ffn_type=FFN_TYPES[family],
            num_ffn_heads=heads,
            num_ffn_kv_heads=flags.get("num_kuv_heads") or heads,
            num_subnetworks=flags.get("num_experts", 1) if family == "mhffnmoe" else 1,
            gate="sigmoid",
            q_norm=flags.get("apply_rmsnorm", False),
            ffn_projections=not flags.get("skip_linear", False),
            ffn_norm=not flags.get("disable_original_mlp_rmsnorm", False),
            score_scale=score_scale,
            output_scale=OUTPUT_SCALE if flags.get("apply_final_scaling", False) else 1.0,
            reference_config=theirs,
        )
    except (ValueError, TypeError) as error:
        raise InputError(f"config.json: {str(error).splitlines()[0]}") from error


def to_reference_config(ours: FlashMHFConfig) -> dict[str, Any]:
    """The reference code's configuration of our model; the one it came from, where it still says the same.

    Raises:
        InputError: the reference code has no flag for what this model does.
    """
    if ours.reference_config is not None:
        came_from = from_reference_config(ours.reference_config)
        if _function(came_from) == _function(ours):
            return ours.reference_config
    family = next((family for family, ffn_type in FFN_TYPES.items() if ffn_type == ours.ffn_type), None)
    heads = ours.num_ffn_heads
    score_flags = {1.0: (False, False), math.sqrt(heads): (True, False), float(heads): (True, True)}
    output_flags = {1.0: False, OUTPUT_SCALE: True}
    for name, value, choices in (
        ("ffn_type", ours.ffn_type, tuple(FFN_TYPES.values())),
        ("gate", ours.gate if ours.ffn_type == "flashmhf" else "sigmoid", ("sigmoid",)),
        ("score_scale", ours.score_scale, tuple(score_flags)),
        ("output_scale", ours.output_scale, tuple(output_flags)),
    ):
        if value not in choices:
            raise InputError(f"{name}: the reference code can express {', '.join(map(str, choices))}, got {value!r}")
    dot_scaling, theory = score_flags[ours.score_scale]
    flags = {
        "num_heads": heads,
        "num_kuv_heads": ours.num_ffn_kv_heads,
        "skip_linear": not ours.ffn_projections,
        "apply_rmsnorm": ours.q_norm,
        "disable_original_mlp_rmsnorm": not ours.ffn_norm,
        "apply_dot_scaling": dot_scaling,
        "apply_dot_scaling_theory": theory,
        "apply_final_scaling": output_flags[ours.output_scale],
    }
    if family == "mhffnmoe":
        flags["num_experts"] = ours.num_subnetworks
    trunk = LlamaConfig(**{key: value for key, value in ours.to_dict().items() if key in LlamaConfig().to_dict()}).to_dict()
    rope = trunk.pop("rope_parameters")
    if rope.get("rope_type", "default") != "default":
        raise InputError(f"rope_parameters: the reference code can express rope_type default, got {rope['rope_type']!r}")
    trunk |= {"rope_theta": rope["rope_theta"], "rope_scaling": None, "torch_dtype": trunk.pop("dtype", None)}
    trunk |= {"model_type": family, "architectures": [ARCHITECTURES[family]]}
    return trunk | {f"{family}_{flag}": value for flag, value in flags.items()}


def our_name(name: str) -> str:
    """Our name of a tensor of the reference code."""
    prefix, rest = _split_name(name)
    return name if prefix is None else prefix + RENAMED.get(rest, rest)


def their_name(name: str) -> str:
    """The reference code's name of a tensor of ours."""
    prefix, rest = _split_name(name)
    theirs = {ours: theirs for theirs, ours in RENAMED.items()}
    return name if prefix is None else prefix + theirs.get(rest, rest)


def rows_from_reference(rows: Tensor, config: FlashMHFConfig) -> Tensor:
    """K, U or V: (d_ff, H_kv D), column block h of head h, row block e of sub-network e, to (H_kv, E, F, D)."""
    E, F = config.num_subnetworks, config.subnetwork_size
    return rows.view(E, F, config.num_ffn_kv_heads, -1).permute(2, 0, 1, 3).contiguous()


def rows_to_reference(rows: Tensor) -> Tensor:
    """K, U or V: (H_kv, E, F, D) to (d_ff, H_kv D)."""
    H_kv, E, F, D = rows.shape
    return rows.permute(1, 2, 0, 3).reshape(E * F, H_kv * D).contiguous()


def _split_name(name: str) -> tuple[str | None, str]:
    match = re.fullmatch(r"(model\.layers\.\d+\.mlp\.)(.+)", name)
    return (None, name) if match is None else (match[1], match[2])


def _expected(ours: FlashMHFConfig, theirs: bool) -> dict[str, tuple[int, ...]]:
    """Names and shapes that the checkpoint must hold, read off our model without its data."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(ours)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if ours.tie_word_embeddings:
        del shapes["lm_head.weight"]
    if not theirs:
        return shapes
    return {their_name(name): _their_shape(name, shape) for name, shape in shapes.items()}


def _their_shape(our_tensor: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    if _split_name(our_tensor)[1] in ROWS:
        H_kv, E, F, D = shape
        return (E * F, H_kv * D)
    return shape


def _unused_names(ours: FlashMHFConfig) -> set[str]:
    names = {"lm_head.weight"} if ours.tie_word_embeddings else set()
    if not ours.q_norm:
        names |= {f"model.layers.{layer}.mlp.q_norm.weight" for layer in range(ours.num_hidden_layers)}
    return names


def _check_tensors(files: dict[str, Path], expected: dict[str, tuple[int, ...]], optional: set[str]) -> None:
    if missing := sorted(expected.keys() - files.keys()):
        raise InputError(f"checkpoint: expected tensor {missing[0]} (of {len(missing)} missing), got none")
    if extra := sorted(files.keys() - expected.keys() - optional):
        raise InputError(f"checkpoint: expected no tensor {extra[0]} (of {len(extra)} extra), got it in {files[extra[0]]}")
    for name, shape in _shapes(files):
        if name in expected and shape != expected[name]:
            raise InputError(f"checkpoint: expected {name} of shape {expected[name]}, got {shape}")


def _shapes(files: dict[str, Path]) -> Iterator[tuple[str, tuple[int, ...]]]:
    for file in sorted(set(files.values())):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():
                yield name, tuple(tensors.get_slice(name).get_shape())


def _write_shards(source, written, files, ours, rename, unused: dict[str, dict[str, Tensor]]) -> None:
    """One file of the destination for each of the source, with the same name and metadata."""
    to_reference = rename is their_name
    unused_names = set() if to_reference else _unused_names(ours)
    kept_unused: dict[str, Tensor] = {}
    places: dict[str, str] = {}
    weight_map: dict[str, str] = {}
    for file in sorted(set(files.values())):
        shard: dict[str, Tensor] = {}
        with safe_open(file, framework="pt") as tensors:
            metadata = tensors.metadata()
            for name in tensors.keys():
                tensor = tensors.get_tensor(name)
                if name in unused_names:
                    kept_unused[name], places[name] = tensor, file.name
                    continue
                new_name = rename(name)
                if to_reference and _split_name(name)[1] in ROWS:
                    tensor = rows_to_reference(tensor)
                elif not to_reference and _split_name(new_name)[1] in ROWS:
                    tensor = rows_from_reference(tensor, ours)
                shard[new_name] = tensor
        shard |= unused.get(file.name, {})
        weight_map |= dict.fromkeys(shard, file.name)
        save_file(shard, written / file.name, metadata=metadata)
    if to_reference:
        _add_missing_norms(written, ours, weight_map)
    if kept_unused:
        save_file(kept_unused, written / UNUSED, metadata=places)
    if (source / INDEX).is_file():
        index = read_json(source / INDEX)
        (written / INDEX).write_text(json.dumps(index | {"weight_map": weight_map}, indent=2, sort_keys=True) + "\n")


def _add_missing_norms(written: Path, ours: FlashMHFConfig, weight_map: dict[str, str]) -> None:
    """The reference always stores the per-head norm's weight; for a model that never had one, ones."""
    D = ours.hidden_size // ours.num_ffn_heads
    by_file: dict[str, list[str]] = {}
    for layer in range(ours.num_hidden_layers):
        prefix = f"model.layers.{layer}.mlp."
        if f"{prefix}q_norm.weight" not in weight_map:
            by_file.setdefault(weight_map[f"{prefix}gate_weight"], []).append(f"{prefix}q_norm.weight")
    for file, names in by_file.items():
        with safe_open(written / file, framework="pt") as tensors:
            metadata = tensors.metadata()
            shard = {name: tensors.get_tensor(name) for name in tensors.keys()}
        dtype = next(iter(shard.values())).dtype
        shard |= {name: torch.ones(ours.num_ffn_heads, D, dtype=dtype) for name in names}
        weight_map |= dict.fromkeys(names, file)
        save_file(shard, written / file, metadata=metadata)


def _read_unused(source: Path) -> dict[str, dict[str, Tensor]]:
    """What an earlier conversion laid aside, by the file that it came from."""
    by_file: dict[str, dict[str, Tensor]] = {}
    if (source / UNUSED).is_file():
        with safe_open(source / UNUSED, framework="pt") as tensors:
            for name, file in (tensors.metadata() or {}).items():
                by_file.setdefault(file, {})[name] = tensors.get_tensor(name)
    return by_file


def _check_folders(source: Path, destination: Path) -> None:
    if not (source / "config.json").is_file():
        raise InputError(f"SRC: expected a folder with config.json, got {source}")
    pickled = sorted(source.glob("pytorch_model*.bin"))
    if pickled and not (source / WEIGHTS).exists() and not (source / INDEX).exists():
        raise InputError(f"SRC: expected safetensors, got {pickled[0]}; pickled weights can run code and are not read")
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise InputError(f"DST: expected a new or empty folder, got {destination}")


def _our_config(config: dict[str, Any], source: Path) -> FlashMHFConfig:
    if config.get("model_type") != FlashMHFConfig.model_type:
        raise InputError(f"config.json: expected model_type 'flashmhf', got {config.get('model_type')!r}")
    try:
        return FlashMHFConfig.from_pretrained(source)
    except (ValueError, TypeError, OSError) as error:
        raise InputError(f"config.json: {str(error).splitlines()[0]}") from error


def _function(config: FlashMHFConfig) -> dict[str, Any]:
    """The values of a configuration that decide what the model computes."""
    ignored = {"reference_config", "architectures", "transformers_version", "init", "backend", "dtype", "use_cache"}
    return {name: value for name, value in config.to_dict().items() if name not in ignored}


def _copy_rest(source: Path, written: Path) -> None:
    for file in sorted(source.iterdir()):
        if file.is_file() and file.suffix in COPIED_SUFFIXES and file.name not in ("config.json", INDEX):
            shutil.copyfile(file, written / file.name)
