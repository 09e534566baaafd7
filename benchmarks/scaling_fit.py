"""Fits loss = E + A parameters^-alpha to runs of several sizes, and extrapolates the contenders' difference to 370M.

    python benchmarks/scaling_fit.py OUTPUT RUNS...

RUNS are files of benchmarks/gpu.py (*.jsonl) or folders of `flashmhf compare`, see recipes/scaling.sh. Writes OUTPUT.md
and OUTPUT.json. Parameters are those without embeddings. With fewer than four sizes E is 0, a pure power law. Intervals
are of 95 %: deviations from the mean of each size are pooled and drawn again for both contenders of a seed together,
then widened by Student's t. Differences are relative, since a ratio of losses does not depend on the tokenizer.
"""

import argparse
import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from flashmhf.comparison.results import RESULTS_FILE, read_comparison
from flashmhf.errors import InputError
from flashmhf.estimates.cost import model_cost
from flashmhf.evaluation.bootstrap import NORMAL, student_t
from flashmhf.files import atomic_write, write_json
from flashmhf.models.loading import load_config
from flashmhf.reports.table import Table
from gpu_rows import read_lines

CONTENDERS = ("swiglu", "flashmhf")  # differences are of the second to the first
TARGET = 370e6
CLAIM = 3.014 / 3.030 - 1  # of the paper at 370M: one seed, 21 layers against 24
POWER_NORMAL = 0.8416  # of the normal distribution: 80 % power
MAX_SPREAD = 0.05  # of tokens per parameter
MIN_SIZES_OF_FLOOR = 4
ALPHAS = np.geomspace(0.02, 1.5, 800)  # steps of 0.5 %, the resolution of an exponent
DRAWS = 2000


@dataclass(frozen=True, kw_only=True)
class Run:
    """The final loss of one training run; `parameters` without embeddings."""

    size: str
    ffn_type: str
    seed: int
    parameters: int
    tokens: int
    loss: float


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A value with its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]"


@dataclass(frozen=True, kw_only=True)
class SizeRow:
    """One size; differences are relative, by seed. `seeds_needed` resolve the paper's difference with 80 % power."""

    size: str
    parameters: float
    seeds: int
    swiglu: float
    flashmhf: float
    difference: float
    deviation: float
    seeds_needed: int


@dataclass(frozen=True, kw_only=True)
class Fit:
    """What the runs say. `jacobian_errors`: standard errors of the exponents, from the linearised fit."""

    has_floor: bool
    sizes: tuple[SizeRow, ...]
    exponents: dict[str, Estimate]
    jacobian_errors: dict[str, float]
    exponent_difference: Estimate
    difference_at_target: Estimate
    seeds_needed_at_target: int
    verdict: str


def fit(runs: Iterable[Run], *, seed: int = 0) -> Fit:
    """The fit of both contenders.

    Raises:
        InputError: fewer than two sizes or seeds, an unpaired run, or unequal tokens per parameter.
    """
    names, parameters, losses = _paired(list(runs))
    x = np.log(parameters / parameters[0])
    means = np.array([of_size.mean(0) for of_size in losses])  # (S, 2)
    counts = np.array([len(of_size) for of_size in losses])
    deviations = np.concatenate([of_size - of_size.mean(0) for of_size in losses])
    degrees = len(deviations) - len(means)
    widened = deviations * math.sqrt(len(deviations) / degrees) * student_t(degrees) / NORMAL
    generator = np.random.default_rng(seed)
    draws = np.empty((DRAWS + 1, *means.shape))
    draws[0] = means
    for number, count in enumerate(counts):
        chosen = generator.integers(len(widened), size=(DRAWS, count))
        draws[1:, number] = means[number] + widened[chosen].mean(1)
    has_floor = len(means) >= MIN_SIZES_OF_FLOOR
    curves = [fit_curves(x, draws[..., number], counts, has_floor) for number in range(2)]  # alpha, E, A of each draw
    target = math.log(TARGET / parameters[0])
    reached = [floor + scale * np.exp(-alpha * target) for alpha, floor, scale in curves]
    difference = _interval(reached[1] / reached[0] - 1)
    rows = [_size_row(*of_size) for of_size in zip(names, parameters, losses, strict=True)]
    pooled = math.sqrt(sum((row.seeds - 1) * row.deviation**2 for row in rows) / degrees)
    return Fit(
        has_floor=has_floor,
        sizes=tuple(rows),
        exponents={name: _interval(curve[0]) for name, curve in zip(CONTENDERS, curves, strict=True)},
        jacobian_errors={
            name: _jacobian_error(x, counts, [float(one[0]) for one in curve], deviations[:, number], has_floor)
            for number, (name, curve) in enumerate(zip(CONTENDERS, curves, strict=True))
        },
        exponent_difference=_interval(curves[1][0] - curves[0][0]),
        difference_at_target=difference,
        seeds_needed_at_target=seeds_needed(pooled),
        verdict=verdict(difference),
    )


def fit_curves(
    x: np.ndarray, losses: np.ndarray, counts: np.ndarray, has_floor: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Least squares of loss = E + A exp(-alpha x), E at least 0, over a grid of alpha: exact in E and A.

    Args:
        x: (S,), logarithms of parameters.
        losses: (B, S), one curve per row.
        counts: (S,), weights.
        has_floor: False keeps E at 0.
    """
    falling = np.exp(-np.outer(ALPHAS, x))  # (K, S)
    norms = falling**2 @ counts
    scale = losses @ (counts * falling).T / norms  # (B, K)
    squares = (losses**2 @ counts)[:, None] - scale**2 * norms
    floor = np.zeros_like(scale)
    if has_floor:
        means, levels = losses @ counts / counts.sum(), falling @ counts / counts.sum()
        centred = falling - levels[:, None]
        free = (losses - means[:, None]) @ (counts * centred).T / (centred**2 @ counts)
        intercept = means[:, None] - free * levels
        within = ((losses - means[:, None]) ** 2 @ counts)[:, None] - free**2 * (centred**2 @ counts)
        inside = intercept > 0
        scale, floor, squares = (
            np.where(inside, *pair) for pair in ((free, scale), (intercept, floor), (within, squares))
        )
    squares = np.where(scale > 0, squares, np.inf)
    best = squares.argmin(1)
    rows = np.arange(len(best))
    if best[0] == 0:
        raise InputError("losses: expected them to fall with the parameters, got losses that do not")
    return ALPHAS[best], floor[rows, best], scale[rows, best]


def _jacobian_error(
    x: np.ndarray, counts: np.ndarray, curve: list[float], deviations: np.ndarray, has_floor: bool
) -> float:
    alpha, _, scale = curve
    falling = np.exp(-alpha * x)
    columns = [-scale * x * falling, falling, *([np.ones_like(x)] if has_floor else [])]
    jacobian = np.stack(columns, 1) * np.sqrt(counts)[:, None]
    variance = deviations @ deviations / (counts.sum() - len(counts))
    return float(math.sqrt(variance * np.linalg.pinv(jacobian.T @ jacobian)[0, 0]))


def seeds_needed(deviation: float, effect: float = CLAIM) -> int:
    """Seeds of both contenders that resolve a relative difference with 80 % power, at least 3."""
    seeds = 3
    while seeds < 10_000 and seeds < ((student_t(seeds - 1) + POWER_NORMAL) * deviation / effect) ** 2:
        seeds += 1
    return seeds


def verdict(difference: Estimate) -> str:
    """What an interval says about the paper's claim, in plain words."""
    no_difference = difference.low <= 0 <= difference.high
    claimed = difference.low <= CLAIM <= difference.high
    if no_difference and claimed:
        return "It cannot be told from these runs: the interval holds both no difference and the paper's claim."
    if claimed:
        return "These runs agree with the paper's claim and not with no difference."
    if no_difference:
        return "These runs agree with no difference and not with the paper's claim."
    return "These runs agree neither with no difference nor with the paper's claim."


def _interval(values: np.ndarray) -> Estimate:
    low, high = np.quantile(values[1:], [0.025, 0.975])
    return Estimate(value=float(values[0]), low=float(low), high=float(high))


def _size_row(name: str, parameters: float, losses: np.ndarray) -> SizeRow:
    relative = losses[:, 1] / losses[:, 0] - 1
    deviation = float(relative.std(ddof=1))
    return SizeRow(
        size=name,
        parameters=float(parameters),
        seeds=len(losses),
        swiglu=float(losses[:, 0].mean()),
        flashmhf=float(losses[:, 1].mean()),
        difference=float(relative.mean()),
        deviation=deviation,
        seeds_needed=seeds_needed(deviation),
    )


def _paired(runs: list[Run]) -> tuple[list[str], np.ndarray, list[np.ndarray]]:
    """Names, parameters, and losses (seeds, contenders) of each size, the smallest first."""
    by_size: dict[str, dict[int, dict[str, Run]]] = {}
    for run in runs:
        if run.ffn_type in CONTENDERS:
            by_size.setdefault(run.size, {}).setdefault(run.seed, {})[run.ffn_type] = run
    if len(by_size) < 2:
        raise InputError(f"sizes: expected at least two, got {', '.join(by_size) or 'none'}")
    for size, seeds in by_size.items():
        complete = sum(len(pair) == len(CONTENDERS) for pair in seeds.values())
        if complete < len(seeds) or complete < 2:
            raise InputError(f"seeds: expected at least two at {size}, each of both contenders, got {complete}")
    ratios = [run.tokens / run.parameters for run in runs if run.ffn_type in CONTENDERS]
    if max(ratios) > (1 + MAX_SPREAD) * min(ratios):
        given = f"{min(ratios):.3g} to {max(ratios):.3g}"
        raise InputError(f"tokens per parameter: expected equal ones (to {MAX_SPREAD:.0%}), got {given}")
    sizes = []
    for size, seeds in by_size.items():
        pairs = [[pair[name] for name in CONTENDERS] for pair in seeds.values()]
        parameters = float(np.mean([run.parameters for pair in pairs for run in pair]))
        sizes.append((parameters, size, np.array([[run.loss for run in pair] for pair in pairs])))
    sizes.sort(key=lambda entry: entry[0])
    return [size for _, size, _ in sizes], np.array([entry[0] for entry in sizes]), [entry[2] for entry in sizes]


def read_runs(source: Path) -> list[Run]:
    """The finished runs of a file of rows, or of a comparison's folder."""
    if source.is_file():
        rows = [row for row in read_lines(source)[0] if row.get("final") and "parameters_without_embeddings" in row]
        return [
            Run(
                size=row["size"],
                ffn_type=row["ffn_type"],
                seed=row["seed"],
                parameters=row["parameters_without_embeddings"],
                tokens=row["tokens"],
                loss=row["validation_nats_per_token"],
            )
            for row in rows
        ]
    result = read_comparison(source / RESULTS_FILE)
    parameters = {
        variant.variant: model_cost(
            load_config(str(source / "configs" / f"{variant.variant}.json"))
        ).parameters_without_embeddings
        for variant in result.variants
    }
    return [
        Run(
            size=Path(run.model).stem,
            ffn_type=run.ffn_type,
            seed=run.seed,
            parameters=parameters[run.variant],
            tokens=run.tokens,
            loss=run.validation_loss,
        )
        for run in result.runs
        if run.validation_loss is not None and run.tokens is not None
    ]


def markdown(found: Fit) -> str:
    """The result as a page."""
    form = "loss = E + A N^-alpha" if found.has_floor else "a pure power law, loss = A N^-alpha: too few sizes for E"
    exponents = [f"- {name}: alpha {value}, Jacobian's standard error {found.jacobian_errors[name]:.2g}"
                 for name, value in found.exponents.items()]  # fmt: skip
    return "\n".join(
        [
            "# Scaling fit", "", Table.of([asdict(row) for row in found.sizes]).markdown(), "",
            f"N is without embeddings; {form}.", "", *exponents,
            f"- difference of the exponents: {found.exponent_difference}",
            f"- relative difference at 370M: {found.difference_at_target} (the paper: {CLAIM:.4f}, one seed, 21 layers "
            "against 24, at 174 tokens per parameter instead of those of these runs)", "", found.verdict,
            f"If the deviation over seeds stays what it is here, {found.seeds_needed_at_target} seeds of both at 370M "
            "itself would settle it with 80 % power.", "",
        ]
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("runs", type=Path, nargs="+")
    arguments = parser.parse_args()
    try:
        found = fit([run for source in arguments.runs for run in read_runs(source)])
    except InputError as error:
        parser.error(str(error))
    write_json(arguments.output.with_suffix(".json"), json.loads(json.dumps(asdict(found))))
    atomic_write(arguments.output.with_suffix(".md"), markdown(found))
    print(markdown(found))


if __name__ == "__main__":
    main()
