"""A benchmark's result, and its JSON form."""

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from flashmhf.benchmarking.comparing import QUARTILES, Comparison, compare_rows
from flashmhf.benchmarking.measuring import Row
from flashmhf.benchmarking.provenance import Provenance
from flashmhf.benchmarking.workloads import LayerShape, ModelWorkload
from flashmhf.errors import InputError
from flashmhf.files import read_results
from flashmhf.serialization import from_plain

VERSION = 2  # of results.json; 1 had no number, and provenance in every row


@dataclass(frozen=True, kw_only=True)
class BenchmarkResult:
    """What `flashmhf bench` measured.

    Attributes:
        kind: op, layer, decode or model.
        workload: what all rows have in common; models for kind "model", else the layer's shape.
        rows: one per variant and case.
        comparison: with an earlier result, if there was one.
    """

    kind: str
    provenance: Provenance
    workload: LayerShape | ModelWorkload
    rows: tuple[Row, ...]
    comparison: Comparison | None = None

    def records(self) -> list[Row]:
        """The rows, each with the layer's shape, kind and provenance: what CSV holds."""
        shape = asdict(self.workload) if isinstance(self.workload, LayerShape) else {}
        origin = {name: value for name, value in asdict(self.provenance).items() if name != "command"}
        return [{**row, **shape, "kind": self.kind, **origin} for row in self.rows]

    def compared_with(self, old: "BenchmarkResult") -> "BenchmarkResult":
        """The same result, with `comparison`."""
        comparison = compare_rows(old.records(), self.records(), old.provenance, self.provenance)
        return replace(self, comparison=comparison)

    def to_json(self) -> dict[str, Any]:
        return {"version": VERSION, **asdict(self)}


def read_result(file: Path) -> BenchmarkResult:
    """The result that a results.json holds; its comparison is left out.

    Raises:
        InputError: the file is something else, or of another version; names it.
    """
    content = read_results(file, VERSION, noun="benchmark", advice="run flashmhf bench again")
    try:
        return _from_json(content)
    except ValueError as error:
        raise InputError(f"{file}: {error}") from error


def _from_json(content: dict[str, Any]) -> BenchmarkResult:
    """Raises ValueError for what is not a result."""
    kind, rows, shape = (content.get(name) for name in ("kind", "rows", "workload"))
    if not isinstance(kind, str):
        raise ValueError("expected kind, got none")
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise ValueError("expected rows, got none")
    for number, row in enumerate(rows, 1):
        if "failed" not in row and not _is_time(row.get("median_ms")):
            raise ValueError(f"row {number}: expected median_ms, got {row.get('median_ms')!r:.80}")
        for name in QUARTILES:
            if row.get(name) is not None and not _is_time(row[name]):
                raise ValueError(f"row {number}: expected a time as {name}, got {row[name]!r:.80}")
    return BenchmarkResult(
        kind=kind,
        provenance=from_plain(Provenance, content.get("provenance")),
        workload=from_plain(ModelWorkload, shape) if kind == "model" else from_plain(LayerShape, shape),
        rows=tuple(rows),
    )


def _is_time(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value) and value > 0
