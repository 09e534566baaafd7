"""The process of one step: python gpu_step.py MODULE:FUNCTION, started by gpu_lease.py.

It imports what it needs, waits for one line of JSON on standard input, and runs cases until they or its time are
exhausted. Each row is on disk before the next is measured. If standard input closes, the parent is gone, and this
process exits, too.
"""

import faulthandler
import gc
import importlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from flashmhf.benchmarking.layer import describe
from gpu_bench import Bench, Case, OutOfTimeError
from gpu_lease import COMPLETE, DEVICE_BROKEN, OUT_OF_TIME, UNUSABLE
from gpu_rows import RowFile, UnusableError, append_failure, done, started


def main() -> int:
    module, _, function = sys.argv[1].partition(":")
    cases: Callable[..., Iterator[Case]] = getattr(importlib.import_module(module), function)
    message = sys.stdin.readline()
    if not message:
        return COMPLETE
    threading.Thread(target=_end_with_parent, daemon=True).start()
    faulthandler.register(signal.SIGUSR1)  # shows where it hangs
    try:
        return run(cases, **json.loads(message))
    except UnusableError as error:
        print(error, file=sys.stderr)
        return UNUSABLE


def _end_with_parent() -> None:
    os.read(sys.stdin.fileno(), 1)  # blocks until standard input closes
    os.killpg(0, signal.SIGKILL)


def run(
    cases: Callable[..., Iterator[Case]],
    step: str,
    options: dict[str, Any],
    file: str,
    facts: dict[str, Any],
    dry_run: bool,
    until: float,
) -> int:
    """Runs the cases that are not done, starts none after `until` on the monotonic clock; returns an exit code."""
    torch.manual_seed(time.time_ns() % 2**31)  # fresh data in every run
    rows = RowFile(Path(file), facts)
    lines = rows.read()
    bench = Bench(dry_run, until, lines)
    over, begun = done(lines, step), started(lines, step)
    left = [case for case in cases(bench, **options) if case.name not in over]
    for case in sorted(left, key=lambda case: case.name in begun):  # interrupted ones last
        if bench.remaining_s() <= 0:
            return OUT_OF_TIME
        latest = case.about | {"state": "started"}
        rows.append(step, case.name, latest)
        try:
            for row in case.measure():
                rows.append(step, case.name, row)
                latest = row if "state" in row else latest
        except OutOfTimeError:
            return OUT_OF_TIME
        except UnusableError:
            raise
        except Exception as error:  # any error of compiler or driver: the other cases still run
            append_failure(rows, step, case.name, latest, describe(error))
        if broken := _device_error():
            append_failure(rows, step, case.name, latest, broken)
            return DEVICE_BROKEN
        rows.append(step, case.name, {"state": "done"})
    return COMPLETE


def _device_error() -> str | None:
    """The device's error after all work is done and memory is freed; after an illegal access nothing runs."""
    gc.collect()
    if torch.cuda.is_available():
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError as error:
            return describe(error)
    return None


if __name__ == "__main__":
    exit_code = main()
    sys.stdout.flush()
    os._exit(exit_code)  # everything is on disk, and a hanging device would block a normal exit
