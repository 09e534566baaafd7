"""Pages of runs: one file each, which shows what the log contains."""

import json

import pytest

from comparison_results import Collector, result
from flashmhf.cli import app
from flashmhf.comparison.results import (
    write_comparison,
)
from flashmhf.errors import InputError
from flashmhf.reports.run import write_run_report


def log_lines(folder, *lines):
    folder.mkdir(exist_ok=True)
    (folder / "run.json").write_text('{"model": "flashmhf-tiny", "data": "books"}')
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_the_page_of_a_run(tmp_path):
    speed = {"tokens_per_second": 1000.0, "memory_mib": 512.0}
    log_lines(
        tmp_path,
        {"start": 0, "time": 0.0},
        *({"step": step, "time": float(step), "loss": 5.0 - step / 10, **speed} for step in range(1, 20)),
        {"start": 10, "time": 100.0},
        *({"step": step, "time": 90.0 + step, "loss": 5.0 - step / 10, **speed} for step in range(11, 31)),
        {"step": 30, "time": 121.0, "eval_loss": 2.5},
    )
    summary = write_run_report(tmp_path, tmp_path / "page.html")
    assert (summary.starts, summary.lost_steps, summary.steps) == (2, 9, 30)
    assert (summary.validation_loss, summary.tokens_per_second, summary.elapsed_s) == (2.5, 1000.0, 31.0)
    page = Collector()
    page.feed((tmp_path / "page.html").read_text())
    assert page.tags.count("svg") == 4  # the losses by step and time, each also without the first steps
    assert "lost steps" in page.text


def test_a_folder_without_a_run_has_no_page(tmp_path):
    with pytest.raises(InputError, match=r"DIR: expected a training run's folder with run.json, got"):
        write_run_report(tmp_path, tmp_path / "page.html")
    log_lines(tmp_path, {"start": 0, "time": 0.0})
    with pytest.raises(InputError, match="DIR: expected a run with at least one logged loss, got"):
        write_run_report(tmp_path, tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_the_command_draws_runs_and_comparisons(tmp_path, capsys):
    write_comparison(result(), tmp_path / "results.json")
    app(["report", str(tmp_path), "--json"], standalone_mode=False)
    shown = json.loads(capsys.readouterr().out)
    assert shown["report"] == str(tmp_path / "report.html")
    assert shown["variants"][0]["variant"] == "swiglu"
    assert "Feed-forward layers compared" in (tmp_path / "report.html").read_text()
    log_lines(tmp_path / "run", {"start": 0, "time": 0.0}, {"step": 1, "time": 1.0, "loss": 5.0})
    app(["report", str(tmp_path / "run")], standalone_mode=False)
    assert "training loss              5\n" in capsys.readouterr().out
