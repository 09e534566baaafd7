"""Pages of several runs, and the settings of runs."""

import json
from pathlib import Path

import pytest
from test_run_report import log_lines

from comparison_results import Collector, result
from flashmhf.cli import app
from flashmhf.comparison.results import write_comparison
from flashmhf.errors import InputError
from flashmhf.reports.logged_run import read_logged_run
from flashmhf.reports.run import write_run_report
from flashmhf.reports.run_settings import differences, in_common
from flashmhf.reports.runs import _styles, groups, write_runs_report
from flashmhf.reports.style import COLOURS


def run_folder(folder: Path, *, seed: int = 0, rate: float = 1e-3, ffn_type: str = "swiglu") -> Path:
    folder.mkdir(parents=True)
    row = {"tokens_per_second": 1000.0 + seed, "memory_mib": 512.0 + 100 * seed, "grad_norm": 1.0}
    log_lines(
        folder,
        {"start": 0, "time": 0.0, "processes": 1, "machine": "NVIDIA H100", "torch": "2.13.0"},
        *(
            {"step": step, "time": float(step), "loss": 5.0 - step / 10 + seed / 10, "num_input_tokens_seen": 64 * step}
            | row
            for step in range(1, 20)
        ),
        {"step": 19, "time": 20.0, "eval_loss": 2.8 + seed / 10},
        {"step": 20, "time": 21.0, "eval_loss": 2.5 + seed / 10},
    )
    prints = {
        "data": [[1.0, "43fc036e32308592a6128a240a7e3197"]],
        "tokenizer": "a8d6",
        "config": {"ffn_type": ffn_type, "hidden_size": 256},
        "weights": None,
        "seed": seed,
        "data_seed": seed,
        "sequences_per_step": 8,
        "arguments": {
            "learning_rate": rate,
            "weight_decay": 0.1,
            "lr_scheduler_type": "cosine",
            "max_steps": 20,
            "warmup_steps": 2,
            "num_train_epochs": 3.0,
        },
    }
    options = {"version": 1, "model": "tiny", "data": "books", "context_length": 64, "fingerprints": prints}
    (folder / "run.json").write_text(json.dumps(options))
    return folder


def page_of(file: Path) -> Collector:
    page = Collector()
    page.feed(file.read_text())
    return page


def pairs_of(page: Collector) -> str:
    return " ".join(page.text.split())


def test_the_page_of_a_run_lists_every_setting(tmp_path):
    write_run_report(run_folder(tmp_path / "run", seed=7), tmp_path / "page.html")
    page = page_of(tmp_path / "page.html")
    for setting in (
        "learning rate0.001", "weight decay0.1", "schedulecosine", "warm-up steps2", "maximum steps20",
        "batch (sequences)8", "batch (tokens)512", "seed7", "databooks", "machineNVIDIA H100", "context length64",
        "ffn typeswiglu", "data hash43fc036e",
    ):  # fmt: skip
        assert setting in page.text, setting
    assert "epochs" not in page.text  # the number of steps is given


def test_losses_are_drawn_over_steps_tokens_and_time_without_a_script(tmp_path):
    write_run_report(run_folder(tmp_path / "run"), tmp_path / "page.html")
    page = page_of(tmp_path / "page.html")
    assert page.tags.count("input") == 3
    assert "script" not in page.tags
    for what in ("by step", "by tokens read", "by time in training"):
        assert f"Loss {what}" in page.text


def test_runs_that_differ_in_seeds_are_one_line(tmp_path):
    folders = [run_folder(tmp_path / f"swiglu-seed{seed}", seed=seed) for seed in (0, 1)]
    folders.append(run_folder(tmp_path / "flash", ffn_type="flashmhf"))
    found = groups([read_logged_run(folder) for folder in folders])
    assert [(group.name, len(group.runs)) for group in found] == [("swiglu", 2), ("flash", 1)]
    summaries = write_runs_report(folders, tmp_path / "page.html")
    assert [summary.validation_loss for summary in summaries] == [2.5, 2.6, 2.5]
    page = page_of(tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert "<!-- swiglu, 2 seeds -->" in text
    assert "<!-- flash -->" in text
    assert "a band from the lowest to the highest" in pairs_of(page)
    assert "swiglu-seed0" in page.text
    assert text.count('<tr class="marked">') == 3  # the seeds and the layer
    assert 'data-label="swiglu">0, 1<' in text


def test_settings_that_differ_are_marked_and_the_others_listed_once(tmp_path):
    runs = {
        name: [read_logged_run(run_folder(tmp_path / name, rate=rate)).settings]
        for name, rate in (("low", 1e-3), ("high", 4e-3))
    }
    table = differences(runs)
    assert table is not None
    assert list(table.rows) == [("learning rate", "0.001", "0.004")]
    assert table.marked == {0}
    assert "learning rate" not in dict(in_common(runs))
    assert dict(in_common(runs))["weight decay"] == "0.1"
    assert differences({"one": runs["low"]}) is None


def test_the_command_draws_several_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for number in (1, 2):
        run_folder(Path(f"run{number}"), rate=number * 1e-3)
    app(["report", "run1", "run2"], standalone_mode=False)
    lines = capsys.readouterr().out.strip().splitlines()
    assert lines[-1] == "report: runs.html"
    assert lines[0].split()[:5] == ["run", "steps", "tokens", "training", "loss"]
    assert lines[2].split() == ["run1", "20", "1,216", "3.1000", "2.5000", "1,000", "512"]
    assert max(map(len, lines)) <= 80
    app(["report", "run1", "run2", "--output", "both.html", "--json"], standalone_mode=False)
    shown = json.loads(capsys.readouterr().out)
    assert [run["run"] for run in shown["runs"]] == ["run1", "run2"]
    assert shown["report"] == "both.html"
    assert "learning rate" in page_of(Path("both.html")).text


def test_what_cannot_be_drawn_together_is_named(tmp_path):
    run = run_folder(tmp_path / "run")
    (tmp_path / "cmp").mkdir()
    write_comparison(result(), tmp_path / "cmp/results.json")
    with pytest.raises(InputError, match=r"DIR: expected training runs, if several, got .*cmp; its runs are in .*cmp/"):
        app(["report", str(run), str(tmp_path / "cmp"), "--output", str(tmp_path / "a.html")], standalone_mode=False)
    with pytest.raises(InputError, match="DIR: expected each run once, got"):
        write_runs_report([run, run], tmp_path / "a.html")
    assert not (tmp_path / "a.html").exists()


def test_a_comparison_lists_the_settings_of_its_runs(tmp_path):
    from flashmhf.reports.comparison import write_files

    for run in result().runs:
        run_folder(tmp_path / "runs" / run.folder, seed=run.seed, ffn_type=run.ffn_type)
    write_files(result(), tmp_path)
    page = page_of(tmp_path / "report.html")
    assert "Settings that differ" in page.text
    assert "machineNVIDIA H100" in page.text
    assert "seed0, 1, 2" in page.text


def test_many_groups_are_rows(tmp_path):
    runs = {f"rate {n}": [read_logged_run(run_folder(tmp_path / str(n), rate=n / 1000)).settings] for n in range(1, 9)}
    table = differences(runs)
    assert table is not None
    assert list(table.columns) == ["setting", "learning rate"]
    assert len(table.rows) == 8


def test_a_layer_has_its_colour_and_its_runs_line_styles(tmp_path):
    folders = [run_folder(tmp_path / f"swiglu-{rate}", rate=rate) for rate in (1e-3, 2e-3)]
    folders.append(run_folder(tmp_path / "flash", ffn_type="flashmhf"))
    styles = _styles(groups([read_logged_run(folder) for folder in folders]))
    assert styles == [(COLOURS["swiglu"], "-"), (COLOURS["swiglu"], "--"), (COLOURS["flashmhf"], "-")]
    same = _styles(groups([read_logged_run(folder) for folder in folders[:2]]))
    assert len({colour for colour, _ in same}) == 2
