"""Files that are what they were or what they become, never half of it."""

import json
import os
from pathlib import Path
from typing import Any


def write_flushed(file: Path, content: str | bytes) -> None:
    """Writes beside, flushes and renames: at any moment `file` is what it was or what it becomes, power cut or not."""
    beside = file.with_name(file.name + ".tmp")
    try:
        beside.write_bytes(content.encode() if isinstance(content, str) else content)
        flush(beside)
        beside.replace(file)
    except BaseException:  # a disk that is full, an interrupt
        beside.unlink(missing_ok=True)
        raise
    flush(file.parent)


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Like `write_flushed`, with the folders that are missing."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_flushed(file, json.dumps(content, indent=2) + "\n")


def rename_flushed(source: Path, destination: Path) -> None:
    """Renames, and returns when the disk knows."""
    source.rename(destination)
    flush(source.parent)
    flush(destination.parent)


def flush(path: Path) -> None:
    """Returns when the file, or the folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
