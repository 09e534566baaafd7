"""The minimum of a loss over learning rates: how flat it is, and what the noise over seeds hides."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from flashmhf.evaluation.bootstrap import student_t


@dataclass(frozen=True, kw_only=True)
class RateRange:
    """Learning rates whose loss is at most `tolerance` above that of the best one.

    An open end is the last rate that was tried, and the loss was still within the tolerance there.
    """

    tolerance: float
    low: float
    high: float
    open_below: bool
    open_above: bool


@dataclass(frozen=True, kw_only=True)
class _Parabola:
    """a x^2 + b x, where x is the logarithm of a rate over the best rate."""

    a: float
    b: float

    @classmethod
    def through(cls, below: tuple[float, float], above: tuple[float, float]) -> "_Parabola | None":
        """The one with its minimum between two points (x, y) on both sides of (0, 0); None if all three are level."""
        slope_below, slope_above = below[1] / below[0], above[1] / above[0]
        a = (slope_above - slope_below) / (above[0] - below[0])
        return cls(a=a, b=slope_below - a * below[0]) if a > 0 else None

    @property
    def minimum(self) -> float:
        return -self.b / (2 * self.a)

    def crossing(self, height: float, side: int) -> float:
        """Where it reaches `height` above 0, left (-1) or right (1) of its minimum."""
        return (-self.b + side * math.sqrt(self.b**2 + 4 * self.a * height)) / (2 * self.a)


def best_rate(losses: Mapping[float, float]) -> float:
    """The rate with the lowest loss; of equal ones the lowest rate."""
    return min(losses, key=lambda rate: (losses[rate], rate))


def fitted_rate(losses: Mapping[float, float]) -> float | None:
    """The minimum of the parabola in log rate through the best rate and its neighbours; None without both."""
    best = best_rate(losses)
    parabola = _parabola(losses, best)
    return None if parabola is None else best * math.exp(parabola.minimum)


def flat_range(losses: Mapping[float, float], tolerance: float) -> RateRange:
    """How far the loss stays within the tolerance.

    Between the best rate and its neighbours the loss is interpolated by a parabola in log rate, if it has both.
    Elsewhere only rates that were tried count.

    Args:
        losses: by rate, all for the same warm-up; infinite if a run failed.
        tolerance: at least 0.
    """
    best = best_rate(losses)
    parabola = _parabola(losses, best)
    ends, opened = {}, {}
    for side in (-1, 1):
        outwards = sorted((rate for rate in losses if (rate - best) * side > 0), reverse=side < 0)
        ends[side], opened[side] = best, True
        for rate in outwards:
            if losses[rate] - losses[best] > tolerance:
                opened[side] = False
                if ends[side] == best and parabola is not None:
                    ends[side] = best * math.exp(parabola.crossing(tolerance, side))
                break
            ends[side] = rate
    return RateRange(tolerance=tolerance, low=ends[-1], high=ends[1], open_below=opened[-1], open_above=opened[1])


def _parabola(losses: Mapping[float, float], best: float) -> _Parabola | None:
    below, above = (rate for rate in losses if rate < best), (rate for rate in losses if rate > best)
    left, right = max(below, default=None), min(above, default=None)
    if left is None or right is None or not math.isfinite(losses[left] + losses[right]):
        return None
    points = [(math.log(rate / best), losses[rate] - losses[best]) for rate in (left, right)]
    return _Parabola.through(*points)


def noise(best: Sequence[float], others: Sequence[Sequence[float]]) -> float | None:
    """Half of the 95 % interval of the difference between the best cell and another one, over seeds.

    The standard deviation of paired differences is pooled over the other cells, since few seeds of one pair say little.

    Args:
        best: losses by seed.
        others: of the other cells, for the same seeds.

    Returns:
        None for one seed, or without another cell.
    """
    seeds = len(best)
    if seeds < 2 or not others:
        return None
    variances = [
        statistics.variance([theirs - ours for theirs, ours in zip(losses, best, strict=True)]) for losses in others
    ]
    degrees = len(others) * (seeds - 1)
    return student_t(degrees) * math.sqrt(statistics.fmean(variances) / seeds)
