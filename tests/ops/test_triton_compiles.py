"""Every row of the tile table compiles for its device: no spill, shared memory within its limit, matrix instructions.

The compiler runs in a process of its own, because the tests switch Triton to its interpreter.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMPILE = """
import json, sys, dataclasses
from compile_kernels import Compiled, compile_row, shipped, SHARED_LIMITS
target, element_bytes, block_d = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
rows = [case for case in shipped(target) if case[3].itemsize == element_bytes and case[2] == block_d]
for case in rows:
    compiled = compile_row(case)
    if isinstance(compiled, Compiled):
        compiled = dataclasses.asdict(compiled) | {"shared_limit": SHARED_LIMITS[target]}
    print(json.dumps([case[1], compiled]))
"""
KERNELS = ["decode", "forward", "backward_tokens", "backward_weights"]


def compiled_rows(target: str, element_bytes: int, block_d: int) -> dict[str, dict]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "benchmarks"), str(ROOT / "src")])
    command = [sys.executable, "-c", COMPILE, target, str(element_bytes), str(block_d)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return dict(json.loads(line) for line in result.stdout.splitlines())


def check(target: str, element_bytes: int, block_d: int) -> None:
    rows = compiled_rows(target, element_bytes, block_d)
    assert sorted(rows) == sorted(KERNELS)
    for kernel, compiled in rows.items():
        assert isinstance(compiled, dict), (kernel, compiled)
        assert compiled["spilled"] == 0, (kernel, compiled)
        assert compiled["shared_bytes"] <= compiled["shared_limit"], (kernel, compiled)
        if element_bytes == 2:
            assert compiled["matrix_instructions"] > 0, (kernel, compiled)


@pytest.mark.parametrize("target", ["sm_80", "sm_90a", "gfx942"])
def test_bfloat16_at_head_dim_128(target):
    check(target, 2, 128)


@pytest.mark.slow
@pytest.mark.parametrize("block_d", [32, 64, 128, 256])
@pytest.mark.parametrize("element_bytes", [2, 4])
@pytest.mark.parametrize("target", ["sm_80", "sm_86", "sm_90a", "sm_100", "gfx942"])
def test_every_row(target, element_bytes, block_d):
    check(target, element_bytes, block_d)
