"""What a measurement must say of itself, and rows as a Markdown table."""

import os
import platform
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import flashmhf
from flashmhf.benchmarking.measuring import Row

RESULTS = ":(top,exclude)benchmarks/results"  # writing results does not make another commit of the code


def provenance(device: torch.device) -> dict[str, Any]:
    """Machine, versions, commit and command of what is measured on `device`."""
    return {
        "machine": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": device.type,
        "python": platform.python_version(),
        "flashmhf": flashmhf.__version__,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "commit": _commit(),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
    }


def _processor() -> str:
    """The number of processors and their name where Linux says it."""
    cpu_info = Path("/proc/cpuinfo")
    if cpu_info.exists():
        names = [line.partition(":")[2].strip() for line in cpu_info.read_text().splitlines() if "model name" in line]
        if names:
            return f"{len(names)} x {names[0]}"
    return platform.processor()


def table(rows: list[Row]) -> str:
    """Rows as Markdown, one column for every key that has a value."""
    columns = telling_columns(rows)
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(cell(row.get(column)) for column in columns) + " |" for row in rows]
    return "\n".join(lines)


def columns_of(rows: list[Row]) -> list[str]:
    """Every key that occurs, in the order in which they do."""
    return list(dict.fromkeys(key for row in rows for key in row))


def telling_columns(rows: list[Row]) -> list[str]:
    """Those of `columns_of` that have a value in some row."""
    return [column for column in columns_of(rows) if any(row.get(column) is not None for row in rows)]


def cell(value: Any) -> str:
    """A value as people read it: four digits of a number, nothing for None."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{key}: {cell(content)}" for key, content in value.items())
    if isinstance(value, list):
        return ", ".join(map(cell, value))
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of this code, with "-dirty" where files other than results have changed since."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", ":(top)", RESULTS], capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.stdout.strip() + ("-dirty" if changed.returncode else "")
