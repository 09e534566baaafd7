"""The table of compiled kernels: every row in docs/kernels.csv, one line per target in docs/kernels.md."""

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple


class Row(NamedTuple):
    """A shipped tile and what it compiles to; compile_kernels.Compiled explains the last five."""

    target: str
    kernel: str
    dtype: str
    head_dim: int
    block_t: int
    block_f: int
    warps: int
    stages: int
    options: str
    registers: int
    spilled: int
    shared_bytes: int
    matrix_instructions: int
    issued: float | None


SIZES = ("block_t", "block_f", "num_warps", "num_stages", "stages")


def options(fields: Mapping[str, Any]) -> str:
    """A tile's fields other than its sizes: "q_in_registers splits=3"; flags that are off are omitted."""
    chosen = [(name, value) for name, value in fields.items() if name not in SIZES and value is not False]
    return " ".join(name if value is True else f"{name}={value}" for name, value in chosen)


def tile_name(fields: Mapping[str, Any]) -> str:
    """The sizes of a tile and its options: "64x64x4 q_in_registers"."""
    sizes = "x".join(str(value) for name, value in fields.items() if name in SIZES)
    return f"{sizes} {options(fields)}".strip()


def write_csv(rows: list[Row], file: Path) -> None:
    """One line per row; `issued` with three digits, empty without matrix instructions."""
    with file.open("w", newline="") as opened:
        writer = csv.writer(opened, lineterminator="\n")
        writer.writerow(Row._fields)
        writer.writerows(row._replace(issued=None if row.issued is None else round(row.issued, 3)) for row in rows)


def summary(rows: list[Row], shared_limits: Mapping[str, int]) -> str:
    """One Markdown line per target. The last column omits prologues, which are memory-bound."""
    lines = [
        "| target | rows | spill | max registers | max shared memory | more matrix FLOPs than the algorithm's |",
        "|---|---:|---:|---:|---:|---|",
    ]
    for target in dict.fromkeys(row.target for row in rows):
        of_target = [row for row in rows if row.target == target]
        spilled = sum(row.spilled > 0 for row in of_target)
        registers, shared = (max(getattr(row, name) for row in of_target) for name in ("registers", "shared_bytes"))
        lines.append(
            f"| {target} | {len(of_target)} | {spilled} | {registers} "
            f"| {shared / 1024:.0f} of {shared_limits[target] / 1024:.0f} KiB | {_wasteful(of_target)} |"
        )
    return "\n".join(lines) + "\n"


def _wasteful(rows: list[Row]) -> str:
    found = [row for row in rows if row.issued is not None and row.issued > 1 and not row.kernel.startswith("prologue")]
    if not found:
        return "none"
    worst = max(found, key=lambda row: row.issued or 0)
    return f"{len(found)}, up to {worst.issued:.2f} ({worst.kernel}, {worst.dtype}, head dim {worst.head_dim})"
