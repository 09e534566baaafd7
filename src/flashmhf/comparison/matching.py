"""Variants of equal size: the width of the feed-forward layer that matches a backbone's parameters or FLOPs."""

from collections.abc import Callable
from typing import Any

from flashmhf.comparison.settings import Variant
from flashmhf.estimates.cost import count_parameters, model_cost
from flashmhf.models import FlashMHFConfig

WIDTH_MULTIPLE = 8
SCALES = ("score_scale", "gate_scale", "output_scale")
SEVERAL_HEADS = ("flashmhf", "mhffn")
PAPER_LAYERS = 5 / 6  # in arXiv 2512.06989, 20 layers with several heads for 24 without


def match(
    base: FlashMHFConfig,
    variant: Variant,
    *,
    by: str = "parameters",
    depth: str = "same",
    context_length: int = 512,
) -> FlashMHFConfig:
    """`base` with another feed-forward layer, whose width brings the model's size closest to that of `base`.

    Args:
        base: gives the backbone and the size.
        variant: gives the layer.
        by: "parameters", or forward "flops" per token.
        depth: "same" or "paper", see `Comparison`.
        context_length: for the FLOPs of the attention.
    """
    layers = base.num_hidden_layers
    if depth == "paper":
        layers = round(layers * PAPER_LAYERS ** (_several(variant.ffn_type) - _several(base.ffn_type)))
    changes = variant.changes(base)
    unchanged = layers == base.num_hidden_layers and all(getattr(base, name) == changes[name] for name in changes)
    if variant.ffn_type == base.ffn_type and unchanged:
        return base
    subnetworks = base.num_subnetworks if variant.ffn_type in ("flashmhf", "dense_moe") else 1
    changes = {"num_subnetworks": subnetworks, "num_hidden_layers": layers, **changes}
    step = WIDTH_MULTIPLE * changes["num_subnetworks"]

    def with_width(steps: int) -> FlashMHFConfig:
        return _with_ffn(base, {"ffn_type": variant.ffn_type, **changes, "intermediate_size": step * steps})

    size: Callable[[FlashMHFConfig], float] = count_parameters
    if by == "flops":

        def size(config: FlashMHFConfig) -> float:
            return model_cost(config, context_length).forward_flops_per_token

    at_one, at_two = (size(with_width(steps)) for steps in (1, 2))
    return with_width(max(1, round(1 + (size(base) - at_one) / (at_two - at_one))))


def _several(ffn_type: str) -> int:
    return int(ffn_type in SEVERAL_HEADS)


def _with_ffn(base: FlashMHFConfig, changes: dict[str, Any]) -> FlashMHFConfig:
    values = {**base.to_dict(), **dict.fromkeys(SCALES), **changes}
    if changes["ffn_type"] == base.ffn_type:  # values that were chosen for this layer stay, derived ones do not
        derived = FlashMHFConfig(**_arguments({**base.to_dict(), **dict.fromkeys(SCALES)}))
        values |= {name: getattr(base, name) for name in SCALES if getattr(base, name) != getattr(derived, name)}
    return FlashMHFConfig(**_arguments(values))


def _arguments(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name != "model_type"}
