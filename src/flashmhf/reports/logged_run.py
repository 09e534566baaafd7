"""A training run as its folder describes it, finished or not: what was logged, the settings, the main numbers."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flashmhf.errors import InputError
from flashmhf.files import read_json
from flashmhf.reports.lines import Trace
from flashmhf.reports.run_settings import Settings, ffn_type, run_settings
from flashmhf.training.checkpoints import TRAINER_STATE, checkpoints
from flashmhf.training.config import RUN_FILE, TrainConfig
from flashmhf.training.non_finite_steps import count_skipped, count_spikes
from flashmhf.training.run_files import read_run
from flashmhf.training.run_log import RunLog, read_log

TOKENS = "num_input_tokens_seen"


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


@dataclass(frozen=True, kw_only=True)
class LoggedRun:
    """A run's folder, read."""

    folder: Path
    config: TrainConfig
    log: RunLog
    summary: RunSummary
    settings: Settings
    ffn_type: str | None


def read_logged_run(folder: Path) -> LoggedRun:
    """The run in `folder`.

    Raises:
        InputError: the folder holds no run, or one that has logged nothing yet, or a damaged one.
    """
    if not (folder / RUN_FILE).is_file():
        raise InputError(f"DIR: expected a training run's folder with {RUN_FILE}, got {folder}")
    log = read_log(folder)
    if not log.curve("loss"):
        raise InputError(f"DIR: expected a run with at least one logged loss, got {folder}")
    return LoggedRun(
        folder=folder,
        config=read_run(folder),
        log=log,
        summary=_summary(folder, log),
        settings=run_settings(folder, log),
        ffn_type=ffn_type(folder),
    )


def trace(log: RunLog, name: str, factor: float = 1.0) -> Trace | None:
    """A logged quantity, times `factor`; None if it was not logged."""
    rows = [row for row in log.rows if row.get(name) is not None]
    if not rows:
        return None
    steps = tuple(float(row["step"]) for row in rows)
    counted = [(row["step"], row[TOKENS]) for row in log.rows if row.get(TOKENS) is not None]
    tokens = np.interp(steps, [step for step, _ in counted], [number for _, number in counted]) if counted else ()
    return Trace(
        values=tuple(factor * row[name] for row in rows),
        steps=steps,
        elapsed_s=tuple(row["elapsed_s"] for row in rows),
        tokens=tuple(map(float, tokens)),
    )


def _summary(folder: Path, log: RunLog) -> RunSummary:
    def last(name: str) -> Any:
        return next((row[name] for row in reversed(log.rows) if row.get(name) is not None), None)

    speeds = sorted(speed for _, speed in log.curve("tokens_per_second"))
    history = read_history(folder)
    return RunSummary(
        steps=log.rows[-1]["step"],
        tokens=last(TOKENS),
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
