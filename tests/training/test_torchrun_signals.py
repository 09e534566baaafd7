"""A signal that one process of several receives: all save after the same step, and the run can go on."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from flashmhf.data.config import DataConfig
from flashmhf.training.config import TrainConfig
from flashmhf.training.manifest import check
from torchrun import command, torchrun

pytestmark = [pytest.mark.slow, pytest.mark.distributed]
FLAGS = ("--save-steps", "100000", "--report-to", "none")


def workers(parent: int) -> list[int]:
    """Processes that `parent` started and that run the command."""
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return [int(child) for child in children if b"flashmhf" in Path(f"/proc/{child}/cmdline").read_bytes()]


def test_one_of_two_processes_is_told_to_stop(corpus_folder, model_file, tmp_path):
    data = DataConfig(source=str(corpus_folder), context_length=32, validation_tokens=2048)
    run, folder = TrainConfig(model=str(model_file), data=data), tmp_path / "two"
    log = tmp_path / "log"
    with log.open("w") as stream:
        arguments = command(run, folder, 2, "--max-steps", "100000", *FLAGS)
        process = subprocess.Popen(arguments, stderr=stream, stdout=stream)
    try:
        deadline = time.monotonic() + 120
        while "step 3/" not in log.read_text() and time.monotonic() < deadline:
            assert process.poll() is None, log.read_text()
            time.sleep(0.1)
        os.kill(workers(process.pid)[1], signal.SIGTERM)
        process.wait(60)
    finally:
        if process.poll() is None:
            for worker in workers(process.pid):  # each has a session of its own
                os.kill(worker, signal.SIGKILL)
            process.kill()
    (checkpoint,) = folder.glob("checkpoint-*")
    assert check(checkpoint) is None
    assert (checkpoint / "rng_state_0.pth").exists()
    assert (checkpoint / "rng_state_1.pth").exists()
    step = int(checkpoint.name.split("-")[1])
    ended = torchrun(run, folder, 2, "--max-steps", str(step + 2), *FLAGS, "--resume")
    assert ended.returncode == 0, ended.stderr
    assert f"resuming from {checkpoint.name}" in ended.stderr
