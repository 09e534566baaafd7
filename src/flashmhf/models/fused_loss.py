"""The loss of a language model from hidden states, by a library that never holds the logits of all tokens at once."""

import logging
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from flashmhf.errors import InputError
from flashmhf.ops.autocast import cast_inputs, without_autocast

logger = logging.getLogger(__name__)

CHOICES = ("auto", "on", "off")
IGNORED = -100  # the label of a token that is not predicted
LinearLoss = Callable[[Tensor, Tensor, Tensor], Tensor]


def use_fused_loss(model: PreTrainedModel, choice: str, device_type: str, half: bool) -> None:
    """Gives `model` the loss that `choose_linear_loss` finds; with "auto" only if its family can have it."""
    if choice == "auto" and not isinstance(model, LlamaForCausalLM):
        return
    linear_loss = choose_linear_loss(choice, device_type, half)
    if linear_loss is not None:
        fuse_loss(model, linear_loss)


def choose_linear_loss(choice: str, device_type: str, half: bool) -> LinearLoss | None:
    """(hidden (T, C), weight (V, C), targets (T,)) -> the sum of the targets' losses; or None for logits as ever.

    Args:
        choice: "auto" takes a library that is installed and can run here, "on" wants one, "off" none.
        device_type: both libraries are written for GPUs.
        half: whether bfloat16 or float16 is trained in, without which cut-cross-entropy has no gradient.

    Raises:
        InputError: another choice, or "on" where no library can run.
    """
    if choice not in CHOICES:
        raise InputError(f"fused-loss: expected one of {', '.join(CHOICES)}, got {choice!r}")
    if choice == "off" or (choice == "auto" and device_type != "cuda"):
        return None
    if device_type != "cuda":
        raise InputError(f"fused-loss: expected a GPU, got {device_type}")
    if find_spec("liger_kernel") is not None:
        logger.info("the loss is liger-kernel's; the logits are never whole")
        return _liger()
    if find_spec("cut_cross_entropy") is not None and half:
        logger.info("the loss is cut-cross-entropy's; the logits are never whole")
        return _cut_cross_entropy()
    if choice == "on":
        found = "neither" if find_spec("cut_cross_entropy") is None else "the latter in float32"
        raise InputError(f"fused-loss: expected liger-kernel, or cut-cross-entropy and --bf16 or --fp16, got {found}")
    return None


def fuse_loss(model: PreTrainedModel, linear_loss: LinearLoss) -> None:
    """In training, with labels, `model` returns the loss alone; otherwise what it did.

    Raises:
        InputError: the model is not of the Llama or the FlashMHF family.
    """
    if not isinstance(model, LlamaForCausalLM):
        raise InputError(f"fused-loss: expected a model of the Llama family, got {type(model).__name__}")
    plain = model.forward

    def forward(*args: Any, labels: Tensor | None = None, **options: Any) -> Any:
        weight = model.lm_head.weight
        if labels is None or not model.training:
            return plain(*args, labels=labels, **options)
        num_items = options.pop("num_items_in_batch", None)
        hidden = model.model(*args, **options).last_hidden_state
        targets = torch.nn.functional.pad(labels[..., 1:], (0, 1), value=IGNORED).flatten()
        hidden, weight = cast_inputs(hidden.flatten(0, -2), weight)  # the libraries look at their inputs' dtype alone
        with without_autocast(hidden.device.type):
            total = linear_loss(hidden, weight, targets).float()
        num_items = (targets != IGNORED).sum() if num_items is None else num_items
        return CausalLMOutputWithPast(loss=total / num_items)

    model.forward = forward


def _liger() -> LinearLoss:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(ignore_index=IGNORED, reduction="sum", accum_dtype=torch.float32)
    return lambda hidden, weight, targets: loss(weight, hidden, targets)


def _cut_cross_entropy() -> LinearLoss:
    from cut_cross_entropy import linear_cross_entropy

    # its filter drops small gradients, of which rare tokens have no others in pretraining
    options: dict[str, Any] = {"ignore_index": IGNORED, "reduction": "sum", "filter_eps": None}
    return lambda hidden, weight, targets: linear_cross_entropy(hidden, weight, targets, **options)
