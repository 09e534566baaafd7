"""Rows of several machines and days in one file, short tables in Markdown, and a picture."""

import json
import math
import statistics
from pathlib import Path
from typing import Any

from flashmhf.evaluation.bootstrap import student_t
from flashmhf.files import atomic_write
from flashmhf.reports.table import Table
from gpu_facts import facts
from gpu_plots import plot
from gpu_rows import Row, UnusableError, failed, read_lines, rows_of
from gpu_speed import growth_fit

CHECKS = ("smoke", "rounds", "tiles", "graphs", "sanitizer")
# Step -> keys of a line, key of a column, and the quantity.
TABLES: dict[str, tuple[tuple[str, ...], str, str]] = {
    "op": (("shape", "dtype", "measured_pass", "tokens"), "variant", "ratio_to_cublas"),
    "dims": (("shape", "dtype", "measured_pass", "tokens"), "variant", "ratio_to_cublas"),
    "layer": (("shape", "against", "measured_pass", "tokens"), "variant", "ratio"),
    "decode": (("shape", "tokens"), "variant", "ratio"),
    "growth": (("shape", "tokens"), "variant", "median_ms"),
}
FACTS = ("step", "case", "device", "device_class", "torch", "triton", "commit", "code", "kernels", "date")
OTHER_TILE = "fastest other tile"
BASELINE, VARIANT = "swiglu", "flashmhf"  # of the training comparison
MIN_SEEDS = 3  # for an interval


def merge(folders: list[Path], merged: Path) -> str:
    """Adds the rows of folders (or files) to `merged`, writes tables and picture next to it, returns a summary.

    Raises:
        UnusableError: a folder holds no rows, or a file cannot be read.
    """
    files = [file for folder in folders for file in _files(folder)]
    lines, corrupt = read_lines(merged)
    for file in files:
        new_lines, new_corrupt = read_lines(file)
        lines, corrupt = lines + new_lines, corrupt + new_corrupt
    own = _own_commit()
    rows = [row for row in rows_of(lines) if row["device"] != "cpu"]
    ignored = f", {corrupt} corrupt lines ignored" if corrupt else ""
    if not rows:
        return f"{merged}: no rows of a GPU in {len(files)} files{ignored}"
    unique = list(dict.fromkeys(json.dumps(row | own.get(row["code"], {})) for row in rows))
    atomic_write(merged, "".join(f"{line}\n" for line in unique))
    rows = [json.loads(line) for line in unique]
    atomic_write(merged.with_suffix(".md"), _markdown(rows))
    plot(_shipped(rows), merged.with_suffix(".png"))
    return f"{merged}: {len(rows)} rows, {len(files)} files added{ignored}"


def _files(folder: Path) -> list[Path]:
    files = [folder] if folder.is_file() else sorted(folder.glob("*.jsonl"))
    if not files:
        raise UnusableError(f"merge: expected folders with rows (*.jsonl), got {str(folder)!r}")
    return files


def _own_commit() -> dict[str, Row]:
    """This code -> its commit, which rows measured in a copy without a repository lack."""
    known = facts(dry_run=True)
    return {} if known["commit"] is None else {known["code"]: {"commit": known["commit"]}}


def _shipped(rows: list[Row]) -> dict[str, list[Row]]:
    """Rows by step, without those of tiles that do not ship."""
    steps: dict[str, list[Row]] = {}
    for row in rows:
        if "=" not in row.get("variant", ""):
            steps.setdefault(row["step"], []).append(row)
    return steps


def _markdown(rows: list[Row]) -> str:
    """Per device and code: counts of checks, and one small table per step."""
    origins: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        key = tuple(row[name] for name in ("device", "torch", "triton", "commit", "code", "date"))
        origins.setdefault(key, []).append(row)
    lines = ["# Measured on GPUs", "", "Written by `python benchmarks/gpu.py --merge`; every row is in gpu.jsonl."]
    for (device, torch, triton, commit, code, date), of_origin in origins.items():
        lines += [
            "",
            f"## {device}, {date}",
            "",
            f"torch {torch}, Triton {triton}, commit {commit or f'(code {code})'}",
        ]
        runs = [row for row in of_origin if "seed" in row]
        others = [row for row in of_origin if "seed" not in row]
        for step in dict.fromkeys(row["step"] for row in others):
            lines += _section(step, [row for row in others if row["step"] == step])
        lines += _training(runs)
    return "\n".join(lines) + "\n"


def _section(step: str, rows: list[Row]) -> list[str]:
    wrong = [row for row in rows if failed(row)]
    lines = ["", f"### {step}", ""]
    if step in CHECKS:
        lines.append(f"{len(rows) - len(wrong)} of {len(rows)} results are right.")
    lines += [f"- {row['case']}: {row.get('failed') or row.get('result')}, error {row.get('error')}" for row in wrong]
    if step in TABLES:
        index, column, quantity = TABLES[step]
        lines += [f"{quantity.replace('_', ' ')}:", "", Table.of(_pivot(rows, index, column, quantity)).markdown()]
        if step == "growth":
            variants = dict.fromkeys(row["variant"] for row in rows if "variant" in row)
            fits = [
                {"variant": name, **growth_fit([row for row in rows if row.get("variant") == name])}
                for name in variants
            ]
            lines += ["", Table.of(fits).markdown()]
    elif step not in CHECKS:
        lines.append(
            Table.of([{key: value for key, value in row.items() if key not in FACTS} for row in rows]).markdown()
        )
    return lines


def _training(rows: list[Row]) -> list[str]:
    """The final validation loss of every run, one line per seed, and the mean difference of the pairs."""
    if not rows:
        return []
    losses: dict[tuple[str, int], Row] = {}
    for row in rows:
        if row.get("final"):
            line = losses.setdefault((row["size"], row["seed"]), {"size": row["size"], "seed": row["seed"]})
            line[row["ffn_type"]] = row["validation_nats_per_token"]
    pairs = [line for line in losses.values() if BASELINE in line and VARIANT in line]
    for line in pairs:
        line["difference"] = line[VARIANT] - line[BASELINE]
    differences: dict[str, list[float]] = {line["size"]: [] for line in losses.values()}
    for line in pairs:
        differences[line["size"]].append(line["difference"])
    failures = [
        f"- {row['size']} {row.get('ffn_type', 'pair')}, seed {row['seed']}: {row['failed']}"
        for row in rows
        if "failed" in row
    ]
    return [
        "",
        "### training",
        "",
        "Final validation loss, nats/token:",
        "",
        Table.of(list(losses.values())).markdown(),
        "",
        *(f"{size}: {VARIANT} - {BASELINE}: {_interval(values)}." for size, values in differences.items()),
        *failures,
    ]


def _interval(differences: list[float]) -> str:
    """The mean with its 95 % interval over seeds."""
    count = len(differences)
    if count < MIN_SEEDS:
        return f"not decided, expected at least {MIN_SEEDS} seeds of both, got {count}"
    mean, half = statistics.fmean(differences), statistics.stdev(differences) / math.sqrt(count) * student_t(count - 1)
    return f"{mean:+.4f} [{mean - half:+.4f}, {mean + half:+.4f}] (95 %, Student's t over {count} seeds)"


def _pivot(rows: list[Row], index: tuple[str, ...], column: str, quantity: str) -> list[Row]:
    """One line per value of `index`, one column per variant, and one for the best tile that does not ship."""
    lines: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        if not isinstance(row.get(quantity), int | float):
            continue  # it failed, or was skipped
        line = lines.setdefault(tuple(row.get(key) for key in index), {key: row.get(key) for key in index})
        if "=" not in row[column]:
            line[row[column]] = row[quantity]
        elif row[quantity] > line.get(OTHER_TILE, 0):
            line |= {OTHER_TILE: row[quantity], "which": row[column]}
    return list(lines.values())
