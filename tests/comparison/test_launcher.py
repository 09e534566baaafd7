"""Runs as processes: one that dies ends no other, all end with the parent, a folder has one comparison."""

import logging
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from flashmhf.comparison import Comparison, compare
from flashmhf.comparison.launcher import signals_interrupt, train_runs
from flashmhf.data.config import DataConfig
from flashmhf.errors import InputError, Interrupted
from flashmhf.training.config import TrainConfig


@dataclass
class FakeRun:
    """What the launcher uses of a `Run`; its process is a line of Python."""

    folder: Path
    code: str
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        return self.folder.name

    @property
    def finished(self) -> bool:
        return self.folder.exists()

    @property
    def log(self) -> Path:
        return self.folder.with_name(self.folder.name + ".log")

    @property
    def config_file(self) -> Path:
        return self.folder.with_name(self.folder.name + ".json")

    @property
    def command(self) -> tuple[str, ...]:
        return sys.executable, "-c", self.code, str(self.folder)


FINISH = "import os, sys; os.mkdir(sys.argv[1])"
ENDS = {
    "terminated": ("import os; os.kill(os.getpid(), 15)", "was killed by SIGTERM"),
    "killed": ("import os; os.kill(os.getpid(), 9)", "was killed by SIGKILL"),
    "after a checkpoint": ("raise SystemExit(143)", "failed with exit code 143"),
    "interrupted": ("raise SystemExit(130)", "failed with exit code 130"),
    "failed": ("raise SystemExit('first line\\nthe reason')", "failed with exit code 1 (the reason)"),
    "unfinished": ("pass", "failed with exit code 0"),
}


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("jobs", [1, 2])
def test_a_run_that_dies_ends_no_other_and_is_tried_again(tmp_path, caplog, end, jobs):
    code, message = ENDS[end]
    runs: Any = [FakeRun(tmp_path / "first", code), FakeRun(tmp_path / "second", FINISH)]
    with caplog.at_level(logging.WARNING, "flashmhf"):
        train_runs(runs, jobs, os.environ, lambda line: None)
    assert [run.finished for run in runs] == [False, True]
    assert caplog.messages == [f"first {message}; the same command tries it again"]
    runs[0].code = FINISH
    train_runs(runs, jobs, os.environ, lambda line: None)
    assert runs[0].finished


def test_a_hangup_that_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals_interrupt():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            with pytest.raises(Interrupted, match="SIGTERM"):
                signal.raise_signal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


PARENT = """
import os, sys
from flashmhf.comparison.launcher import _Processes
from flashmhf.lifeline import lifeline
child = "from flashmhf.lifeline import end_with_parent; end_with_parent(); import os, signal, subprocess, sys, time;"
child += "signal.signal(15, signal.SIG_IGN); inner = subprocess.Popen(['sleep', '60']);"
child += "print(os.getpid(), inner.pid, file=sys.stderr, flush=True); time.sleep(60)"
with lifeline() as parent:
    _Processes(parent).run([sys.executable, "-c", child], os.environ, None)
"""


def test_a_run_and_its_children_end_with_a_parent_that_is_killed():
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stderr=subprocess.PIPE, text=True)
    assert parent.stderr is not None
    children = parent.stderr.readline().split()
    assert len(children) == 2, parent.stderr.read()
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    deadline = time.monotonic() + 20
    while any(alive(child) for child in children):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    parent.stderr.close()


def alive(pid: str) -> bool:
    """Neither gone nor waiting for somebody to read its exit code."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


HOLD = "import sys; from pathlib import Path; from flashmhf.training.resuming import only_writer\n"
HOLD += "with only_writer(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"


def test_a_second_comparison_in_one_folder_is_refused_at_once(corpus_folder, model_file, tmp_path):
    settings = Comparison(
        variants=("swiglu",),
        models=(str(model_file),),
        train=TrainConfig(model="", data=DataConfig(source=str(corpus_folder), context_length=64)),
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(InputError, match="output-dir: expected a folder that no other process trains into, got"):
        compare(settings, tmp_path, lambda line: None)
    assert not (tmp_path / "compare.json").exists()
    holder.communicate("")
