"""Successive halving over a grid of learning rates and warm-ups: how many cells, how many steps, which remain."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from flashmhf.errors import InputError

NEIGHBOURHOOD = 3  # a rate and its two neighbours: what a parabola takes
MIN_STEPS = 2  # of a run: one of warm-up, one after it


@dataclass(frozen=True, order=True)
class Cell:
    """One combination of the grid; the warm-up is a share of the steps."""

    warmup: float
    learning_rate: float


@dataclass(frozen=True, kw_only=True)
class Halving:
    """What is trained for one contender. The results change which cells remain, never how many.

    Each rung trains its cells from new weights with a complete schedule; a long schedule cut short would favour low
    rates. The last rung has all steps and all seeds, each one before it half the steps of the next, and the first seed.

    Args:
        rates: the number of learning rates.
        warmups: the number of warm-ups.
        seeds: of the last rung.
        rungs: at most this many; as many as cost the fewest steps.
        steps: of the last rung's runs.
    """

    rates: int
    warmups: int
    seeds: int
    rungs: int
    steps: int

    def __post_init__(self) -> None:
        if self.rungs < 1:
            raise InputError(f"rungs: expected 1 or more, got {self.rungs}")

    @property
    def cells(self) -> tuple[int, ...]:
        """Of each rung: half of the one before, but at least a rate, its neighbours and one of another warm-up."""
        grid = self.rates * self.warmups
        least = min(min(self.rates, NEIGHBOURHOOD) + (self.warmups > 1), grid)
        halved = [max(-(-grid // 2**rung), least) for rung in range(self.rungs)]
        return min((tuple(dict.fromkeys(halved[:rungs])) for rungs in range(1, self.rungs + 1)), key=self._cost)

    def _cost(self, cells: tuple[int, ...]) -> float:
        """In runs of full length."""
        *early, last = cells
        return last * self.seeds + sum(number / 2 ** (len(early) - rung) for rung, number in enumerate(early))

    @property
    def runs(self) -> tuple[int, ...]:
        """Of each rung."""
        *early, last = self.cells
        return (*early, last * self.seeds)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Steps of a run in each rung."""
        number = len(self.cells)
        return tuple(self.steps // 2 ** (number - 1 - rung) for rung in range(number))

    @property
    def total_steps(self) -> int:
        """Over all runs."""
        return sum(runs * length for runs, length in zip(self.runs, self.lengths, strict=True))

    @property
    def least_steps(self) -> int:
        """The fewest that the first rung can halve."""
        return MIN_STEPS * 2 ** (len(self.cells) - 1)


def keep(losses: Mapping[Cell, float], grid: Iterable[Cell], number: int) -> tuple[Cell, ...]:
    """The cells of the next rung: the best, its neighbours in the rate, the best of another warm-up, then by loss.

    The best rate changes with the number of steps, so the neighbours are kept however bad they are, even if an earlier
    rung dropped them. The last rung thus tells rates and warm-ups apart with all seeds.

    Args:
        losses: of the cells of this rung; infinite if a run failed.
        grid: all cells.
        number: of cells to keep.
    """
    ranked = sorted(losses, key=lambda cell: (losses[cell], cell))
    best = ranked[0]
    row = sorted(cell for cell in grid if cell.warmup == best.warmup)
    at = row.index(best)
    others = [cell for cell in ranked if cell.warmup != best.warmup][:1]
    chosen = dict.fromkeys([best, *row[max(at - 1, 0) : at + 2], *others, *ranked])
    return tuple(sorted(list(chosen)[:number]))
