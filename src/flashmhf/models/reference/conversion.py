"""Converts checkpoints of the reference code (`mhffnmoe`, `mhffn`) to this package's and back.

Tensors are renamed and permuted, shard by shard, and never computed with, so that a round trip is exact. What the
reference stores without using it (the per-head norm's weight if the norm is off, the output layer if it is tied) has no
place in our models and goes to `unused.safetensors`. format.py defines the format.
"""

import contextlib
import json
import math
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from flashmhf.errors import InputError
from flashmhf.files import read_json
from flashmhf.layers.former_shapes import ROWS, former_shapes
from flashmhf.models import FlashMHFConfig
from flashmhf.models.loading import INDEX, WEIGHTS, check_safetensors
from flashmhf.models.reference.format import (
    from_reference_config,
    our_name,
    rows_from_reference,
    rows_to_reference,
    split_name,
    their_name,
    to_reference_config,
)

Shapes = dict[str, tuple[int, ...]]

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
        InputError: a tensor that is missing, unexpected or of the wrong shape, an unknown flag, a corrupt file, or a
            model that the reference code cannot express.
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
    expected, former = _expected(ours, theirs=to == "flashmhf")
    _check_tensors(files, expected, former, _unused_names(ours) if to == "flashmhf" else set())
    with _atomic_folder(destination) as written:
        _write_shards(source, written, files, ours, rename, unused)
        (written / "config.json").write_text(json.dumps(new_config, indent=2, sort_keys=True) + "\n")
        _copy_tokenizer(source, written)
    parameters = sum(math.prod(shape) for shape in expected.values())
    return {"to": to, "tensors": len(files), "parameters": parameters, "files": len(set(files.values()))}


@contextlib.contextmanager
def _atomic_folder(destination: Path) -> Iterator[Path]:
    """A folder to write to, which is renamed to `destination` at the end and removed on failure."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=destination.parent, prefix=f".{destination.name}-") as parent:
        folder = Path(parent) / destination.name
        folder.mkdir()
        yield folder
        if destination.exists():
            destination.rmdir()
        folder.rename(destination)


def _expected(ours: FlashMHFConfig, theirs: bool) -> tuple[Shapes, Shapes]:
    """Shapes of the tensors that the checkpoint must hold, and former shapes that some may have instead, by name."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(ours)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if ours.tie_word_embeddings:
        del shapes["lm_head.weight"]
    former: Shapes = {name: tuple(shape) for name, shape in former_shapes(model).items()}
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


def _check_tensors(files: dict[str, Path], expected: Shapes, former: Shapes, optional: set[str]) -> None:
    if missing := sorted(expected.keys() - files.keys()):
        raise InputError(f"checkpoint: expected tensor {missing[0]} (of {len(missing)} missing), got none")
    if extra := sorted(files.keys() - expected.keys() - optional):
        raise InputError(
            f"checkpoint: expected no tensor {extra[0]} (of {len(extra)} extra), got it in {files[extra[0]]}"
        )
    for name, shape in _shapes(files):
        if name in expected and shape not in (expected[name], former.get(name)):
            raise InputError(f"checkpoint: expected {name} of shape {expected[name]}, got {shape}")


def _shapes(files: dict[str, Path]) -> Iterator[tuple[str, tuple[int, ...]]]:
    for file in sorted(set(files.values())):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():
                yield name, tuple(tensors.get_slice(name).get_shape())


def _write_shards(source, written, files, ours, rename, unused: dict[str, dict[str, Tensor]]) -> None:
    """Writes one file for each file of the source, with the same name and metadata."""
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
    if (source / INDEX).is_file():
        index = read_json(source / INDEX)
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


def _read_unused(source: Path) -> dict[str, dict[str, Tensor]]:
    """The tensors that an earlier conversion set aside, by their original file."""
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


def _copy_tokenizer(source: Path, written: Path) -> None:
    for file in sorted(source.iterdir()):
        if file.is_file() and file.suffix in COPIED_SUFFIXES and file.name not in ("config.json", INDEX):
            shutil.copyfile(file, written / file.name)
