"""Training over processes as a user starts it: one result, one set of files, the losses of one process."""

import contextlib
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from flashmhf.cli.train import OWN_STORE
from flashmhf.models.loading import load_model
from flashmhf.training.arguments import parse_arguments
from flashmhf.training.config import TrainConfig
from flashmhf.training.run import train
from torchrun import command, torchrun

pytestmark = [pytest.mark.slow, pytest.mark.distributed]
STEPS = ("--max-steps", "8", "--save-steps", "4", "--bf16", "false")


@pytest.fixture
def run(run) -> TrainConfig:
    """With AdamW: Muon's iterations in bfloat16 make more of differences in rounding than these tests allow."""
    return dataclasses.replace(run, optimizer="adamw")


@pytest.fixture
def losses_of_one(run, tmp_path) -> list[float]:
    flags = ["--per-device-train-batch-size", "4", "--learning-rate", "1e-2", "--logging-steps", "1", *STEPS]
    train(run, parse_arguments([*flags, "--eval-strategy", "no", "--report-to", "none"], str(tmp_path / "one")))
    return losses(tmp_path / "one")


def losses(folder: Path) -> list[float]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [row["loss"] for row in history if "loss" in row]


def test_two_processes_train_as_one_and_write_once(run, tmp_path, losses_of_one):
    folder = tmp_path / "two"
    ended = torchrun(run, folder, 2, *STEPS)
    assert ended.returncode == 0, ended.stderr
    result = json.loads(ended.stdout)
    assert (result["steps"], result["tokens"]) == (8, 8 * 4 * 32)
    assert losses(folder) == pytest.approx(losses_of_one, rel=1e-5)
    assert ended.stderr.count("step 8/8") == ended.stderr.count("runs on the backend") == 1
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-8"]
    assert len({path.parent for path in folder.rglob("events.*")}) == 1
    assert load_model(str(folder)).config.vocab_size == 320


def test_going_on_with_another_number_of_processes(run, tmp_path, losses_of_one):
    folder = tmp_path / "two"
    assert torchrun(run, folder, 2, *STEPS).returncode == 0
    shutil.rmtree(folder / "checkpoint-8")
    ended = torchrun(run, folder, 4, *STEPS, "--resume")
    assert ended.returncode == 0, ended.stderr
    assert losses(folder) == pytest.approx(losses_of_one, rel=1e-5)


@pytest.fixture
def long_run(run, tmp_path):
    """Starts one, and gives the process of torchrun and that of the second rank, a checkpoint later."""
    started = []

    def start(*flags: str, launcher: tuple[str, ...] = ()) -> tuple[subprocess.Popen, int]:
        arguments = command(run, tmp_path / "two", 2, "--save-steps", "4", *flags, launcher=launcher)
        started.append(subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        wait_for(lambda: list((tmp_path / "two").glob("checkpoint-*")))
        return started[0], max(children(started[0].pid))

    yield start
    for process in started:
        if process.poll() is None:
            for pid in [*children(process.pid), process.pid]:  # torchrun gives each a session of its own
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait()


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_for(condition) -> None:
    deadline = time.monotonic() + 90
    while not condition():
        assert time.monotonic() < deadline, "no checkpoint within 90 s"
        time.sleep(0.1)


def test_a_dead_process_ends_the_run_and_is_named(long_run):
    process, second_rank = long_run("--max-steps", "1000000")
    os.kill(second_rank, signal.SIGKILL)
    killed_at = time.monotonic()
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 1
    assert time.monotonic() - killed_at < 60
    assert re.search(r"Root Cause[^=]*rank      : 1 [^=]*Signal 9 \(SIGKILL\)", errors)


def test_a_job_that_torchrun_restarts_goes_on_from_its_last_checkpoint(run, tmp_path, long_run, monkeypatch):
    flags = ("--max-steps", "60", "--save-steps", "20")
    assert torchrun(run, tmp_path / "uninterrupted", 2, *flags).returncode == 0
    monkeypatch.setenv(OWN_STORE, "1")
    process, second_rank = long_run(*flags, launcher=("--max-restarts", "3"))
    os.kill(second_rank, signal.SIGKILL)
    output, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    assert len(re.findall(r"resuming from checkpoint-(?:20|40)\n", errors)) == 1
    assert OWN_STORE not in errors
    assert json.loads(output)["steps"] == 60
    assert len(losses(tmp_path / "two")) == 60
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "uninterrupted"), rel=1e-5)


def test_restarts_without_a_store_for_each_are_warned_of(run, tmp_path, monkeypatch):
    monkeypatch.delenv(OWN_STORE, raising=False)
    ended = torchrun(run, tmp_path / "two", 2, "--max-steps", "1", launcher=("--max-restarts", "1"))
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.count(f"--max-restarts: set {OWN_STORE}=1") == 1


def test_a_hung_process_ends_the_run_and_is_named(long_run):
    process, second_rank = long_run("--max-steps", "1000000", "--ddp-timeout", "4")
    os.kill(second_rank, signal.SIGSTOP)
    errors = process.communicate(timeout=90)[1]  # torchrun itself waits 30 s for what it has asked to end
    assert process.returncode == 1
    assert re.search(r"rank 0 has waited \d+ s for rank 1, which has stopped; the run ends", errors)


def test_a_gpu_that_is_asked_for_and_is_not_there(run, tmp_path):
    ended = torchrun(run, tmp_path / "two", 2, "--use-cpu", "false")
    assert ended.returncode == 1
    assert "use-cpu: expected true under torchrun on a machine without a GPU, got false" in ended.stderr
    assert not (tmp_path / "two").exists()
