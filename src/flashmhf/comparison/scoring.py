"""All trained models of a comparison scored by several processes: one per GPU, or on a CPU up to one per core."""

import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.queues import SimpleQueue
from pathlib import Path

import torch

from flashmhf.comparison.evaluate import HeldOut, Score, Scorer, read_evaluation
from flashmhf.comparison.launcher import signals_interrupt
from flashmhf.comparison.plan import Run
from flashmhf.errors import RunError
from flashmhf.estimates.cost import model_cost

logger = logging.getLogger(__name__)

START_FLOPS = {"cpu": 2e11, "cuda": 4e13}  # what one core or GPU computes while a process starts
SCORING_PER_TRAINING = 4  # training holds weights, gradients and two moments, scoring only weights

ScoreFolders = Callable[[Sequence[Path], Sequence[bool]], Iterator[Score]]


def score_runs(runs: Sequence[Run], held_out: HeldOut, jobs: int, progress: Callable[[str], None]) -> dict[Path, Score]:
    """By folder, the score of every run that finished. An evaluation from an earlier call is not computed again.

    Gates and sample are those of each variant's first run with a finite loss.

    Args:
        runs: for each variant in the order of seeds.
        held_out: the documents.
        jobs: how many trainings fit into memory at a time.
        progress: called with one line per run.

    Raises:
        RunError: a process ended unexpectedly.
    """
    finished = [run for run in runs if run.finished]
    scores: dict[Path, Score] = {}
    with signals_interrupt(), _processes(held_out, count_processes(finished, held_out, jobs)) as score_folders:

        def score(chosen: Sequence[Run], observed: Sequence[Run]) -> None:
            folders = {run.folder for run in observed}
            for run in chosen:
                evaluation = None if run.folder in folders else read_evaluation(run.folder)
                if evaluation is not None:
                    scores[run.folder] = Score(evaluation=evaluation)
            waiting = [run for run in chosen if run.folder in folders or run.folder not in scores]
            found = score_folders([run.folder for run in waiting], [run.folder in folders for run in waiting])
            for run, result in zip(waiting, found, strict=True):
                progress(f"evaluated {run.label}")
                if result.problem:
                    logger.warning("%s: %s", run.label, result.problem)
                scores[run.folder] = result

        firsts = _first_of_each_variant(finished)
        score(finished, firsts)
        good = [run for run in finished if scores[run.folder].evaluation is not None]
        late = [run for run in _first_of_each_variant(good) if scores[run.folder].continuation is None]
        score(late, late)
    return scores


def count_processes(runs: Sequence[Run], held_out: HeldOut, jobs: int) -> int:
    """As many as there are GPUs or cores, as are worth their start, and as fit into memory."""
    flops = sum(model_cost(run.variant.config, held_out.context_length).forward_flops_per_token for run in runs)
    flops *= sum(map(len, held_out.documents.tokens["input_ids"]))
    gpus = torch.cuda.device_count()
    worth = int(flops / START_FLOPS["cuda" if gpus else "cpu"])
    return max(1, min(gpus or min(torch.get_num_threads(), SCORING_PER_TRAINING * jobs), len(runs), worth))


def _first_of_each_variant(runs: Sequence[Run]) -> list[Run]:
    return list({run.variant.name: run for run in reversed(runs)}.values())


@contextmanager
def _processes(held_out: HeldOut, number: int) -> Iterator[ScoreFolders]:
    """A function that scores folders. Its processes, if there are several, end with this context."""
    if number == 1:
        scorer = Scorer(held_out, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        yield lambda folders, observed: map(scorer.score, folders, observed)
        return
    context = multiprocessing.get_context("spawn")
    slots = context.SimpleQueue()
    for slot in range(number):
        slots.put(slot)
    alive, held_open = context.Pipe(duplex=False)
    arguments = (held_out, slots, max(1, torch.get_num_threads() // number), alive)
    with ProcessPoolExecutor(number, context, initializer=_start, initargs=arguments) as pool:
        try:
            yield lambda folders, observed: pool.map(_score, folders, observed)
        except BaseException as error:
            held_open.close()
            if isinstance(error, BrokenProcessPool):
                raise RunError("evaluation: a process ended unexpectedly, perhaps for lack of memory") from error
            raise


_scorer: Scorer | None = None  # of a process


def _start(held_out: HeldOut, slots: "SimpleQueue[int]", threads: int, alive: Connection) -> None:
    """Prepares a process. It ignores signals, and ends when the parent closes `alive` or dies."""
    global _scorer
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(alive,), daemon=True).start()
    torch.set_num_threads(threads)
    gpus = torch.cuda.device_count()
    _scorer = Scorer(held_out, torch.device("cuda", slots.get() % gpus) if gpus else torch.device("cpu"))


def _end_with(alive: Connection) -> None:
    alive.poll(None)
    os._exit(1)


def _score(folder: Path, observe: bool) -> Score:
    assert _scorer is not None
    return _scorer.score(folder, observe)
