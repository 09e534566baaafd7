"""Training killed by SIGKILL at random moments, resumed each time: the losses are those of an uninterrupted run.

The processes come from a fork server that has imported torch and transformers already; what is killed is the command
itself with its files, as a user's would be.
"""

import itertools
import json
import multiprocessing
import os
import random
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from flashmhf.training.checkpoints import UNFINISHED, checkpoints
from flashmhf.training.config import RUN_FILE
from flashmhf.training.manifest import check

SAVE_STEPS = 3
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["flashmhf.training", "flashmhf.cli"])


@dataclass
class Tally:
    """What the kills met; printed, and the source of the figures in docs/reliability.md."""

    seed: int
    kills: int = 0
    while_saving: int = 0
    unnamed_but_whole: int = 0
    before_any_checkpoint: int = 0
    resumed_from: list[str] = field(default_factory=list)


def command(arguments: list[str], log: Path) -> None:
    """The child: flashmhf with its standard error in `log`."""
    import torch

    from flashmhf.cli import main

    torch.set_num_threads(1)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.argv = ["flashmhf", *arguments]
    main()


@pytest.fixture
def start(corpus_folder, model_file, tmp_path):
    """Starts the run in a folder, with --resume where there is something to resume; the process and its log."""
    count = itertools.count()

    def start(folder: Path, steps: int):
        arguments = ["train", "--model", str(model_file), "--data", str(corpus_folder), "--output-dir", str(folder)]
        arguments += ["--context-length", "16", "--validation-tokens", "64", "--per-device-train-batch-size", "2"]
        arguments += ["--logging-steps", "1", "--report-to", "none", "--disable-tqdm", "true", "--eval-strategy", "no"]
        arguments += ["--max-steps", str(steps), "--save-steps", str(SAVE_STEPS)]
        arguments += ["--resume"] if (folder / RUN_FILE).exists() else []
        log = tmp_path / f"{next(count)}.log"
        log.touch()
        process = SERVER.Process(target=command, args=(arguments, log), daemon=True)
        process.start()
        return process, log

    return start


def uninterrupted(start, folder: Path, steps: int) -> float:
    """Trains to the end; the seconds between its first checkpoint and its last."""
    process, log = start(folder, steps)
    started = wait_for(lambda: (folder / f"checkpoint-{SAVE_STEPS}").exists(), process)
    process.join(120)
    assert process.exitcode == 0, log.read_text()
    return time.monotonic() - started


def wait_for(condition, process) -> float:
    while not condition() and process.is_alive():
        time.sleep(0.0005)
    return time.monotonic()


def kill(start, folder: Path, steps: int, moment: random.Random, seconds: float, tally: Tally) -> None:
    """One process, checked to resume from the last complete checkpoint and killed at a random moment."""
    names = [path.name for path in (*checkpoints(folder), *grown(folder))] if folder.exists() else []
    newest = max(names, key=lambda name: int(name.split("-")[1]), default=None)
    process, log = start(folder, steps)
    ready = f"resuming from {newest}" if newest else ""
    reached, seconds = progress(folder), moment.uniform(0, seconds)
    if tally.kills % 4 != 3:  # else also while it starts
        wait_for(lambda: (folder / RUN_FILE).exists() and ready in log.read_text(), process)
    if tally.kills % 2 == 0:  # while it saves, and one checkpoint further than the last process
        wait_for(lambda: any(path.name not in names for path in checkpoints(folder)), process)
        wait_for(lambda: (folder / UNFINISHED).exists(), process)
        seconds = moment.uniform(0, 0.015)
    deadline = time.monotonic() + seconds
    wait_for(lambda: time.monotonic() > deadline or progress(folder) >= reached + 3 * SAVE_STEPS, process)
    assert process.is_alive(), log.read_text()
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    text = log.read_text()
    assert "Traceback" not in text, text
    assert ready in text or "resuming from" not in text
    tally.kills += 1
    tally.resumed_from += [newest] if newest and ready in text else []
    tally.while_saving += (folder / UNFINISHED).exists()
    tally.unnamed_but_whole += bool(grown(folder))
    tally.before_any_checkpoint += not names


def progress(folder: Path) -> int:
    """The step of the newest checkpoint."""
    names = [path.name for path in checkpoints(folder)] if folder.exists() else []
    return int(names[0].split("-")[1]) if names else 0


def grown(folder: Path) -> list[Path]:
    """Checkpoints that were complete when the kill came but had no name yet."""
    there = (folder / UNFINISHED).is_dir()
    return [path for path in checkpoints(folder / UNFINISHED) if check(path) is None] if there else []


def losses(folder: Path) -> dict[int, float]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return {row["step"]: row["loss"] for row in history if "loss" in row}


def survive(start, tmp_path: Path, kills: int, steps: int, seed: int) -> Tally:
    seconds = uninterrupted(start, tmp_path / "uninterrupted", steps) / kills
    moment, tally = random.Random(seed), Tally(seed)
    for _ in range(kills):
        kill(start, tmp_path / "killed", steps, moment, seconds, tally)
    process, log = start(tmp_path / "killed", steps)
    process.join(120)
    assert process.exitcode == 0, log.read_text()
    assert len(losses(tmp_path / "killed")) == steps
    assert losses(tmp_path / "killed") == losses(tmp_path / "uninterrupted")
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("uninterrupted", "killed"))
    assert first == second
    assert not (tmp_path / "killed" / UNFINISHED).exists()
    print(tally)
    return tally


def test_two_kills(start, tmp_path):
    assert survive(start, tmp_path, 2, 30, 0).kills == 2


@pytest.mark.slow
def test_twenty_four_kills(start, tmp_path):
    tally = survive(start, tmp_path, 24, 360, random.randrange(10**6))
    assert tally.kills == 24
    assert tally.while_saving >= 3
    assert len(set(tally.resumed_from)) >= 8
