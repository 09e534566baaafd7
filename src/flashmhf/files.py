"""Files that hold their old or their new content at any time, never a part of it; JSON files; locks.

Everything that the package writes into a folder goes through here: a file is written under a random name that nobody
can prepare, and a symbolic link in the place of a file is replaced or refused, never followed.
"""

import contextlib
import errno
import json
import logging
import math
import os
import secrets
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from flashmhf.errors import InputError

if sys.platform != "win32":
    import fcntl

logger = logging.getLogger(__name__)

TEMPORARY = ".flashmhf-{}.tmp"
# Never through a symbolic link, never waiting for a pipe's other end, not inherited by programs started later.
if sys.platform == "win32":
    SAFELY = os.O_BINARY
else:
    SAFELY = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


def atomic_write(file: Path, content: str | bytes) -> None:
    """Writes a temporary file, flushes and renames it: `file` is old or new at any time, even after a power cut."""
    try:
        with temporary_file(file.parent) as (opened, temporary):
            opened.write(content.encode() if isinstance(content, str) else content)
            opened.flush()
            os.fsync(opened.fileno())
            temporary.replace(file)
        flush(file.parent)
    except OSError as error:  # name the file, not the temporary one
        raise OSError(error.errno, error.strerror, str(file)) from error


@contextlib.contextmanager
def temporary_file(folder: Path) -> Iterator[tuple[IO[bytes], Path]]:
    """A new file in `folder`; removed at the end unless it was renamed. After a kill, the next call removes it."""
    remove_leftovers(folder)
    descriptor, temporary = _create(folder)
    with os.fdopen(descriptor, "wb") as opened:
        try:
            yield opened, temporary
        finally:  # a full disk, an interrupt
            temporary.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Removes the temporary files of processes that were killed: those that no process has locked."""
    if sys.platform == "win32":
        return
    for left in folder.glob(TEMPORARY.format("*")):
        with contextlib.suppress(OSError):  # in use, a link, or removed meanwhile
            descriptor = os.open(left, os.O_RDWR | SAFELY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                left.unlink()
            finally:
                os.close(descriptor)


def _create(folder: Path) -> tuple[int, Path]:
    """A new file, locked as long as it is open, so that `remove_leftovers` leaves it alone."""
    while True:
        temporary = folder / TEMPORARY.format(secrets.token_hex(8))
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | SAFELY, 0o666)
        if sys.platform == "win32":
            return descriptor, temporary
        with contextlib.suppress(OSError):  # a file system without locks, on which nothing is removed either
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if temporary.exists():
            return descriptor, temporary
        os.close(descriptor)  # removed as a leftover before it was locked


@contextlib.contextmanager
def append_to(file: Path) -> Iterator[IO[bytes]]:
    """`file`, opened for appending; also readable. A symbolic link is refused."""
    descriptor = _open_regular(file, os.O_RDWR | os.O_APPEND | os.O_CREAT)
    with os.fdopen(descriptor, "a+b") as opened:
        yield opened


@contextlib.contextmanager
def exclusive_lock(file: Path) -> Iterator[None]:
    """Within the context, no other process of this machine is in one with the same file; it ends with the process.

    `file` is created and removed; its folder must exist. Its content, if any, stays, and a link is not followed.

    Raises:
        BlockingIOError: another process is in it.
        InputError: `file` is a symbolic link, a folder or a device.
    """
    if sys.platform == "win32":
        yield
        return
    descriptor = _lock(file)
    try:
        yield
    finally:
        file.unlink(missing_ok=True)  # while it is locked, see `_lock`
        os.close(descriptor)


def _lock(file: Path) -> int:
    """A descriptor of `file`, locked. Children do not inherit the lock.

    Who had the file before may have removed it between opening and locking here; then another process could lock a
    new file of that name at the same time, so the file is opened again.
    """
    while True:
        descriptor = _open_regular(file, os.O_RDWR | os.O_CREAT)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.lstat(file)):
                    return descriptor
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                os.close(descriptor)
                raise BlockingIOError(errno.EAGAIN, "used by another process", str(file)) from None
            logger.warning("%s cannot be locked: make sure that no other process writes into its folder", file)
            return descriptor
        os.close(descriptor)


def _open_regular(file: Path, flags: int) -> int:
    """A descriptor of a regular file, new or not; never through a symbolic link."""
    try:
        descriptor = os.open(file, flags | SAFELY, 0o666)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise
    else:
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            return descriptor
        os.close(descriptor)
    raise InputError(f"expected a regular file, got a link, a folder or a device at {file}; remove it")


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Like `atomic_write`; creates missing folders. For numbers that are not finite see `json_text`."""
    file.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(file, json_text(content, indent=2) + "\n")


def json_text(content: Any, *, indent: int | None = None) -> str:
    """JSON, which has no NaN and no infinity: such numbers become null."""
    return json.dumps(only_finite(content), indent=indent, allow_nan=False)


def only_finite(content: Any) -> Any:
    """With None for every float that is not finite, in lists and dictionaries too."""
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, dict):
        return {name: only_finite(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [only_finite(value) for value in content]
    return content


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


def read_json(file: Path, *, version: int | None = None, strict: bool = False) -> dict[str, Any]:
    """A JSON object; anything else is an InputError that names the file. Numbers that are not finite become None.

    Args:
        version: the newest format with a "version" that the caller reads; a file without one is older, version 0.
        strict: refuse numbers that are not finite and names that are given twice.
    """
    try:
        content = (parse_strict_json if strict else parse_json)(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
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


def read_results(file: Path, version: int, *, noun: str, advice: str) -> dict[str, Any]:
    """The JSON object that holds a command's results, of exactly this "version".

    Args:
        noun: what the results are of, for the message.
        advice: what to do about another version, for the message.

    Raises:
        InputError: the file is damaged or of another version; names it.
    """
    content = read_json(file)
    if content.get("version") != version:
        found = content.get("version", "none")
        raise InputError(f"{file}: expected version {version} of a {noun}'s results, got {found}; {advice}")
    return content


def parse_json(text: str) -> Any:
    """Any JSON value; numbers that are not finite become None.

    Raises:
        ValueError: it is not JSON, or too deeply nested, or too large.
    """
    try:
        return json.loads(text, parse_constant=lambda name: None, parse_float=_finite_float)
    except RecursionError:
        raise ValueError("JSON that is too deeply nested") from None
    except MemoryError:
        raise ValueError("JSON that does not fit into memory") from None


def parse_strict_json(text: str) -> Any:
    """Like `parse_json`, without numbers that are not finite and names that are given twice in an object."""
    parse_json(text)
    return json.loads(text, parse_constant=_refuse_number, parse_float=_strict_float, object_pairs_hook=_unique)


def _refuse_number(text: str) -> None:
    raise ValueError(f"{text}, expected a finite number")


def _strict_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        _refuse_number(text)
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice} twice")
    return values


def _finite_float(text: str) -> float | None:
    value = float(text)
    return value if math.isfinite(value) else None
