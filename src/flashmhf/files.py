"""Files that hold their old or their new content at any time, never a part of it; JSON files."""

import json
import os
from pathlib import Path
from typing import Any

from flashmhf.errors import InputError


def atomic_write(file: Path, content: str | bytes) -> None:
    """Writes a temporary file, flushes and renames it: `file` is old or new at any time, even after a power cut."""
    temporary = file.with_name(file.name + ".tmp")
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        flush(temporary)
        temporary.replace(file)
    except BaseException:  # a full disk, an interrupt
        temporary.unlink(missing_ok=True)
        raise
    flush(file.parent)


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Like `atomic_write`; creates missing folders."""
    file.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(file, json.dumps(content, indent=2) + "\n")


def atomic_rename(source: Path, destination: Path) -> None:
    """Renames, and returns once the disk has it."""
    source.rename(destination)
    flush(source.parent)
    flush(destination.parent)


def flush(path: Path) -> None:
    """Returns once the file, or the folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_json(file: Path, *, version: int | None = None) -> dict[str, Any]:
    """A JSON object; anything else is an InputError that names the file.

    Args:
        version: the newest format with a "version" that the caller reads; a file without one is older, version 0.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"expected a JSON object in {file}, got {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"expected a JSON object in {file}, got a {type(content).__name__}")
    if version is not None:
        found = content.get("version", 0)
        if not isinstance(found, int) or found > version:
            raise InputError(
                f"{file}: expected a format version of at most {version}, got {found!r}; use a newer flashmhf"
            )
    return content
