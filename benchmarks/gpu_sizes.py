"""The models of the training comparison: recipes/scaling/*.json and a SwiGLU of equal size for each."""

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashmhf.estimates.cost import ModelCost, model_cost
from flashmhf.models import FlashMHFConfig
from flashmhf.models.config_checks import USED_BY

CONFIGS = Path(__file__).parent.parent / "recipes/scaling"
CONTENDERS = ("swiglu", "flashmhf")  # differences are to the first
CONTEXT_LENGTH = 1024


@dataclass(frozen=True, kw_only=True)
class Size:
    """A pair of models, named by their parameters without embeddings.

    Hidden size / layers is 64; attention has heads of 64, FlashMHF the fewest heads of at most 128.
    `swiglu_width` is what `flashmhf.comparison.matching.match` finds. The batch grows with the model, so that the
    smallest model does not end after a hundred steps.
    """

    name: str
    swiglu_width: int
    batch_size: int


SIZES = {
    size.name: size
    for size in (
        Size(name="1m", swiglu_width=512, batch_size=8),
        Size(name="3m", swiglu_width=752, batch_size=16),
        Size(name="10m", swiglu_width=1024, batch_size=32),
        Size(name="30m", swiglu_width=1496, batch_size=64),
    )
}
VOCABULARY = 8192  # of training_tokens.py
TOY_VOCABULARY = 300
TOY = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def config_of(size: Size, ffn_type: str, vocab_size: int = VOCABULARY, *, toy: bool = False) -> FlashMHFConfig:
    """A contender's model.

    Args:
        vocab_size: of the tokens, which have no padding.
        toy: for a dry run: the same layer on a backbone that trains in a second.
    """
    values: dict[str, Any] = json.loads((CONFIGS / f"{size.name}.json").read_text())
    values |= {"vocab_size": vocab_size, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
    if toy:
        values |= TOY | {"num_ffn_heads": TOY["num_attention_heads"]}
    if ffn_type == "swiglu":
        unused = {name for name, users in USED_BY.items() if ffn_type not in users}
        values = {name: value for name, value in values.items() if name not in unused}
        values |= {"ffn_type": "swiglu", "intermediate_size": size.swiglu_width, "num_subnetworks": 1}
    return FlashMHFConfig(**values)


@functools.cache
def cost_of(size: Size, ffn_type: str) -> ModelCost:
    """Parameters and FLOPs of a contender at the context length of training."""
    return model_cost(config_of(size, ffn_type), CONTEXT_LENGTH)


def parameters_of(size: Size) -> int:
    """Parameters without embeddings: the first contender's, which stands for both."""
    return cost_of(size, CONTENDERS[0]).parameters_without_embeddings
