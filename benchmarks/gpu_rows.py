"""Measured rows on disk, as JSON lines: appended completely or not at all, read without corrupt lines.

Every line is an object with its step, its case and the provenance of the run: device, versions, commit.
A line with a `state` says that a case has "started", is "trying" something or is "done"; any other line is a row.
Only imports the standard library: the process that starts the steps never waits for torch.
"""

import json
import math
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]
DIGITS = 6  # of a float; timers are no more precise
SAME = ("device", "torch", "triton", "code")  # what rows of the same run have in common


class UnusableError(Exception):
    """A file that cannot be written or read; one line for the user."""


class RowFile:
    """The rows of one device and one state of the code."""

    def __init__(self, path: Path, facts: Row) -> None:
        self.path = path
        self.facts = facts

    def prepare(self) -> None:
        """Creates the folder and terminates a line that an earlier run left truncated.

        Raises:
            UnusableError: nothing can be written there.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab+") as file:
                if file.tell() > 0:
                    file.seek(-1, os.SEEK_END)
                    if file.read(1) != b"\n":
                        file.write(b"\n")
        except OSError as error:
            raise UnusableError(f"output: cannot write to {str(self.path)!r}: {error.strerror}") from error

    def append(self, step: str, case: str, row: Row) -> None:
        """Writes one line and syncs it; on a full disk the file stays unchanged.

        Raises:
            UnusableError: nothing can be written there.
        """
        taken = {"step", "case", *self.facts} & row.keys()
        assert not taken, f"row of {step} with reserved keys: {taken}"
        line = json.dumps({"step": step, "case": case, **_rounded(row), **self.facts}).encode() + b"\n"
        try:
            with self.path.open("ab", buffering=0) as file:
                before = file.tell()
                try:
                    written = file.write(line)
                    os.fsync(file.fileno())
                except OSError:
                    file.truncate(before)
                    raise
                if written != len(line):  # only part of it fitted
                    file.truncate(before)
                    raise OSError(None, "the disk is full")
        except OSError as error:
            raise UnusableError(f"output: cannot write to {str(self.path)!r}: {error.strerror}") from error

    def read(self) -> list[Row]:
        """All lines of this run, without those of another device, other versions or other code."""
        lines, _ = read_lines(self.path)
        return [line for line in lines if all(line.get(key) == self.facts.get(key) for key in SAME)]


def append_failure(rows: RowFile, step: str, case: str, latest: Row, reason: str) -> None:
    """Writes that a case failed; `latest` is its last state line.

    The case is done, unless it was only trying something: it can continue without that.
    """
    about = {key: value for key, value in latest.items() if key not in ("state", "step", "case", *rows.facts)}
    rows.append(step, case, about | {"failed": reason})
    if latest["state"] != "trying":
        rows.append(step, case, {"state": "done"})


def file_of(output: Path, facts: Row) -> Path:
    """The file of the rows of a device and a commit; code without a (clean) commit is named by its hash."""
    device = re.sub(r"[^a-z0-9]+", "-", facts["device"].lower()).strip("-")
    return output / f"{device}-{facts['commit'] or facts['code']}.jsonl"


def read_lines(path: Path) -> tuple[list[Row], int]:
    """The valid lines of a file, and the number of truncated or corrupt ones.

    Raises:
        UnusableError: it cannot be read.
    """
    try:
        texts = path.read_bytes().splitlines() if path.exists() else []
    except OSError as error:
        raise UnusableError(f"rows: cannot read {str(path)!r}: {error.strerror}") from error
    lines, corrupt = [], 0
    for text in texts:
        try:
            line = json.loads(text)
        except ValueError:
            line = None
        if isinstance(line, dict) and isinstance(line.get("step"), str):
            lines.append(line)
        else:
            corrupt += bool(text.strip())
    return lines, corrupt


def started(lines: Iterable[Row], step: str) -> set[str]:
    """The cases of a step that have started, done or not."""
    return {line["case"] for line in lines if line["step"] == step and line.get("state") == "started"}


def done(lines: Iterable[Row], step: str) -> set[str]:
    """The cases of a step that do not have to run again."""
    return {line["case"] for line in lines if line["step"] == step and line.get("state") == "done"}


def rows_of(lines: Iterable[Row], step: str | None = None) -> list[Row]:
    """Only the measurements, of one step or of all."""
    return [line for line in lines if "state" not in line and step in (None, line["step"])]


def failed(row: Row) -> bool:
    """Whether a row is a check that did not pass or a case that failed."""
    return "failed" in row or not row.get("passed", True)


def _rounded(value: Any) -> Any:
    """Floats with their significant digits; NaN and infinity, which JSON lacks, as text."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else str(value)
    if isinstance(value, dict):
        return {key: _rounded(content) for key, content in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(content) for content in value]
    return value
