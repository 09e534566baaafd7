"""Which runs a sweep consists of, rung by rung."""

import math
from dataclasses import replace
from pathlib import Path

from flashmhf.comparison.plan import MatchedVariant, Plan, Run
from flashmhf.errors import RunError
from flashmhf.sweeping.halving import Cell, keep
from flashmhf.sweeping.settings import Sweep


class SweepPlan:
    """The runs of a sweep in its folder.

    Attributes:
        settings: of the sweep.
        comparison: the plan that matches the contenders and has their configurations.
    """

    def __init__(self, settings: Sweep, output_dir: Path) -> None:
        self.settings = settings
        self.comparison = Plan(settings, output_dir)
        self._runs = output_dir / "runs"

    @property
    def contenders(self) -> list[MatchedVariant]:
        return self.comparison.variants

    def runs(self, rung: int) -> list[Run]:
        """Of all contenders, in the order in which they start; call it when the rung before has finished."""
        each = [
            [run for cell in self.cells(contender, rung) for run in self.runs_of(contender, rung, cell)]
            for contender in self.contenders
        ]
        assert {len(runs) for runs in each} == {self.settings.halving.runs[rung]}, "equal effort for every contender"
        return [run for together in zip(*each, strict=True) for run in together]

    def runs_of(self, contender: MatchedVariant, rung: int, cell: Cell) -> list[Run]:
        """Of one cell, for each seed."""
        seeds = self.settings.seeds if rung == len(self.settings.halving.cells) - 1 else self.settings.seeds[:1]
        return [self._run(contender, rung, cell, seed) for seed in seeds]

    def cells(self, contender: MatchedVariant, rung: int) -> tuple[Cell, ...]:
        """The grid in the first rung, what `keep` leaves in the others."""
        grid = self.settings.grid(contender.variant.ffn_type)
        if rung == 0:
            return tuple(grid)
        before = {cell: self.loss(contender, rung - 1, cell) for cell in self.cells(contender, rung - 1)}
        return keep(before, grid, self.settings.halving.cells[rung])

    def loss(self, contender: MatchedVariant, rung: int, cell: Cell) -> float:
        """With the first seed; infinite if the run failed."""
        result = self.runs_of(contender, rung, cell)[0].result
        loss = None if result is None else result.validation_loss
        return math.inf if loss is None or not math.isfinite(loss) else loss

    def check_trained(self, rung: int) -> None:
        """Raises RunError if every run of a contender failed."""
        for contender in self.contenders:
            runs = [run for cell in self.cells(contender, rung) for run in self.runs_of(contender, rung, cell)]
            if not any(run.finished for run in runs):
                raise RunError(
                    f"training failed in every run of {contender.name} in rung {rung + 1}; "
                    f"{runs[0].log} has the reason; the same command tries again"
                )

    def _run(self, contender: MatchedVariant, rung: int, cell: Cell, seed: int) -> Run:
        rate, warmup, steps = cell.learning_rate, cell.warmup, self.settings.halving.lengths[rung]
        schedule = ("--learning-rate", repr(rate), "--warmup-steps", repr(warmup), "--max-steps", str(steps))
        return Run(
            variant=contender,
            seed=seed,
            learning_rate=rate,
            label=f"{contender.name}, {steps} steps, learning rate {rate:g}, warm-up {warmup:g}, seed {seed}",
            folder=self._runs / f"{contender.name}-steps{steps}-lr{rate!r}-warmup{warmup!r}-seed{seed}",
            config=replace(self.settings.train, model=str(self.comparison.config_file(contender))),
            flags=(*self.settings.training_flags, *schedule),
        )
