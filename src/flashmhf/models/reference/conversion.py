"""Converts checkpoints of the reference code (`mhffnmoe`, `mhffn`) to this package's and back.

Tensors are renamed and permuted, shard by shard, and never computed with, so that a round trip is exact. What the
reference stores without using it (the per-head norm's weight if the norm is off, the output layer if it is tied) has no
place in our models and goes to `unused.safetensors`. format.py defines the format.
"""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from flashmhf.errors import InputError
from flashmhf.layers.former_shapes import ROWS
from flashmhf.models import FlashMHFConfig
from flashmhf.models.loading import Shapes, expected_shapes, read_config
from flashmhf.models.reference.format import (
    from_reference_config,
    our_name,
    rows_from_reference,
    rows_to_reference,
    split_name,
    their_name,
    to_reference_config,
)
from flashmhf.models.weights import (
    INDEX,
    WEIGHTS,
    StoredTensor,
    check_floating_point,
    check_number_of_layers,
    check_safetensors,
    stored_tensors,
    tensor_names,
)
from flashmhf.names import CONFIG
from flashmhf.new_folder import new_folder
from flashmhf.untrusted import read_settings, reading

UNUSED = "unused.safetensors"
COPIED_SUFFIXES = {".json", ".txt", ".model", ".jinja"}  # tokenizer and generation settings


def convert(source: Path, destination: Path, *, to: str = "flashmhf") -> dict[str, Any]:
    """Converts a checkpoint folder.

    Args:
        source: with config.json and safetensors, in one file or sharded.
        destination: a new or empty folder; nothing is left there on failure.
        to: "flashmhf" or "reference".

    Returns:
        "to", "tensors", "parameters", "files".

    Raises:
        InputError: a tensor that is missing, unexpected or of the wrong shape, an unknown flag, a corrupt file, a
            model that the reference code cannot express, or another conversion to `destination` that is running.
        OSError: the destination cannot be written: no space is left, for example.
    """
    if to not in ("flashmhf", "reference"):
        raise InputError(f"to: expected flashmhf or reference, got {to!r}")
    _check_folders(source, destination)
    rename: Callable[[str], str]
    if to == "flashmhf":
        ours = from_reference_config(read_settings(source / CONFIG))
        new_config, rename = {**ours.to_dict(), "architectures": ["FlashMHFForCausalLM"]}, our_name
    else:
        ours = _our_config(source)
        new_config, rename = to_reference_config(ours), their_name
    _check_settings(source)
    files = check_safetensors(source)
    stored = stored_tensors(files.values())
    unused = _read_unused(source, ours) if to == "reference" else {}
    check_floating_point(stored)
    check_number_of_layers(stored, ours.num_hidden_layers)
    expected, former = _expected(ours, theirs=to == "flashmhf")
    _check_tensors(stored, expected, former, _unused_names(ours) if to == "flashmhf" else set())
    with new_folder("DST", destination) as written:
        _write_shards(source, written, files, ours, rename, unused)
        (written / CONFIG).write_text(json.dumps(new_config, indent=2, sort_keys=True) + "\n")
        _copy_tokenizer(source, written)
    parameters = sum(math.prod(shape) for shape in expected.values())
    return {"to": to, "tensors": len(files), "parameters": parameters, "files": len(set(files.values()))}


def _expected(ours: FlashMHFConfig, theirs: bool) -> tuple[Shapes, Shapes]:
    """Shapes of the tensors that the checkpoint must hold, and former shapes that some may have instead, by name."""
    shapes, former = expected_shapes(ours)
    if not theirs:
        return shapes, former
    for name, (H_kv, E, F, D) in former.items():
        shapes[name] = (E * F, H_kv * D)
    return {their_name(name): shape for name, shape in shapes.items()}, {}


def _unused_names(ours: FlashMHFConfig) -> set[str]:
    names = {"lm_head.weight"} if ours.tie_word_embeddings else set()
    if not ours.q_norm:
        names |= {f"model.layers.{layer}.mlp.q_norm.weight" for layer in range(ours.num_hidden_layers)}
    return names


def _check_tensors(stored: dict[str, StoredTensor], expected: Shapes, former: Shapes, optional: set[str]) -> None:
    if missing := sorted(expected.keys() - stored.keys()):
        raise InputError(f"checkpoint: expected tensor {missing[0]} (of {len(missing)} missing), got none")
    if extra := sorted(stored.keys() - expected.keys() - optional):
        raise InputError(
            f"checkpoint: expected no tensor {extra[0]} (of {len(extra)} extra), got it in {stored[extra[0]].file}"
        )
    for name, shape in expected.items():
        if stored[name].shape not in (shape, former.get(name)):
            raise InputError(f"checkpoint: expected {name} of shape {shape}, got {stored[name].shape}")


def _write_shards(
    source: Path,
    written: Path,
    files: dict[str, Path],
    ours: FlashMHFConfig,
    rename: Callable[[str], str],
    unused: dict[str, dict[str, Tensor]],
) -> None:
    """Writes one file for each file of the source, with the same name and metadata."""
    to_reference = rename is their_name
    unused_names = set() if to_reference else _unused_names(ours)
    kept_unused: dict[str, Tensor] = {}
    places: dict[str, str] = {}
    weight_map: dict[str, str] = {}
    for file in sorted(set(files.values())):
        shard: dict[str, Tensor] = {}
        with reading(f"checkpoint: {file}"), safe_open(file, framework="pt") as tensors:
            metadata = tensors.metadata()
            for name in tensors.keys():
                tensor = tensors.get_tensor(name)
                if name in unused_names:
                    kept_unused[name], places[name] = tensor, file.name
                    continue
                new_name = rename(name)
                if to_reference and split_name(name)[1] in ROWS:
                    tensor = rows_to_reference(tensor, ours)
                elif not to_reference and split_name(new_name)[1] in ROWS:
                    tensor = rows_from_reference(tensor, ours)
                shard[new_name] = tensor
        shard |= unused.get(file.name, {})
        weight_map |= dict.fromkeys(shard, file.name)
        save_file(shard, written / file.name, metadata=metadata)
    if to_reference:
        _add_missing_norms(written, ours, weight_map)
    if kept_unused:
        save_file(kept_unused, written / UNUSED, metadata=places)
    if not (source / WEIGHTS).exists():
        index = read_settings(source / INDEX)
        (written / INDEX).write_text(json.dumps(index | {"weight_map": weight_map}, indent=2, sort_keys=True) + "\n")


def _add_missing_norms(written: Path, ours: FlashMHFConfig, weight_map: dict[str, str]) -> None:
    """Adds per-head norm weights of one, which the reference always stores, for a model that has none."""
    H, _ = ours.ffn_heads
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
        shard |= {name: torch.ones(H, ours.hidden_size // H, dtype=dtype) for name in names}
        weight_map |= dict.fromkeys(names, file)
        save_file(shard, written / file, metadata=metadata)


def _read_unused(source: Path, ours: FlashMHFConfig) -> dict[str, dict[str, Tensor]]:
    """The tensors that an earlier conversion set aside, by their original file."""
    by_file: dict[str, dict[str, Tensor]] = {}
    if (source / UNUSED).exists():
        tensor_names(source / UNUSED)
        with reading(f"checkpoint: {source / UNUSED}"), safe_open(source / UNUSED, framework="pt") as tensors:
            for name, file in (tensors.metadata() or {}).items():
                if name not in _unused_names(ours):
                    raise InputError(f"checkpoint: expected only unused tensors in {source / UNUSED}, got {name}")
                by_file.setdefault(file, {})[name] = tensors.get_tensor(name)
    return by_file


def _check_folders(source: Path, destination: Path) -> None:
    if not (source / CONFIG).is_file():
        raise InputError(f"SRC: expected a folder with {CONFIG}, got {source}")
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise InputError(f"DST: expected a new or empty folder, got {destination}")


def _our_config(source: Path) -> FlashMHFConfig:
    model_type = read_settings(source / CONFIG).get("model_type")
    if model_type != FlashMHFConfig.model_type:
        raise InputError(f"{CONFIG}: expected model_type 'flashmhf', got {model_type!r:.80}")
    config = read_config(source)
    assert isinstance(config, FlashMHFConfig)
    return config


def _copied(source: Path) -> list[Path]:
    """The settings that a conversion copies: those of the tokenizer and of generation."""
    copied = (file for file in sorted(source.iterdir()) if file.is_file() and file.suffix in COPIED_SUFFIXES)
    return [file for file in copied if file.name not in (CONFIG, INDEX)]


def _check_settings(source: Path) -> None:
    """Raises InputError for a file of settings that is corrupt, instead of copying it."""
    for file in sorted(source.glob("*.json")):
        with reading(str(file)):
            read_settings(file, strict=False)


def _copy_tokenizer(source: Path, written: Path) -> None:
    for file in _copied(source):
        shutil.copyfile(file, written / file.name)
