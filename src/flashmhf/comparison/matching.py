"""Contenders of equal size: the width of the feed-forward layer that matches a backbone's parameters or FLOPs."""

from collections.abc import Callable
from typing import Any

from flashmhf.comparison.settings import Contender
from flashmhf.estimates.cost import count_parameters, model_cost
from flashmhf.models import FlashMHFConfig

WIDTH_MULTIPLE = 8
SCALES = ("score_scale", "gate_scale", "output_scale")
SEVERAL_HEADS = ("flashmhf", "mhffn")
PAPER_LAYERS = 5 / 6  # 20 for 24 in arXiv 2512.06989: layers with several heads for those without


def match(
    base: FlashMHFConfig,
    contender: Contender,
    *,
    by: str = "parameters",
    depth: str = "same",
    context_length: int = 512,
) -> FlashMHFConfig:
    """`base` with another feed-forward layer, whose width brings the size of the model closest to that of `base`.

    Args:
        base: gives the backbone and the size.
        contender: gives the layer.
        by: "parameters", or "flops" of a forward pass a token.
        depth: "same" or "paper", see `Comparison`.
        context_length: for the attention's FLOPs.
    """
    layers = base.num_hidden_layers
    if depth == "paper":
        layers = round(layers * PAPER_LAYERS ** (_several(contender.ffn_type) - _several(base.ffn_type)))
    changes = contender.changes(base)
    unchanged = layers == base.num_hidden_layers and all(getattr(base, name) == changes[name] for name in changes)
    if contender.ffn_type == base.ffn_type and unchanged:
        return base
    subnetworks = base.num_subnetworks if contender.ffn_type in ("flashmhf", "dense_moe") else 1
    changes = {"num_subnetworks": subnetworks, "num_hidden_layers": layers, **changes}
    step = WIDTH_MULTIPLE * changes["num_subnetworks"]

    def with_width(steps: int) -> FlashMHFConfig:
        return _with_ffn(base, {"ffn_type": contender.ffn_type, **changes, "intermediate_size": step * steps})

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
    if changes["ffn_type"] == base.ffn_type:  # what somebody chose for this layer stays; what follows from it does not
        derived = FlashMHFConfig(**_arguments({**base.to_dict(), **dict.fromkeys(SCALES)}))
        values |= {name: getattr(base, name) for name in SCALES if getattr(base, name) != getattr(derived, name)}
    return FlashMHFConfig(**_arguments(values))


def _arguments(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name != "model_type"}
