"""How many processes read and tokenize, and how many documents each holds at once."""

import os

from datasets import Dataset

WORKER_BYTES = 16 * 2**20  # of text; with less, a process costs more than it saves
MAX_ROWS = 64
ROWS_BYTES = 2**25  # of text, held at once


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
