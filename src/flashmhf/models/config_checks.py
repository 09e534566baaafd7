"""Which values `FlashMHFConfig` takes: names, types and ranges; everything is used or refused.

What transformers itself writes into config.json is known here, too.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedConfig
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from flashmhf.models.remote_code import ATTENTION, check_attention
from flashmhf.names import did_you_mean

WHOLE = {  # name: smallest and largest value; the largest are far beyond any model, but end before memory does
    "vocab_size": (1, 2**26),
    "hidden_size": (1, 2**20),
    "intermediate_size": (1, 2**24),
    "num_hidden_layers": (1, 10_000),
    "num_attention_heads": (1, 2**16),
    "num_key_value_heads": (1, 2**16),
    "head_dim": (2, 2**16),
    "max_position_embeddings": (1, 2**31),
    "num_subnetworks": (1, 2**20),
    "subnetwork_size": (1, 2**24),
    "num_ffn_heads": (1, 2**16),
    "num_ffn_kv_heads": (1, 2**16),
}
POSITIVE = ("rms_norm_eps", "score_scale", "gate_scale", "output_scale")
FLAGS = (
    *("q_norm", "qk_norm", "ffn_projections", "ffn_norm", "recompute_q", "mlp_bias", "attention_bias"),
    "tie_word_embeddings",
)
OPTIONAL_FLAGS = ("use_cache", "output_hidden_states", "output_attentions")
FIXED = {  # of LlamaConfig and its base, but without effect on this model: the only value that is taken
    "hidden_act": "silu",
    "pretraining_tp": 1,
    "chunk_size_feed_forward": 0,
    "is_encoder_decoder": False,
    "return_dict": True,
    "per_layer_config": None,
    **dict.fromkeys(("experts_implementation", "_experts_implementation", "_experts_implementation_internal")),
}
# Fields that only some values of ffn_type use. The numbers of heads and sub-networks are not among them: one set of
# sizes describes all models of a comparison.
USED_BY = {
    "mlp_bias": ("flashmhf", "mhffn", "pkv", "swiglu"),  # without ffn_projections, there is nothing to add it to
    "gate_type": ("flashmhf", "dense_moe"),
    "gate_scale": ("flashmhf", "dense_moe"),
    "q_norm": ("flashmhf", "mhffn"),
    "ffn_projections": ("flashmhf", "mhffn"),
    "score_scale": ("flashmhf", "mhffn", "dense_moe"),
    "output_scale": ("flashmhf", "mhffn", "dense_moe"),
    "recompute_q": ("flashmhf", "mhffn", "dense_moe"),
}
# What transformers takes besides fields, and what it has written into config.json at some time.
OTHER_NAMES = {
    *("model_type", "name_or_path", "_name_or_path", "_commit_hash", "tokenizer_class", "num_labels"),
    *("dtype", "torch_dtype", "rope_theta", "rope_scaling", "output_attentions", "quantization_config", "auto_map"),
    *(f"{before}{kind}_implementation" for before in ("", "_") for kind in ("attn", "experts")),
    *("_attn_implementation_internal", "_experts_implementation_internal", "_attn_implementation_autoset"),
    "per_layer_config",
}
ROPE_NUMBERS = {  # rope_type: its numbers besides rope_theta
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": (
        *("factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow"),
        *("mscale", "mscale_all_dim"),
    ),
    "longrope": ("factor", "original_max_position_embeddings", "attention_factor"),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
}
ROPE_REQUIRED = {  # besides rope_type; transformers fills in rope_theta and original_max_position_embeddings
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}
ROPE_OTHERS = {"yarn": ("truncate",), "longrope": ("short_factor", "long_factor")}
PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification", None)
DTYPES = ("float32", "bfloat16", "float16", "float64")
MAX_LABELS = 2**20


def known_names() -> set[str]:
    """Every name besides `FlashMHFConfig`'s own fields and LlamaConfig's that it takes."""
    return OTHER_NAMES | PreTrainedConfig().to_dict().keys() | GenerationConfig._get_default_generation_params().keys()


def check_names(names: Iterable[str], fields: Iterable[str]) -> None:
    """Raises ValueError for a name that nothing uses, with the field that was probably meant."""
    for name in sorted(set(names) - known_names()):
        meant = did_you_mean(name, sorted(fields))
        raise ValueError(f"{name}: expected a field of FlashMHFConfig, got an unknown one{meant}")


def check_values(values: dict[str, Any]) -> None:
    """Raises ValueError for the first value of a wrong type or range. None is a default that is not known yet."""
    for name, (smallest, largest) in WHOLE.items():
        value = values.get(name)
        if value is not None and (type(value) is not int or not smallest <= value <= largest):
            raise ValueError(f"{name}: expected a whole number from {smallest} to {largest}, got {value!r:.80}")
    for name in POSITIVE:
        _check_number(name, values.get(name))
    for name in FLAGS:
        if not isinstance(values.get(name, False), bool):
            raise ValueError(f"{name}: expected true or false, got {values[name]!r:.80}")
    for name in OPTIONAL_FLAGS:
        if not isinstance(values.get(name), bool | None):
            raise ValueError(f"{name}: expected true or false, got {values[name]!r:.80}")
    architectures = values.get("architectures")
    if not isinstance(architectures, list | tuple | None) or not all(isinstance(a, str) for a in architectures or ()):
        raise ValueError(f"architectures: expected a list of names, got {architectures!r:.80}")
    for name, only in FIXED.items():
        if values.get(name) not in (only, None):
            raise ValueError(f"{name}: expected {only!r}, all that this model has, got {values[name]!r:.80}")
    for name in ("initializer_range", "attention_dropout"):
        value = values.get(name)
        if value is not None and (type(value) not in (int, float) or not 0 <= value <= 1):
            raise ValueError(f"{name}: expected a number from 0 to 1, got {value!r:.80}")
    pad, vocabulary = values.get("pad_token_id"), values.get("vocab_size")
    if pad is not None and (type(pad) is not int or not 0 <= pad < (vocabulary or 0)):
        raise ValueError(f"pad_token_id: expected a token of the vocabulary of {vocabulary}, got {pad!r:.80}")
    for name in ("bos_token_id", "eos_token_id"):
        tokens = values.get(name)
        for token in tokens if isinstance(tokens, list) else [tokens]:
            if token is not None and (type(token) is not int or not 0 <= token <= WHOLE["vocab_size"][1]):
                raise ValueError(f"{name}: expected a token, got {tokens!r:.80}")
    if not isinstance(values.get("reference_config"), dict | None):
        raise ValueError(f"reference_config: expected an object, got {values['reference_config']!r:.80}")


def check_others(values: dict[str, Any]) -> None:
    """Raises ValueError for what transformers takes besides fields: the dtype, attention, quantization, labels."""
    for name in ("dtype", "torch_dtype"):
        value = values.get(name)
        known = value.is_floating_point if isinstance(value, torch.dtype) else value in (*DTYPES, None)
        if not known:
            raise ValueError(f"{name}: expected one of {', '.join(DTYPES)}, got {value!r:.80}")
    for name in ATTENTION:
        check_attention(name, values.get(name))
    quantization = values.get("quantization_config")
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if isinstance(quantization, dict) and method not in (*AUTO_QUANTIZATION_CONFIG_MAPPING, "bitsandbytes"):
        raise ValueError(f"quantization_config: expected a quant_method that transformers knows, got {method!r:.80}")
    if isinstance(quantization, str | int | float | list):
        raise ValueError(f"quantization_config: expected an object, got {quantization!r:.80}")
    for name in ("transformers_version", "tokenizer_class", "_name_or_path"):
        if not isinstance(values.get(name), str | None):
            raise ValueError(f"{name}: expected text, got {values[name]!r:.80}")
    if values.get("problem_type") not in PROBLEM_TYPES:
        raise ValueError(f"problem_type: expected one of {PROBLEM_TYPES[:3]}, got {values['problem_type']!r:.80}")
    for name in ("id2label", "label2id"):
        if values.get(name) is not None and (not isinstance(values[name], dict) or not values[name]):
            raise ValueError(f"{name}: expected an object with labels, got {values[name]!r:.80}")
    labels = values.get("num_labels")
    if labels is not None and (type(labels) is not int or not 1 <= labels <= MAX_LABELS):
        raise ValueError(f"num_labels: expected a whole number from 1 to {MAX_LABELS}, got {labels!r:.80}")


def check_rope(parameters: Any) -> None:
    """Raises ValueError for rotary parameters that Llama does not use, which transformers would only warn of."""
    if parameters is None:
        return
    if not isinstance(parameters, dict):
        raise ValueError(f"rope_parameters: expected an object, got {parameters!r:.80}")
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if not isinstance(kind, str) or kind not in ROPE_NUMBERS:
        raise ValueError(f"rope_type: expected one of {', '.join(ROPE_NUMBERS)}, got {kind!r:.80}")
    for name in ROPE_REQUIRED.get(kind, ()):
        if parameters.get(name) is None:
            raise ValueError(f"rope_parameters: expected {name} for rope_type {kind}, got none")
    numbers = ("rope_theta", *ROPE_NUMBERS[kind])
    for name, value in parameters.items():
        if name not in (*numbers, *ROPE_OTHERS.get(kind, ()), "rope_type", "type"):
            raise ValueError(f"rope_parameters: expected some of {', '.join(numbers)} for {kind}, got {name}")
        if name in numbers:
            _check_number(f"rope_parameters: {name}", value)
        elif name in ROPE_OTHERS.get("longrope", ()):
            for factor in value if isinstance(value, list) and value else [str(value)]:
                _check_number(f"rope_parameters: {name}", factor)


def _check_number(name: str, value: Any) -> None:
    """Raises ValueError unless it is a finite number above 0, or None."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"{name}: expected a number above 0, got {value!r:.80}")
