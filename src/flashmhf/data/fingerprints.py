"""Hashes of what is read, wherever it lies."""

import hashlib
import os
import sys
from collections.abc import Iterable
from pathlib import Path

READ_BYTES = 2**20
HEAD_BYTES = 2**16


def content_key(files: Iterable[Path], root: Path) -> str:
    """A hash of the files' names below `root` and of their contents, in order, wherever the folder lies.

    Of a file that cannot be read, only the name counts; of `root` itself, if it is a file, only the content.
    """
    return _key_of(files, root, sys.maxsize)


def stream_key(files: Iterable[Path], root: Path) -> str:
    """Like `content_key`, but only of each file's size and its first `HEAD_BYTES`."""
    return _key_of(files, root, HEAD_BYTES)


def _key_of(files: Iterable[Path], root: Path, most_bytes: int) -> str:
    total = hashlib.blake2b(digest_size=16)
    for path in files:
        content = hashlib.blake2b(digest_size=16)
        try:
            with path.open("rb") as file:
                content.update(f"{os.fstat(file.fileno()).st_size} ".encode())
                left = most_bytes
                while part := file.read(min(READ_BYTES, left)):
                    content.update(part)
                    left -= len(part)
        except OSError:
            content.update(b"unreadable")
        name = path.relative_to(root).as_posix() if path != root else ""
        total.update(os.fsencode(name) + b"\0" + content.digest())
    return total.hexdigest()


def texts_key(texts: Iterable[str]) -> str:
    """A hash of the texts in order."""
    total = hashlib.blake2b(digest_size=16)
    for text in texts:
        total.update(text_hash(text).to_bytes(8))
    return total.hexdigest()


def text_hash(text: str) -> int:
    """64 bits of a hash that is the same in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest())


def short_hash(*parts: object) -> str:
    """A hash of the parts as text."""
    return hashlib.blake2b("\0".join(map(str, parts)).encode(errors="surrogatepass"), digest_size=16).hexdigest()


def stamps(files: Iterable[Path]) -> list[tuple[int, int]]:
    """Modification time and size of each file; zeros for a missing one."""
    found = []
    for path in files:
        try:
            status = path.stat()
            found.append((status.st_mtime_ns, status.st_size))
        except OSError:
            found.append((0, 0))
    return found
