"""From the runs of a sweep to its result."""

import math
from collections.abc import Sequence

from flashmhf.comparison.plan import MatchedVariant, Run
from flashmhf.comparison.results import Spread
from flashmhf.errors import RunError
from flashmhf.estimates.cost import count_parameters
from flashmhf.sweeping.halving import Cell
from flashmhf.sweeping.optimum import fitted_rate, flat_range, noise
from flashmhf.sweeping.plan import SweepPlan
from flashmhf.sweeping.results import LOWER, UPPER, CellResult, ContenderResult, RungResult, TuningResult

FLAT = 0.01  # nats/token


def summarise(plan: SweepPlan) -> TuningResult:
    """The result of a sweep whose runs have finished or failed."""
    return TuningResult(
        settings=plan.settings,
        runs_each=sum(plan.settings.halving.runs),
        tokens_each=_tokens(plan),
        contenders=tuple(_contender(plan, contender) for contender in plan.contenders),
    )


def _contender(plan: SweepPlan, contender: MatchedVariant) -> ContenderResult:
    settings = plan.settings
    rungs = tuple(_rung(plan, contender, rung) for rung in range(len(settings.halving.cells)))
    ranked = sorted((cell for cell in rungs[-1].cells if cell.validation_loss.values), key=_complete_first)
    best, runner_up = ranked[0], ranked[1] if len(ranked) > 1 else None
    losses = {cell.learning_rate: _loss(cell) for cell in rungs[-1].cells if cell.warmup == best.warmup}
    resolved = _noise(ranked)
    return ContenderResult(
        variant=contender.name,
        ffn_type=contender.variant.ffn_type,
        parameters=count_parameters(contender.config),
        rungs=rungs,
        best=best,
        runner_up=runner_up,
        noise=resolved,
        decided=None if resolved is None or runner_up is None else _loss(runner_up) - _loss(best) > resolved,
        fitted_rate=fitted_rate(losses),
        flat=flat_range(losses, FLAT),
        within_noise=None if resolved is None else flat_range(losses, resolved),
        rate_edge=_edge(best.learning_rate, settings.learning_rates[contender.variant.ffn_type]),
        warmup_edge=_edge(best.warmup, settings.warmups),
    )


def _rung(plan: SweepPlan, contender: MatchedVariant, rung: int) -> RungResult:
    cells = {cell: plan.runs_of(contender, rung, cell) for cell in plan.cells(contender, rung)}
    return RungResult(
        steps=plan.settings.halving.lengths[rung],
        seeds=tuple(run.seed for run in next(iter(cells.values()))),
        cells=tuple(_cell(cell, runs) for cell, runs in cells.items()),
    )


def _cell(cell: Cell, runs: Sequence[Run]) -> CellResult:
    results = {run.seed: run.result for run in runs}
    losses = {seed: None if result is None else result.validation_loss for seed, result in results.items()}
    return CellResult(
        learning_rate=cell.learning_rate,
        warmup=cell.warmup,
        validation_loss=Spread.of(losses.values()),
        failed_seeds=tuple(seed for seed, loss in losses.items() if loss is None),
        unstable_seeds=tuple(seed for seed, result in results.items() if result is not None and result.instabilities),
    )


def _complete_first(cell: CellResult) -> tuple[int, float]:
    """A rate at which some seeds fail is too high, however low the loss of the others."""
    mean = cell.validation_loss.mean
    return len(cell.failed_seeds), math.inf if mean is None else mean


def _loss(cell: CellResult) -> float:
    """Over all seeds; infinite if one failed."""
    mean = cell.validation_loss.mean
    return math.inf if mean is None or cell.failed_seeds else mean


def _noise(ranked: Sequence[CellResult]) -> float | None:
    best, *others = [cell.validation_loss.values for cell in ranked if not cell.failed_seeds] or [()]
    return noise(best, others)


def _tokens(plan: SweepPlan) -> int:
    """That one contender's runs read.

    Raises:
        RunError: runs of the same length read different numbers, so that the contenders did not get the same.
    """
    total = 0
    for rung, number in enumerate(plan.settings.halving.runs):
        read = {run.label: result.tokens for run in plan.runs(rung) if (result := run.result) is not None}
        first = next(iter(read.values()))
        for label, tokens in read.items():
            if tokens != first:
                raise RunError(f"tokens: expected {first:,} in every run of the rung, got {tokens:,} in {label}")
        total += number * first
    return total


def _edge(value: float, grid: Sequence[float]) -> str | None:
    if len(grid) < 2 or min(grid) < value < max(grid):
        return None
    return LOWER if value == min(grid) else UPPER
