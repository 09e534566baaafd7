"""No kernel issues more matrix FLOPs per tile than its algorithm has: no warp duplicates the work of another."""

import pytest
from offline import run

from flashmhf.ops.triton.tiles import TABLE

RATIOS = """
import json, sys
from compile_kernels import compile_row, shipped
for case in shipped(sys.argv[1]):
    if case[2] == int(sys.argv[2]) and case[3].itemsize in map(int, sys.argv[3:]):
        print(json.dumps([case[1], case[3].itemsize, compile_row(case).issued]))
"""
# Known exceptions: (target, kernel, bytes per element, head dim) -> issued FLOPs over the algorithm's.
KNOWN = {
    ("gfx942", "backward_dkuv", 4, 256): 2.5,  # every tile that does not duplicate products spills
}


def check_ratios(target: str, block_d: int, *element_bytes: int) -> None:
    """Except for the prologue, whose kernels are memory-bound: warps may duplicate their small products."""
    rows = [row for row in run(RATIOS, target, block_d, *element_bytes) if not row[0].startswith("prologue")]
    assert len(rows) >= 4
    for kernel, size, issued in rows:
        if size == 4 and target != "gfx942":
            assert issued is None, (kernel, issued)  # exact float32 products do not use matrix instructions on NVIDIA
        else:
            assert issued == pytest.approx(KNOWN.get((target, kernel, size, block_d), 1), abs=1e-3), kernel


@pytest.mark.parametrize("target", ["sm_80", "sm_90a"])
def test_matrix_flops_in_bfloat16_at_head_dim_128(target):
    check_ratios(target, 128, 2)


@pytest.mark.slow
@pytest.mark.parametrize("block_d", [32, 64, 128, 256])
@pytest.mark.parametrize("target", TABLE)
def test_matrix_flops_of_every_row(target, block_d):
    check_ratios(target, block_d, 2, 4)
