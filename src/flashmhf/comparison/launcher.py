"""Training runs as processes, several at a time."""

import itertools
import logging
import queue
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import IO

import torch

from flashmhf.comparison.jobs import cores
from flashmhf.comparison.plan import Run
from flashmhf.errors import Interrupted
from flashmhf.files import append_to, write_json
from flashmhf.lifeline import child_environment, lifeline

logger = logging.getLogger(__name__)

LAST_BYTES = 2**14  # of a log, in which its last line is looked for
VISIBLE_GPUS = "CUDA_VISIBLE_DEVICES"


class _Processes:
    """Processes that a terminal's Ctrl-C does not reach, and that end with this one. None starts after `stop`.

    Args:
        parent: the descriptor of a `lifeline`.
    """

    def __init__(self, parent: int) -> None:
        self._parent = parent
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen] = set()
        self._stopped = False

    def run(self, command: Sequence[str], environment: Mapping[str, str] | None, stderr: IO[bytes]) -> int:
        """The exit code, negative if a signal killed it.

        Raises:
            KeyboardInterrupt: all were told to stop.
        """
        with self._lock:
            if self._stopped:
                raise KeyboardInterrupt
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                start_new_session=True,
                pass_fds=(self._parent,),
                env=child_environment(self._parent, environment),
            )
            self._running.add(process)
        code = process.wait()
        with self._lock:
            self._running.discard(process)
            if self._stopped:
                raise KeyboardInterrupt
        return code

    def stop(self) -> None:
        """Each saves a checkpoint after its current step."""
        with self._lock:
            self._stopped = True
            for process in self._running:
                process.terminate()


Watch = Callable[[Run], AbstractContextManager[object]]  # around a run's training


def train_runs(
    runs: Sequence[Run],
    jobs: int,
    environment: Mapping[str, str] | None,
    progress: Callable[[str], None],
    watch: Watch = nullcontext,
) -> None:
    """Trains the runs that have not finished.

    One that fails or is killed does not affect the others; SIGINT, SIGTERM and SIGHUP to this process end all of them
    with a checkpoint, a second one, or the end of this process, at once.

    Args:
        runs: in the order in which they start.
        jobs: how many at a time.
        environment: variables of the processes, to which each one's share of the CPU's cores, or one of several GPUs,
            is added; None for those of this process, without a share.
        progress: called with one line at the start of each run.
        watch: the context that each run trains in.
    """
    waiting = [run for run in runs if not run.finished]
    together = min(jobs, max(len(waiting), 1))
    slots: queue.SimpleQueue[int] = queue.SimpleQueue()
    for slot in range(together):
        slots.put(slot)

    def train(run: Run, processes: _Processes) -> None:
        slot = slots.get()
        try:
            progress(f"run {runs.index(run) + 1} of {len(runs)}: {run.label}")
            own = None if environment is None else {**environment, **_share(environment, slot, together)}
            with watch(run):
                _train(run, own, processes)
        finally:
            slots.put(slot)

    with signals_interrupt(), lifeline() as parent, ThreadPoolExecutor(together) as pool:
        processes = _Processes(parent)
        try:
            list(pool.map(train, waiting, itertools.repeat(processes)))
        except BaseException:
            processes.stop()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


@contextmanager
def signals_interrupt() -> Iterator[None]:
    """SIGTERM and SIGHUP raise `Interrupted`, so that the processes are told to stop; not if nohup has them ignored."""

    def interrupt(number: int, frame: object) -> None:
        raise Interrupted(number)

    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread can set signal handlers
        return
    numbers = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _train(run: Run, environment: Mapping[str, str] | None, processes: _Processes) -> None:
    write_json(run.config_file, run.options)
    with append_to(run.log) as log:
        code = processes.run(run.command, environment, log)
    if code == 0 and run.finished:
        run.log.unlink()
        return
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"failed with exit code {code}"
    reason = _last_line(run.log)
    logger.warning("%s %s%s; the same command tries it again", run.label, how, f" ({reason})" if reason else "")


def _last_line(log: Path) -> str:
    with log.open("rb") as file:
        file.seek(max(log.stat().st_size - LAST_BYTES, 0))
        lines = file.read().decode(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def _share(environment: Mapping[str, str], slot: int, jobs: int) -> dict[str, str]:
    gpus = torch.cuda.device_count()
    if gpus > 1:
        visible = environment.get(VISIBLE_GPUS, "")
        names = visible.split(",") if visible else [str(number) for number in range(gpus)]
        return {VISIBLE_GPUS: names[slot % gpus]}
    if gpus == 0 and jobs > 1 and "OMP_NUM_THREADS" not in environment:
        return {"OMP_NUM_THREADS": str(max(cores(environment) // jobs, 1))}
    return {}
