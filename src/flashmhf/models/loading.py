"""Configurations and models from a preset's name, a JSON file or a folder, with errors that say what is wrong."""

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
    """The configuration of a preset, a JSON file, or a model's folder.

    Raises:
        InputError: `source` is none of them, or its values do not fit.
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
        InputError: the folder holds no model, or its tensors are torn, missing or misshapen; names the file or tensor.
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
    """A model's folder, after a look at whether its files are there and whole.

    Raises:
        InputError: they are not; names the file.
    """
    path = Path(folder)
    if not (path / "config.json").is_file():
        raise InputError(f"model: expected a folder with config.json, got {folder!r}")
    check_safetensors(path)
    return path


def check_safetensors(folder: Path) -> dict[str, Path]:
    """Every tensor of a checkpoint and its file, after a look at each file's header and length.

    Raises:
        InputError: a file is missing, torn, or lacks a tensor that the index promises.
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
        promised = {name for name, place in tensors.items() if place == file}
        if promised - present:
            raise InputError(f"checkpoint: expected tensor {min(promised - present)} in {file}, got none")
        if present - promised:
            raise InputError(f"checkpoint: expected only tensors of {INDEX}, got {min(present - promised)} in {file}")
    return tensors


def tensor_names(file: Path) -> list[str]:
    """Names in one safetensors file.

    Raises:
        InputError: the file is missing or torn; says how many bytes are missing.
    """
    try:
        with safe_open(file, framework="pt") as tensors:
            return list(tensors.keys())
    except FileNotFoundError as error:
        raise InputError(f"checkpoint: expected the file {file}, got none") from error
    except (SafetensorError, OSError) as error:
        raise InputError(f"checkpoint: {file} is torn: {_length_report(file) or error}") from error


def _length_report(file: Path) -> str | None:
    """How much of a safetensors file is missing, by its own header."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        if len(prefix) < 8:
            return f"expected a header, got {size} bytes in all"
        header_size = struct.unpack("<Q", prefix)[0]
        if header_size > size - 8:
            return f"expected a header of {header_size} bytes, got {size} bytes in all"
        try:
            header = json.loads(stream.read(header_size))
            data = max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
        except (ValueError, KeyError, TypeError):
            return None
    return f"expected {8 + header_size + data} bytes, got {size}"
