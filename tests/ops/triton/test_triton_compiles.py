"""Every tile compiles for its device without spills, within its shared memory, and with matrix instructions.

The compiler runs in a process of its own, because the tests switch Triton to its interpreter.
"""

from pathlib import Path

import pytest
from offline import run

ROOT = Path(__file__).parents[3]
COMPILE = """
import json, sys, dataclasses
from compile_kernels import Compiled, compile_row, shipped, SHARED_LIMITS
from flashmhf.ops.triton.tiles import BLOCK_DS, OCCUPANCY
from occupancy import resident_programs
target, element_bytes, block_d = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
rows = [case for case in shipped(target) if case[3].itemsize == element_bytes and case[2] == block_d]
for case in rows:
    compiled = compile_row(case)
    if isinstance(compiled, Compiled):
        row = dataclasses.asdict(compiled) | {"shared_limit": SHARED_LIMITS[target]}
        if case[1] in ("decode", "forward"):
            row["resident"] = OCCUPANCY[target][element_bytes][case[1]][BLOCK_DS.index(block_d)]
            row["fit"] = resident_programs(target, compiled.registers, compiled.shared_bytes, case[4].num_warps)
        compiled = row
    print(json.dumps([case[1], compiled]))
"""
COUNT = """
import json
import torch
from compile_kernels import TARGETS, Source
from gpu_kernels import KernelCase
from gpu_kernels import launches as launches_of
from flashmhf.ops.hopper.tiles import FORWARD_CANDIDATES, TABLE
from flashmhf.ops.tensors import Gradients, Inputs
from flashmhf.ops.triton.backward import plan_backward_dq, plan_backward_dkuv
from flashmhf.ops.triton.forward import plan_forward

def launches(B, L, H, D):
    q, dout = (torch.empty(B, 2 * L, H, D, dtype=torch.bfloat16, device="meta")[:, :L] for _ in range(2))
    k, u, v = (torch.empty(H, 3, 40, D, dtype=torch.bfloat16, device="meta") for _ in range(3))
    gate, dgate = (torch.empty(B, L, H, 3, device="meta") for _ in range(2))
    out, dq = (torch.empty(B, L, H, D, dtype=torch.bfloat16, device="meta") for _ in range(2))
    yield "forward", plan_forward(q, k, u, v, gate, out)
    inputs, grads = Inputs(q, k, u, v, gate), Gradients(dq, k, u, v, dgate)
    yield "backward_dq", plan_backward_dq(dout, inputs, grads)
    yield "backward_dkuv", plan_backward_dkuv(dout, inputs, grads)
    for tile in FORWARD_CANDIDATES[64 if D < 64 else 128][1:3]:
        case = KernelCase("hopper_forward", (B * L, H, H, 3, 40), D, torch.bfloat16, tile)
        yield f"hopper_forward {tile}", launches_of("sm_90a", case)[0]
    for kernel in ("backward", "backward_dq"):
        tile = TABLE[kernel][0 if D < 64 else 1]
        case = KernelCase(f"hopper_{kernel}", (B * L, H, H, 3, 40), D, torch.bfloat16, tile)
        yield f"hopper_{kernel}", launches_of("sm_90a", case)[0]

for B, H, D in ((1, 8, 128), (1, 1, 24), (3, 8, 128)):
    variants = {}
    for L in range(17, 5000, 101):
        for kernel, launch in launches(B, L, H, D):
            variants.setdefault(kernel, set()).add(Source.of(launch, TARGETS["sm_90a"]).key)
    print(json.dumps({kernel: len(keys) for kernel, keys in variants.items()}))
"""
KERNELS = {"decode", "forward", "backward_dq", "backward_dkuv"}
FUSED = {"backward_fused"}  # 16-bit only, where a tile fits
HOPPER_BACKWARDS = {"hopper_backward", "hopper_backward_dq"}
HOPPER = {"hopper_forward"} | HOPPER_BACKWARDS
PROLOGUE_KERNELS = {"prologue_backward", "prologue_forward"}
KNOWN_TO_SPILL = {("prologue_backward", 4, 256)}  # exact products of this depth need more registers


def check(target: str, element_bytes: int, block_d: int) -> None:
    rows = dict(run(COMPILE, target, element_bytes, block_d))
    assert set(rows) - FUSED - HOPPER == KERNELS | PROLOGUE_KERNELS
    assert ("hopper_forward" in rows) == (target == "sm_90a" and element_bytes == 2 and block_d > 32)
    has_backward = target == "sm_90a" and element_bytes == 2 and block_d in (64, 128)
    assert HOPPER_BACKWARDS & set(rows) == (HOPPER_BACKWARDS if has_backward else set())
    assert "backward_fused" in rows or element_bytes == 4 or block_d == 256
    for kernel, compiled in rows.items():
        assert isinstance(compiled, dict), (kernel, compiled)
        assert compiled["spilled"] == 0 or (kernel, element_bytes, block_d) in KNOWN_TO_SPILL, (kernel, compiled)
        assert compiled["shared_bytes"] <= compiled["shared_limit"], (kernel, compiled)
        if kernel in ("decode", "forward"):
            assert 1 <= compiled["resident"] <= compiled["fit"], (kernel, compiled)
        if element_bytes == 2 and kernel in KERNELS | FUSED | HOPPER:
            assert compiled["matrix_instructions"] > 0, (kernel, compiled)


@pytest.mark.parametrize("target", ["sm_80", "sm_90a", "gfx942"])
def test_bfloat16_at_head_dim_128(target):
    check(target, 2, 128)


@pytest.mark.slow
@pytest.mark.parametrize("block_d", [32, 64, 128, 256])
@pytest.mark.parametrize("element_bytes", [2, 4])
@pytest.mark.parametrize("target", ["sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_120", "gfx942"])
def test_every_row(target, element_bytes, block_d):
    check(target, element_bytes, block_d)


def test_fifty_lengths_share_one_compiled_kernel():
    for counts in run(COUNT):
        assert {"forward", "backward_dq", "backward_dkuv"} < set(counts)
        assert set(counts.values()) == {1}


HOPPER_CODE = """
import json, re, sys, torch
from compile_kernels import HOPPER_KERNELS, SHARED_LIMITS, TARGETS, compiled_kernel
from gpu_kernels import KernelCase, launches
from flashmhf.ops.hopper import tiles
import os, triton
import subprocess, tempfile

dtype = getattr(torch, sys.argv[1])
rows = [(k, x) for k in HOPPER_KERNELS for x in zip(tiles.BLOCK_DS, tiles.TABLE[k[7:]])]
rows += [(k, (96, tiles.TABLE[k[7:]][1])) for k in HOPPER_KERNELS]
if "candidates" in sys.argv:
    candidates = [(k, D, some) for k, by_D in tiles.CANDIDATES.items() for D, some in by_D.items()]
    rows = [("hopper_" + k, (D, row)) for k, D, some in candidates for row in some]
    rows += [(k, (96, row)) for k, (D, row) in rows if D == 128]
for kernel, (D, row) in rows:
    parts = [(8, 384, 7, {}), (2, 100, 1, {}), (8, 384, 7, {"HAS_GATE": False})]
    if kernel == "hopper_backward":
        parts[2:] = [(2, 100, 1, {"ACCUM_DQ": False}), (8, 384, 7, {"ACCUM_DQ": False, "ACCUM_DGATE": False})]
    for H_kv, F, E, changes in parts if row is not None else ():
        launch = launches("sm_90a", KernelCase(kernel, (1000, 8, H_kv, E, F), D, dtype, row))[0]
        launch.arguments.update(changes)
        compiled = compiled_kernel(launch, TARGETS["sm_90a"])
        asm = compiled.asm
        with tempfile.TemporaryDirectory() as folder:
            open(folder + "/x.ptx", "w").write(asm["ptx"])
            tools = os.path.dirname(triton.__file__) + "/backends/nvidia/bin/"
            command = [tools + "ptxas", "-v", "--gpu-name=sm_90a", folder + "/x.ptx", "-o", folder + "/x.cubin"]
            said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
            command = [tools + "nvdisasm", "-c", folder + "/x.cubin"]
            sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        loops = re.findall(r"DEPBAR\\.LE gsb0, 0x1 (.*?)DEPBAR\\.LE gsb0, 0x0 ", sass, re.DOTALL)
        count = lambda pattern: len(re.findall(pattern, asm["ptx"]))
        print(json.dumps([kernel, D, row, {
            "wgmma": count(r"wgmma\\.mma_async"), "loads": count(r"cp\\.async\\.bulk\\.tensor\\.3d\\.shared"),
            "stores": count(r"cp\\.async\\.bulk\\.tensor\\.3d\\.global"), "reductions": count(r"red\\.relaxed\\.gpu"),
            "sums": count(r"cp\\.reduce\\.async\\.bulk\\.tensor\\.3d\\.global\\S+\\.add"),
            "registers": sorted(set(map(int, re.findall(r"setmaxnreg\\S+\\s+(\\d+);", asm["ptx"])))),
            "waits": sorted(set(map(int, re.findall(r"wgmma\\.wait_group\\.sync\\.aligned\\s+(\\d+)", asm["ptx"])))),
            "serialised": "serializ" in said, "spilled": re.findall(r"(\\d+) bytes spill", said),
            "adds_q": launch.arguments.get("ACCUM_DQ", False),
            "tanh": [loop.count("MUFU.TANH") for loop in loops], "a_thread": row.block_t * row.block_f // 128,
            "shared": compiled.metadata.shared, "shared_limit": SHARED_LIMITS["sm_90a"],
        }]))
"""


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
def test_hopper_kernels_use_tma_wgmma_and_register_reallocation(dtype):
    """TMA, wgmma, setmaxnreg, vectorised reductions; asynchronous products, and no spills."""
    check_hopper(run(HOPPER_CODE, dtype))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_tiles_that_a_gpu_will_compare(dtype):
    check_hopper(run(HOPPER_CODE, dtype, "candidates"))


def check_hopper(rows: list) -> None:
    for kernel, D, row, found in rows:
        assert found["wgmma"] > 0, kernel
        assert found["loads"] >= 4, kernel
        assert {24, 240} <= set(found["registers"]), (kernel, D)
        assert not found["serialised"], (kernel, D)
        assert set(found["spilled"]) == {"0"}, (kernel, D)
        assert found["shared"] <= found["shared_limit"], (kernel, D)
        assert {0, 1 if kernel == "hopper_forward" else 2} <= set(found["waits"]), (kernel, D)
        values = (128 if D > 64 else 64) // 2  # of dQ's tile, per thread
        at_once = {"fragments": 4, "rows": 2}.get(row[3]) if found["adds_q"] else None
        assert found["reductions"] == (values // at_once if at_once else 0), (kernel, D, row)
        assert (found["stores"] == 0) == (kernel == "hopper_backward"), (kernel, D)
        assert (found["sums"] > 0) == (found["adds_q"] and row[3] == "tma"), (kernel, D, row)
        if kernel == "hopper_forward":  # the whole activation overlaps the previous product
            assert found["tanh"] == [found["a_thread"]] * 2, D
