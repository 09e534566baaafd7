"""Training runs as processes of their own, several at a time."""

import json
import logging
import queue
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from flashmhf.writing import write_json

logger = logging.getLogger(__name__)

RESULT_FILE = "result.json"
INTERRUPTED = (130, 143)


@dataclass(frozen=True)
class Trial:
    """One training run: `command` trains into `folder`."""

    label: str
    folder: Path
    command: tuple[str, ...]

    @property
    def finished(self) -> bool:
        return (self.folder / RESULT_FILE).exists()

    @property
    def log(self) -> Path:
        """What it prints where several run at a time."""
        return self.folder.with_name(self.folder.name + ".log")


def run_trials(
    trials: Sequence[Trial], jobs: int, environment: Mapping[str, str] | None, progress: Callable[[str], None]
) -> None:
    """Runs those that have not finished, in turn.

    One that ends with an error leaves the others alone; Ctrl-C ends all of them with a checkpoint.

    Args:
        trials: in the order in which they begin.
        jobs: at a time.
        environment: variables of the processes, to which each one's share of the CPU's cores, or the next of several
            GPUs, is added; None leaves these as they are.
        progress: called with one line at the start of each run.
    """
    waiting = [trial for trial in trials if not trial.finished]
    slots: queue.SimpleQueue[int] = queue.SimpleQueue()
    for slot in range(jobs):
        slots.put(slot)
    processes: set[subprocess.Popen] = set()

    def run(trial: Trial) -> None:
        slot = slots.get()
        try:
            progress(f"run {trials.index(trial) + 1} of {len(trials)}: {trial.label}")
            mine = None if environment is None else {**environment, **_share(environment, slot, jobs)}
            _run(trial, mine, jobs == 1, processes)
        finally:
            slots.put(slot)

    with ThreadPoolExecutor(jobs) as pool:
        try:
            list(pool.map(run, waiting))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list(processes):
                process.terminate()
            raise


def _run(trial: Trial, environment: Mapping[str, str] | None, alone: bool, processes: set[subprocess.Popen]) -> None:
    trial.folder.parent.mkdir(parents=True, exist_ok=True)
    command = [*trial.command, *(["--resume"] if (trial.folder / "run.json").exists() else [])]
    with trial.log.open("ab") as log:
        errors = None if alone else log
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment)
        processes.add(process)
        output, _ = process.communicate()
        processes.discard(process)
    if process.returncode in INTERRUPTED:
        raise KeyboardInterrupt
    if process.returncode == 0:
        write_json(trial.folder / RESULT_FILE, json.loads(output))
        trial.log.unlink()
    else:
        logger.warning("%s failed with exit code %d", trial.label, process.returncode)


def _share(environment: Mapping[str, str], slot: int, jobs: int) -> dict[str, str]:
    gpus = torch.cuda.device_count()
    if gpus > 1:
        return {"CUDA_VISIBLE_DEVICES": str(slot % gpus)}
    if gpus == 0 and jobs > 1 and "OMP_NUM_THREADS" not in environment:
        return {"OMP_NUM_THREADS": str(max(torch.get_num_threads() // jobs, 1))}
    return {}


def train_command(options: dict[str, object], flags: Sequence[str]) -> tuple[str, ...]:
    """`flashmhf train` in a process of this Python."""
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return (sys.executable, "-m", "flashmhf", "train", "--json", *words, *flags)
