"""Where a measurement comes from: machine, versions, commit, command."""

import os
import platform
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import flashmhf

RESULTS = ":(top,exclude)benchmarks/results"  # new results do not make the code "dirty"


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """`machine` is the device under test, `processor` the host's CPU; `device` is torch's device type."""

    machine: str
    processor: str
    cores: int | None
    threads: int
    device: str
    python: str
    flashmhf: str
    torch: str
    triton: str | None
    commit: str | None
    command: str
    date: str


def provenance(device: torch.device) -> Provenance:
    """The provenance of what this process measures on `device`."""
    return Provenance(
        machine=torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        processor=_processor(),
        cores=os.cpu_count(),
        threads=torch.get_num_threads(),
        device=device.type,
        python=platform.python_version(),
        flashmhf=flashmhf.__version__,
        torch=torch.__version__,
        triton=_version("triton"),
        commit=_commit(),
        command=" ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        date=time.strftime("%Y-%m-%d"),
    )


def _processor() -> str:
    """Number and name of the CPUs, as far as the operating system tells."""
    cpu_info = Path("/proc/cpuinfo")
    if cpu_info.exists():
        names = [line.partition(":")[2].strip() for line in cpu_info.read_text().splitlines() if "model name" in line]
        if names:
            return f"{len(names)} x {names[0]}"
    return platform.processor()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of this code, with "-dirty" if files other than results have changed since."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", ":(top)", RESULTS], capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.stdout.strip() + ("-dirty" if changed.returncode else "")
