"""What a person sees of runs that train in processes of their own: a bar for each, or a line every half minute."""

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from flashmhf.console import LINES_EVERY_S, progress, write_line
from flashmhf.files import parse_json

if TYPE_CHECKING:
    from flashmhf.comparison.plan import Run

POLL_S = 0.5


class _Tail:
    """Follows the log of a run from its current end."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._offset = file.stat().st_size if file.is_file() else 0
        self.step, self.note = 0, ""
        self.steps: int | None = None

    def read(self) -> None:
        if not self._file.is_file():
            return
        with self._file.open("rb") as file:
            file.seek(self._offset)
            complete, newline, _ = file.read().rpartition(b"\n")
        self._offset += len(complete) + len(newline)
        for line in complete.splitlines():
            with contextlib.suppress(ValueError):
                self._take(parse_json(line.decode(errors="replace")))

    def _take(self, row: Any) -> None:
        if not isinstance(row, dict):
            return
        self.step = int(row.get("step", row.get("start", self.step)) or 0)
        self.steps = row.get("max_steps", self.steps)
        if isinstance(row.get("loss"), float):
            self.note = f"loss {row['loss']:.4f}"


class RunsProgress:
    """A context in which `watching` shows runs."""

    def __init__(self) -> None:
        self._bars = progress()
        self._tails: dict[Any, tuple[str, _Tail]] = {}
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._poll, daemon=True)

    def __enter__(self) -> Self:
        self._bars.start()
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        self._thread.join()
        self._bars.stop()

    @contextlib.contextmanager
    def watching(self, run: "Run") -> Iterator[None]:
        """While the run trains; from the thread that waits for it."""
        task = self._bars.add_task(run.label, total=None, note="")
        with self._lock:
            self._tails[task] = run.label, _Tail(run.folder / "log.jsonl")
        try:
            yield
        finally:
            with self._lock:
                del self._tails[task]
            self._bars.remove_task(task)

    def _poll(self) -> None:
        shown_s = time.monotonic()
        while not self._ended.wait(POLL_S):
            lines = self._bars.disable and time.monotonic() - shown_s > LINES_EVERY_S
            shown_s = time.monotonic() if lines else shown_s
            with self._lock:
                for task, (label, tail) in self._tails.items():
                    tail.read()
                    self._bars.update(task, completed=tail.step, total=tail.steps, note=tail.note)
                    if lines and tail.steps:
                        write_line(f"{label}: step {tail.step}/{tail.steps}: {tail.note}")
