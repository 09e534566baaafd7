"""A folder that appears complete or not at all, and of which a killed process leaves nothing for ever."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from flashmhf.errors import InputError
from flashmhf.files import atomic_rename, exclusive_lock
from flashmhf.system_errors import system_error


@contextlib.contextmanager
def new_folder(argument: str, destination: Path) -> Iterator[Path]:
    """A folder to write to, which is renamed to `destination` at the end and removed on failure.

    It is beside `destination`. What a killed process left of it, the next call for the same destination removes.

    Args:
        argument: the name of `destination` in messages.
        destination: a new or empty folder.

    Raises:
        InputError: another process writes to `destination`.
        OSError: no space is left, for example; names `destination`.
    """
    unfinished = destination.parent / f".{destination.name}-flashmhf-unfinished"
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        with exclusive_lock(unfinished.with_name(unfinished.name + ".lock")):
            if unfinished.exists():
                shutil.rmtree(unfinished)
            unfinished.mkdir()
            try:
                yield unfinished
                if destination.exists():
                    destination.rmdir()
                atomic_rename(unfinished, destination)
            finally:
                shutil.rmtree(unfinished, ignore_errors=True)
    except BlockingIOError:
        raise InputError(f"{argument}: expected a folder that no other process writes, got {destination}") from None
    except Exception as error:  # Rust's libraries have errors of their own for a full disk
        if not isinstance(error, OSError | SafetensorError) and system_error(error) is None:
            raise
        raise OSError(f"{argument}: {destination} cannot be written: {error}") from error
