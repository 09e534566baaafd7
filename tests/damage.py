"""Ways in which a file can be unreadable, for tests that try all of them on all files."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest


def _link(file: Path) -> None:
    file.unlink()
    file.symlink_to("nothing")


def _folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def _written(content: bytes) -> Callable[[Path], Any]:
    return lambda file: file.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "empty": _written(b""),
    "half": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "zeroed": lambda file: file.write_bytes(bytes(file.stat().st_size)),
    "list": _written(b"[]"),
    "null": _written(b"null"),
    "number": _written(b"7"),
    "empty object": _written(b"{}"),
    "deep": _written(b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}"),
    "binary": _written(bytes(range(256)) * 4),
    "huge number": _written(b'{"version": ' + b"9" * 5000 + b"}"),
    "folder": _folder,
    "dangling link": _link,
}
VALUES = (None, "text", -1, 1e400, [], {}, [[]], True)


def wrong_values(file: Path) -> Iterator[tuple[str, Any]]:
    """The JSON object in `file` with each value of its first two levels replaced; names and contents."""
    content = json.loads(file.read_text())
    for name in content:
        for value in VALUES:
            yield f"{name} {value!r}", content | {name: value}
        if isinstance(content[name], dict):
            for inner in content[name]:
                for value in VALUES:
                    yield f"{name}.{inner} {value!r}", content | {name: content[name] | {inner: value}}


def assert_one_line(what: str, act: Callable[[], Any], errors: tuple[type[BaseException], ...]) -> str | None:
    """The one line of the error that `act` raised, or None if it ended well. Anything else is a failure."""
    try:
        act()
    except errors as error:
        assert str(error) and "\n" not in str(error), (what, error)  # noqa: PT017, PT018
        return str(error)
    except BaseException as error:
        pytest.fail(f"{what}: {type(error).__name__}: {error}"[:500])
    return None
