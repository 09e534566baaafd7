"""Fused linear cross-entropy: the loss from hidden states, by a library that never materialises the logits."""

import functools
import inspect
import logging
from collections.abc import Callable
from importlib.util import find_spec
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedModel
from transformers.loss.loss_utils import LOSS_MAPPING
from transformers.modeling_outputs import CausalLMOutputWithPast

from flashmhf.errors import InputError
from flashmhf.layers.plain import is_plain
from flashmhf.ops.autocast import cast_inputs, without_autocast

logger = logging.getLogger(__name__)

CHOICES = ("auto", "on", "off")
IGNORED = -100  # the label of tokens without a loss
LinearLoss = Callable[[Tensor, Tensor, Tensor], Tensor]


def use_fused_loss(model: PreTrainedModel, choice: str, device_type: str, half: bool) -> None:
    """Makes `model` use the loss that `choose_linear_loss` selects; "auto" skips models of other families."""
    if choice == "auto" and not _is_llama(model):
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
        return _liger
    if find_spec("cut_cross_entropy") is not None and half:
        logger.info("using the fused loss of cut-cross-entropy; logits are not materialised")
        return _cut_cross_entropy
    if choice == "on":
        found = "neither" if find_spec("cut_cross_entropy") is None else "the latter with float32"
        raise InputError(f"fused-loss: expected liger-kernel, or cut-cross-entropy and --bf16 or --fp16, got {found}")
    return None


def fuse_loss(model: PreTrainedModel, linear_loss: LinearLoss) -> None:
    """Has `model` return the loss without logits when it is trained with labels; otherwise it behaves as before.

    It also does where a fused loss would be another: with hooks, adapters, a bias, or offloaded or quantised weights of
    the output layer, another loss function, or arguments that change the loss. Copies use their own weights. A pickled
    model computes the same loss from logits when it is loaded.

    Raises:
        InputError: the model is not of the Llama or the FlashMHF family.
    """
    if not _is_llama(model):
        raise InputError(f"fused-loss: expected a model of the Llama family, got {type(model).__name__}")
    patched: Any = model
    patched._linear_loss = linear_loss
    patched.forward = MethodType(forward, model)


def forward(self: Any, *args: Any, **options: Any) -> Any:
    """LlamaForCausalLM.forward; a method, which accelerate and copy.deepcopy can bind to another model."""
    labels = options.get("labels")
    if labels is None or not _can_fuse(self, options):
        return type(self).forward(self, *args, **options)
    del options["labels"]
    num_items = options.pop("num_items_in_batch", None)
    outputs = self.model(*args, **options)
    hidden, weight = outputs.last_hidden_state, self.lm_head.weight
    targets = nn.functional.pad(labels[..., 1:], (0, 1), value=IGNORED).flatten().to(hidden.device)
    hidden, weight = cast_inputs(hidden.flatten(0, -2), weight)  # the libraries ignore autocast
    with without_autocast(hidden.device.type):
        total = self._linear_loss(hidden, weight, targets).float()
    num_items = (targets != IGNORED).sum() if num_items is None else num_items
    return CausalLMOutputWithPast(
        loss=total / (num_items.to(total.device) if isinstance(num_items, Tensor) else num_items),
        past_key_values=outputs.past_key_values,
        hidden_states=outputs.hidden_states,
        attentions=outputs.attentions,
    )


# For the Trainer, which selects columns by it. Not __wrapped__, down to which accelerate would unwrap the model.
forward.__signature__ = inspect.signature(LlamaForCausalLM.forward)  # type: ignore[attr-defined]


def _is_llama(model: PreTrainedModel) -> bool:
    return isinstance(model, LlamaForCausalLM) and type(model).forward is LlamaForCausalLM.forward


def _can_fuse(model: Any, options: dict[str, Any]) -> bool:
    """Whether the model is trained, on the usual labels, with an output layer that is nothing but its weight."""
    head = model.lm_head
    if not model.training or not is_plain(head, nn.Linear) or head.bias is not None:
        return False
    if model.loss_function is not LOSS_MAPPING["ForCausalLM"] or not options.get(
        "return_dict", model.config.return_dict
    ):
        return False
    return all(options.get(name) is None for name in ("shift_labels", "ignore_index", "logits_to_keep"))


def _liger(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return _liger_loss()(weight, hidden, targets)


@functools.cache
def _liger_loss() -> Any:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss(ignore_index=IGNORED, reduction="sum", accum_dtype=torch.float32)


def _cut_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    # No gradient filter: in pretraining rare tokens receive only small gradients, which it would drop.
    return linear_cross_entropy(hidden, weight, targets, ignore_index=IGNORED, reduction="sum", filter_eps=None)
