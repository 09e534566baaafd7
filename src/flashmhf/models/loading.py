"""Loads configurations and models from a preset, a JSON file or a folder; errors name the file or tensor at fault."""

import json
import struct
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from flashmhf.errors import InputError
from flashmhf.files import read_json
from flashmhf.models.configuration import FlashMHFConfig, preset_names

INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"


def load_config(source: str) -> PreTrainedConfig:
    """The configuration from a preset's name, a JSON file, or a model's folder.

    Raises:
        InputError: `source` is none of them, or has an invalid value.
    """
    path = Path(source)
    try:
        if source in preset_names():
            return FlashMHFConfig.from_preset(source)
        if path.is_dir():
            return AutoConfig.from_pretrained(path)
        if path.is_file():
            return FlashMHFConfig(**{k: v for k, v in read_json(path).items() if k != "model_type"})
    except (ValueError, OSError) as error:
        raise InputError(f"model: {source}: {str(error).splitlines()[0]}") from error
    raise InputError(f"model: expected a preset ({', '.join(preset_names())}), a JSON file or a folder, got {source!r}")


def load_model(folder: str, dtype: torch.dtype | str = "auto") -> PreTrainedModel:
    """The causal language model in `folder`, in evaluation mode on the CPU.

    Raises:
        InputError: the folder holds no model, or a file or tensor is corrupt, missing or has the wrong shape.
    """
    path = check_folder(folder)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, output_loading_info=True)
        model, report = loaded
    except (ValueError, OSError, RuntimeError, SafetensorError) as error:
        raise InputError(f"model: {folder}: {str(error).splitlines()[0]}") from error
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[problem]:
            first = ", ".join(str(key) for key in sorted(report[problem], key=str)[:3])
            raise InputError(f"model: expected the tensors of its config.json, got {folder} with {problem}: {first}")
    return model.eval()


def check_folder(folder: str) -> Path:
    """The path of a model's folder, after checking that its files are present and complete.

    Raises:
        InputError: a file is missing or truncated.
    """
    path = Path(folder)
    if not (path / "config.json").is_file():
        raise InputError(f"model: expected a folder with config.json, got {folder!r}")
    check_safetensors(path)
    return path


def check_safetensors(folder: Path) -> dict[str, Path]:
    """Every tensor of a checkpoint with its file, after checking each file's header and length.

    Raises:
        InputError: a file is missing or truncated, or its tensors are not those listed in the index.
    """
    if (folder / INDEX).is_file():
        index = read_json(folder / INDEX).get("weight_map")
        if not isinstance(index, dict):
            raise InputError(f"checkpoint: expected a weight_map in {folder / INDEX}, got none")
        tensors = {name: folder / file for name, file in index.items()}
    elif (folder / WEIGHTS).is_file():
        tensors = dict.fromkeys(tensor_names(folder / WEIGHTS), folder / WEIGHTS)
    else:
        raise InputError(f"checkpoint: expected {WEIGHTS} or {INDEX} in {folder}, got neither")
    for file in sorted(set(tensors.values())):
        present = set(tensor_names(file))
        listed = {name for name, place in tensors.items() if place == file}
        if listed - present:
            raise InputError(f"checkpoint: expected tensor {min(listed - present)} in {file}, got none")
        if present - listed:
            raise InputError(f"checkpoint: expected only tensors of {INDEX}, got {min(present - listed)} in {file}")
    return tensors


def tensor_names(file: Path) -> list[str]:
    """The names of the tensors in a safetensors file.

    Raises:
        InputError: the file is missing, truncated or corrupt.
    """
    try:
        with safe_open(file, framework="pt") as tensors:
            return list(tensors.keys())
    except FileNotFoundError as error:
        raise InputError(f"checkpoint: expected the file {file}, got none") from error
    except (SafetensorError, OSError) as error:
        raise InputError(f"checkpoint: {file} is corrupt: {_length_report(file) or error}") from error


def _length_report(file: Path) -> str | None:
    """Expected and actual length of a safetensors file, by its header; None if the header cannot be read."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        if len(prefix) < 8:
            return f"expected a header, got {size} bytes in total"
        header_size = struct.unpack("<Q", prefix)[0]
        if header_size > size - 8:
            return f"expected a header of {header_size} bytes, got {size} bytes in total"
        try:
            header = json.loads(stream.read(header_size))
            data = max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
        except (ValueError, KeyError, TypeError):
            return None
    return f"expected {8 + header_size + data} bytes, got {size}"
