"""Steps whose loss or gradient is not finite are skipped, and too many in a row end the run; losses that stand out are
named. Both come with the blocks of data that were in the batch and the documents in them."""

import collections
import itertools
import logging
import math
import statistics
from collections.abc import Iterator, Sized
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import nn

from flashmhf.data.shuffling import ShuffledBlocks
from flashmhf.errors import InputError, RunError
from flashmhf.training.saving import CheckpointTrainer

logger = logging.getLogger(__name__)

BLOCK = "block"
WINDOW = 100
MIN_LOSSES = 20  # before that many a loss is not judged
SIGMAS = 6.0
MIN_DEVIATION = 0.01  # of the mean: losses that hardly differ make no spikes
NUMBERED, DESCRIBED = 16, 4  # blocks in a line that are told by number, and of these with their documents


class GuardedTrainer(CheckpointTrainer):
    """Judges each step between the gradient and the optimizer.

    Rows {"step", "skipped" or "spike", "blocks", "documents"} in the state's log_history, and so in every checkpoint,
    tell of them: the blocks whose own loss is not finite or highest come first, "documents" describes these.

    Args:
        max_non_finite_steps: so many in a row save a checkpoint and end training; `check_finite` then raises.
    """

    def __init__(self, *args: Any, max_non_finite_steps: int, **options: Any) -> None:
        super().__init__(*args, **options)
        self.max_non_finite_steps = max_non_finite_steps
        self._bad: list[dict[str, Any]] = []  # in a row, up to now
        self._window = LossWindow()
        self._losses: list[torch.Tensor] = []  # of the step under way, as are the blocks
        self._blocks: list[torch.Tensor] = []

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **options: Any) -> torch.Tensor:
        if BLOCK in inputs:
            self._blocks.append(inputs.pop(BLOCK))
        loss = super().training_step(model, inputs, *args, **options)
        self._losses.append(loss)
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        self._judge(model, norm)
        return norm

    def _judge(self, model: nn.Module, norm: Any) -> None:
        value = norm.item() if isinstance(norm, torch.Tensor) else float(norm)
        measured = torch.stack(
            [torch.stack(self._losses).sum().float(), torch.tensor(value).to(self._losses[0].device)]
        )
        loss, mean_norm = self.accelerator.reduce(measured, "mean").tolist()  # the same verdict on every process
        scaled = self.accelerator.scaler is not None  # fp16: it skips gradients that overflow, which is its way of work
        if math.isfinite(loss) and (scaled or math.isfinite(mean_norm)):
            self._bad = []
            limit = self._window.limit_passed(loss)
            if limit is not None:
                row = self._record(spike=loss)
                logger.warning(
                    "loss spike at step %d: %.4g, expected below %.4g; blocks %s",
                    *(row["step"], loss, limit, _told([row])),
                )
        else:
            self._skip(model, f"loss {loss:.4g}, gradient norm {mean_norm:.4g}", scaled)
        self._losses, self._blocks = [], []

    def _skip(self, model: nn.Module, found: str, scaled: bool) -> None:
        if not scaled:
            model.zero_grad(set_to_none=True)  # optimizers pass over parameters without a gradient
        self._bad.append(self._record(skipped=found))
        row = self._bad[-1]
        logger.warning("step %d skipped: %s; blocks %s", row["step"], found, _told([row]))
        if len(self._bad) >= self.max_non_finite_steps:
            self.control.should_save = self.control.should_training_stop = True

    def _record(self, **what: Any) -> dict[str, Any]:
        losses = [loss.item() for loss in self._losses]
        batches = gather_object([(loss, batch.tolist()) for loss, batch in zip(losses, self._blocks, strict=False)])
        batches.sort(key=lambda pair: -pair[0] if math.isfinite(pair[0]) else -math.inf)
        blocks = list(dict.fromkeys(number for _, batch in batches for number in batch))  # head groups share them
        row = {"step": self.state.global_step + 1, **what, "blocks": blocks, "documents": []}
        if isinstance(self.train_dataset, ShuffledBlocks):
            row["documents"] = [self.train_dataset.describe(number) for number in blocks[:NUMBERED]]
        self.state.log_history.append(row)
        return row

    def check_finite(self) -> None:
        """Raises RunError where training ended for want of finite steps."""
        if len(self._bad) >= self.max_non_finite_steps:
            first, last = self._bad[0]["step"], self._bad[-1]["step"]
            raise RunError(
                f"max-non-finite-steps: expected a finite loss and gradient within {self.max_non_finite_steps} steps, "
                f"got none in steps {first} to {last} (blocks {_told(self._bad)}); checkpoint-{last} holds the weights "
                "from before them, and --resume goes on with the data after them"
            )

    def skipped_steps(self) -> int:
        """Since the run began, in earlier processes too."""
        return sum("skipped" in row for row in self.state.log_history)


class LossWindow:
    """The losses of the last steps, and whether one is far above them."""

    def __init__(self) -> None:
        self._losses: collections.deque[float] = collections.deque(maxlen=WINDOW)

    def limit_passed(self, loss: float) -> float | None:
        """The limit where `loss` is above it, mean and six standard deviations of those before it, else None."""
        limit = math.inf
        if len(self._losses) >= MIN_LOSSES:
            mean = statistics.fmean(self._losses)
            limit = mean + SIGMAS * max(statistics.pstdev(self._losses, mean), MIN_DEVIATION * abs(mean))
        self._losses.append(loss)
        return limit if loss > limit else None


def check_limit(max_non_finite_steps: int) -> None:
    """Raises InputError below 1."""
    if max_non_finite_steps < 1:
        raise InputError(f"max-non-finite-steps: expected 1 or more, got {max_non_finite_steps}")


def numbered(blocks: Any) -> Any:
    """Blocks with a number under "block"; those that can be asked for by index bring theirs, streams are counted."""
    return blocks if isinstance(blocks, Sized) else NumberedStream(blocks)


class NumberedStream(torch.utils.data.IterableDataset):
    def __init__(self, blocks: Any) -> None:
        self.blocks = blocks

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for index, block in enumerate(self.blocks):
            yield {**block, BLOCK: index}

    def set_epoch(self, epoch: int) -> None:
        if hasattr(self.blocks, "set_epoch"):
            self.blocks.set_epoch(epoch)


def _told(rows: list[dict[str, Any]]) -> str:
    """The blocks of steps by number, and the documents in the first block of each, then in their second, and so on."""
    numbers = [number for row in rows for number in row["blocks"]]
    if not numbers:
        return "unknown"
    documents = [text for turn in itertools.zip_longest(*(row["documents"] for row in rows)) for text in turn if text]
    named = _listed(documents, DESCRIBED, "; ", len(numbers)) if documents else "not known of a stream"
    return f"{_listed(numbers, NUMBERED, ', ', len(numbers))}: documents {named}"


def _listed(items: list[Any], most: int, separator: str, total: int) -> str:
    shown = separator.join(str(item) for item in items[:most])
    return f"{shown} and {total - most} more" if total > most else shown
