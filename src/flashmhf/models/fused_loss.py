"""Fused linear cross-entropy: the loss from hidden states, by a library that never materialises the logits."""

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
IGNORED = -100  # the label of tokens without a loss
LinearLoss = Callable[[Tensor, Tensor, Tensor], Tensor]


def use_fused_loss(model: PreTrainedModel, choice: str, device_type: str, half: bool) -> None:
    """Makes `model` use the loss that `choose_linear_loss` selects; "auto" skips models of other families."""
    if choice == "auto" and not isinstance(model, LlamaForCausalLM):
        return
    linear_loss = choose_linear_loss(choice, device_type, half)
    if linear_loss is not None:
        fuse_loss(model, linear_loss)


def choose_linear_loss(choice: str, device_type: str, half: bool) -> LinearLoss | None:
    """(hidden (T, C), weight (V, C), targets (T,)) -> the sum of the targets' losses; None for a loss from logits.

    Args:
        choice: "auto" uses a library if one is installed and can run here, "on" requires one, "off" uses none.
        device_type: both libraries require a GPU.
        half: whether training is in bfloat16 or float16; cut-cross-entropy has no gradient otherwise.

    Raises:
        InputError: an invalid choice, or "on" where no library can run.
    """
    if choice not in CHOICES:
        raise InputError(f"fused-loss: expected one of {', '.join(CHOICES)}, got {choice!r}")
    if choice == "off" or (choice == "auto" and device_type != "cuda"):
        return None
    if device_type != "cuda":
        raise InputError(f"fused-loss: expected a GPU, got {device_type}")
    if find_spec("liger_kernel") is not None:
        logger.info("using the fused loss of liger-kernel; logits are not materialised")
        return _liger()
    if find_spec("cut_cross_entropy") is not None and half:
        logger.info("using the fused loss of cut-cross-entropy; logits are not materialised")
        return _cut_cross_entropy()
    if choice == "on":
        found = "neither" if find_spec("cut_cross_entropy") is None else "the latter with float32"
        raise InputError(f"fused-loss: expected liger-kernel, or cut-cross-entropy and --bf16 or --fp16, got {found}")
    return None


def fuse_loss(model: PreTrainedModel, linear_loss: LinearLoss) -> None:
    """Patches `model` to return only the loss when it is trained with labels; otherwise it behaves as before.

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
        hidden, weight = cast_inputs(hidden.flatten(0, -2), weight)  # the libraries ignore autocast
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

    # No gradient filter: in pretraining rare tokens receive only small gradients, which it would drop.
    options: dict[str, Any] = {"ignore_index": IGNORED, "reduction": "sum", "filter_eps": None}
    return lambda hidden, weight, targets: linear_cross_entropy(hidden, weight, targets, **options)
