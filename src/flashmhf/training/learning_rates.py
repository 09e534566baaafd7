"""Learning rates by fan-in, so that one learning rate serves models of every width (docs/parametrisation.md)."""

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import TrainingArguments

from flashmhf.errors import InputError
from flashmhf.layers import PKV, FlashMHF

OPTION = "mup-base-width"


def check_base_width(base_width: int | None, arguments: TrainingArguments) -> None:
    """Raises InputError where learning rates cannot be scaled so."""
    if base_width is None:
        return
    if base_width < 1:
        raise InputError(f"{OPTION}: expected a hidden size of at least 1, got {base_width}")
    if arguments.fsdp:
        raise InputError(f"{OPTION}: expected no --fsdp, which may hide the weights' shapes, got {arguments.fsdp}")


def learning_rate_factors(model: nn.Module, base_width: int) -> dict[Tensor, float]:
    """What each matrix's learning rate is multiplied by; a parameter that is not named keeps the whole of it.

    An Adam step moves a product by about learning rate x fan-in x the scale behind it. The fan-ins of a Linear (d or
    d_ff) are in proportion to the model's width, so its factor is base_width / hidden_size. K, U, V and the gate of a
    FlashMHF sum over head_dim or over F E numbers and have scales behind them; with init="scaled" that is hidden_size,
    too. Embeddings (tied ones as well), norms, biases and the rows of PKV, whose sums do not grow with the number of
    heads, are not named.

    Args:
        model: with a `config` that has hidden_size.
        base_width: the hidden size at which the learning rate was found.
    """
    width: int = cast(Any, model).config.hidden_size
    factors: dict[Tensor, float] = {}
    for module in model.modules():
        if isinstance(module, nn.Linear):
            factors[module.weight] = base_width / width
        elif isinstance(module, FlashMHF):
            factors |= {parameter: base_width / fan_in for parameter, fan_in in _fan_ins(module)}
        elif isinstance(module, PKV):
            factors |= {module.k: 1.0, module.v: 1.0}
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            factors.pop(module.weight, None)  # tied to lm_head
    return factors


def scale_learning_rates(optimizer: torch.optim.Optimizer, factors: dict[Tensor, float]) -> None:
    """Splits the optimizer's groups by factor. Before its first step and before a scheduler sees it.

    The weight decay of a group is divided by its factor: AdamW multiplies the two, and so the decay a step is the same
    at every width. The groups with the full learning rate come first, since that of the first group is logged.
    """
    groups = []
    for group in optimizer.param_groups:
        present = {factors.get(parameter, 1.0) for parameter in group["params"]}
        for factor in present:
            chosen = [parameter for parameter in group["params"] if factors.get(parameter, 1.0) == factor]
            scaled = {"params": chosen, "lr": group["lr"] * factor, "weight_decay": group["weight_decay"] / factor}
            groups.append((factor, {**group, **scaled}))
    groups.sort(key=lambda pair: (pair[0] != 1.0, pair[0]))
    optimizer.param_groups[:] = [group for _, group in groups]


def _fan_ins(layer: FlashMHF) -> list[tuple[Tensor, float]]:
    """Numbers that a score, a gate's logit and an output sum over, times their scales, in units of the width."""
    scores = layer.score_scale * layer.head_dim
    rows = layer.output_scale * layer.hidden_size
    if layer.gate_weight is None:
        return [(layer.k, scores), (layer.u, scores), (layer.v, rows)]
    shared = rows / layer.num_subnetworks  # the gate sums to one
    gate = layer.gate_scale * layer.head_dim
    return [(layer.k, scores), (layer.u, scores), (layer.v, shared), (layer.gate_weight, gate)]
