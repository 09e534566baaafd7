"""A training run as a page: its losses in steps and in time, its speed and memory, and what befell it."""

import html
import time
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from flashmhf.errors import InputError
from flashmhf.files import read_json
from flashmhf.reports.page import BLUE, GREY, VERMILION, figures, html_table, new_axes, write_page
from flashmhf.training.checkpoints import TRAINER_STATE, checkpoints
from flashmhf.training.run_files import RUN_FILE, read_run
from flashmhf.training.run_log import RunLog, read_log

TRAINING, VALIDATION = BLUE, VERMILION
SMOOTHING = 0.7  # of the line over the single losses


def write_run_report(folder: Path, file: Path) -> dict[str, Any]:
    """Writes the page for the run in `folder`, finished or under way.

    Returns:
        What its table says: "steps", "tokens", "train_loss", "validation_loss", "starts", "lost_steps",
        "skipped_steps", "spikes", "tokens_per_second", "memory_mib", "elapsed_s".

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
    write_page(file, f"{config.model} on {config.data.source}", _sections(config.options(), log, summary))
    return summary


def _summary(folder: Path, log: RunLog) -> dict[str, Any]:
    def last(name: str) -> Any:
        return next((row[name] for row in reversed(log.rows) if name in row), None)

    speeds = sorted(speed for _, speed in log.curve("tokens_per_second"))
    history = _history(folder)
    return {
        "steps": log.rows[-1]["step"],
        "tokens": last("num_input_tokens_seen"),
        "train_loss": last("loss"),
        "validation_loss": last("eval_loss"),
        "starts": len(log.starts),
        "lost_steps": log.lost_steps,
        "skipped_steps": sum("skipped" in row for row in history),
        "spikes": sum("spike" in row for row in history),
        "tokens_per_second": speeds[len(speeds) // 2] if speeds else None,
        "memory_mib": last("memory_mib"),
        "elapsed_s": log.rows[-1]["elapsed_s"],
    }


def _history(folder: Path) -> list[dict[str, Any]]:
    """The Trainer's own log, from the end of the run or its newest checkpoint."""
    places = [folder, *checkpoints(folder)]
    state = next((place / TRAINER_STATE for place in places if (place / TRAINER_STATE).is_file()), None)
    return [] if state is None else read_json(state)["log_history"]


def _sections(run: dict[str, Any], log: RunLog, summary: dict[str, Any]) -> list[str]:
    drawn = [
        (_losses(log, "step", "step"), "Loss by step; a dotted line where a process began again"),
        (
            _losses(log, "elapsed_s", "seconds of training"),
            "Loss by time in training, without pauses between processes",
        ),
    ]
    for name, label, caption in (
        ("tokens_per_second", "tokens/s", "Speed, without validation and saving"),
        ("grad_norm", "gradient norm", "Gradient norm before clipping"),
        ("learning_rate", "learning rate", "Learning rate"),
        ("memory_mib", "MiB", "Most memory so far, of the process under way"),
        ("data_wait_share", "share of the time", "Waiting for data"),
        ("model_flops_utilisation", "share of the peak", "Model FLOPs utilisation"),
    ):
        if log.curve(name):
            drawn.append((_line(log, name, label), caption))
    return [
        html_table(("", "value"), [(_label(name), _shown(value)) for name, value in summary.items()]),
        figures(*drawn),
        "<h2>Starts</h2>",
        html_table(
            ("began", "from step", "processes", "machine", "torch"),
            [
                (
                    time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(start.time)) + " UTC",
                    str(start.step),
                    "" if start.processes is None else str(start.processes),
                    start.machine,
                    start.torch,
                )
                for start in log.starts
            ],
        ),
        "<h2>Settings</h2>",
        f"<pre>{html.escape(chr(10).join(f'{name}: {value}' for name, value in run.items()))}</pre>",
    ]


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
    """An exponential mean that begins unbiased."""
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


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if isinstance(value, int) or abs(value) >= 100 else f"{value:.4g}"
