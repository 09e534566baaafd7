"""Step `sanitizer`: compute-sanitizer on forward and backward at small shapes.

As a script, the program to check: python gpu_sanitizer.py BACKEND DTYPE DEVICE
"""

import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator

import torch

from flashmhf.benchmarking.measuring import Row
from flashmhf.layers import FlashMHF
from gpu_bench import Bench, Case, OutOfTimeError

TOOLS = ("memcheck", "racecheck")
DTYPES = ("bfloat16", "float16", "float32")
TIME_LIMIT_S = 90
PLACES = (None, "/usr/local/cuda/bin")  # PATH, and the toolkit's folder
HEAD_DIMS = (128, 48)
TOKENS = (1, 16, 100, 200)  # few tokens, split rows, a tail


def sanitizer(bench: Bench) -> Iterator[Case]:
    """Out-of-bounds and misaligned accesses (memcheck), hazards in shared memory (racecheck)."""
    for tool in TOOLS:
        for dtype in ("float32",) if bench.dry_run else DTYPES:
            for backend in bench.backends(2, 2, 2, 40, HEAD_DIMS[0], getattr(torch, dtype)):
                yield Case(f"{tool} {backend} {dtype}", functools.partial(_check, bench, tool, backend, dtype))


def _check(bench: Bench, tool: str, backend: str, dtype: str) -> list[Row]:
    row: Row = {"tool": tool, "backend": backend, "dtype": dtype}
    script = [sys.executable, __file__, bench.runs_as(backend), dtype, bench.device.type]
    program = next((found for place in PLACES if (found := shutil.which("compute-sanitizer", path=place))), None)
    if program is None and not bench.dry_run:
        return [{**row, "outcome": "tool not found"}]
    command = script if program is None else [program, "--tool", tool, "--error-exitcode", "9", *script]
    # Torch's caching allocator would hide out-of-bounds accesses between its blocks.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    limit_s = min(TIME_LIMIT_S, bench.remaining_s())
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=limit_s)
    except subprocess.TimeoutExpired as expired:
        if limit_s < TIME_LIMIT_S:
            raise OutOfTimeError from expired
        return [{**row, "outcome": f"not finished within {TIME_LIMIT_S} s"}]
    if program is None and done.returncode == 0:
        return [{**row, "outcome": "the script runs; tool not found"}]
    last = (done.stdout + done.stderr).strip().splitlines()[-1:]
    return [{**row, "outcome": " ".join(last), "passed": done.returncode == 0}]


def main() -> None:
    backend, dtype, device = sys.argv[1], getattr(torch, sys.argv[2]), torch.device(sys.argv[3])
    for head_dim in HEAD_DIMS:
        layer = FlashMHF(2 * head_dim, 2, 2, 40, q_norm=True, backend=backend, dtype=dtype, device=device)
        for T in TOKENS:
            x = torch.randn(T, 2 * head_dim, dtype=dtype, device=device, requires_grad=True)
            layer(x).sum().backward()
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
