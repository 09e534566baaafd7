"""Section `sanitizer`: compute-sanitizer over forward and backward at small shapes.

As a script it is what runs under the tool: python gpu_sanitizer.py DTYPE DEVICE
"""

import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator

import torch

from flashmhf.benchmarking import Row
from flashmhf.layers import FlashMHF
from gpu_bench import Bench, Case, OutOfTimeError

TOOLS = ("memcheck", "racecheck")
DTYPES = ("bfloat16", "float16", "float32")
TIME_LIMIT_S = 90
PLACES = (None, "/usr/local/cuda/bin")  # the PATH, and where the toolkit installs it
TOKENS = (1, 16, 100, 200)  # few tokens, split rows, a tail


def sanitizer(bench: Bench) -> Iterator[Case]:
    """Out-of-bounds and misaligned accesses (memcheck), hazards in shared memory (racecheck)."""
    for tool in TOOLS:
        for dtype in ("float32",) if bench.dry_run else DTYPES:
            yield f"{tool} {dtype}", functools.partial(_check, bench, tool, dtype)


def _check(bench: Bench, tool: str, dtype: str) -> list[Row]:
    row: Row = {"tool": tool, "dtype": dtype}
    script = [sys.executable, __file__, dtype, bench.device.type]
    program = next((found for place in PLACES if (found := shutil.which("compute-sanitizer", path=place))), None)
    if program is None and not bench.dry_run:
        return [{**row, "outcome": "tool not found"}]
    command = script if program is None else [program, "--tool", tool, "--error-exitcode", "9", *script]
    # Torch's allocator would hide accesses between its blocks.
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
    dtype, device = getattr(torch, sys.argv[1]), torch.device(sys.argv[2])
    for head_dim in (64, 48):
        layer = FlashMHF(2 * head_dim, 2, 2, 40, q_norm=True, dtype=dtype, device=device)
        for T in TOKENS:
            x = torch.randn(T, 2 * head_dim, dtype=dtype, device=device, requires_grad=True)
            layer(x).sum().backward()
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
