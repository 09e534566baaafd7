"""A training run's log in its folder, `log.jsonl`: one line per start and one per entry of the Trainer's log.

Numbers that are not finite become null: JSON has no other word for them.

Lines are only appended, so that the log of a run that was killed and resumed shows what was lost and the time it took.
"""

import json
import os
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback
from transformers import __version__ as transformers_version

from flashmhf.files import append_to, only_finite, parse_json

LOG_FILE = "log.jsonl"
ABSURD = 1e15  # no number of a log is as large
NUMBERED = ("step", "start")  # a line has one of them
NOT_NUMBERS = (
    "skipped",
    "unstable",
    "found",
    "blocks",
    "documents",
    "machine",
    "torch",
    "transformers",
)  # other values that are none are left out


class LogLines(TrainerCallback):
    """Writes the file: {"start": step, "time", "processes", ...} when training starts, then {"step", "time", ...}.

    "time" is seconds since 1970, by a clock that may be set; "since_start_s" is by one that nobody sets.
    """

    def __init__(self) -> None:
        self._started_s = time.monotonic()

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self._started_s = time.monotonic()
        if state.is_world_process_zero:
            _add(
                Path(args.output_dir),
                {
                    "start": state.global_step,
                    "time": time.time(),
                    "max_steps": state.max_steps,
                    "processes": args.world_size,
                    "warmup_steps": args.get_warmup_steps(state.max_steps),
                    "machine": platform.machine() if args.device.type == "cpu" else torch.cuda.get_device_name(),
                    "torch": torch.__version__,
                    "transformers": transformers_version,
                },
            )

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if state.is_world_process_zero and logs:
            times = {"time": time.time(), "since_start_s": time.monotonic() - self._started_s}
            _add(Path(args.output_dir), {"step": state.global_step, **times, **logs})


def add_row(folder: Path, row: dict[str, Any]) -> None:
    """Appends an entry, with its step, that is not one of the Trainer's log."""
    _add(folder, {"time": time.time(), **row})


@dataclass(frozen=True, kw_only=True)
class Start:
    """A start of training: the first one or a resumed one.

    Attributes:
        step: the last step before it.
        time: seconds since 1970.
        processes: their number.
        machine: the GPU's name, or the CPU's architecture.
        torch: its version.
    """

    step: int
    time: float
    processes: int | None
    machine: str
    torch: str


@dataclass(frozen=True, kw_only=True)
class RunLog:
    """The log of a run, without the entries that were lost.

    Attributes:
        rows: entries of the Trainer's log, in the order of steps; "elapsed_s" is the time spent training up to each.
        starts: in the order of time.
        lost_steps: steps that were logged and then computed again.
    """

    rows: list[dict[str, Any]]
    starts: list[Start]
    lost_steps: int

    def curve(self, name: str, against: str = "step") -> list[tuple[float, float]]:
        """(x, y) of the rows that have a finite `name`."""
        return [(row[against], row[name]) for row in self.rows if row.get(name) is not None]


def read_log(folder: Path) -> RunLog:
    """Reads `log.jsonl`; skips lines that a kill truncated, and values that are no numbers. Without it, no rows."""
    rows: list[dict[str, Any]] = []
    starts: list[Start] = []
    lost = 0
    started = before = 0.0
    for line in _lines(folder / LOG_FILE):
        if "start" in line:
            kept = [row for row in rows if row["step"] <= line["start"]]
            if rows:
                lost += rows[-1]["step"] - (kept[-1]["step"] if kept else 0)
            rows = kept
            started, before = line["time"], rows[-1]["elapsed_s"] if rows else 0.0
            starts.append(_start(line))
        else:
            since_start_s = line.get("since_start_s", line["time"] - started)  # older logs have the wall clock alone
            rows.append({**line, "elapsed_s": before + since_start_s})
    return RunLog(rows=rows, starts=starts, lost_steps=lost)


def _start(line: dict[str, Any]) -> Start:
    return Start(
        step=line["start"],
        time=line["time"],
        processes=line.get("processes"),
        machine=line.get("machine", ""),
        torch=line.get("torch", ""),
    )


def _add(folder: Path, entry: dict[str, Any]) -> None:
    """Appends a line in one write, after ending one that a kill may have truncated."""
    folder.mkdir(parents=True, exist_ok=True)
    with append_to(folder / LOG_FILE) as file:
        truncated = False
        if file.tell() > 0:
            file.seek(-1, os.SEEK_END)
            truncated = file.read(1) != b"\n"
        text = json.dumps(only_finite(entry), default=str, allow_nan=False)
        file.write((b"\n" if truncated else b"") + text.encode() + b"\n")


def _lines(file: Path) -> list[dict[str, Any]]:
    if not file.is_file():
        return []
    lines = []
    for text in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = parse_json(text)
        except ValueError:
            continue
        if (
            isinstance(line, dict)
            and _is_number(line.get("time"))
            and any(isinstance(line.get(name), int) for name in NUMBERED)
        ):
            lines.append({name: value for name, value in line.items() if _is_number(value) or name in NOT_NUMBERS})
    return lines


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and abs(value) < ABSURD
