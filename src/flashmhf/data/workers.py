"""How many processes read and tokenise."""

import os

WORKER_BYTES = 16 * 2**20  # of text; for less a process costs more than it saves


def count_workers(num_bytes: int, most: int) -> int:
    """At least 1, at most the cores that this process may use, `most`, and one for every 16 MiB."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, most, num_bytes // WORKER_BYTES))
