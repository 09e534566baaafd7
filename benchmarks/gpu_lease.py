"""Runs the steps of a plan in sequence, each in its own process, within a time limit.

A step that hangs, crashes or runs out of memory only loses the case at fault: its process restarts after that case.
While one step measures, the next one's process already imports torch. This process does not import torch, holds no
rows, and leaves no child behind.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gpu_plan import Step
from gpu_rows import Row, RowFile, UnusableError, append_failure

SCRIPT = Path(__file__).with_name("gpu_step.py")
COMPLETE, OUT_OF_TIME, DEVICE_BROKEN, UNUSABLE = 0, 10, 11, 12  # exit codes of gpu_step.py
MIN_S = 5  # a step with less is skipped
GRACE_S = 3  # no case starts this close to the limit
POLL_S = 0.05
ENVIRONMENT = {
    "KINETO_LOG_LEVEL": "6",  # silences torch's profiler
    "PYTHONFAULTHANDLER": "1",  # the log shows where a process crashed
    "PYTHONUNBUFFERED": "1",
}


@dataclass
class Outcome:
    """How a step ended; `state` is "complete", "skipped: ..." or "incomplete: ..."."""

    step: Step
    seconds: float
    state: str


class Lease:
    """A time limit and its processes; leaving the context kills them all.

    Attributes:
        done: the outcomes so far.
        log: the steps' output.
    """

    def __init__(self, steps: tuple[Step, ...], seconds: float, output: Path, dry_run: bool) -> None:
        self.done: list[Outcome] = []
        self.log = output / "steps.log"
        self._steps = steps
        self._dry_run = dry_run
        self._deadline = time.monotonic() + seconds
        self._processes: list[subprocess.Popen[str]] = []

    def __enter__(self) -> "Lease":
        self._waiting = self._start(self._steps[0])
        return self

    def __exit__(self, *exception: object) -> None:
        while self._processes:
            self._end(self._processes[-1])

    def outcomes(self, rows: RowFile) -> Iterator[Outcome]:
        """Runs the steps and yields the outcome of each.

        Raises:
            UnusableError: rows can no longer be written.
        """
        self.rows = rows
        for number, step in enumerate(self._steps):
            process, later = self._waiting, self._steps[number + 1 :]
            if later:
                self._waiting = self._start(later[0])
            self.done.append(self._step(step, process, sum(other.limit_s for other in later)))
            yield self.done[-1]

    def _step(self, step: Step, process: subprocess.Popen[str], later_s: float) -> Outcome:
        left = self._deadline - time.monotonic()
        if left < MIN_S:
            return Outcome(step, 0, "skipped: no time left")
        began = time.monotonic()
        deadline = began + min(left, max(step.limit_s, left - later_s))  # including what earlier steps saved
        state = self._attempt(step, process, deadline)
        while state is None:
            state = self._attempt(step, self._start(step), deadline)
        return Outcome(step, time.monotonic() - began, state)

    def _attempt(self, step: Step, process: subprocess.Popen[str], deadline: float) -> str | None:
        """The outcome of a step, or None if a new process should continue after the case that ended this one."""
        before = len(self._lines(step))
        self._go(step, process, deadline)
        reason = self._watch(step, process, deadline, before)
        self._end(process)
        if process.returncode == UNUSABLE:
            self.rows.append(step.name, "", {"state": "stopped"})  # raises the reason if it persists
            raise UnusableError(f"output: rows could not be written; see {self.log}")
        if process.returncode == COMPLETE:
            return "complete"
        latest = self._in_flight(step, before)
        if process.returncode == OUT_OF_TIME or time.monotonic() >= deadline:
            return "incomplete: out of time" + ("" if latest is None else f" in {latest['case']}")
        reason = reason or _exit_reason(process.returncode, self.log)
        if process.returncode != DEVICE_BROKEN:  # which has written its own failure
            if latest is None:
                return f"incomplete: {reason}"  # outside any case: another process would fail the same way
            append_failure(self.rows, step.name, latest["case"], latest, reason)
        return None if deadline - time.monotonic() > MIN_S else f"incomplete: {reason}"

    def _start(self, step: Step) -> subprocess.Popen[str]:
        """Starts a process that imports what the step needs and waits.

        Raises:
            UnusableError: the log cannot be written.
        """
        try:
            self.log.parent.mkdir(parents=True, exist_ok=True)
            log = self.log.open("a")
        except OSError as error:
            raise UnusableError(f"output: cannot write to {str(self.log)!r}: {error.strerror}") from error
        with log:
            process = subprocess.Popen(
                [sys.executable, str(SCRIPT), step.cases],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                text=True,
                env={**os.environ, **ENVIRONMENT},
                start_new_session=True,  # so that it can be killed with all its children
            )
        self._processes.append(process)
        return process

    def _end(self, process: subprocess.Popen[str]) -> None:
        """Kills a process and its session, since compilers have their own process groups."""
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(ProcessLookupError):
                if os.getsid(int(entry.name)) == process.pid:
                    os.kill(int(entry.name), signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):  # stuck in the driver
            process.wait(10)
        with contextlib.suppress(BrokenPipeError):
            assert process.stdin is not None
            process.stdin.close()
        self._processes.remove(process)

    def _go(self, step: Step, process: subprocess.Popen[str], deadline: float) -> None:
        message = {
            "step": step.name, "options": step.options, "file": str(self.rows.path), "facts": self.rows.facts,
            "dry_run": self._dry_run, "until": deadline - GRACE_S,
        }  # fmt: skip
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has exited; _watch sees how
            process.stdin.write(json.dumps(message) + "\n")
            process.stdin.flush()

    def _watch(self, step: Step, process: subprocess.Popen[str], deadline: float, before: int) -> str | None:
        """Waits until the process exits or has to be killed, and returns the reason in that case."""
        size, since = self._size(), time.monotonic()
        while process.poll() is None:
            now = time.monotonic()
            if now >= deadline:
                return "out of time"
            if self._size() != size:
                size, since = self._size(), now
            elif step.case_limit_s is not None and now - since > step.case_limit_s and self._in_flight(step, before):
                process.send_signal(signal.SIGUSR1)
                time.sleep(POLL_S)  # lets it write its stack to the log
                return f"no row for {step.case_limit_s} s"
            time.sleep(POLL_S)
        return None

    def _in_flight(self, step: Step, before: int) -> Row | None:
        """The last state line of a step's current process, unless it says that a case is done.

        `before`: the number of lines before that process.
        """
        states = [line for line in self._lines(step)[before:] if "state" in line]
        return states[-1] if states and states[-1]["state"] != "done" else None

    def _lines(self, step: Step) -> list[Row]:
        return [line for line in self.rows.read() if line["step"] == step.name]

    def _size(self) -> int:
        return self.rows.path.stat().st_size if self.rows.path.exists() else 0


def _exit_reason(code: int | None, log: Path) -> str:
    """How a process ended, and the last line of its log."""
    if code is not None and code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return f"exit code {code}: {_last_line(log)}"


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1][:200] if lines else "nothing printed"
