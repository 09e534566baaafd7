"""Training runs as processes of their own, several at a time."""

import json
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

logger = logging.getLogger(__name__)

RESULT_FILE = "result.json"
INTERRUPTED = (128 + signal.SIGINT, 128 + signal.SIGTERM)
VISIBLE_GPUS = "CUDA_VISIBLE_DEVICES"


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


class _Processes:
    """Processes that a terminal's Ctrl-C does not reach; once they are told to stop, no further one begins."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen] = set()
        self._stopped = False

    def run(self, command: Sequence[str], **options: Any) -> tuple[int, str]:
        """Exit code and standard output."""
        with self._lock:
            if self._stopped:
                raise KeyboardInterrupt
            process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True, **options)
            self._running.add(process)
        output, _ = process.communicate()
        with self._lock:
            self._running.discard(process)
        return process.returncode, output

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
    trial.folder.parent.mkdir(parents=True, exist_ok=True)
    command = [*trial.command, *(["--resume"] if (trial.folder / "run.json").exists() else [])]
    with trial.log.open("ab") as log:
        code, output = processes.run(command, stderr=None if alone else log, env=environment)
    if code in INTERRUPTED:
        raise KeyboardInterrupt
    result = _last_object(output) if code == 0 else None
    if result is None:
        logger.warning("%s failed with exit code %d", trial.label, code)
    else:
        write_json(trial.folder / RESULT_FILE, result)
        trial.log.unlink()


def _last_object(output: str) -> dict[str, Any] | None:
    """The last line as JSON: a library may have printed before it."""
    try:
        result = json.loads(output.rstrip().rpartition("\n")[2])
    except json.JSONDecodeError:
        return None
    return result if isinstance(result, dict) else None


def _share(environment: Mapping[str, str], slot: int, jobs: int) -> dict[str, str]:
    gpus = torch.cuda.device_count()
    if gpus > 1:
        visible = environment.get(VISIBLE_GPUS, "")
        names = visible.split(",") if visible else [str(number) for number in range(gpus)]
        return {VISIBLE_GPUS: names[slot % gpus]}
    if gpus == 0 and jobs > 1 and "OMP_NUM_THREADS" not in environment:
        return {"OMP_NUM_THREADS": str(max(torch.get_num_threads() // jobs, 1))}
    return {}


def train_command(options: dict[str, object], flags: Sequence[str]) -> tuple[str, ...]:
    """`flashmhf train` in a process of this Python; `options` win over `flags`."""
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return (sys.executable, "-m", "flashmhf", "train", "--json", *flags, *words)
