"""Files from elsewhere: their code is never run, and whatever a library raises over them becomes one InputError.

Tokenizers and safetensors raise bare Exceptions and Rust panics, and transformers whatever a wrong value causes.
"""

import contextlib
import logging
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flashmhf.errors import InputError, RunError
from flashmhf.files import read_json

logger = logging.getLogger(__name__)

MAX_SETTINGS_MIB = 256  # the largest tokenizer.json of a published model has 35
MAX_DEPTH = 64
RUST_PANIC = "pyo3_runtime"  # module of the exception's type, which is no Exception
OUR_BUGS = (AssertionError, NameError)


@contextlib.contextmanager
def reading(what: str) -> Iterator[None]:
    """Turns whatever a library raises while it reads `what` into an InputError that names it.

    Signals, errors that already are one line, and bugs of this package pass.
    """
    try:
        yield
    except (InputError, RunError, *OUR_BUGS):
        raise
    except Exception as error:
        logger.debug("%s cannot be read", what, exc_info=True)
        raise InputError(f"{what}: {reason_of(error)}") from error
    except BaseException as error:
        if type(error).__module__ != RUST_PANIC:
            raise
        raise InputError(f"{what}: {reason_of(error)}") from error


def reason_of(error: BaseException) -> str:
    """What an error says, in one line: the first, with those that it announces by a colon."""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)  # not its repr
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    said = lines[0] if lines else ""
    for line in lines[1:]:
        if not said.endswith(":"):
            break
        said += " " + line
    named = isinstance(error, (ValueError, OSError, RuntimeError)) and said
    return said if named else f"{type(error).__name__}: {said}".removesuffix(": ")


def check_regular(file: Path) -> int:
    """The size of a regular file in bytes; opening a named pipe would wait forever.

    Raises:
        InputError: it is missing, or a folder, a pipe or a device.
    """
    try:
        status = file.stat()
    except OSError as error:
        raise InputError(f"expected the file {file}, got none ({error.strerror})") from error
    if not stat.S_ISREG(status.st_mode):
        raise InputError(f"expected a regular file, got a folder, a pipe or a device at {file}")
    return status.st_size


def read_settings(file: Path, *, strict: bool = True) -> dict[str, Any]:
    """A JSON object that was written elsewhere; `strict` as in `files.read_json`.

    Raises:
        InputError: the file is missing, too large, too deeply nested or no JSON object.
    """
    size = check_regular(file)
    if size > MAX_SETTINGS_MIB * 2**20:
        raise InputError(f"expected at most {MAX_SETTINGS_MIB} MiB of settings in {file}, got {size // 2**20}")
    values = read_json(file, strict=strict)
    for _, _, depth in entries(values):
        if depth > MAX_DEPTH:
            raise InputError(f"expected at most {MAX_DEPTH} levels of JSON in {file}, got more")
    return values


def entries(values: dict[str, Any]) -> Iterator[tuple[str | None, Any, int]]:
    """The name (None in a list), value and depth of every entry of a JSON object, without recursion."""
    waiting: list[tuple[str | None, Any, int]] = [(name, value, 1) for name, value in values.items()]
    while waiting:
        name, value, depth = waiting.pop()
        yield name, value, depth
        if isinstance(value, dict):
            waiting += [(inner, item, depth + 1) for inner, item in value.items()]
        elif isinstance(value, list):
            waiting += [(None, item, depth + 1) for item in value]
