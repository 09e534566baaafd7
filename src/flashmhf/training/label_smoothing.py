"""The loss of `--label-smoothing-factor`, for training alone."""

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as nnf
from torch import Tensor

from flashmhf.models.fused_loss import IGNORED


@dataclass(frozen=True)
class SmoothedLoss:
    """A `compute_loss_func` for causal language models: the logits at a position are scored against the next token.

    The Trainer's own smoother shifts labels only for class names in a table, which misses compiled models, those of
    FSDP2, which renames classes, and classes that a user registered.

    Args:
        factor: the share of the loss that goes to the mean over the vocabulary.
    """

    factor: float

    def __call__(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """The summed loss over the items of all accumulated batches, or the mean of this batch without their number."""
        targets = labels[..., 1:].flatten()
        logits = outputs["logits"][..., :-1, :].float().flatten(0, -2)
        total = nnf.cross_entropy(logits, targets, ignore_index=IGNORED, label_smoothing=self.factor, reduction="sum")
        return total / ((targets != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch)
