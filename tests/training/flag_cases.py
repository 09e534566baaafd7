"""What must come of a flag: the effect that its documentation names, on a run of three steps, or one line."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flashmhf.training.run_files import TrainResult


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A run, and the one with the base flags alone."""

    result: TrainResult
    trainer: Any
    folder: Path
    rows: list[dict[str, Any]]
    weights: dict[str, torch.Tensor]
    base: "Outcome | None" = None

    def steps(self, name: str) -> list[int]:
        """Of the log entries that have `name`; the last evaluation is not one of training."""
        return [row["step"] for row in self.rows if name in row]

    def checkpoints(self) -> list[str]:
        return sorted(folder.name for folder in self.folder.glob("checkpoint-*"))

    def same_weights(self) -> bool:
        return all(torch.equal(tensor, self.base.weights[name]) for name, tensor in self.weights.items())


@dataclass(frozen=True)
class Runs:
    """Trains with the flags, and has the effect."""

    flags: str
    effect: Callable[[Outcome], bool]


@dataclass(frozen=True)
class Refused:
    """Ends in one line that has this text."""

    flags: str
    text: str


def same(flags: str) -> Runs:
    """Does not change what is learned."""
    return Runs(flags, Outcome.same_weights)


def other(flags: str) -> Runs:
    """Changes what is learned."""
    return Runs(flags, lambda run: not run.same_weights())


def reaches(flags: str, value: Callable[[Any], bool]) -> Runs:
    """Arrives in the Trainer, and does not change what is learned."""
    return Runs(flags, lambda run: value(run.trainer) and run.same_weights())


def refused(flag: str, text: str, *values: str) -> list[Runs | Refused]:
    """Each of the values is refused."""
    return [Refused(f"{flag} {value}", text) for value in values]


Table = dict[str, list[Runs | Refused]]
EVALUATED = "--eval-strategy steps --eval-steps 1"
