"""Rows of several machines and days as one file, a short table in Markdown, and a picture."""

import json
import math
import statistics
from pathlib import Path
from typing import Any

from flashmhf.evaluation.bootstrap import student_t
from flashmhf.files import atomic_write
from gpu_facts import facts
from gpu_plots import plot
from gpu_rows import Row, UnusableError, failed, read_lines, rows_of
from gpu_speed import growth_fit

CHECKS = ("smoke", "rounds", "tiles", "graphs", "sanitizer")
# Step -> what makes a line, what makes a column, and the quantity in it.
TABLES: dict[str, tuple[tuple[str, ...], str, str]] = {
    "op": (("shape", "dtype", "measured_pass", "tokens"), "variant", "ratio_to_cublas"),
    "dims": (("shape", "dtype", "measured_pass", "tokens"), "variant", "ratio_to_cublas"),
    "layer": (("shape", "against", "measured_pass", "tokens"), "variant", "ratio"),
    "decode": (("shape", "tokens"), "variant", "ratio"),
    "growth": (("shape", "tokens"), "variant", "median_ms"),
}
FACTS = ("step", "case", "device", "device_class", "torch", "triton", "commit", "code", "kernels", "date")
OTHER_TILE = "fastest other tile"
BASELINE, OTHER = "swiglu", "flashmhf"  # of the training comparison


def merge(folders: list[Path], merged: Path) -> str:
    """Adds the rows of folders (or files) to those of `merged`, writes table and picture beside it, says what it did.

    Raises:
        UnusableError: a folder holds no rows, or a file cannot be read.
    """
    files = [file for folder in folders for file in _files(folder)]
    lines, torn = read_lines(merged)
    for file in files:
        of_file, torn_of_file = read_lines(file)
        lines, torn = lines + of_file, torn + torn_of_file
    own = _own_commit()
    rows = [row for row in rows_of(lines) if row["device"] != "cpu"]
    ignored = f", {torn} torn lines ignored" if torn else ""
    if not rows:
        return f"{merged}: nothing to write in {len(files)} files{ignored}; a dry run measures nothing"
    unique = list(dict.fromkeys(json.dumps(row | own.get(row["code"], {})) for row in rows))
    atomic_write(merged, "".join(f"{line}\n" for line in unique))
    rows = [json.loads(line) for line in unique]
    atomic_write(merged.with_suffix(".md"), _markdown(rows))
    plot(_shipped(rows), merged.with_suffix(".png"))
    return f"{merged}: {len(rows)} rows of {len(files)} files and of before{ignored}"


def _files(folder: Path) -> list[Path]:
    files = [folder] if folder.is_file() else sorted(folder.glob("*.jsonl"))
    if not files:
        raise UnusableError(f"merge: expected folders with rows (*.jsonl), got {str(folder)!r}")
    return files


def _own_commit() -> dict[str, Row]:
    """This code -> its commit, which a copy without a repository, where it was measured, does not know."""
    known = facts(dry_run=True)
    return {} if known["commit"] is None else {known["code"]: {"commit": known["commit"]}}


def _shipped(rows: list[Row]) -> dict[str, list[Row]]:
    """By step, without what other tiles measured."""
    steps: dict[str, list[Row]] = {}
    for row in rows:
        if "=" not in row.get("variant", ""):
            steps.setdefault(row["step"], []).append(row)
    return steps


def _markdown(rows: list[Row]) -> str:
    """For each device and state of the code: counts of checks, and one small table a step."""
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
        runs = [row for row in of_origin if "contender" in row]
        others = [row for row in of_origin if "contender" not in row]
        for step in dict.fromkeys(row["step"] for row in others):
            lines += _section(step, [row for row in others if row["step"] == step])
        lines += _training(runs)
    return "\n".join(lines) + "\n"


def _section(step: str, rows: list[Row]) -> list[str]:
    wrong = [row for row in rows if failed(row)]
    lines = ["", f"### {step}", ""]
    if step in CHECKS:
        lines.append(f"{len(rows) - len(wrong)} of {len(rows)} results as they should be.")
    lines += [f"- {row['case']}: {row.get('failed') or row.get('result')}, error {row.get('error')}" for row in wrong]
    if step in TABLES:
        index, column, quantity = TABLES[step]
        lines += [f"{quantity.replace('_', ' ')}:", "", table(_pivot(rows, index, column, quantity))]
        if step == "growth":
            variants = dict.fromkeys(row["variant"] for row in rows if "variant" in row)
            fits = [
                {"variant": name, **growth_fit([row for row in rows if row.get("variant") == name])}
                for name in variants
            ]
            lines += ["", table(fits)]
    elif step not in CHECKS:
        lines.append(table([{key: value for key, value in row.items() if key not in FACTS} for row in rows]))
    return lines


def _training(rows: list[Row]) -> list[str]:
    """The last validation loss of every run, a line each seed, and what the pairs say."""
    if not rows:
        return []
    first, second = BASELINE, OTHER
    losses: dict[int, Row] = {}
    for row in rows:
        if row.get("final"):
            losses.setdefault(row["seed"], {"seed": row["seed"]})[row["contender"]] = row["validation_nats_per_token"]
    pairs = [line for line in losses.values() if first in line and second in line]
    for line in pairs:
        line["difference"] = line[second] - line[first]
    differences = [line["difference"] for line in pairs]
    failures = [f"- {row['contender']}, seed {row['seed']}: {row['failed']}" for row in rows if "failed" in row]
    return [
        "",
        "### training",
        "",
        "Validation loss of the last step, nats/token:",
        "",
        table(list(losses.values())),
        "",
        f"{second} less {first}: {_interval(differences)}.",
        *failures,
    ]


def _interval(differences: list[float]) -> str:
    """The mean with its 95 % interval over seeds."""
    count = len(differences)
    if count < 2:
        return "not decided: two seeds of both at least are wanted"
    mean, half = statistics.fmean(differences), statistics.stdev(differences) / math.sqrt(count) * student_t(count - 1)
    return f"{mean:+.4f} [{mean - half:+.4f}, {mean + half:+.4f}] (95 %, Student's t over {count} seeds)"


def _pivot(rows: list[Row], index: tuple[str, ...], column: str, quantity: str) -> list[Row]:
    """One line for each value of `index`, one column for each variant; of tiles that do not ship the best alone."""
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
