"""SIGINT and SIGTERM: a checkpoint after the current step, and one line on how to continue."""

import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from flashmhf.training.callbacks import StopOnSignal
from flashmhf.training.manifest import check

FLAGS = ["--per-device-train-batch-size", "4", "--logging-steps", "1", "--report-to", "none", "--eval-strategy", "no"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda n: n.name)
def test_a_signal_saves_and_says_how_to_continue(model_file, corpus_folder, tmp_path, number):
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "flashmhf", "train", "--model", str(model_file)]
    command += ["--data", str(corpus_folder)]
    command += ["--context-length", "32", "--output-dir", str(folder), "--max-steps", "100000", *FLAGS]
    command += ["--disable-tqdm", "false", "--save-steps", "100000"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    wait_for_training(process)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert out == ""
    (checkpoint,) = folder.glob("checkpoint-*")
    assert check(checkpoint) is None
    assert f"{number.name} after step {checkpoint.name.partition('-')[2]}" in err
    assert "continue with --resume" in err
    assert "Traceback" not in err


def wait_for_training(process: subprocess.Popen) -> None:
    """Returns once the first step has been logged."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        line = process.stderr.readline()
        assert line, "the process ended before its first step"
        if "step " in line and "loss" in line:
            return
    raise AssertionError("no step within a minute")


def test_a_signal_while_the_processes_agree_stops_them_after_the_next_step(monkeypatch):
    stop, control = StopOnSignal(), SimpleNamespace(should_save=False, should_training_stop=False)
    args = SimpleNamespace(world_size=2, device="cpu")
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *_: signal.raise_signal(signal.SIGTERM))
    with stop:
        stop.on_step_end(args, None, control)
    assert stop.signal is None
    assert not control.should_training_stop
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *_: None)
    stop.on_step_end(args, None, control)
    assert stop.signal == signal.SIGTERM
    assert control.should_save
    assert control.should_training_stop
