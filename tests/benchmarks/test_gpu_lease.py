"""A lease survives steps that hang, crash, exhaust memory and raise, and interruptions; a second run resumes."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from lease_facts import ROOT

import gpu_lease
from gpu_plan import Step
from gpu_rows import done, rows_of

GOOD = Step("good", 40, "", "broken_steps:good")
HANGS = Step("hangs", 40, "", "broken_steps:hangs", case_limit_s=2)
KILLS = Step("kills", 40, "", "broken_steps:kills_itself")
FILLS = Step("fills", 40, "", "broken_steps:fills_memory")
RAISES = Step("raises", 40, "", "broken_steps:raises")
LAST = Step("last", 40, "", "broken_steps:good", {"names": "c"})


def values(rows, step: str) -> list[str]:
    return [row["value"] for row in rows_of(rows.read(), step) if "value" in row]


def test_a_broken_case_costs_only_itself(lease, rows):
    code, printed = lease(GOOD, HANGS, KILLS, FILLS, RAISES, LAST, seconds=240)
    assert code == 1
    assert values(rows, "good") == ["a", "b"]
    assert values(rows, "hangs") == ["before", "a first row", "behind"]
    assert values(rows, "kills") == ["before", "behind"]
    assert values(rows, "fills") == ["behind"]
    assert values(rows, "last") == ["c"]
    failures = {row["case"]: row for row in rows_of(rows.read()) if "failed" in row}
    assert failures["hangs"]["failed"] == "no row for 2 s"
    assert failures["kills"]["failed"] == "killed by SIGKILL"
    assert (failures["hangs"]["variant"], failures["kills"]["variant"]) == ("slow", "deadly")
    assert failures["fills"]["failed"].startswith("MemoryError")
    assert failures["raises"]["failed"] == "RuntimeError: no such instruction"
    for line in ("wrong: hangs: hangs: no row for 2 s", "wrong: kills: kills: killed by SIGKILL"):
        assert line in printed
    before = rows.path.read_bytes()
    assert lease(GOOD)[0] == 0
    assert lease(HANGS)[0] == 1, "a failure is final"
    assert rows.path.read_bytes() == before, "what is done is not done again"


def test_a_variant_that_crashes_the_process_is_skipped(lease, rows):
    code, _ = lease(Step("tries", 60, "", "broken_steps:tries"))
    assert code == 1
    found = rows_of(rows.read())
    assert [row["variant"] for row in found if "failed" in row] == ["deadly"]
    assert [row["variant"] for row in found if "median_ms" in row] == ["first", "first", "last"]
    assert done(rows.read(), "tries") == {"all"}


def test_a_step_that_cannot_start_is_not_retried(lease):
    code, printed = lease(Step("odd", 40, "", "broken_steps:cannot_begin"), LAST)
    assert code == 1
    assert "incomplete: exit code 1: RuntimeError: no such device" in printed
    assert "incomplete, the same command resumes: odd" in printed


@pytest.mark.slow
def test_a_step_out_of_time_does_not_use_the_time_of_others(lease, rows):
    hangs = Step("hangs", 20, "", "broken_steps:hangs")
    began = time.monotonic()
    code, printed = lease(hangs, LAST, seconds=60)
    assert code == 1
    assert "incomplete: out of time in hangs" in printed
    assert values(rows, "last") == ["c"]
    assert time.monotonic() - began < 58
    assert done(rows.read(), "hangs") == {"before"}, "an interrupted case may run again"


def test_steps_without_time_are_skipped_and_reported(lease, rows):
    code, printed = lease(GOOD, LAST, seconds=gpu_lease.MIN_S - 1)
    assert code == 1
    assert printed.count("skipped: no time left") == 4  # when it happens, and in the table
    assert not rows.path.read_bytes()


INTERRUPTED = """
import sys
import gpu
from gpu_plan import Step
from lease_facts import FACTS
gpu._query_device = lambda dry_run: FACTS
endless = Step("endless", 60, "", "broken_steps:writes_until", {"file": sys.argv[2]})
steps = (endless, Step("next", 9, "", "broken_steps:good"))
from pathlib import Path
sys.exit(gpu.run(steps, 90, Path(sys.argv[1]), dry_run=True))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_plan_keeps_its_rows_and_leaves_no_child(number, tmp_path, rows):
    paths = [str(Path(__file__).parent), str(ROOT / "src"), str(ROOT / "benchmarks")]
    began = tmp_path / "began"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-c", INTERRUPTED, str(tmp_path), str(began)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        wait_for(lambda: began.exists() and began.read_text())
        wait_for(lambda: values(rows, "endless") == ["quick", "began"])
        process.send_signal(number)
        printed, _ = process.communicate(timeout=30)
    if number != signal.SIGKILL:
        assert process.returncode == 128 + number
        last = printed.splitlines()[-1]
        assert last == f"interrupted; 2 rows are kept in {rows.path}; the same command resumes"
    step, its_child = map(int, began.read_text().split())
    left = [step] if number == signal.SIGKILL else [step, its_child]  # the lease itself is killed, too
    wait_for(lambda: not any(map(alive, left)))
    with contextlib.suppress(ProcessLookupError):
        os.kill(its_child, signal.SIGKILL)
    assert values(rows, "endless") == ["quick", "began"]


def wait_for(condition, seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


def alive(pid: int) -> bool:
    """Whether a process runs and is not a zombie."""
    status = Path(f"/proc/{pid}/status")
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return "State:\tZ" not in status.read_text()
    return False
