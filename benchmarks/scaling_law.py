"""loss = E + A parameters^-alpha, fitted to two contenders at several sizes, with intervals over seeds.

The mean losses of each size are drawn again, 2000 times, from the normal distribution of their standard errors, both
contenders together since they share seeds, and the law is fitted to each draw. The quantiles of what follows from it
(exponents, curves, differences) are then widened by Student's t over the normal quantile, with Welch's and
Satterthwaite's degrees of freedom, since the standard errors are estimates from few seeds. How often such an interval
holds the truth: tests/benchmarks/test_scaling_fit.py. It is about seeds alone and takes the law for exact. Whether the
law holds can be seen from fits that leave out one size: a verdict is one that all of them share.

Small models may vary more from seed to seed than large ones, so each size has a covariance of its own if all sizes have
OWN_SEEDS seeds; from fewer it would be too rough. Then deviations relative to the mean of their size are pooled over
the sizes. Differences are relative, since a ratio of losses does not depend on the tokenizer.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from flashmhf.comparison.verdict import MIN_SEEDS
from flashmhf.errors import InputError
from flashmhf.evaluation.bootstrap import NORMAL, student_t
from scaling_runs import CONTENDERS, MIN_SIZES, Size

TARGET = 370e6
CLAIM = 3.014 / 3.030 - 1  # of the paper at 370M: one seed, 21 layers against 24
POWER_NORMAL = 0.8416  # of the normal distribution: 80 % power
MIN_SIZES_OF_FLOOR = 4
OWN_SEEDS = 5
ALPHAS = np.geomspace(0.02, 1.5, 60)  # the best of them is refined
GOLDEN, GOLDEN_STEPS = (math.sqrt(5) - 1) / 2, 28  # each step shrinks the 15 % between grid points: to 2e-7
DRAWS = 2000
CURVE_POINTS = 40
AGREES = {  # by `_holds`
    (False, True): "with the paper's claim and not with no difference",
    (True, False): "with no difference and not with the paper's claim",
    (False, False): "neither with no difference nor with the paper's claim",
}


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
    """One size; differences are relative.

    Attributes:
        losses: by contender, then by seed.
        difference: mean over seeds.
        interval: of it, 95 % (Student's t); None with fewer than MIN_SEEDS seeds.
        deviation: standard deviation over seeds of the difference.
        seeds_needed: to resolve the paper's difference at this size with 80 % power.
    """

    size: str
    parameters: float
    losses: dict[str, tuple[float, ...]]
    difference: float
    interval: tuple[float, float] | None
    deviation: float
    seeds_needed: int

    @property
    def seeds(self) -> int:
        return len(self.losses[CONTENDERS[0]])


@dataclass(frozen=True, kw_only=True)
class Fit:
    """What the runs say.

    Attributes:
        has_floor: whether E is fitted, otherwise it is 0.
        own_deviations: whether each size has deviations of its own, otherwise they are pooled.
        curve_parameters: where `curves` are, from the smallest size to the target.
        curves: the loss by contender.
        difference_curve: relative.
        without: `difference_at_target` without each size, by its name; none if there are two sizes.
        seeds_needed_at_target: if the difference varies there as at the largest size (as over all, if pooled).
        verdict: on the paper's claim; None with fewer than MIN_SEEDS seeds at any size.
    """

    has_floor: bool
    own_deviations: bool
    sizes: tuple[SizeRow, ...]
    exponents: dict[str, Estimate]
    exponent_difference: Estimate
    curve_parameters: tuple[float, ...]
    curves: dict[str, tuple[Estimate, ...]]
    difference_curve: tuple[Estimate, ...]
    difference_at_target: Estimate
    without: dict[str, Estimate]
    seeds_needed_at_target: int
    verdict: str | None


def fit(sizes: Sequence[Size], *, seed: int = 0) -> Fit:
    """The fit of both contenders.

    Args:
        sizes: at least two, the smallest first.
        seed: of the draws.

    Raises:
        InputError: the losses do not fall.
    """
    has_floor = len(sizes) >= MIN_SIZES_OF_FLOOR
    at = np.geomspace(sizes[0].parameters, TARGET, CURVE_POINTS)
    whole = _Laws.of(sizes, at, has_floor, seed)
    if whole.exponents[0].min() <= ALPHAS[1]:  # the end of the grid
        raise InputError("losses: expected them to fall with the parameters, got losses that do not")
    means, difference = whole.means, whole.differences()
    without = {}
    if len(sizes) > MIN_SIZES:
        for size in sizes:
            others = [other for other in sizes if other is not size]
            (without[size.name],) = _Laws.of(others, at[-1:], has_floor, seed).differences()
    counts, rows = np.array([size.seeds for size in sizes]), tuple(map(_size_row, sizes))
    degrees = counts.sum() - len(counts)
    pooled = math.sqrt(sum((row.seeds - 1) * row.deviation**2 for row in rows) / degrees)
    return Fit(
        has_floor=has_floor,
        own_deviations=means.own,
        sizes=rows,
        exponents={name: means.estimate(alpha) for name, alpha in zip(CONTENDERS, whole.exponents.T, strict=True)},
        exponent_difference=means.estimate(whole.exponents[:, 1] - whole.exponents[:, 0]),
        curve_parameters=tuple(map(float, at)),
        curves={name: tuple(map(means.estimate, curve)) for name, curve in zip(CONTENDERS, whole.curves, strict=True)},
        difference_curve=difference,
        difference_at_target=difference[-1],
        without=without,
        seeds_needed_at_target=seeds_needed(rows[-1].deviation if means.own else pooled),
        verdict=verdict(difference[-1], without) if counts.min() >= MIN_SEEDS else None,
    )


@dataclass(frozen=True, kw_only=True)
class _Laws:
    """The laws of both contenders, for the means and for all that `_Means.drawn` made of them (B).

    Attributes:
        exponents: (B, 2).
        curves: by contender, (points, B).
    """

    means: "_Means"
    exponents: np.ndarray
    curves: list[np.ndarray]

    @classmethod
    def of(cls, sizes: Sequence[Size], at: np.ndarray, has_floor: bool, seed: int) -> "_Laws":
        parameters, counts = (np.array([getattr(size, name) for size in sizes]) for name in ("parameters", "seeds"))
        means = _Means.of(sizes)
        losses = means.drawn(np.random.default_rng(seed))
        x = np.log(parameters / parameters[0])
        laws = [fit_curves(x, losses[..., number], counts, has_floor) for number in range(2)]
        curves = [floor + scale * np.exp(np.outer(np.log(at / parameters[0]), -alpha)) for alpha, floor, scale in laws]
        return cls(means=means, exponents=np.stack([alpha for alpha, _, _ in laws], 1), curves=curves)

    def differences(self) -> tuple[Estimate, ...]:
        """Relative, at each point of the curves."""
        return tuple(map(self.means.estimate, self.curves[1] / self.curves[0] - 1))


@dataclass(frozen=True, kw_only=True)
class _Means:
    """Mean losses (S, 2) with their covariances (S, 2, 2), and the degrees of freedom of these by size.

    Attributes:
        own: whether a size's covariance is from its own seeds; otherwise all have the same, pooled degrees of freedom.
    """

    values: np.ndarray
    covariances: np.ndarray
    degrees: np.ndarray
    own: bool

    @classmethod
    def of(cls, sizes: Sequence[Size]) -> "_Means":
        counts = np.array([size.seeds for size in sizes])
        values = np.array([size.losses.mean(0) for size in sizes])
        relative = [size.losses / mean - 1 for size, mean in zip(sizes, values, strict=True)]
        own = bool(counts.min() >= OWN_SEEDS)
        degrees = counts - 1 if own else np.full(len(counts), counts.sum() - len(counts))
        squares = np.array([deviations.T @ deviations for deviations in relative])
        covariances = (squares if own else squares.sum(0)) / degrees[:, None, None]
        scale = values[:, :, None] * values[:, None, :] / counts[:, None, None]
        return cls(values=values, covariances=covariances * scale, degrees=degrees, own=own)

    @property
    def errors(self) -> np.ndarray:
        return np.sqrt(np.diagonal(self.covariances, axis1=1, axis2=2))

    def drawn(self, generator: np.random.Generator) -> np.ndarray:
        """(1 + 4 S + DRAWS, S, 2): the means; with one of them lower, then higher, by a standard error; draws."""
        steps = np.eye(self.values.size).reshape(-1, *self.values.shape) * self.errors
        draws = [
            generator.multivariate_normal(mean, covariance, size=DRAWS, method="svd")
            for mean, covariance in zip(self.values, self.covariances, strict=True)
        ]
        return np.concatenate([self.values[None], self.values - steps, self.values + steps, np.stack(draws, 1)])

    def estimate(self, found: np.ndarray) -> Estimate:
        """Of a quantity, from its values for what `drawn` returned."""
        value, below, above, draws = np.split(found, np.cumsum([1, self.values.size, self.values.size]))
        per_error = ((above - below) / 2).reshape(self.values.shape)
        errors = np.where(self.errors > 0, self.errors, 1.0)
        slopes = per_error / errors
        variances = np.einsum("sc,scd,sd->s", slopes, self.covariances, slopes)
        widened = student_t(self._degrees_of(variances)) / NORMAL
        low, high = value + widened * (np.quantile(draws, [0.025, 0.975]) - value)
        return Estimate(value=float(value[0]), low=float(low), high=float(high))

    def _degrees_of(self, variances: np.ndarray) -> int:
        """Welch and Satterthwaite's, from what each size adds to a quantity's variance."""
        if not self.own or not variances.any():
            return int(self.degrees.min())
        return int(variances.sum() ** 2 / (variances**2 / self.degrees).sum())


def fit_curves(
    x: np.ndarray, losses: np.ndarray, counts: np.ndarray, has_floor: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Least squares of loss = E + A exp(-alpha x), E at least 0: alpha, E and A, each (B,).

    The best alpha of a grid, then golden sections between its neighbours; E and A are exact for each alpha.

    Args:
        x: (S,), logarithms of parameters.
        losses: (B, S), one curve per row.
        counts: (S,), weights.
        has_floor: False keeps E at 0.
    """

    def squares(alphas: np.ndarray) -> np.ndarray:
        return _solve(x, losses, counts, alphas, has_floor)[2]

    best = squares(ALPHAS[None]).argmin(1)
    low, high = (ALPHAS[(best + step).clip(0, len(ALPHAS) - 1)][:, None] for step in (-1, 1))
    for _ in range(GOLDEN_STEPS):
        left, right = high - GOLDEN * (high - low), low + GOLDEN * (high - low)
        smaller = squares(left) < squares(right)
        low, high = np.where(smaller, low, left), np.where(smaller, right, high)
    alphas = (low + high) / 2
    floor, scale, _ = _solve(x, losses, counts, alphas, has_floor)
    return alphas[:, 0], floor[:, 0], scale[:, 0]


def _solve(
    x: np.ndarray, losses: np.ndarray, counts: np.ndarray, alphas: np.ndarray, has_floor: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """E, A and the sum of squares for each alpha, all (B, K); alphas are (B, K) or (1, K)."""
    falling = np.exp(-alphas[..., None] * x)  # (B or 1, K, S)
    y, shares = losses[:, None, :], counts / counts.sum()
    scale = (y * falling) @ shares / (falling**2 @ shares)
    floor = np.zeros_like(scale)
    if has_floor:
        centred = falling - (falling @ shares)[..., None]
        free = (y * centred) @ shares / (centred**2 @ shares)
        intercept = y @ shares - free * (falling @ shares)
        inside = intercept > 0
        scale, floor = np.where(inside, free, scale), np.where(inside, intercept, floor)
    residuals = y - floor[..., None] - scale[..., None] * falling
    return floor, scale, np.where(scale > 0, residuals**2 @ counts, np.inf)


def seeds_needed(deviation: float, effect: float = CLAIM) -> int:
    """Seeds of both contenders that resolve a relative difference with 80 % power, at least MIN_SEEDS."""
    seeds = MIN_SEEDS
    while seeds < 10_000 and seeds < ((student_t(seeds - 1) + POWER_NORMAL) * deviation / effect) ** 2:
        seeds += 1
    return seeds


def verdict(difference: Estimate, without: Mapping[str, Estimate]) -> str:
    """What an interval says about the paper's claim, in plain words.

    Args:
        difference: relative, of all sizes.
        without: the same without one of them, by its name; where it says something else there is no verdict.
    """
    found = _holds(difference)
    others = [name for name, estimate in without.items() if _holds(estimate) != found]
    if found == (True, True):
        return "It cannot be told from these runs: the interval holds both no difference and the paper's claim."
    if others:
        named = " or ".join(others)
        return f"It cannot be told from these runs: all sizes agree {AGREES[found]}, but not without {named}."
    return f"These runs agree {AGREES[found]}."


def _holds(difference: Estimate) -> tuple[bool, bool]:
    """Whether the interval holds no difference, and the paper's claim."""
    no_difference, claimed = (difference.low <= value <= difference.high for value in (0.0, CLAIM))
    return no_difference, claimed


def _size_row(size: Size) -> SizeRow:
    relative = size.losses[:, 1] / size.losses[:, 0] - 1
    mean, deviation = float(relative.mean()), float(relative.std(ddof=1))
    half = student_t(size.seeds - 1) * deviation / math.sqrt(size.seeds)
    return SizeRow(
        size=size.name,
        parameters=size.parameters,
        losses={name: tuple(map(float, size.losses[:, number])) for number, name in enumerate(CONTENDERS)},
        difference=mean,
        interval=(mean - half, mean + half) if size.seeds >= MIN_SEEDS else None,
        deviation=deviation,
        seeds_needed=seeds_needed(deviation),
    )
