"""What is swept: a grid of learning rates and warm-ups for the contenders of a comparison."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from flashmhf.comparison.settings import Comparison
from flashmhf.errors import InputError
from flashmhf.sweeping.halving import Cell, Halving
from flashmhf.training.warmup import steps_of_share

MAX_SHOWN = 8  # values in a message


@dataclass(frozen=True, kw_only=True)
class Sweep(Comparison):
    """The settings of a sweep: a comparison's, where every variant is a contender, and a grid.

    Args:
        learning_rates: of the grid, per variant, as many for each.
        warmups: of the grid, as shares of the steps.
        max_steps: of a run in the last rung.
        rungs: at most this many, see `Halving`.
        seeds: of the last rung; the first one is that of the others.
    """

    settings_file: ClassVar[str] = "settings.json"
    noun: ClassVar[str] = "sweep"

    warmups: tuple[float, ...]
    max_steps: int
    rungs: int = 3

    def __post_init__(self) -> None:
        if len(self.models) > 1:
            raise InputError(f"model: expected one, got {', '.join(self.models)}")
        rates = {name: self.learning_rates.get(name, ()) for name in self.variants}
        for values in rates.values():
            _check_values("learning-rates", values, math.inf)
        _check_values("warmups", self.warmups, 1.0)
        counts = [len(values) for values in rates.values()]
        if len(set(counts)) > 1:
            raise InputError(
                f"learning-rates: expected as many for each of {', '.join(rates)}, got {', '.join(map(str, counts))}"
            )
        if max(counts, default=0) == len(self.warmups) == 1:
            raise InputError("learning-rates: expected at least two, got one; there is nothing to sweep")
        super().__post_init__()
        if self.max_steps < self.halving.least_steps:
            raise InputError(
                f"max-steps: expected at least {self.halving.least_steps} for {len(self.halving.cells)} rungs, "
                f"got {self.max_steps}"
            )
        self._check_warmup_steps()

    def _check_warmup_steps(self) -> None:
        for length in self.halving.lengths:
            by_steps: dict[int, float] = {}
            for warmup in sorted(self.warmups):
                steps = steps_of_share(warmup, length)
                if steps >= length:
                    raise InputError(f"warmups: expected less than the {length} steps of a run, got {warmup:g} of them")
                if steps in by_steps:
                    raise InputError(
                        f"warmups: expected values that differ in whole steps, got {by_steps[steps]:g} and {warmup:g}, "
                        f"both {steps} of {length} steps"
                    )
                by_steps[steps] = warmup

    @property
    def halving(self) -> Halving:
        """The same for every contender."""
        return Halving(
            rates=len(self.learning_rates[self.variants[0]]),
            warmups=len(self.warmups),
            seeds=len(self.seeds),
            rungs=self.rungs,
            steps=self.max_steps,
        )

    def grid(self, ffn_type: str) -> list[Cell]:
        """All cells of a contender."""
        return [Cell(warmup, rate) for warmup in sorted(self.warmups) for rate in sorted(self.learning_rates[ffn_type])]


def _check_values(option: str, values: Sequence[float], below: float) -> None:
    if not values:
        raise InputError(f"{option}: expected at least one, got none")
    shown = ", ".join(f"{value:g}" for value in values[:MAX_SHOWN])
    if len(set(values)) < len(values):
        raise InputError(f"{option}: expected each once, got {shown}")
    for value in values:
        if not (math.isfinite(value) and 0 < value < below):
            what = "positive finite numbers" if below == math.inf else "shares of the steps, above 0 and below 1"
            raise InputError(f"{option}: expected {what}, got {value:g}")
