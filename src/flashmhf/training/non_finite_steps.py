"""Steps without a finite loss and gradient are skipped, too many in a row end the run, and loss spikes are logged.

The log names the blocks of data in the batch and the documents in them.
"""

import collections
import itertools
import logging
import math
import statistics
from collections.abc import Callable, Iterator, Sequence, Sized
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import TrainerControl, TrainerState

from flashmhf.errors import InputError, RunError

logger = logging.getLogger(__name__)

BLOCK = "block"
WINDOW = 100
MIN_LOSSES = 20  # before this many, no loss counts as a spike
SIGMAS = 6.0
MIN_DEVIATION = 0.01  # of the mean, for losses that hardly differ
NUMBERED, DESCRIBED = 16, 4  # blocks in a message that are numbered, and that come with their documents


@dataclass(frozen=True, kw_only=True)
class FlaggedStep:
    """A step that was skipped, or whose loss stands out.

    Attributes:
        step: its number, from 1.
        found: "skipped" and why, or "spike" and the loss.
        blocks: numbers of the blocks in its batch; those with a loss that is not finite, or the highest, come first.
        documents: descriptions of the first blocks.
    """

    step: int
    found: dict[str, str | float]
    blocks: list[int]
    documents: list[str]

    def as_row(self) -> dict[str, Any]:
        """For the Trainer's log_history."""
        return {"step": self.step, **self.found, "blocks": self.blocks, "documents": self.documents}


class NonFiniteGuard:
    """Checks each step between the gradient and the optimizer.

    Flagged steps become rows {"step", "skipped" or "spike", "blocks", "documents"} of the state's log_history, which
    every checkpoint holds.

    Args:
        accelerator: of the processes, which all come to the same verdict.
        max_in_a_row: this many skipped steps save a checkpoint and end training; `check_finite` then raises.
        describe: names the documents in a block by its number; None for a stream.
    """

    def __init__(
        self, accelerator: Accelerator, max_in_a_row: int, describe: Callable[[int], str] | None = None
    ) -> None:
        self._accelerator = accelerator
        self._max_in_a_row = max_in_a_row
        self._describe = describe
        self._skipped: list[FlaggedStep] = []  # in a row, up to now
        self._window = LossWindow()
        self._losses: list[Tensor] = []  # of the current step, as are the blocks
        self._blocks: list[Tensor] = []
        self.measured: tuple[float, float] | None = None  # loss and norm of the last step, unless it was skipped
        self.spiked = False  # whether its loss was a spike

    @property
    def in_a_row(self) -> int:
        """How many of the last steps were skipped, up to now."""
        return len(self._skipped)

    def reset(self) -> None:
        """Forgets the batches of a step that was not finished."""
        self._losses, self._blocks = [], []

    def add(self, loss: Tensor, blocks: Tensor | None) -> None:
        """Takes the loss of a batch of the current step and the numbers of its blocks."""
        self._losses.append(loss)
        if blocks is not None:
            self._blocks.append(blocks)

    def check(self, model: nn.Module, grad_norm: Tensor | float, state: TrainerState, control: TrainerControl) -> None:
        """Ends the current step: drops the gradients if they or the loss are not finite, and names what stands out."""
        value = grad_norm.item() if isinstance(grad_norm, Tensor) else float(grad_norm)
        measured = torch.stack(
            [torch.stack(self._losses).sum().float(), torch.tensor(value).to(self._losses[0].device)]
        )
        loss, mean_norm = self._accelerator.reduce(measured, "mean").tolist()  # the same verdict on every process
        scaled = self._accelerator.scaler is not None  # fp16: the scaler skips gradients that overflow, as it should
        if math.isfinite(loss) and (scaled or math.isfinite(mean_norm)):
            self._skipped = []
            self.measured = loss, mean_norm
            limit = self._window.limit_passed(loss)
            self.spiked = limit is not None
            if limit is not None:
                step = self._flag(state, {"spike": loss})
                logger.warning(
                    "loss spike at step %d: %.4g, expected below %.4g; blocks %s",
                    *(step.step, loss, limit, _described([step])),
                )
        else:
            self.measured, self.spiked = None, False
            if not scaled:
                model.zero_grad(set_to_none=True)  # optimizers pass over parameters without a gradient
            self._skip(state, control, f"loss {loss:.4g}, gradient norm {mean_norm:.4g}")
        self.reset()

    def check_finite(self) -> None:
        """Raises RunError if too many skipped steps in a row ended training."""
        if len(self._skipped) >= self._max_in_a_row:
            first, last = self._skipped[0].step, self._skipped[-1].step
            raise RunError(
                f"max-non-finite-steps: expected a finite loss and gradient within {self._max_in_a_row} steps, "
                f"got none in steps {first} to {last} (blocks {_described(self._skipped)}); checkpoint-{last} holds "
                "the weights from before them, and --resume continues with the data after them"
            )

    def _skip(self, state: TrainerState, control: TrainerControl, found: str) -> None:
        step = self._flag(state, {"skipped": found})
        self._skipped.append(step)
        logger.warning("step %d skipped: %s; blocks %s", step.step, found, _described([step]))
        if len(self._skipped) >= self._max_in_a_row:
            control.should_save = control.should_training_stop = True

    def _flag(self, state: TrainerState, found: dict[str, str | float]) -> FlaggedStep:
        losses = [loss.item() for loss in self._losses]
        batches = gather_object([(loss, batch.tolist()) for loss, batch in zip(losses, self._blocks, strict=False)])
        batches.sort(key=lambda pair: -pair[0] if math.isfinite(pair[0]) else -math.inf)
        blocks = list(dict.fromkeys(number for _, batch in batches for number in batch))  # tensor-parallel ranks share
        documents = [] if self._describe is None else [self._describe(number) for number in blocks[:NUMBERED]]
        step = FlaggedStep(step=state.global_step + 1, found=found, blocks=blocks, documents=documents)
        state.log_history.append(step.as_row())
        return step


def count_skipped(history: Sequence[dict[str, Any]]) -> int:
    """Skipped steps in a Trainer's log_history: since the first start of the run."""
    return sum("skipped" in row for row in history)


def count_spikes(history: Sequence[dict[str, Any]]) -> int:
    """Loss spikes in a Trainer's log_history: since the first start of the run."""
    return sum("spike" in row for row in history)


class LossWindow:
    """The losses of the last steps, to which a new one is compared."""

    def __init__(self) -> None:
        self._losses: collections.deque[float] = collections.deque(maxlen=WINDOW)

    def limit_passed(self, loss: float) -> float | None:
        """Mean plus six standard deviations of the losses before, if `loss` is above it, otherwise None."""
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
    """Blocks with their number under "block": indexed ones have it already, those of a stream are counted."""
    return blocks if isinstance(blocks, Sized) else NumberedStream(blocks)


class NumberedStream(torch.utils.data.IterableDataset):
    """A stream of blocks, each with its number."""

    def __init__(self, blocks: Any) -> None:
        self.blocks = blocks

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for index, block in enumerate(self.blocks):
            yield {**block, BLOCK: index}

    def set_epoch(self, epoch: int) -> None:
        if hasattr(self.blocks, "set_epoch"):
            self.blocks.set_epoch(epoch)


def _described(steps: Sequence[FlaggedStep]) -> str:
    """The numbers of the steps' blocks, and the documents in the first block of each, then in the second, and so on."""
    numbers = [number for step in steps for number in step.blocks]
    if not numbers:
        return "unknown"
    documents = [text for turn in itertools.zip_longest(*(step.documents for step in steps)) for text in turn if text]
    named = _listed(documents, DESCRIBED, "; ", len(numbers)) if documents else "not known of a stream"
    return f"{_listed(numbers, NUMBERED, ', ', len(numbers))}: documents {named}"


def _listed(items: Sequence[Any], most: int, separator: str, total: int) -> str:
    shown = separator.join(str(item) for item in items[:most])
    return f"{shown} and {total - most} more" if total > most else shown
