"""Which rows of two results became faster or slower beyond the noise of both."""

import functools
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from flashmhf.benchmarking.measuring import Row
from flashmhf.benchmarking.provenance import Provenance

Verdict = Literal["faster", "slower", "within noise", "unknown", "new", "gone", "failed"]
# Rows with equal values of these measure the same thing.
IDENTITY = (
    "kind", "task", "variant", "model", "tokens", "batch_size", "context_length", "new_tokens", "dtype",
    "measured_pass", "hidden_size", "num_heads", "num_subnetworks", "subnetwork_size", "device",
)  # fmt: skip
ENVIRONMENT = ("machine", "processor", "cores", "threads", "python", "flashmhf", "torch", "triton")
QUARTILES = ("lower_quartile_ms", "upper_quartile_ms")
MIN_CHANGE = 1.03  # machines drift by a few percent between runs, which no single run can show


@dataclass(frozen=True, kw_only=True)
class RowComparison:
    """One measurement in two results.

    Attributes:
        identity: the values of IDENTITY.
        ratio: new median / old; `min_ratio` and `max_ratio` by the quartiles of both.
        memory_ratio: new peak / old, where memory is measured.
    """

    identity: Mapping[str, Any]
    verdict: Verdict
    old_ms: float | None
    new_ms: float | None
    ratio: float | None = None
    min_ratio: float | None = None
    max_ratio: float | None = None
    memory_ratio: float | None = None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two results; `environment_changes` of machine and versions may explain any difference."""

    old_commit: str | None
    new_commit: str | None
    environment_changes: tuple[str, ...]
    rows: tuple[RowComparison, ...]

    @property
    def counts(self) -> Counter[Verdict]:
        return Counter(row.verdict for row in self.rows)


def compare_rows(old: Iterable[Row], new: Iterable[Row], old_origin: Provenance, new_origin: Provenance) -> Comparison:
    """What changed from one run to another.

    A row is faster or slower if the quartiles of the two runs are at least 3 % apart. For two equal programs with 7
    repeats each, the quartiles fail to overlap by chance once in 34 times, and are 3 % apart less often. `unknown` is
    a row with fewer than 3 repeats in either run.

    Args:
        old, new: as `BenchmarkResult.records` has them.
    """
    before, after = ({_identity(row): row for row in rows} for rows in (old, new))
    return Comparison(
        old_commit=old_origin.commit,
        new_commit=new_origin.commit,
        environment_changes=tuple(
            f"{name}: {getattr(old_origin, name)} before, {getattr(new_origin, name)} now"
            for name in ENVIRONMENT
            if getattr(old_origin, name) != getattr(new_origin, name)
        ),
        rows=tuple(_compare(before.get(key), after.get(key)) for key in {**after, **before}),
    )


def _identity(row: Row) -> tuple[str, ...]:
    return tuple(str(row.get(key)) for key in IDENTITY)


def _compare(old: Row | None, new: Row | None) -> RowComparison:
    row, before, after = new or old or {}, old or {}, new or {}
    old_ms, new_ms = before.get("median_ms"), after.get("median_ms")
    identity = {key: row[key] for key in IDENTITY if row.get(key) is not None}
    compared = functools.partial(RowComparison, identity=identity, old_ms=old_ms, new_ms=new_ms)
    if new is None:
        return compared(verdict="gone")
    if new_ms is None:
        return compared(verdict="failed")
    if old_ms is None:
        return compared(verdict="new")
    old_mib, new_mib = before.get("peak_mib"), after.get("peak_mib")
    compared = functools.partial(
        compared, ratio=new_ms / old_ms, memory_ratio=new_mib / old_mib if old_mib and new_mib else None
    )
    quartiles = [side[key] for side in (before, after) for key in QUARTILES if side.get(key) is not None]
    if len(quartiles) < 4:
        return compared(verdict="unknown")
    old_lower, old_upper, new_lower, new_upper = quartiles
    min_ratio, max_ratio = new_lower / old_upper, new_upper / old_lower
    return compared(verdict=_verdict(min_ratio, max_ratio), min_ratio=min_ratio, max_ratio=max_ratio)


def _verdict(min_ratio: float, max_ratio: float) -> Verdict:
    if max_ratio <= 1 / MIN_CHANGE:
        return "faster"
    if min_ratio >= MIN_CHANGE:
        return "slower"
    return "within noise"
