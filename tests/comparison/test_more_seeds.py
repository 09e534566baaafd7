"""A comparison that is given more seeds keeps its finished runs, and has a verdict once there are three."""

import json
import logging
from dataclasses import replace

import pytest

from flashmhf.cli import app
from flashmhf.comparison import Comparison, compare, read_comparison
from flashmhf.comparison.results import RESULTS_FILE
from flashmhf.comparison.verdict import UNDECIDED
from flashmhf.data.config import DataConfig
from flashmhf.files import write_json
from flashmhf.training.config import TrainConfig

FLAGS = ("--max-steps", "2", "--per-device-train-batch-size", "2", "--eval-strategy", "no", "--report-to", "none")


@pytest.fixture
def trained(monkeypatch):
    """The labels of the runs that were trained, in this process, which takes a fraction of the time of several."""
    labels = []

    def train_runs(runs, jobs, environment, progress, watch):
        for run in runs:
            if not run.finished:
                write_json(run.config_file, run.options)
                app(list(run.command[run.command.index("train") :]), standalone_mode=False)
                labels.append(run.label)

    monkeypatch.setattr("flashmhf.comparison.run.train_runs", train_runs)
    monkeypatch.setattr("flashmhf.comparison.scoring.count_processes", lambda *arguments: 1)
    return labels


@pytest.fixture
def settings(corpus_folder, model_file):
    def make(*seeds: int) -> Comparison:
        return Comparison(
            variants=("swiglu", "flashmhf"),
            models=(str(model_file),),
            seeds=seeds,
            train=TrainConfig(
                model="", data=DataConfig(source=str(corpus_folder), context_length=32, validation_tokens=64)
            ),
            training_flags=FLAGS,
            document_bytes=64,
        )

    return make


def test_from_one_seed_to_three(settings, trained, tmp_path, caplog):
    def results(*seeds: int, jobs: int | None = None):
        caplog.clear()
        result = compare(settings(*seeds), tmp_path, lambda line: None, jobs=jobs)
        assert read_comparison(tmp_path / RESULTS_FILE) == result
        return result, result.variants[1].difference

    for seeds, line in (
        ((0,), "seeds: 1 seed gives no verdict; 3 or more do"),
        ((0, 1), "seeds: 2 seeds give no verdict; 3 or more do"),
    ):
        result, difference = results(*seeds)
        assert caplog.messages[0] == line
        assert (difference.verdict.outcome, difference.verdict.seeds) == (UNDECIDED, len(seeds))
        content = json.loads((tmp_path / RESULTS_FILE).read_text())["variants"][1]["difference"]
        assert [content[measure]["interval"] for measure in ("nats_per_token", "bits_per_byte")] == [None, None]
        assert not any(word in json.dumps(content) for word in ("better", "worse"))
    before = (tmp_path / "runs/swiglu-seed0/model.safetensors").stat().st_mtime_ns

    result, difference = results(0, 1, 2)
    assert trained == [
        "swiglu, seed 0", "flashmhf, seed 0", "flashmhf, seed 1", "swiglu, seed 1",
        "swiglu, seed 2", "flashmhf, seed 2",
    ]  # fmt: skip
    assert (tmp_path / "runs/swiglu-seed0/model.safetensors").stat().st_mtime_ns == before
    assert "verdict" not in caplog.text
    assert (difference.verdict.seeds, len(difference.nats_per_token.by_run)) == (3, 3)
    low, high = difference.nats_per_token.interval
    assert low < difference.nats_per_token.mean < high
    first, second = (row.documents.nats_per_token.values for row in result.variants)
    by_run = [mine - theirs for mine, theirs in zip(second, first, strict=True)]
    assert difference.nats_per_token.by_run == pytest.approx(by_run)


def test_one_document_is_too_few(settings, trained, tmp_path, caplog):
    texts = {"train.txt": "the quick brown fox " * 50, "validation.txt": "jumps over the lazy dog " * 20}
    (tmp_path / "data").mkdir()
    for name, text in texts.items():
        (tmp_path / "data" / name).write_text(text)
    one = settings(0)
    data = replace(one.data, source=str(tmp_path / "data"))
    result = compare(replace(one, train=replace(one.train, data=data)), tmp_path / "out", lambda line: None)
    lines = [line for line in caplog.messages if "verdict" in line]
    assert lines == [
        "seeds: 1 seed gives no verdict; 3 or more do",
        "data: 1 held-out document gives no verdict; 2 or more do",
    ]
    assert result.variants[1].difference.verdict.outcome == UNDECIDED


def test_a_single_variant_requires_no_verdict(settings, trained, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "flashmhf"):
        compare(replace(settings(0), variants=("swiglu",)), tmp_path, lambda line: None)
    assert "verdict" not in caplog.text
