"""Clocks that one iteration of a compiled kernel's main loop needs of each unit of an SM, counted from SASS.

Rates are from data sheets and CUDA's throughput tables, except for two that others have measured. The model assumes no
bank conflicts in shared memory, loads that hit the L2 cache, and waits at barriers that do not poll.
"""

import re
from dataclasses import dataclass
from typing import NamedTuple

from machine_code import Instruction, MachineCode
from matrix_work import MATRIX_OPCODE, WARPS_OF_A_WARPGROUP, instruction_flops, main_loops

LANES = 32
WIDTHS = {"U8": 4, "S8": 4, "U16": 4, "S16": 4, "64": 8, "128": 16, "F32x2": 8, "F32x4": 16}  # bytes per lane; others 4
K_BYTES = 32  # of a row of either operand in one HGMMA, for every dtype
SHARED = r"LDS|STS|LDSM|STSM|SHFL|ATOMS|LDGSTS"
ADDITION = r"(REDG?|ATOMG?)$"
GLOBAL_LOAD = r"(LDG|LDGSTS)$"


@dataclass(frozen=True)
class Processor:
    """A streaming multiprocessor, and the number of them. Rates are per clock."""

    count: int
    matrix_flops: int
    """16-bit operands, float32 sums."""
    mma_sync_share: float
    """Fraction of `matrix_flops` for instructions of single warps."""
    special: int = 16
    schedulers: int = 4
    shared_bytes: int = 128
    cache_bytes_of_all: int = 5120
    """L2 to all SMs together: NVIDIA's figure for the A100; none is published for the H100."""


# mma.sync on Hopper: 62.9 % of the peak on average, as arXiv 2402.13499 reports; not measured here.
PROCESSORS = {
    "sm_90a": Processor(count=132, matrix_flops=4096, mma_sync_share=0.629),
    "sm_80": Processor(count=108, matrix_flops=2048, mma_sync_share=1.0),
}


class Clocks(NamedTuple):
    """Clocks of one SM for one iteration of one program, by unit."""

    matrix: float
    special: float
    issue: float
    shared: float
    loads: float
    additions: float

    @property
    def overlapped(self) -> float:
        """With all units in parallel: the busiest one's. Loads and additions share the L2 cache."""
        return max(self.matrix, self.special, self.issue, self.shared, self.loads + self.additions)

    @property
    def exposed(self) -> float:
        """With products, arithmetic and additions to memory in sequence, each with its own units."""
        return max(self.matrix, self.shared, self.loads) + max(self.special, self.issue) + self.additions

    @property
    def bound(self) -> str:
        """The busiest unit."""
        units = {**self._asdict(), "L2 cache": self.loads + self.additions}
        del units["loads"], units["additions"]
        return max(units, key=lambda unit: units[unit])


def loop_clocks(code: MachineCode, warps: list[int], processor: Processor, tma_bytes: int = 0) -> Clocks:
    """Clocks of the main loops of all partitions with matrix instructions, `warps` of each.

    `tma_bytes` is what a producer partition loads to shared memory per iteration; its few instructions do not count.
    """
    total = Clocks(0, 0, 0, 0, 0, 0)
    for loop in main_loops(code, warps):
        waits = frozenset().union(*(other.blocks for other in code.loops if other.blocks < loop.blocks))
        for instruction in code.instructions(loop.blocks - waits):
            total = _add(total, instruction_clocks(instruction, code, warps[0], processor))
    cache_bytes = processor.cache_bytes_of_all / processor.count
    arriving = Clocks(0, 0, 0, tma_bytes / processor.shared_bytes, tma_bytes / cache_bytes, 0)
    return _add(total, arriving)


def instruction_clocks(instruction: Instruction, code: MachineCode, warps: int, processor: Processor) -> Clocks:
    """What an instruction costs that `warps` warps execute."""
    name, *modifiers = instruction.opcode.split(".")
    cache_bytes = processor.cache_bytes_of_all / processor.count
    matrix = shared = loads = additions = 0.0
    if re.match(MATRIX_OPCODE, name):
        rate = processor.matrix_flops * (processor.mma_sync_share if name == "HMMA" else 1)
        matrix = instruction_flops(instruction, code, warps) / rate
        shared = _operand_bytes(instruction) * (warps // WARPS_OF_A_WARPGROUP) / processor.shared_bytes
    moved = LANES * warps * next((WIDTHS[modifier] for modifier in modifiers if modifier in WIDTHS), 4)
    if name in ("LDSM", "STSM"):
        moved = 128 * warps * int(modifiers[-1] if modifiers[-1].isdigit() else 1)
    if re.fullmatch(SHARED, name):
        shared = moved / processor.shared_bytes
    if re.match(GLOBAL_LOAD, name):
        loads = moved / cache_bytes
    if re.match(ADDITION, name):
        additions = moved / cache_bytes
    special = LANES * warps / processor.special if name == "MUFU" else 0
    return Clocks(matrix, special, warps / processor.schedulers, shared, loads, additions)


def _operand_bytes(instruction: Instruction) -> int:
    """What a warpgroup's product reads from shared memory: B, and A unless it is in registers."""
    name, shape, *_ = instruction.opcode.split(".")
    if name != "HGMMA":
        return 0
    m, n, _ = map(int, shape.split("x"))
    a_in_registers = re.match(r"R\d+, R\d+, gdesc", instruction.operands)
    return (n if a_in_registers else m + n) * K_BYTES


def _add(left: Clocks, right: Clocks) -> Clocks:
    return Clocks(*(a + b for a, b in zip(left, right, strict=True)))
