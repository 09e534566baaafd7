"""Processes that read, tokenize and load: how many, how much each holds at once, and how they end."""

import contextlib
import logging
import multiprocessing
import os
import re
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.queues import Queue
from typing import Any

from datasets import Dataset

from flashmhf.errors import RunError

logger = logging.getLogger(__name__)

WORKER_BYTES = 16 * 2**20  # of text; with less, a process costs more than it saves
MAX_ROWS = 64
ROWS_BYTES = 2**25  # of text, held at once
DEAD_WORKER = re.compile(r"DataLoader worker \(pid")  # begins what torch says of one


def count_workers(num_bytes: int, most: int) -> int:
    """At least 1; at most `most`, one per core that this process may use, and one per 16 MiB."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, most, num_bytes // WORKER_BYTES))


def count_rows(bytes_per_row: float) -> int:
    """Documents to hold at once: 1 to 64, fewer if they are long."""
    return max(1, min(MAX_ROWS, int(ROWS_BYTES // max(bytes_per_row, 1))))


def rows_at_once(documents: Dataset) -> int:
    """The same for given documents, by their mean length."""
    return count_rows(documents.data.nbytes / max(documents.data.num_rows, 1))


@contextlib.contextmanager
def loading_in_workers() -> Iterator[None]:
    """A data loader's worker that dies, or cannot pass on a batch, ends the run in one line.

    By default a worker without space in shared memory or without descriptors drops the batch, for which the process
    that trains then waits for ever.
    """
    queue: Any = Queue
    before = queue._on_queue_feeder_error
    queue._on_queue_feeder_error = staticmethod(partial(_end_worker, before))  # workers are forked from here
    try:
        yield
    except RuntimeError as error:
        if not DEAD_WORKER.search(str(error)):
            raise
        raise RunError(
            "dataloader-num-workers: a worker process ended unexpectedly, perhaps without memory, shared memory "
            "(/dev/shm) or descriptors (ulimit -n); fewer workers need less"
        ) from error
    finally:
        queue._on_queue_feeder_error = staticmethod(before)


def _end_worker(before: Callable[[Exception, Any], None], error: Exception, item: Any) -> None:
    if multiprocessing.parent_process() is None:
        before(error, item)
        return
    logger.error("data: a worker process cannot pass on a batch: %s", error)
    os._exit(1)
