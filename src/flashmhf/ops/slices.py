"""Splits a size into blocks."""

from collections.abc import Iterator


def slices(size: int, step: int) -> Iterator[slice]:
    """Consecutive slices of at most `step` elements that cover range(size)."""
    for start in range(0, size, step):
        yield slice(start, min(start + step, size))
