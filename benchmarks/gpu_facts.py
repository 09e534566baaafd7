"""Provenance of every row: device, versions, commit. As a script, prints it as JSON.

gpu.py runs it as a subprocess, so that the process of the lease neither waits for torch nor holds a context on the
device. If the kernels cannot run here, it prints the reason in one line, with exit code 2.
"""

import hashlib
import json
import sys
from pathlib import Path

import torch

import flashmhf
from flashmhf.benchmarking.measuring import Row
from flashmhf.benchmarking.provenance import provenance
from flashmhf.ops.backends import backends
from flashmhf.ops.problem import Problem
from flashmhf.ops.triton.tiles import device_class

OPS = Path(flashmhf.__file__).parent / "ops"
# Folders whose code a measurement of a backend is about. Tables of tiles are not: a row has the tile it measured.
KERNELS = {"triton": ("triton",), "hopper": ("hopper", "triton")}
TABLES = ("tiles.py",)
MIN_TRITON = (3, 6)


def facts(dry_run: bool) -> Row:
    """Provenance of this machine and this code.

    Raises:
        ValueError: the kernels cannot run here, and why.
    """
    device = torch.device("cpu" if dry_run else "cuda")
    if not dry_run:
        check_device(device)
    origin = provenance(device)
    commit = origin.commit
    return {
        "device": "cpu" if dry_run else torch.cuda.get_device_name(device),
        "device_class": device_class(device),
        "torch": origin.torch,
        "triton": origin.triton,
        "commit": None if commit is None or commit.endswith("-dirty") else commit,
        "code": code_hash(),
        "kernels": kernel_hashes(),
        "date": origin.date,
    }


def check_device(device: torch.device) -> None:
    """Raises ValueError if the portable kernels cannot run: no GPU, driver or Triton too old, unsupported GPU."""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"device: expected a CUDA or ROCm GPU, got none ({reason}); --dry-run builds every case on the CPU"
        ) from error
    import triton

    if tuple(map(int, triton.__version__.split(".")[:2])) < MIN_TRITON:
        raise ValueError(f"triton: expected 3.6 or later, got {triton.__version__}")
    problem = Problem(16, 2, 2, 2, 64, 64, torch.bfloat16, device, has_gate=True)
    unsupported_reason = backends(problem)["triton"]
    if unsupported_reason is not None:
        name = torch.cuda.get_device_name(device)
        raise ValueError(f"device: expected one that runs the kernels, got {name}: {unsupported_reason}")


def code_hash() -> str:
    """A hash of package and benchmarks: identifies a modified tree, and a copy without a repository."""
    files = [*Path(flashmhf.__file__).parent.rglob("*.py"), *Path(__file__).parent.glob("*.py")]
    return _hash(sorted(hashlib.sha256(file.read_bytes()).hexdigest() for file in files))


def kernel_hashes(ops: Path = OPS) -> dict[str, str]:
    """A hash of each backend's sources without blank lines and comment lines, which change no kernel."""
    hashes = {}
    for backend, folders in KERNELS.items():
        files = sorted(file for folder in folders for file in (ops / folder).glob("*.py") if file.name not in TABLES)
        lines = [line.rstrip() for file in files for line in file.read_text().splitlines()]
        hashes[backend] = _hash([line for line in lines if line and not line.lstrip().startswith("#")])
    return hashes


def _hash(texts: list[str]) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:12]


def main() -> int:
    try:
        print(json.dumps(facts("--dry-run" in sys.argv)))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
