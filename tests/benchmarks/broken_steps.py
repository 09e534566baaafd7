"""Steps that a plan must survive, each in a process that gpu_lease.py starts."""

import os
import resource
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from gpu_bench import Bench, Case


def good(bench: Bench, names: str = "ab") -> Iterator[Case]:
    for name in names:
        yield Case(name, lambda name=name: [{"value": name, "pid": os.getpid()}])


def hangs(bench: Bench) -> Iterator[Case]:
    yield Case("before", lambda: [{"value": "before"}])
    yield Case("hangs", _hang, {"variant": "slow"})
    yield Case("behind", lambda: [{"value": "behind"}])


def kills_itself(bench: Bench) -> Iterator[Case]:
    yield Case("before", lambda: [{"value": "before"}])
    yield Case("kills", lambda: os.kill(os.getpid(), signal.SIGKILL), {"variant": "deadly"})
    yield Case("behind", lambda: [{"value": "behind"}])


def fills_memory(bench: Bench) -> Iterator[Case]:
    yield Case("fills", _fill)
    yield Case("behind", lambda: [{"value": "behind"}])


def raises(bench: Bench) -> Iterator[Case]:
    yield Case("raises", _raise)
    yield Case("off", lambda: [{"result": "out", "error": 1.0, "budget": 0.1, "passed": False}])


def cannot_begin(bench: Bench) -> Iterator[Case]:
    raise RuntimeError("no such device")


def tries(bench: Bench) -> Iterator[Case]:
    """One of three variants crashes the process; the case continues without it."""
    wrong = {row["variant"] for row in bench._rows if "failed" in row}
    yield Case("all", lambda: _try(wrong))


def _try(wrong: set[str]) -> Iterator[dict]:
    for variant in ("first", "deadly", "last"):
        if variant not in wrong:
            yield {"state": "trying", "variant": variant}
            if variant == "deadly":
                os.kill(os.getpid(), signal.SIGKILL)
            yield {"variant": variant, "median_ms": 1.0}
    yield {"state": "timing"}


def writes_until(bench: Bench, file: str) -> Iterator[Case]:
    """Writes its process ids, of itself and of a child, and never ends."""
    yield Case("quick", lambda: [{"value": "quick"}])
    yield Case("endless", lambda: _endless(Path(file)))


def _endless(file: Path) -> Iterator[dict]:
    child = os.fork()
    if child == 0:
        os.setpgrp()  # as the compilers of compile_ahead do
        time.sleep(600)
    file.write_text(f"{os.getpid()} {child}")
    yield {"value": "began"}
    time.sleep(600)


def _hang() -> Iterator[dict]:
    yield {"value": "a first row"}
    time.sleep(600)


def _fill() -> list[dict]:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, before[1]))
    try:
        return [{"bytes": len(b"x" * 2**30)}]
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def _raise() -> list[dict]:
    raise RuntimeError("no such\ninstruction")
