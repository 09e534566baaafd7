"""Results of GPU measurements that change which tiles and backends are used; empty until something is measured.

`python benchmarks/gpu.py --apply` writes measured.json from committed measurements. The tile tables read it, and `auto`
follows them.
"""

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("measured.json")
# Claim -> the keys of an entry and their types. Every entry also has a `proof`, for readers.
CLAIMS: dict[str, dict[str, type]] = {
    "hopper tile": {"kernel": str, "D": int, "tile": dict},
    "hopper verified": {"D": int, "dtype": str},
    "hopper faster": {"D": int, "dtype": str, "from_tokens": int},
    "triton tile": {"device": str, "element_bytes": int, "kernel": str, "D": int, "tile": list},
    "fused faster": {"device": str, "D": int},
}

Entry = dict[str, Any]


@functools.cache
def entries() -> tuple[Entry, ...]:
    """The entries of measured.json, read once.

    Raises:
        ValueError: the file does not have the format that `--apply` writes.
    """
    return parse(FILE.read_text())


def parse(text: str) -> tuple[Entry, ...]:
    """The entries of a measured.json; raises a ValueError that names the first invalid one."""
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{FILE.name}: expected JSON, got {text[:40]!r}") from error
    if not isinstance(found, list):
        raise ValueError(f"{FILE.name}: expected a list of entries, got {type(found).__name__}")
    for number, entry in enumerate(found, start=1):
        keys = CLAIMS.get(entry.get("claim", "")) if isinstance(entry, dict) else None
        if keys is None:
            raise ValueError(f"{FILE.name}: entry {number}: claim: expected one of {', '.join(CLAIMS)}, got {entry!r}")
        for key, kind in (keys | {"proof": dict}).items():
            if not isinstance(entry.get(key), kind):
                raise ValueError(
                    f"{FILE.name}: entry {number}: {key}: expected {kind.__name__}, got {entry.get(key)!r}"
                )
    return tuple(found)


def hopper_tile(kernel: str, D: int) -> dict[str, Any] | None:
    """The fields of the tile that measured fastest, or None."""
    return next((entry["tile"] for entry in _of("hopper tile") if (entry["kernel"], entry["D"]) == (kernel, D)), None)


def hopper_verified() -> frozenset[tuple[int, str]]:
    """(padded head dim, name of the dtype) pairs whose kernels passed on a GPU."""
    return frozenset((entry["D"], entry["dtype"]) for entry in _of("hopper verified"))


def hopper_faster_from() -> dict[tuple[int, str], int]:
    """(padded head dim, name of the dtype) -> number of tokens from which Hopper's kernels measured faster."""
    return {(entry["D"], entry["dtype"]): entry["from_tokens"] for entry in _of("hopper faster")}


def triton_tiles() -> dict[tuple[str, int, str, int], tuple[int, ...]]:
    """(device class, bytes of an element, kernel, padded head dim) -> the tile that measured fastest."""
    return {
        (entry["device"], entry["element_bytes"], entry["kernel"], entry["D"]): tuple(entry["tile"])
        for entry in _of("triton tile")
    }


def fused_faster() -> frozenset[tuple[str, int]]:
    """(device class, padded head dim) pairs where the fused backward measured faster than two kernels."""
    return frozenset((entry["device"], entry["D"]) for entry in _of("fused faster"))


def _of(claim: str) -> Iterator[Entry]:
    return (entry for entry in entries() if entry["claim"] == claim)
