"""Numba's cache: where it cannot be written, what makes it stale, and two processes that fill it at once."""

import logging
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import offline
import pytest

from flashmhf.ops import onednn as package

pytestmark = pytest.mark.usefixtures("onednn")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("no locator available")])
def test_a_cache_that_cannot_be_written(error, monkeypatch, caplog):
    from flashmhf.ops.onednn import launch

    attempts = []

    def cfunc(signature, **options):
        attempts.append(options.get("cache", False))
        if options.get("cache"):
            raise error
        return lambda function: "compiled"

    monkeypatch.setattr(launch.numba, "cfunc", cfunc)
    with caplog.at_level(logging.INFO, logger="flashmhf"):
        assert launch.region(lambda pointer: None) == "compiled"
    assert attempts == [True, False]
    (record,) = caplog.records
    assert record.getMessage() == f"the onednn backend's kernels are compiled in every process: {error}"


def test_the_fingerprint_follows_every_source(tmp_path, monkeypatch):
    from flashmhf.ops.onednn import launch

    for file in Path(package.__file__).parent.glob("*.py"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    before = launch._fingerprint()
    monkeypatch.setattr(launch, "__file__", str(tmp_path / "launch.py"))
    seen = {launch._fingerprint()}
    assert seen == {before}
    for file in sorted(tmp_path.iterdir()):
        file.write_bytes(file.read_bytes() + b"\n")
        seen.add(launch._fingerprint())
    assert len(seen) == 1 + len(list(tmp_path.iterdir()))
    assert f"sources_{before}" in launch.ARGUMENTS.names


SCRIPT = """
import json, logging, sys
logging.basicConfig(level=logging.INFO)
import torch
from flashmhf.ops.gated_mhf import gated_mhf
leaves = [torch.randn(size).requires_grad_() for size in ((70, 2, 8), *[(1, 2, 20, 8)] * 3, (2, 8, 2), (2, 8))]
dout = torch.randn(70, 2, 8)
results = []
for backend in ("onednn", "blockwise"):
    out = gated_mhf(*leaves, backend=backend)
    results.append([out, *torch.autograd.grad(out, leaves, dout)])
print(json.dumps(all((x - y).norm() <= 1e-5 * y.norm() for x, y in zip(*results))))
"""


@pytest.mark.slow
def test_two_processes_compile_at_once(tmp_path):
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(offline.run, SCRIPT, timeout=900, NUMBA_CACHE_DIR=str(tmp_path)) for _ in range(2)]
        assert [run.result() for run in runs] == [[True], [True]]
    files = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.nb*")}
    assert files
    assert offline.run(SCRIPT, timeout=900, NUMBA_CACHE_DIR=str(tmp_path)) == [True]
    assert files == {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.nb*")}  # nothing compiled again


@pytest.mark.slow
def test_without_a_folder_for_the_cache(tmp_path):
    """Numba finds no folder: the package's is replaced by a file, and so is the user's."""
    (tmp_path / "file").touch()
    source = Path(package.__file__).parents[3]
    copied = tmp_path / "copy"
    subprocess.run(["cp", "-r", str(source), str(copied)], check=True)
    folder = copied / "flashmhf/ops/onednn"
    for cache in folder.glob("__pycache__"):
        subprocess.run(["rm", "-r", str(cache)], check=True)
    (folder / "__pycache__").touch()
    variables = {
        name: value for name, value in os.environ.items() if name not in ("NUMBA_CACHE_DIR", "TRITON_INTERPRET")
    }
    variables |= {name: str(tmp_path / "file/no") for name in ("HOME", "XDG_CACHE_HOME")}
    variables |= {"PYTHONPATH": str(copied), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", SCRIPT]
    result = subprocess.run(command, env=variables, capture_output=True, text=True, check=True, timeout=900)
    assert result.stdout.splitlines() == ["true"]
    assert "the onednn backend's kernels are compiled in every process" in result.stderr
