"""Validation over several processes: the mean over all blocks, each counted once."""

from typing import Any

from accelerate import Accelerator
from torch import Tensor
from transformers import TrainingArguments

from flashmhf.distributed.tensor_parallel import tensor_parallel_size
from flashmhf.models.fused_loss import IGNORED


class EvaluationBatches:
    """What the Trainer leaves over in its last batches and between the processes of a tensor-parallel group.

    accelerate repeats blocks to fill up the last batches; they must not count.
    """

    def __init__(self, arguments: TrainingArguments, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        size = tensor_parallel_size(arguments)
        self._group, self._groups = arguments.process_index // size, arguments.world_size // size

    def without_padding(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The batch of this process with the labels of repeated blocks ignored."""
        left = self._blocks_left()
        if left is None:
            return inputs
        labels = inputs["labels"].clone()
        before = self._group * len(labels)
        labels[max(0, left - before) :] = IGNORED
        return {**inputs, "labels": labels}

    def gather_losses(self, losses: Tensor) -> Tensor:
        """The mean loss of the batches of all processes, once per block; each loss is a share of that mean."""
        blocks = len(losses) * self._groups
        return self._accelerator.gather(losses).mean().repeat(self._blocks_left() or blocks)

    def _blocks_left(self) -> int | None:
        """Blocks in the last batches of a loader that does not fill them, otherwise None."""
        loader = self._accelerator.gradient_state
        return loader.remainder if loader.end_of_dataloader and loader.remainder > 0 else None
