"""Durations come from a clock that nobody sets; only timestamps are the wall clock's."""

import json
import time

import pytest

from flashmhf.data.config import DataConfig
from flashmhf.training.arguments import parse_arguments
from flashmhf.training.config import TrainConfig
from flashmhf.training.run import train
from flashmhf.training.run_log import LOG_FILE, read_log


def test_a_wall_clock_that_jumps_changes_no_duration(corpus_folder, model_file, tmp_path, monkeypatch):
    now = [2_000_000_000.0]

    def an_hour_back() -> float:
        now[0] -= 3600
        return now[0]

    monkeypatch.setattr(time, "time", an_hour_back)
    flags = "--max-steps 3 --logging-steps 1 --eval-steps 1 --report-to none --disable-tqdm true --save-steps 3"
    flags += " --per-device-train-batch-size 4"
    data = DataConfig(source=str(corpus_folder), context_length=32, validation_tokens=2048)
    result = train(TrainConfig(model=str(model_file), data=data), parse_arguments(flags.split(), str(tmp_path / "run")))
    rows = read_log(tmp_path / "run").rows
    assert 0 < rows[-1]["elapsed_s"] <= result.elapsed_s < 600
    assert [row["elapsed_s"] for row in rows] == sorted(row["elapsed_s"] for row in rows)
    for name in ("train", "eval"):
        speeds = [row for row in rows if f"{name}_runtime" in row]
        assert speeds
        for row in speeds:
            assert 0 < row[f"{name}_runtime"] < 600
            assert row[f"{name}_samples_per_second"] > 0
            assert row[f"{name}_steps_per_second"] > 0


def test_logs_from_before_durations_were_written_are_read(tmp_path):
    lines = [{"start": 0, "time": 100.0}, {"step": 1, "time": 103.0, "loss": 2.0}, {"step": 2, "time": 107.0}]
    (tmp_path / LOG_FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [row["elapsed_s"] for row in read_log(tmp_path).rows] == pytest.approx([3.0, 7.0])
