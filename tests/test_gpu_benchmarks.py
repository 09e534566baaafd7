"""benchmarks/gpu.py and tune.py as far as they go without a GPU: what is kept, what is run again, every case built."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gpu
import gpu_record
import tune
from flashmhf.ops.triton.tiles import TABLE, Tile
from gpu_bench import Bench, OutOfTimeError
from gpu_record import Record
from gpu_speed import growth_fit

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def record(tmp_path, monkeypatch):
    """Opens the record of a run, as a new process would."""
    same = {"machine": "toy", "torch": "2", "triton": "3"}

    def open_record(time_limit_s: float = 60, code: str = "abc", **changes: str) -> Record:
        monkeypatch.setattr(gpu_record, "provenance", lambda device: same | changes)
        monkeypatch.setattr(gpu_record, "code_hash", lambda: code)
        return Record(tmp_path / "out", Bench(True, time_limit_s))

    return open_record


def cases_of(calls: list[str], names: str = "abc"):
    for name in names:
        yield name, lambda name=name: calls.append(name) or [{"value": name, "passed": True}]


def test_what_ran_is_not_run_again(record, tmp_path):
    calls: list[str] = []
    record().run("s", cases_of(calls, "ab"))
    record().run("s", cases_of(calls, "abc"))
    assert calls == ["a", "b", "c"]
    section = json.loads((tmp_path / "out.json").read_text())["sections"]["s"]
    assert section["complete"]
    assert [row["value"] for row in section["rows"]] == ["a", "b", "c"]


@pytest.mark.parametrize("changes", [{"code": "def"}, {"machine": "other"}, {"torch": "3"}])
def test_another_code_or_machine_starts_anew(record, changes):
    calls: list[str] = []
    record().run("s", cases_of(calls))
    record(**changes).run("s", cases_of(calls))
    assert calls == ["a", "b", "c"] * 2


def test_a_changed_file_is_another_code(tmp_path, monkeypatch):
    before = gpu_record.code_hash()
    assert gpu_record.code_hash() == before
    monkeypatch.setattr(gpu_record, "__file__", str(tmp_path / "gpu_record.py"))
    hashes = {before, gpu_record.code_hash()}
    (tmp_path / "gpu.py").write_text("pass")
    assert len(hashes | {gpu_record.code_hash()}) == 3


def test_the_time_limit_leaves_cases_for_the_next_run(record, tmp_path):
    calls: list[str] = []
    record(time_limit_s=0).run("s", cases_of(calls))
    assert calls == []
    assert "incomplete" in (tmp_path / "out.md").read_text()

    def cut_short():
        raise OutOfTimeError

    record().run("s", [*cases_of(calls, "a"), ("slow", cut_short), *cases_of(calls, "b")])
    assert calls == ["a"]
    later = record()
    later.run("s", cases_of(calls))
    assert calls == ["a", "b", "c"]
    assert later.sections["s"]["complete"]


def test_a_case_that_fails_leaves_a_row(record):
    def fail():
        raise RuntimeError("no such\ninstruction")

    run = record()
    run.run("s", [("bad", fail), ("off", lambda: [{"passed": False}]), *cases_of([])])
    assert run.sections["s"]["complete"]
    assert run.failures() == [{"case": "bad", "failed": "RuntimeError: no such instruction"}, {"passed": False}]


def test_growth_is_the_slope_of_the_logarithms():
    rows = [{"tokens": T, "median_ms": 3 * T**1.5, "peak_bytes_per_token": 9.0} for T in (10, 100, 400)]
    rows.append({"tokens": 1000, "failed": "OutOfMemoryError"})
    fit = growth_fit(rows)
    assert fit["exponent_of_time"] == pytest.approx(1.5)
    assert fit["tokens"] == [10, 400]
    assert growth_fit(rows[:1]) == {}


def test_proposed_rows_can_be_pasted():
    shipped = TABLE["sm_80"][2]["forward"]  # the class of a machine without a GPU
    row = {"kernel": "forward", "dtype": "bfloat16", "best": [64, 32, 4, 2], "best_ms": {}}
    rows = [row | {"D": 64, "speedup": 1.2}, row | {"D": 128, "speedup": 1.01}, {"case": "x", "failed": "y"}]
    name, _, tiles = tune.proposal(rows).partition(": ")
    assert name == '"forward"'
    (pasted,) = eval(f"({tiles}\n)", {"Tile": Tile})
    assert pasted == (shipped[0], Tile(64, 32, 4, 2), *shipped[2:])
    assert tune.proposal([]) == "# the shipped rows are the best of the grid"


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        (gpu, ["--sections", "x"], "--sections: expected some of correctness, "),
        (tune, ["--dims", "7"], "--dims: expected some of 32, 64, 128, 256, got '7'"),
        (tune, ["--kernels", "sort"], "--kernels: expected some of decode, "),
    ],
)
def test_bad_usage_is_one_line_and_exit_code_2(script, arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["script", *arguments])
    with pytest.raises(SystemExit, match="2"):
        script.main()
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("script", [gpu, tune])
def test_without_a_gpu_the_scripts_say_so(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["script"])
    with pytest.raises(SystemExit, match="2"):
        script.main()
    assert "expected a CUDA or ROCm GPU, found none" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("script", ["gpu.py", "tune.py"])
def test_every_case_of_the_scripts_builds(script, tmp_path):
    command = [sys.executable, str(BENCHMARKS / script), "--dry-run", "--output", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    sections = json.loads((tmp_path / "out.json").read_text())["sections"]
    assert all(section["complete"] and section["rows"] for section in sections.values())
    assert not [row for section in sections.values() for row in section["rows"] if "failed" in row]
