"""Corrupt records: counted, named, and skipped or refused."""

import contextlib
import logging
from collections import Counter, defaultdict
from collections.abc import Iterator

import torch
from torch.utils.data import get_worker_info

from flashmhf.data.config import REFUSE, SKIP
from flashmhf.errors import InputError, RunError
from flashmhf.printable import one_line

logger = logging.getLogger(__name__)

EMPTY = "empty document"  # always skipped, since nothing is lost
BINARY = "binary file"
ENCODING = "file not in UTF-8"
UNREADABLE = "unreadable file"
BROKEN_LINE = "broken line"
BROKEN_ROWS = "unreadable group of rows"
NO_TEXT = "row without text column"
INVALID_TEXT = "text with invalid characters"
PLURALS = {
    EMPTY: "empty documents",
    BINARY: "binary files",
    ENCODING: "files not in UTF-8",
    UNREADABLE: "unreadable files",
    BROKEN_LINE: "broken lines",
    BROKEN_ROWS: "unreadable groups of rows",
    NO_TEXT: "rows without text column",
    INVALID_TEXT: "texts with invalid characters",
}
KINDS = tuple(PLURALS)
NAMED = 3  # per kind


class CorruptRecords:
    """The corrupt records of a source.

    The counts are shared with the worker processes of a data loader, which log the first few records of each kind.

    Args:
        policy: `refuse` raises InputError at the first that may have held text; `skip` counts them.
    """

    def __init__(self, policy: str = REFUSE) -> None:
        if policy not in (SKIP, REFUSE):
            raise InputError(f"bad-data: expected {SKIP} or {REFUSE}, got {policy!r}")
        self.policy = policy
        self._counts = torch.zeros(len(KINDS), dtype=torch.int64).share_memory_()
        self._seen: set[int] = set()  # a stream that starts again meets the same ones
        self._named: defaultdict[str, list[str]] = defaultdict(list)

    def add(self, kind: str, message: str) -> None:
        """Counts one, or refuses it; `message` names it."""
        if self.policy == REFUSE and kind != EMPTY:
            raise InputError(f"{message}; --bad-data skip leaves it out")
        if hash(message) in self._seen:
            return
        self._seen.add(hash(message))
        self._counts[KINDS.index(kind)] += 1
        if len(self._named[kind]) < NAMED:
            self._named[kind].append(message)
            if get_worker_info() is not None:
                logger.warning("data: skipped %s: %s", kind, message)

    @property
    def counts(self) -> Counter[str]:
        """How many of each kind were skipped."""
        return Counter({kind: count for kind, count in zip(KINDS, self._counts.tolist(), strict=True) if count})

    def summary(self) -> str:
        """One line on what was skipped, with the first few of each kind; empty if nothing was."""
        if not self.counts:
            return ""
        parts = []
        for kind, count in sorted(self.counts.items()):
            more = ["..."] if count > len(self._named[kind]) else []
            name = PLURALS[kind] if count > 1 else kind
            parts.append(f"{count:,} {name} ({', '.join(self._named[kind] + more)})")
        return f"bad data skipped: {'; '.join(parts)}"


def reason(error: BaseException) -> str:
    """Why something could not be read, in one line."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if isinstance(error, MemoryError):
        return "it does not fit into memory"
    said = getattr(error, "strerror", None) or str(error).strip().partition("\n")[0]
    return one_line(said) or type(error).__name__


@contextlib.contextmanager
def naming(where: str) -> Iterator[None]:
    """Whatever a library raises while it reads `where` becomes an InputError that names it."""
    try:
        yield
    except (InputError, RunError):
        raise
    except Exception as error:  # readers and decoders raise dozens of unrelated types
        raise InputError(f"data: could not read {where}: {reason(error)}") from error
