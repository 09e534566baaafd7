"""A training run as a page: its losses by step and time, speed, memory, restarts."""

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from flashmhf.errors import InputError
from flashmhf.files import read_json
from flashmhf.reports.render import write_page
from flashmhf.reports.style import BLUE, GREY, VERMILION, new_axes
from flashmhf.reports.table import Table
from flashmhf.training.checkpoints import TRAINER_STATE, checkpoints
from flashmhf.training.config import RUN_FILE
from flashmhf.training.instability import recorded
from flashmhf.training.non_finite_steps import count_skipped, count_spikes
from flashmhf.training.run_files import read_result, read_run
from flashmhf.training.run_log import RunLog, read_log

TRAINING, VALIDATION = BLUE, VERMILION
SMOOTHING = 0.7  # of the line over the single losses
QUANTITIES = (
    ("tokens_per_second", "tokens/s", "Throughput, without validation and saving"),
    ("grad_norm", "gradient norm", "Gradient norm before clipping"),
    ("learning_rate", "learning rate", "Learning rate"),
    ("memory_mib", "MiB", "Peak memory so far, of the current process"),
    ("data_wait_share", "share of the time", "Waiting for data"),
    ("model_flops_utilisation", "share of the peak", "Model FLOPs utilisation"),
)


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """A run in numbers; None for what its log does not have.

    Attributes:
        starts: processes that trained.
        lost_steps: steps that were computed again after a kill.
        spikes: losses far above the mean of the steps before them.
        tokens_per_second: median over the log.
        elapsed_s: in training.
    """

    steps: int
    tokens: int | None
    train_loss: float | None
    validation_loss: float | None
    starts: int
    lost_steps: int
    skipped_steps: int
    spikes: int
    tokens_per_second: float | None
    memory_mib: float | None
    elapsed_s: float


def write_run_report(folder: Path, file: Path) -> RunSummary:
    """Writes the page for the run in `folder`, finished or not.

    Raises:
        InputError: the folder holds no run, or one that has logged nothing yet.
    """
    if not (folder / RUN_FILE).is_file():
        raise InputError(f"DIR: expected a training run's folder with {RUN_FILE}, got {folder}")
    log = read_log(folder)
    if not log.curve("loss"):
        raise InputError(f"DIR: expected a run with at least one logged loss, got {folder}")
    config = read_run(folder)
    summary = _summary(folder, log)
    result = read_result(folder)
    write_page(
        file,
        "run.html",
        title=f"{config.model} on {config.data.source}",
        summary=Table(("", "value"), [(_label(name), _shown(value)) for name, value in asdict(summary).items()]),
        curves=_curves(log),
        starts=_starts(log),
        warnings=[str(found) for found in recorded(log.rows)],
        data=[] if result is None else [line for line in (result.data_read, result.bad_data) if line],
        options=config.options(),
    )
    return summary


def _summary(folder: Path, log: RunLog) -> RunSummary:
    def last(name: str) -> Any:
        return next((row[name] for row in reversed(log.rows) if row.get(name) is not None), None)

    speeds = sorted(speed for _, speed in log.curve("tokens_per_second"))
    history = read_history(folder)
    return RunSummary(
        steps=log.rows[-1]["step"],
        tokens=last("num_input_tokens_seen"),
        train_loss=last("loss"),
        validation_loss=last("eval_loss"),
        starts=len(log.starts),
        lost_steps=log.lost_steps,
        skipped_steps=count_skipped(history),
        spikes=count_spikes(history),
        tokens_per_second=speeds[len(speeds) // 2] if speeds else None,
        memory_mib=last("memory_mib"),
        elapsed_s=log.rows[-1]["elapsed_s"],
    )


def read_history(folder: Path) -> list[dict[str, Any]]:
    """The Trainer's own log, from the end of the run or its newest checkpoint."""
    places = [folder, *checkpoints(folder)]
    state = next((place / TRAINER_STATE for place in places if (place / TRAINER_STATE).is_file()), None)
    history = [] if state is None else read_json(state).get("log_history")
    if not isinstance(history, list) or not all(isinstance(row, dict) for row in history):
        raise InputError(f"expected the log_history of a run in {state}, got {history!r:.80}")
    return history


def _curves(log: RunLog) -> list[tuple[Figure, str]]:
    """Figures and captions."""
    return [
        (_losses(log, "step", "step"), "Loss by step; a dotted line where a process started again"),
        (_losses(log, "elapsed_s", "seconds of training"), "Loss by time in training, without pauses between starts"),
        *((_line(log, name, label), caption) for name, label, caption in QUANTITIES if log.curve(name)),
    ]


def _starts(log: RunLog) -> Table:
    rows = [
        (
            time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(start.time)) + " UTC",
            str(start.step),
            "" if start.processes is None else str(start.processes),
            start.machine,
            start.torch,
        )
        for start in log.starts
    ]
    return Table(("started", "from step", "processes", "machine", "torch"), rows)


def _losses(log: RunLog, against: str, label: str) -> Figure:
    figure, axes = new_axes(label, "nats/token")
    x, y = zip(*log.curve("loss", against), strict=True)
    axes.plot(x, y, color=TRAINING, alpha=0.3, linewidth=0.8)
    axes.plot(x, _smoothed(y), color=TRAINING, linewidth=1.5, label="training, smoothed")
    validation = log.curve("eval_loss", against)
    if validation:
        axes.plot(*zip(*validation, strict=True), color=VALIDATION, marker="o", markersize=4, label="validation")
    if against == "step":
        for start in log.starts[1:]:
            axes.axvline(start.step, color=GREY, linestyle=":", linewidth=1)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False)
    return figure


def _smoothed(values: tuple[float, ...]) -> list[float]:
    """An exponential mean, corrected for its start."""
    mean = weight = 0.0
    smoothed = []
    for value in values:
        mean, weight = SMOOTHING * mean + value, SMOOTHING * weight + 1.0
        smoothed.append(mean / weight)
    return smoothed


def _line(log: RunLog, name: str, label: str) -> Figure:
    figure, axes = new_axes("step", label, 2.4)
    axes.plot(*zip(*log.curve(name), strict=True), color=TRAINING, linewidth=1.2)
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def _label(name: str) -> str:
    """ "memory_mib" -> "memory (MiB)"."""
    for unit, shown in (("_mib", " (MiB)"), ("_s", " (s)")):
        if name.endswith(unit):
            name = name.removesuffix(unit) + shown
    return name.replace("_", " ")


def _shown(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if isinstance(value, int) or abs(value) >= 100 else f"{value:.4g}"
