"""Which rows of two results became faster or slower beyond the noise of both."""

from typing import Any

from flashmhf.benchmarking.measuring import Row
from flashmhf.benchmarking.results import QUARTILES, complete

# Rows are of the same thing where all of these agree.
IDENTITY = (
    "kind", "task", "variant", "model", "tokens", "batch_size", "context_length", "new_tokens", "dtype",
    "measured_pass", "hidden_size", "num_heads", "num_subnetworks", "subnetwork_size", "device",
)  # fmt: skip
SURROUNDINGS = ("machine", "processor", "cores", "threads", "python", "flashmhf", "torch", "triton")
MIN_CHANGE = 1.03  # machines drift by a few percent from one run to the next, which no run by itself can see
VERDICTS = ("faster", "slower", "within noise", "unknown", "new", "gone", "failed")


def compare_results(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """What changed from one result to another.

    A row is faster or slower if the quartiles of the two runs lie at least 3 % apart. Of two equal programs with 7
    repeats each, the quartiles do not overlap by chance once in 34 times, and less often lie 3 % apart. `unknown` is a
    row of which a run has fewer than 3 repeats, or no quartiles.

    Returns:
        `rows`: the identity, both medians, `ratio` (new time / old), its bounds by the quartiles, `memory_ratio` where
        memory is measured, and the verdict, one of VERDICTS; `counts` of the verdicts; `differences` of machine and
        versions, which may explain any of them.
    """
    before, after = ({_identity(row): row for row in complete(result)} for result in (old, new))
    rows = [_compare_rows(before.get(key), after.get(key)) for key in {**after, **before}]
    verdicts = [row["verdict"] for row in rows]
    return {
        "old_commit": old.get("commit"),
        "new_commit": new.get("commit"),
        "differences": [
            f"{name}: {old[name]} before, {new.get(name)} now"
            for name in SURROUNDINGS
            if name in old and old[name] != new.get(name)
        ],
        "counts": {verdict: verdicts.count(verdict) for verdict in VERDICTS if verdict in verdicts},
        "rows": rows,
    }


def _identity(row: Row) -> tuple[str, ...]:
    return tuple(str(row.get(key)) for key in IDENTITY)


def _compare_rows(old: Row | None, new: Row | None) -> Row:
    row = new or old or {}
    result = {key: row[key] for key in IDENTITY if row.get(key) is not None}
    before, after = old or {}, new or {}
    old_ms, new_ms = before.get("median_ms"), after.get("median_ms")
    result |= {"old_ms": old_ms, "new_ms": new_ms, "ratio": None, "ratio_from": None, "ratio_to": None}
    if new is None:
        return {**result, "verdict": "gone"}
    if new_ms is None:
        return {**result, "verdict": "failed"}
    if old_ms is None:
        return {**result, "verdict": "new"}
    result["ratio"] = new_ms / old_ms
    if before.get("peak_mib") and after.get("peak_mib"):
        result["memory_ratio"] = after["peak_mib"] / before["peak_mib"]
    quartiles = [side[key] for side in (before, after) for key in QUARTILES if side.get(key) is not None]
    if len(quartiles) < 4:
        return {**result, "verdict": "unknown"}
    old_lower, old_upper, new_lower, new_upper = quartiles
    result |= {"ratio_from": new_lower / old_upper, "ratio_to": new_upper / old_lower}
    return {**result, "verdict": _verdict(result["ratio_from"], result["ratio_to"])}


def _verdict(least: float, most: float) -> str:
    if most <= 1 / MIN_CHANGE:
        return "faster"
    if least >= MIN_CHANGE:
        return "slower"
    return "within noise"


def comparison_table(comparison: dict[str, Any]) -> list[Row]:
    """The rows to print: what each is of, in one cell and as far as they differ, then the verdict and the figures."""
    rows = comparison["rows"]
    names = ("variant", "model")
    telling = [key for key in IDENTITY if key in names or len({str(row.get(key)) for row in rows}) > 1]
    return [
        {
            "what": ", ".join(_phrase(key, row[key]) for key in telling if key in row),
            "verdict": row["verdict"],
            **{key: value for key, value in row.items() if key not in IDENTITY},
        }
        for row in rows
    ]


def _phrase(key: str, value: Any) -> str:
    return f"{key.replace('_', ' ')} {value}" if isinstance(value, int) else str(value)


def comparison_summary(comparison: dict[str, Any]) -> list[str]:
    """Lines: how many of each verdict, between which commits, and what else is not the same."""
    counts = ", ".join(f"{count} {verdict}" for verdict, count in comparison["counts"].items())
    commits = f"commit {comparison['old_commit']} before, {comparison['new_commit']} now"
    warnings = [f"Not the same, which alone can change times: {line}" for line in comparison["differences"]]
    return [f"{counts}; {commits}", *warnings]
