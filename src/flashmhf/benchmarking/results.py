"""A result as rows, as CSV, and as it is read again from results.json."""

import csv
import io
import json
import math
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

from flashmhf.benchmarking.measuring import Row
from flashmhf.benchmarking.provenance import columns_of
from flashmhf.benchmarking.variants import Shape
from flashmhf.errors import InputError

# What is said once of a result and repeated in every row, so that a row can be read alone.
FACTS = (
    "kind", "device", "machine", "processor", "cores", "threads", "python", "flashmhf", "torch", "triton", "commit",
    "date",
)  # fmt: skip
QUARTILES = ("lower_quartile_ms", "upper_quartile_ms")


def complete(result: dict[str, Any]) -> list[Row]:
    """The rows, each with sizes, machine, versions and commit."""
    facts = {name: result[name] for name in FACTS if name in result}
    return [{**row, **result.get("shape", {}), **facts} for row in result["rows"]]


def measured(rows: list[Row]) -> list[Row]:
    """The rows without what `complete` added."""
    sizes = {field.name for field in fields(Shape)}
    return [{key: value for key, value in row.items() if key not in sizes and key not in FACTS} for row in rows]


def check_folder(folder: Path) -> None:
    """Raises InputError for what cannot be, or is surely not meant as, the folder of `write_results`."""
    if folder.suffix == ".json" or (folder.exists() and not folder.is_dir()):
        raise InputError(f"output: expected a folder, got {str(folder)!r}")


def read_result(file: Path) -> dict[str, Any]:
    """What `write_results` wrote to results.json.

    Raises:
        InputError: it is something else.
    """
    try:
        result = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no JSON"
    else:
        reason = _invalid_reason(result)
        if reason is None:
            return cast(dict[str, Any], result)
    raise InputError(f"compare: expected the results.json of a benchmark, got {str(file)!r}: {reason}")


def _invalid_reason(result: Any) -> str | None:
    """The first thing that keeps an object from being a result."""
    if not isinstance(result, dict) or not isinstance(result.get("kind"), str):
        return "it has no 'kind'"
    rows = result.get("rows")
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        return "it has no 'rows'"
    if not isinstance(result.get("shape", {}), dict):
        return "its 'shape' is no object"
    for number, row in enumerate(rows, 1):
        if "failed" not in row and not _is_time(row.get("median_ms")):
            return f"row {number} has no 'median_ms'"
        if not all(row.get(name) is None or _is_time(row[name]) for name in QUARTILES):
            return f"row {number} has a quartile that is no time"
    return None


def _is_time(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value) and value > 0


def csv_text(rows: list[Row]) -> str:
    """Rows as CSV, one column for every key that occurs."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns_of(rows), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
