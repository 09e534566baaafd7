"""Training runs as processes, several at a time."""

import logging
import queue
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch

from flashmhf.comparison.plan import Run
from flashmhf.errors import Interrupted
from flashmhf.files import write_json

logger = logging.getLogger(__name__)

INTERRUPTED = (128 + signal.SIGINT, 128 + signal.SIGTERM)
VISIBLE_GPUS = "CUDA_VISIBLE_DEVICES"


class _Processes:
    """Processes that a terminal's Ctrl-C does not reach. None starts after `stop`."""

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
        """Each saves a checkpoint after its current step."""
        with self._lock:
            self._stopped = True
            for process in self._running:
                process.terminate()


def train_runs(
    runs: Sequence[Run], jobs: int, environment: Mapping[str, str] | None, progress: Callable[[str], None]
) -> None:
    """Trains the runs that have not finished.

    One that fails does not affect the others; SIGINT, SIGTERM and SIGHUP end all of them with a checkpoint.

    Args:
        runs: in the order in which they start.
        jobs: how many at a time.
        environment: variables of the processes, to which each one's share of the CPU's cores, or one of several GPUs,
            is added; None for those of this process, without a share.
        progress: called with one line at the start of each run.
    """
    waiting = [run for run in runs if not run.finished]
    slots: queue.SimpleQueue[int] = queue.SimpleQueue()
    for slot in range(jobs):
        slots.put(slot)
    processes = _Processes()

    def train(run: Run) -> None:
        slot = slots.get()
        try:
            progress(f"run {runs.index(run) + 1} of {len(runs)}: {run.label}")
            own = None if environment is None else {**environment, **_share(environment, slot, jobs)}
            _train(run, own, jobs == 1, processes)
        finally:
            slots.put(slot)

    with signals_interrupt(), ThreadPoolExecutor(jobs) as pool:
        try:
            list(pool.map(train, waiting))
        except BaseException:
            processes.stop()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


@contextmanager
def signals_interrupt() -> Iterator[None]:
    """SIGTERM and SIGHUP raise `Interrupted`, so that the processes are told to stop."""

    def interrupt(number: int, frame: object) -> None:
        raise Interrupted(number)

    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread can set signal handlers
        return
    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _train(run: Run, environment: Mapping[str, str] | None, alone: bool, processes: _Processes) -> None:
    write_json(run.config_file, run.options)
    with run.log.open("ab") as log:
        code = processes.run(run.command, stderr=None if alone else log, env=environment)
    if code in INTERRUPTED:
        raise KeyboardInterrupt
    if code != 0 or not run.finished:
        logger.warning("%s failed with exit code %d", run.label, code)
    else:
        run.log.unlink()


def _share(environment: Mapping[str, str], slot: int, jobs: int) -> dict[str, str]:
    gpus = torch.cuda.device_count()
    if gpus > 1:
        visible = environment.get(VISIBLE_GPUS, "")
        names = visible.split(",") if visible else [str(number) for number in range(gpus)]
        return {VISIBLE_GPUS: names[slot % gpus]}
    if gpus == 0 and jobs > 1 and "OMP_NUM_THREADS" not in environment:
        return {"OMP_NUM_THREADS": str(max(torch.get_num_threads() // jobs, 1))}
    return {}
