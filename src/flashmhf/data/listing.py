"""Which files of a folder are read, and which are passed over."""

import os
import stat
from collections import defaultdict, deque
from dataclasses import dataclass, field
from pathlib import Path

from fsspec.utils import infer_compression

from flashmhf.errors import InputError
from flashmhf.printable import one_line

FORMATS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
NAMED = 3  # of each reason
OTHER_FORMAT, HIDDEN, SPECIAL, SAME_FILE, OTHER_SPLIT = (
    "of another format", "hidden", "not regular files", "reached before, through a link", "of another split"
)  # fmt: skip


@dataclass
class Listing:
    """The files below a path.

    Attributes:
        root: the path.
        files: what to read, sorted by name.
        passed_over: names below the root by reason.
        unreadable: one line on each folder that could not be listed.
    """

    root: Path
    files: list[Path] = field(default_factory=list)
    passed_over: defaultdict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    unreadable: list[str] = field(default_factory=list)

    def pass_over(self, path: Path, reason: str) -> None:
        self.passed_over[reason].append(path.relative_to(self.root).as_posix())

    def leave_out(self, files: set[Path], reason: str) -> None:
        """Files that the caller does not read."""
        self.files = [path for path in self.files if path not in files]
        for path in sorted(files):
            self.pass_over(path, reason)

    def passed_over_summary(self) -> str:
        """What was not read, in one line with the first names of each reason; empty if nothing was."""
        if not self.passed_over:
            return ""
        parts = []
        for reason, names in sorted(self.passed_over.items()):
            more = ", ..." if len(names) > NAMED else ""
            parts.append(f"{len(names):,} {reason} ({', '.join(map(one_line, sorted(names)[:NAMED]))}{more})")
        return f"passed over {sum(map(len, self.passed_over.values())):,}: {', '.join(parts)}"


def list_files(path: Path) -> Listing:
    """The files under `path` of a known format, or `path` itself. Endings in capitals count, hidden files do not.

    Links are followed. A file or folder that is reached in several ways is read once, by its path without links if
    there is one. Pipes, sockets and devices are never opened.

    Raises:
        InputError: there are none.
    """
    listing = Listing(path)
    if path.is_dir():
        _walk(listing)
    elif not path.is_file():
        raise InputError(f"data: expected a file or a folder, got {path}, which is neither")
    elif file_format(path) is not None:
        listing.files.append(path)
    if not listing.files and not listing.unreadable:
        summary = listing.passed_over_summary()
        raise InputError(
            f"data: expected {', '.join(FORMATS)} files (also {', '.join(COMPRESSIONS)}), got {path} with none of them"
            + (f" ({summary})" if summary else "")
        )
    for file in listing.files:
        if file.suffix.lower() == ".zst" and infer_compression(file.name) is None:
            raise InputError(f"data: expected the package zstandard to be installed for .zst, got {file}")
    listing.files.sort()
    return listing


def file_format(path: Path) -> str | None:
    """`text`, `json`, `parquet` or None."""
    suffixes = [suffix for suffix in map(str.lower, path.suffixes) if suffix not in COMPRESSIONS]
    return FORMATS.get(suffixes[-1]) if suffixes else None


def _walk(listing: Listing) -> None:
    seen: set[tuple[int, int]] = set()
    folders, links = deque([listing.root]), deque[Path]()  # links last
    while folders or links:
        path = folders.popleft() if folders else links.popleft()
        try:
            found = path.stat()
        except OSError:
            listing.files.append(path)  # a link to nowhere: reading says so
            continue
        if found.st_ino and (found.st_dev, found.st_ino) in seen:
            listing.pass_over(path, SAME_FILE)
            continue
        seen.add((found.st_dev, found.st_ino))
        if stat.S_ISREG(found.st_mode):
            listing.files.append(path)
            continue
        try:
            entries = sorted(os.scandir(path), key=lambda entry: entry.name)
        except OSError as error:
            listing.unreadable.append(f"data: could not list {path}: {error.strerror}")
            continue
        for entry in entries:
            reason = _reason_against(path / entry.name)
            if reason is not None:
                listing.pass_over(path / entry.name, reason)
            else:
                (links if entry.is_symlink() else folders).append(path / entry.name)


def _reason_against(path: Path) -> str | None:
    """Why a file or folder is not read."""
    if path.name.startswith("."):
        return HIDDEN
    try:
        mode = path.stat().st_mode
    except OSError:
        mode = stat.S_IFREG
    if stat.S_ISDIR(mode):
        return None
    if not stat.S_ISREG(mode):
        return SPECIAL
    return OTHER_FORMAT if file_format(path) is None else None
