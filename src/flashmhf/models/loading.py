"""Loads configurations and models from a preset, a JSON file or a folder; errors name the file or tensor at fault.

Code that comes with a model is never run: neither its Python files nor pickles nor kernels of the Hub.
"""

import math
import os
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel

from flashmhf.errors import InputError, RunError
from flashmhf.layers.former_shapes import former_shapes
from flashmhf.layers.multi_head import local
from flashmhf.models.configuration import FlashMHFConfig
from flashmhf.models.remote_code import refuse_code
from flashmhf.models.weights import (
    check_floating_point,
    check_number_of_layers,
    check_safetensors,
    stored_tensors,
)
from flashmhf.names import CONFIG, check_model, check_model_folder, preset_names
from flashmhf.untrusted import read_settings, reading

GENERATION_CONFIG = "generation_config.json"
ADAPTER_CONFIG = "adapter_config.json"
NUMBERS_AT_A_TIME = 2**26  # of a tensor that is searched for NaN and infinity

Shapes = dict[str, tuple[int, ...]]


def load_config(source: str) -> PreTrainedConfig:
    """The configuration from a preset's name, a JSON file, or a model's folder.

    Raises:
        InputError: `source` is none of them, or has an invalid value.
    """
    check_model(source)
    if source in preset_names():
        return FlashMHFConfig.from_preset(source)
    path = Path(source)
    if path.is_dir():
        return read_config(path)
    values = {"model_type": FlashMHFConfig.model_type} | _read(path)
    if values["model_type"] != FlashMHFConfig.model_type:
        raise InputError(f"model: {path}: expected model_type 'flashmhf', got {values['model_type']!r:.80}")
    return _config_of(values, path)


def read_config(folder: Path) -> PreTrainedConfig:
    """The configuration of the model in `folder`, of any model type that transformers or this package has.

    Raises:
        InputError: there is none, or an invalid one.
    """
    check_model_folder(str(folder))
    config = _config_of(_read(folder / CONFIG), folder / CONFIG)
    config.name_or_path = str(folder)
    return config


def _read(file: Path) -> dict[str, Any]:
    with reading(f"model: {file}"):
        values = read_settings(file)
        refuse_code(values, file)
    return values


def _config_of(values: dict[str, Any], file: Path) -> PreTrainedConfig:
    model_type = values.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        custom = "; code that comes with a model (auto_map) is never run" if values.get("auto_map") else ""
        raise InputError(
            f"model: {file}: expected a model_type that flashmhf or transformers has, got {model_type!r:.80}{custom}"
        )
    with reading(f"model: {file}"):
        config: PreTrainedConfig = CONFIG_MAPPING[model_type].from_dict(values)
        config.to_dict()  # fails where a value cannot be copied or written again
    return config


def new_model(config: PreTrainedConfig, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """A causal language model with random weights.

    Raises:
        InputError: the configuration describes none, or one that does not fit into memory.
    """
    with reading(f"model: {config.name_or_path or config.model_type}"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    return model


def check_memory(config: PreTrainedConfig) -> None:
    """Raises InputError if the model's parameters in float32 are larger than this machine's memory."""
    with torch.device("meta"):
        size = 4 * new_model(config).num_parameters()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else math.inf
    if size > memory:
        raise InputError(
            f"model: expected one that fits into the memory of {memory / 2**30:.0f} GiB, got {size / 2**30:,.0f} GiB "
            "of parameters"
        )


def load_model(folder: str, dtype: torch.dtype | str = "auto") -> PreTrainedModel:
    """The causal language model in `folder`, in evaluation mode on the CPU.

    Raises:
        InputError: the folder holds no model, or a file or tensor is corrupt, missing or has the wrong shape.
        RunError: a weight is not finite.
    """
    path = check_folder(folder)
    config = read_config(path)
    _check_sizes(path, config)
    with reading(f"model: {folder}"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path,
            config=config,
            dtype=dtype,
            output_loading_info=True,
            trust_remote_code=False,
            use_safetensors=True,
            local_files_only=True,
        )
        model, report = loaded
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[problem]:
            first = ", ".join(str(key) for key in sorted(report[problem], key=str)[:3])
            raise InputError(f"model: expected the tensors of its config.json, got {folder} with {problem}: {first}")
    if (tensor := non_finite_weight(model)) is not None:
        raise RunError(f"model: expected finite weights, got NaN or infinity in {tensor} of {folder}")
    return model.eval()


def check_folder(folder: str) -> Path:
    """The path of a model's folder, after checking that its files are present and complete.

    Raises:
        InputError: a file is missing, truncated or no valid one.
    """
    path = check_model_folder(folder)
    if (path / ADAPTER_CONFIG).exists():
        raise InputError(
            f"model: expected a complete model, got {path / ADAPTER_CONFIG}; merge the adapter (peft's "
            "merge_and_unload) and save the model"
        )
    check_safetensors(path)
    if (path / GENERATION_CONFIG).exists():
        with reading(f"model: {path / GENERATION_CONFIG}"):
            _check_tokens(GenerationConfig.from_dict(read_settings(path / GENERATION_CONFIG)).to_dict())
    return path


def _check_tokens(settings: dict[str, Any]) -> None:
    for name, tokens in settings.items():
        if name.endswith("_token_id") and tokens is not None:
            for token in tokens if isinstance(tokens, list) else [tokens]:
                if type(token) is not int or token < 0:
                    raise ValueError(f"{name}: expected a token, got {tokens!r:.80}")


def non_finite_weight(model: torch.nn.Module) -> str | None:
    """The name of the first parameter or buffer that holds NaN or infinity; None if there is none.

    Of a sharded one, the part of this process counts; of a quantised one, its values. One pass over memory without a
    copy: 0.15 s per GB in float32 and bfloat16 on one core.
    """
    for name, whole in [*model.named_parameters(), *model.named_buffers()]:
        tensor = local(whole)
        if tensor.numel() and tensor.is_floating_point() and not tensor.is_meta:
            for part in tensor.detach().reshape(-1).split(NUMBERS_AT_A_TIME):
                ends = (part if part.element_size() > 1 else part.float()).aminmax()
                if not (ends.min.isfinite() and ends.max.isfinite()):
                    return name
    return None


def _check_sizes(folder: Path, config: PreTrainedConfig) -> None:
    """Compares the stored tensors with the configuration before a model of its size is built.

    Raises:
        InputError: another number of layers, of values in a tensor, or no floating point.
    """
    if getattr(config, "quantization_config", None) is not None or not isinstance(config, FlashMHFConfig):
        return
    tensors = stored_tensors(check_safetensors(folder).values())
    check_floating_point(tensors)
    check_number_of_layers(tensors, config.num_hidden_layers)
    for name, shape in expected_shapes(config)[0].items():
        if name in tensors and math.prod(tensors[name].shape) != math.prod(shape):
            raise InputError(
                f"model: expected {name} of shape {shape}, as {folder / CONFIG} says, got {tensors[name].shape} in "
                f"{tensors[name].file}"
            )


def expected_shapes(config: FlashMHFConfig) -> tuple[Shapes, Shapes]:
    """Shapes of a checkpoint's tensors by name, from the model on the meta device; former shapes that some may have."""
    with torch.device("meta"):
        model = new_model(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    return shapes, {name: tuple(shape) for name, shape in former_shapes(model).items()}
