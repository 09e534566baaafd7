"""Rows of measurements on the disk, as JSON lines: appended whole, read with what is torn left out, merged.

Every line is an object with its step, its case and the facts of the run: device, versions, commit.
A line with a `state` says of a case that it has "started", is "trying" something or is "done"; any other is a row.
Imports the standard library alone: the process that starts the steps never waits for torch.
"""

import json
import math
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]
DIGITS = 6  # of a float; no clock has more to say
SAME = ("device", "torch", "triton", "code")  # what rows must share to belong to the same run


class UnusableError(Exception):
    """A file that cannot be written or read: one line for the user."""


class RowFile:
    """The rows of one device and one state of the code."""

    def __init__(self, path: Path, facts: Row) -> None:
        self.path = path
        self.facts = facts

    def prepare(self) -> None:
        """Makes the folder and ends a line that an earlier run could not end.

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
        """Writes one line and hands it to the operating system; on a full disk the file stays what it was.

        Raises:
            UnusableError: nothing can be written there.
        """
        taken = {"step", "case", *self.facts} & row.keys()
        assert not taken, f"a row of {step} with names that say where it comes from: {taken}"
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
                if written != len(line):  # as much as still fitted
                    file.truncate(before)
                    raise OSError(None, "the disk is full")
        except OSError as error:
            raise UnusableError(f"output: cannot write to {str(self.path)!r}: {error.strerror}") from error

    def read(self) -> list[Row]:
        """All lines of this run: those of another device, other versions or other code are left out."""
        lines, _ = read_lines(self.path)
        return [line for line in lines if all(line.get(key) == self.facts.get(key) for key in SAME)]


def append_failure(rows: RowFile, step: str, case: str, latest: Row, reason: str) -> None:
    """Writes that a case broke; `latest` is its line with a state that says what it was at.

    The case is over, unless it was only trying something: without that it can go on.
    """
    about = {key: value for key, value in latest.items() if key not in ("state", "step", "case", *rows.facts)}
    rows.append(step, case, about | {"failed": reason})
    if latest["state"] != "trying":
        rows.append(step, case, {"state": "done"})


def file_of(output: Path, facts: Row) -> Path:
    """Where the rows of a device and a commit are. Code that is changed, or has no commit, is named by its content."""
    device = re.sub(r"[^a-z0-9]+", "-", facts["device"].lower()).strip("-")
    return output / f"{device}-{facts['commit'] or facts['code']}.jsonl"


def read_lines(path: Path) -> tuple[list[Row], int]:
    """The lines of a file, and how many were none: a process or a disk may have ended in one.

    Raises:
        UnusableError: it cannot be read.
    """
    try:
        texts = path.read_bytes().splitlines() if path.exists() else []
    except OSError as error:
        raise UnusableError(f"rows: cannot read {str(path)!r}: {error.strerror}") from error
    lines, torn = [], 0
    for text in texts:
        try:
            line = json.loads(text)
        except ValueError:
            line = None
        if isinstance(line, dict) and isinstance(line.get("step"), str):
            lines.append(line)
        else:
            torn += bool(text.strip())
    return lines, torn


def started(lines: Iterable[Row], step: str) -> set[str]:
    """The cases of a step that began, whether or not they ended."""
    return {line["case"] for line in lines if line["step"] == step and line.get("state") == "started"}


def done(lines: Iterable[Row], step: str) -> set[str]:
    """The cases of a step that need not run again."""
    return {line["case"] for line in lines if line["step"] == step and line.get("state") == "done"}


def rows_of(lines: Iterable[Row], step: str | None = None) -> list[Row]:
    """The measurements alone, of one step or of all."""
    return [line for line in lines if "state" not in line and step in (None, line["step"])]


def failed(row: Row) -> bool:
    """Whether a row says that something is wrong: a check that did not pass, a case that broke."""
    return "failed" in row or not row.get("passed", True)


def _rounded(value: Any) -> Any:
    """Floats with as many digits as mean something; JSON knows neither NaN nor infinity."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else str(value)
    if isinstance(value, dict):
        return {key: _rounded(content) for key, content in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(content) for content in value]
    return value
