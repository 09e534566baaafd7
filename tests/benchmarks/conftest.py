"""A lease without a GPU: its rows, its provenance, and the path of its steps."""

import os
import signal
from pathlib import Path

import pytest
from lease_facts import FACTS, ROOT

import gpu


@pytest.fixture
def lease(tmp_path, monkeypatch, capsys):
    """Runs steps as gpu.py does, without querying the device; returns exit code and output."""
    paths = [str(Path(__file__).parent), str(ROOT / "src"), str(ROOT / "benchmarks")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    monkeypatch.setattr(gpu, "_query_device", lambda dry_run: FACTS)
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    def run(*steps, seconds: float = 120) -> tuple[int, str]:
        code = gpu.run(steps, seconds, tmp_path, dry_run=True)
        return code, capsys.readouterr().out

    yield run
    for number, handler in zip((signal.SIGINT, signal.SIGTERM), before, strict=True):
        signal.signal(number, handler)


@pytest.fixture
def rows(tmp_path):
    """The file of `lease`'s rows."""
    from gpu_rows import RowFile, file_of

    return RowFile(file_of(tmp_path, FACTS), FACTS)
