"""Processes that end with the one that started them, however that one ends: each waits at the other end of its pipe."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator, Mapping

DESCRIPTOR = "FLASHMHF_LIFELINE"  # variable with the number of the pipe's end that a process inherits


@contextlib.contextmanager
def lifeline() -> Iterator[int]:
    """A descriptor for child processes, which end when the context does, or when this process dies."""
    waiting, held_open = os.pipe()
    try:
        yield waiting
    finally:
        os.close(held_open)
        os.close(waiting)


def child_environment(descriptor: int, environment: Mapping[str, str] | None) -> dict[str, str]:
    """The variables of a process that inherits the descriptor of a `lifeline`; None for those of this process."""
    return {**(os.environ if environment is None else environment), DESCRIPTOR: str(descriptor)}


def end_with_parent() -> None:
    """Called first in a process: if it was started with a lifeline, it ends at once when that is cut."""
    descriptor = os.environ.get(DESCRIPTOR, "")
    if descriptor:
        threading.Thread(target=_wait, args=(int(descriptor),), daemon=True).start()


def has_parent() -> bool:
    """Whether this process was started with a lifeline, so that nobody resumes it by hand."""
    return DESCRIPTOR in os.environ


def _wait(descriptor: int) -> None:
    while os.read(descriptor, 1):  # nothing is written; the end of the file is the end of the parent
        pass
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)  # and its own children, such as those that load data
    os._exit(1)
