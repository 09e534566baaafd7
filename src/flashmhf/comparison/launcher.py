"""Training runs as processes of their own, several at a time."""

import logging
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flashmhf.errors import Interrupted
from flashmhf.files import write_json
from flashmhf.training.run_files import read_result, was_begun

logger = logging.getLogger(__name__)

INTERRUPTED = (128 + signal.SIGINT, 128 + signal.SIGTERM)
VISIBLE_GPUS = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True)
class Trial:
    """One training run: `flashmhf train` of a configuration, with further flags, into `folder`."""

    label: str
    folder: Path
    config: dict[str, Any]
    flags: tuple[str, ...] = ()

    @property
    def finished(self) -> bool:
        return read_result(self.folder) is not None

    @property
    def log(self) -> Path:
        """What it prints where several run at a time."""
        return self.folder.with_name(self.folder.name + ".log")

    @property
    def config_file(self) -> Path:
        """Hands the configuration to the process that trains."""
        return self.folder.with_name(self.folder.name + ".json")

    @property
    def command(self) -> tuple[str, ...]:
        """In a process of this Python; goes on where there is something to go on from."""
        resume = ("--resume",) if was_begun(self.folder) else ()
        files = ("--config", str(self.config_file), "--output-dir", str(self.folder))
        return (sys.executable, "-m", "flashmhf", "train", *files, *self.flags, *resume)


class _Processes:
    """Processes that a terminal's Ctrl-C does not reach; once they are told to stop, no further one begins."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen] = set()
        self._stopped = False

    def run(self, command: Sequence[str], **options: Any) -> int:
        """The exit code."""
        with self._lock:
            if self._stopped:
                raise KeyboardInterrupt
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True, **options)
            self._running.add(process)
        code = process.wait()
        with self._lock:
            self._running.discard(process)
        return code

    def stop(self) -> None:
        """Each saves a checkpoint after its step."""
        with self._lock:
            self._stopped = True
            for process in self._running:
                process.terminate()


def run_trials(
    trials: Sequence[Trial], jobs: int, environment: Mapping[str, str] | None, progress: Callable[[str], None]
) -> None:
    """Runs those that have not finished, in turn.

    One that ends with an error leaves the others alone; SIGINT, SIGTERM and SIGHUP end all of them with a checkpoint.

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
    processes = _Processes()

    def run(trial: Trial) -> None:
        slot = slots.get()
        try:
            progress(f"run {trials.index(trial) + 1} of {len(trials)}: {trial.label}")
            mine = None if environment is None else {**environment, **_share(environment, slot, jobs)}
            _run(trial, mine, jobs == 1, processes)
        finally:
            slots.put(slot)

    with _signals_interrupt(), ThreadPoolExecutor(jobs) as pool:
        try:
            list(pool.map(run, waiting))
        except BaseException:
            processes.stop()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


@contextmanager
def _signals_interrupt() -> Iterator[None]:
    """SIGTERM and SIGHUP are raised as Ctrl-C is; the processes would not know of them."""

    def interrupt(number: int, frame: object) -> None:
        raise Interrupted(number)

    if threading.current_thread() is not threading.main_thread():
        yield  # which alone may say what a signal does
        return
    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _run(trial: Trial, environment: Mapping[str, str] | None, alone: bool, processes: _Processes) -> None:
    write_json(trial.config_file, trial.config)
    with trial.log.open("ab") as log:
        code = processes.run(trial.command, stderr=None if alone else log, env=environment)
    if code in INTERRUPTED:
        raise KeyboardInterrupt
    if code != 0 or not trial.finished:
        logger.warning("%s failed with exit code %d", trial.label, code)
    else:
        trial.log.unlink()


def _share(environment: Mapping[str, str], slot: int, jobs: int) -> dict[str, str]:
    gpus = torch.cuda.device_count()
    if gpus > 1:
        visible = environment.get(VISIBLE_GPUS, "")
        names = visible.split(",") if visible else [str(number) for number in range(gpus)]
        return {VISIBLE_GPUS: names[slot % gpus]}
    if gpus == 0 and jobs > 1 and "OMP_NUM_THREADS" not in environment:
        return {"OMP_NUM_THREADS": str(max(torch.get_num_threads() // jobs, 1))}
    return {}
