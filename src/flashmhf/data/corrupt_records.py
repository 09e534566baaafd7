"""Corrupt records: counted, named, and skipped or refused."""

import logging
from collections import Counter, defaultdict

from flashmhf.data.config import REFUSE, SKIP
from flashmhf.errors import InputError

logger = logging.getLogger(__name__)

EMPTY = "empty document"  # always skipped, since nothing is lost
BINARY = "binary file"
ENCODING = "file not in UTF-8"
UNREADABLE = "unreadable file"
BROKEN_LINE = "broken line"
NO_TEXT = "row without text column"
NAMED = 3  # per kind


class CorruptRecords:
    """The corrupt records of a source.

    Args:
        policy: `refuse` raises InputError at the first that may have held text; `skip` counts them.
    """

    def __init__(self, policy: str = REFUSE) -> None:
        if policy not in (SKIP, REFUSE):
            raise InputError(f"bad-data: expected {SKIP} or {REFUSE}, got {policy!r}")
        self.policy = policy
        self.counts: Counter[str] = Counter()
        self._seen: set[int] = set()  # a stream that starts again meets the same ones
        self._named: defaultdict[str, list[str]] = defaultdict(list)

    def add(self, kind: str, message: str) -> None:
        """Counts one, or refuses it; `message` names it."""
        if self.policy == REFUSE and kind != EMPTY:
            raise InputError(f"{message}; --bad-data skip leaves it out")
        if hash(message) in self._seen:
            return
        self._seen.add(hash(message))
        self.counts[kind] += 1
        if len(self._named[kind]) < NAMED:
            self._named[kind].append(message)

    def summary(self) -> str:
        """One line on what was skipped, with the first few of each kind; empty if nothing was."""
        if not self.counts:
            return ""
        parts = []
        for kind, count in sorted(self.counts.items()):
            more = ", ..." if count > NAMED else ""
            parts.append(f"{count:,} {kind}{'s' if count > 1 else ''} ({', '.join(self._named[kind])}{more})")
        return f"bad data skipped: {'; '.join(parts)}"
