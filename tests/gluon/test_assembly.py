"""Emulated inline assembly sees the elements in the registers in which the compiler puts them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

import torch
from triton.experimental.gluon import language as gl

from gluon import probe
from gluon.assembly import inline_asm_elementwise, registers
from gluon.emulator import emulate
from gluon.machine import RUNNING, EmulationError, Machine
from gluon.values import Pointer, Value

FRAGMENT = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, 8, 16])
RED_V2 = "red.relaxed.gpu.global.add.v2.f32 [$2], {$4, $5}; mov.b32 $0, 0; mov.b32 $1, 0;"
CONSTRAINTS = "=r,=r,l,l,f,f"


def test_a_fragment_of_wgmma():
    """PTX ISA, wgmma's D fragment: lane 5 holds columns 2 and 3 of row 1, and then of row 9."""
    order = registers(FRAGMENT, [128, 8])
    assert order.shape == (256, 4)
    assert [divmod(int(n), 8) for n in order[5]] == [(1, 2), (1, 3), (9, 2), (9, 3)]
    assert [divmod(int(n), 8) for n in order[3 * 32]] == [(48, 0), (48, 1), (56, 0), (56, 1)]


@pytest.mark.parametrize("fragments", [True, False])
def test_the_compiler_adds_what_the_emulator_adds(fragments):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2] / "src")
    command = [sys.executable, probe.__file__, str(fragments)]
    ptx = json.loads(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)
    size = (probe.ARGUMENTS["t"] + probe.BLOCK_T) * probe.ARGUMENTS["H"] * probe.COLUMNS
    compiled, emulated = torch.zeros(2, size)
    probe.run_ptx(ptx, compiled, list(probe.ARGUMENTS.values()))
    constants = {"BLOCK_T": probe.BLOCK_T, "COLUMNS": probe.COLUMNS, "FRAGMENTS": fragments}
    arguments = {"dq_ptr": emulated, **probe.ARGUMENTS, **constants}
    emulate(probe.probe, (1,), arguments, num_warps=probe.THREADS // 32)
    assert torch.equal(compiled, emulated)
    elements = probe.BLOCK_T * probe.COLUMNS
    assert int((compiled != 0).sum()) == elements - 1  # of 0, 1, 2, ...: every one is there
    assert float(compiled.double().sum()) == elements * (elements - 1) / 2


def run(
    asm: str, offsets: torch.Tensor, layout=FRAGMENT, constraints: str = CONSTRAINTS, pack: int = 2
) -> torch.Tensor:
    memory = torch.zeros(1024 + 8)
    values = Value(torch.ones(128, 8), layout)
    RUNNING.append(Machine("0", 8, (0, 0, 0), (1, 1, 1)))
    try:
        inline_asm_elementwise(asm, constraints, [Pointer(memory, offsets), values], gl.int32, False, pack)
    finally:
        RUNNING.pop()
    return memory


def test_a_reduction_takes_the_first_address_and_its_neighbours():
    offsets = torch.arange(1024).view(128, 8)
    offsets[:, 1::2] = 7  # nobody looks at the second address of a pair
    memory = run(RED_V2, offsets)
    assert memory.tolist() == [1.0] * 1024 + [0.0] * 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"offsets": torch.arange(1024).view(128, 8) + 1}, "not a multiple of its size"),
        ({"offsets": torch.arange(1024).view(128, 8) + 10}, "of a tensor of 1032"),
        ({"layout": None}, "layout of .* is unknown"),
        ({"asm": "tanh.approx.f32 $0, $2;"}, "pass a hook"),
        ({"asm": RED_V2.replace("v2", "v4")}, "adds 2 values"),
        ({"constraints": "=r,=r,l,l,f"}, "are not 2 operands"),
    ],
)
def test_what_it_refuses(change, message):
    with pytest.raises(EmulationError, match=message):
        run(**{"asm": RED_V2, "offsets": torch.arange(1024).view(128, 8)} | change)
