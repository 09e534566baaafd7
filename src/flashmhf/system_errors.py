"""What the operating system refuses, whichever library reports it: no space, no descriptors, no shared memory."""

import errno
import re
from collections.abc import Iterator

FULL = (errno.ENOSPC, errno.EDQUOT)
REFUSED = (*FULL, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EROFS, errno.EIO, errno.EFBIG)
RUST = re.compile(r"\(os error (\d+)\)")  # of safetensors and tokenizers
# Of torch and its loaders, whose errors carry no number.
WORDS = re.compile(
    r"No space left on device|Disk quota exceeded|Too many open files|Read-only file system|Cannot allocate memory"
    r"|shared memory|Bus error"
)


def system_error(error: BaseException) -> BaseException | None:
    """`error`, or the one that caused it, if the operating system refused something; otherwise None."""
    for found in _causes(error):
        if isinstance(found, MemoryError) or _number(found) in REFUSED or WORDS.search(str(found)):
            return found
    return None


def is_disk_full(error: BaseException) -> bool:
    """Whether a disk without space, or a quota, is the cause."""
    return any(_number(found) in FULL for found in _causes(error))


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        yield error
        seen.add(id(error))
        error = error.__cause__ or error.__context__


def _number(error: BaseException) -> int | None:
    if isinstance(error, OSError):
        return error.errno
    match = RUST.search(str(error))
    return int(match[1]) if match else None
