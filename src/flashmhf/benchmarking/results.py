"""A benchmark's result, and its JSON form."""

import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from flashmhf.benchmarking.comparing import QUARTILES, Comparison, compare_rows
from flashmhf.benchmarking.measuring import Row
from flashmhf.benchmarking.provenance import Provenance
from flashmhf.benchmarking.workloads import LayerShape, ModelWorkload
from flashmhf.errors import InputError

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
        InputError: the file is something else, or of another version.
    """
    try:
        return _from_json(json.loads(file.read_bytes()))
    except OSError as error:
        reason = error.strerror
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError):
        reason = "not JSON"
    except (ValueError, TypeError) as error:
        reason = str(error)
    raise InputError(f"compare: expected the results.json of a benchmark, got {str(file)!r}: {reason}")


def _from_json(content: Any) -> BenchmarkResult:
    """Raises ValueError or TypeError for what is not a result."""
    if not isinstance(content, dict) or not isinstance(content.get("kind"), str):
        raise ValueError("it has no 'kind'")
    if content.get("version") != VERSION:
        raise ValueError(f"expected version {VERSION}, got {content.get('version', 1)}; run the benchmark again")
    rows = content.get("rows")
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise ValueError("it has no 'rows'")
    for number, row in enumerate(rows, 1):
        if "failed" not in row and not _is_time(row.get("median_ms")):
            raise ValueError(f"row {number} has no 'median_ms'")
        if not all(row.get(name) is None or _is_time(row[name]) for name in QUARTILES):
            raise ValueError(f"row {number} has a quartile that is not a time")
    for name in ("workload", "provenance"):
        if not isinstance(content.get(name), dict):
            raise ValueError(f"it has no {name!r}")
    workload = ModelWorkload if content["kind"] == "model" else LayerShape
    return BenchmarkResult(
        kind=content["kind"],
        provenance=Provenance(**content["provenance"]),
        workload=workload(**content["workload"]),
        rows=tuple(rows),
    )


def _is_time(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value) and value > 0
