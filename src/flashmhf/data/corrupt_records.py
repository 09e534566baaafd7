"""Bad data: counted, named, and skipped or refused."""

import logging
from collections import Counter, defaultdict

from flashmhf.data.config import REFUSE, SKIP
from flashmhf.errors import InputError

logger = logging.getLogger(__name__)

EMPTY = "empty document"  # nothing is lost with one, so it is skipped either way
BINARY = "binary file"
ENCODING = "file not in UTF-8"
UNREADABLE = "unreadable file"
BROKEN_LINE = "broken line"
NO_TEXT = "row without text column"
NAMED = 3  # of each kind


class CorruptRecords:
    """What was bad in a source.

    Args:
        policy: `refuse` raises InputError at the first that holds or may hold text; `skip` counts it and goes on.
    """

    def __init__(self, policy: str = REFUSE) -> None:
        if policy not in (SKIP, REFUSE):
            raise InputError(f"bad-data: expected {SKIP} or {REFUSE}, got {policy!r}")
        self.policy = policy
        self.counts: Counter[str] = Counter()
        self._seen: set[int] = set()  # a stream comes by the same one again
        self._named: defaultdict[str, list[str]] = defaultdict(list)

    def add(self, kind: str, problem: str) -> None:
        """Counts one, or refuses it; `problem` is the line that names it."""
        if self.policy == REFUSE and kind != EMPTY:
            raise InputError(f"{problem}; --bad-data skip goes on without it")
        if hash(problem) in self._seen:
            return
        self._seen.add(hash(problem))
        self.counts[kind] += 1
        if len(self._named[kind]) < NAMED:
            self._named[kind].append(problem)

    def summary(self) -> str:
        """One line on what was skipped, with the first few of each kind; empty where nothing was."""
        if not self.counts:
            return ""
        parts = []
        for kind, count in sorted(self.counts.items()):
            more = ", ..." if count > NAMED else ""
            parts.append(f"{count:,} {kind}{'s' if count > 1 else ''} ({', '.join(self._named[kind])}{more})")
        return f"bad data skipped: {'; '.join(parts)}"
