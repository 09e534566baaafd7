"""Learning rates by fan-in, so that one learning rate transfers across model widths (docs/parametrisation.md)."""

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import TrainingArguments

from flashmhf.errors import InputError
from flashmhf.layers import PKV, FlashMHF

OPTION = "mup-base-width"


def check_base_width(base_width: int | None, arguments: TrainingArguments) -> None:
    """Raises InputError if learning rates cannot be scaled for this width or with these arguments."""
    if base_width is None:
        return
    if base_width < 1:
        raise InputError(f"{OPTION}: expected a hidden size of at least 1, got {base_width}")
    if arguments.fsdp:
        raise InputError(f"{OPTION}: expected no --fsdp, which may hide the weights' shapes, got {arguments.fsdp}")


def learning_rate_factors(model: nn.Module, base_width: int) -> dict[Tensor, float]:
    """The factor on each matrix's learning rate; other parameters keep the full rate.

    An Adam step changes a product by about learning rate x fan-in x the scale that follows it. The fan-ins of a Linear
    (d or d_ff) are proportional to the model's width, so its factor is base_width / hidden_size. K, U, V and the gate
    of a FlashMHF sum over head_dim or over F E numbers and are followed by scales; with init="scaled", the product of
    the two is hidden_size, too. Embeddings (tied ones included), norms and biases have no factor; nor do the rows of
    PKV, whose sums do not grow with the number of heads.

    Args:
        model: with a `config` that has hidden_size.
        base_width: the hidden size for which the learning rate was tuned.
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
    """Splits the optimizer's groups by factor. To be called before its first step and before a scheduler is made.

    The weight decay of a group is divided by its factor: AdamW multiplies the two, so the decay per step is the same at
    every width. The groups with the full learning rate come first, since the Trainer logs that of the first group.
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
    """The number of terms in a score, a gate logit and an output, times their scales, in units of the width."""
    scores = layer.score_scale * layer.head_dim
    rows = layer.output_scale * layer.hidden_size
    if layer.gate_weight is None:
        return [(layer.k, scores), (layer.u, scores), (layer.v, rows)]
    shared = rows / layer.num_subnetworks  # the gate sums to one
    gate = layer.gate_scale * layer.head_dim
    return [(layer.k, scores), (layer.u, scores), (layer.v, shared), (layer.gate_weight, gate)]
