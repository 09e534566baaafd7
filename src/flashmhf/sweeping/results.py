"""What a sweep found, and `sweep.json`, the file that holds it."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flashmhf.comparison.results import Spread, read_result
from flashmhf.files import write_json
from flashmhf.sweeping.optimum import RateRange
from flashmhf.sweeping.settings import Sweep

TUNING_FILE = "sweep.json"
VERSION = 1  # of the file's format
LOWER, UPPER = "lower", "upper"  # edges of a grid


@dataclass(frozen=True, kw_only=True)
class CellResult:
    """One learning rate and warm-up in one rung.

    Attributes:
        warmup: share of the steps.
        validation_loss: nats/token over the seeds that finished.
        failed_seeds: seeds whose runs failed; they are in no mean.
        unstable_seeds: seeds whose runs finished, but were on the edge of divergence.
    """

    learning_rate: float
    warmup: float
    validation_loss: Spread
    failed_seeds: tuple[int, ...]
    unstable_seeds: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class RungResult:
    """Cells that were trained for the same number of steps, with the same seeds."""

    steps: int
    seeds: tuple[int, ...]
    cells: tuple[CellResult, ...]


@dataclass(frozen=True, kw_only=True)
class ContenderResult:
    """One contender.

    Attributes:
        best: of the last rung.
        runner_up: the next of the last rung; None if no other cell finished.
        noise: a difference between the best cell and another one below it is not distinguishable from none (95 %, over
            seeds); None for one seed.
        decided: whether the runner-up differs by more than the noise; None without a noise or a runner-up.
        fitted_rate: the minimum of a parabola through the best rate and its neighbours; None at the edge.
        flat: rates that lose less than `FLAT` nats/token, with the warm-up of the best.
        within_noise: rates that lose less than the noise.
        rate_edge: "lower" or "upper" if the best rate is the grid's lowest or highest, and the grid has several.
        warmup_edge: the same of the warm-up.
    """

    variant: str
    ffn_type: str
    parameters: int
    rungs: tuple[RungResult, ...]
    best: CellResult
    runner_up: CellResult | None
    noise: float | None
    decided: bool | None
    fitted_rate: float | None
    flat: RateRange
    within_noise: RateRange | None
    rate_edge: str | None
    warmup_edge: str | None


@dataclass(frozen=True, kw_only=True)
class TuningResult:
    """Everything that table and page show.

    Attributes:
        runs_each, tokens_each: what each contender got.
    """

    settings: Sweep
    runs_each: int
    tokens_each: int
    contenders: tuple[ContenderResult, ...]

    def as_dict(self) -> dict[str, Any]:
        """As sweep.json holds it."""
        return {"version": VERSION, **asdict(self)}


def write_tuning(result: TuningResult, file: Path) -> None:
    """Writes sweep.json."""
    write_json(file, result.as_dict())


def read_tuning(file: Path) -> TuningResult:
    """Reads what `write_tuning` wrote.

    Raises:
        InputError: the file is damaged or has another version; names it.
    """
    return read_result(TuningResult, file, VERSION, noun="sweep", command="sweep")
