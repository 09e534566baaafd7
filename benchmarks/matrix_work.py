"""Counts the matrix FLOPs that a compiled kernel issues in one iteration of its main loop, over all its warps.

They equal the FLOPs of the algorithm's products for one tile, unless several warps compute the same rows and columns,
as Triton's do if a tile is too small for all warps: then results are right, but part of the work is redundant.
"""

import re
from dataclasses import dataclass
from typing import Any

from machine_code import Instruction, Loop, MachineCode, machine_code

MATRIX_OPCODE = r"HMMA|HGMMA|UTC\w*MMA|v_mfma|v_smfmac|IMMA|DMMA|[OQ]G?MMA"
HMMA_SHAPES = {"1688": (16, 8, 8), "16816": (16, 8, 16), "1684": (16, 8, 4)}
WARPS_OF_A_WARPGROUP = 4
# Products of block_t x block_f x block_d per tile; the prologue's are of block_t x BLOCK_E x block_d.
PRODUCTS = {
    "decode": 3,
    "forward": 3,
    "backward_dq": 5,
    "backward_dkuv": 6,
    "backward_fused": 8,
    "hopper_forward": 3,
    "hopper_backward": 8,
    "hopper_backward_dq": 5,
    "prologue_forward": 1,
    "prologue_backward": 3,
}
BLOCK_E = 16  # sub-networks in a prologue's product, padded
WARPGROUPS = {
    "hopper_forward": 2,
    "hopper_backward_dq": 2,
}  # with block_t tokens each; otherwise they share a tile


@dataclass(frozen=True)
class MatrixWork:
    """Matrix FLOPs of a program: in one iteration of its main loop, and in all instructions outside it."""

    loop: int
    outside: int

    def iterations(self, tile_flops: int) -> int:
        """The number of tiles that one iteration covers.

        The number of tiles is only known at run time, so a loop unrolled over several tiles has at least one complete
        tile outside, for the remainder. Pipelined loops have part of a tile outside, which implies nothing.
        """
        return max(1, round(self.loop / self.outside)) if self.outside >= tile_flops else 1


def issued_ratio(work: MatrixWork, kernel: str, tile: Any, block_d: int) -> float | None:
    """Matrix FLOPs issued per tile over the algorithm's; None without matrix instructions (exact float32)."""
    tile_flops = algorithm_flops(kernel, tile, block_d)
    if work.loop == work.outside == 0:
        return None
    if kernel == "prologue_forward":  # one tile per program: there is no loop
        return work.outside / tile_flops
    assert work.loop > 0, f"{kernel}: products, but no loop around any of them"
    return work.loop / work.iterations(tile_flops) / tile_flops


def algorithm_flops(kernel: str, tile: Any, block_d: int) -> int:
    """The algorithm's FLOPs per tile, at the padded head dim."""
    block_t = tile.block_t * WARPGROUPS.get(kernel, 1)
    block_f = BLOCK_E if kernel.startswith("prologue") else tile.block_f
    return 2 * PRODUCTS[kernel] * block_t * block_f * block_d


def matrix_work(compiled: Any) -> MatrixWork:
    """Matrix FLOPs of a kernel that Triton compiled."""
    return work_of(machine_code(compiled.asm), partitions(compiled))


def partitions(compiled: Any) -> list[int]:
    """Warps of each partition large enough for a warpgroup's products, or of the only partition.

    The TTGIR has the first partition's warps in the module's attributes, the others' at warp specialisation.
    """
    ttgir = compiled.asm["ttgir"]
    default = re.search(r'"ttg.num-warps" = (\d+)', ttgir)
    assert default is not None
    others = re.findall(r"^\s*partition\d+\(.*\) num_warps\((\d+)\)", ttgir, re.MULTILINE)
    if not others:
        return [int(default[1])]
    return [warps for warps in map(int, (default[1], *others)) if warps >= WARPS_OF_A_WARPGROUP]


def work_of(code: MachineCode, warps: list[int]) -> MatrixWork:
    """Matrix FLOPs of parsed code; `warps` as `partitions` returns them."""
    total = _flops(code, code.instructions(), warps[0])
    main = sum(_flops(code, code.instructions(loop.blocks), warps[0]) for loop in main_loops(code, warps))
    return MatrixWork(main, total - main)


def main_loops(code: MachineCode, warps: list[int]) -> list[Loop]:
    """The loop with the most matrix FLOPs of each partition; `warps` as `partitions` returns them."""
    assert len(set(warps)) == 1, f"partitions of unequal sizes, {warps}: cannot assign loops to them"
    loops = code.innermost(MATRIX_OPCODE)
    loops.sort(key=lambda loop: _flops(code, code.instructions(loop.blocks), warps[0]))
    return loops[-len(warps) :]


def _flops(code: MachineCode, instructions: list[Instruction], warps: int) -> int:
    return sum(instruction_flops(x, code, warps) for x in instructions if re.match(MATRIX_OPCODE, x.opcode))


def instruction_flops(instruction: Instruction, code: MachineCode, warps: int) -> int:
    """FLOPs of an instruction that `warps` warps execute.

    HMMA and MFMA are per warp, HGMMA per warpgroup; tcgen05.mma is issued by one thread per program.
    """
    opcode, *modifiers = instruction.opcode.split(".")
    if opcode == "HMMA":
        m, n, k = HMMA_SHAPES[modifiers[0]]
        return 2 * m * n * k * warps
    if opcode == "HGMMA":
        m, n, k = map(int, modifiers[0].split("x"))
        return 2 * m * n * k * (warps // WARPS_OF_A_WARPGROUP)
    if opcode == "UTCHMMA":
        m, n, k = _tcgen05_shape(instruction, code)
        return 2 * m * n * k
    if match := re.match(r"v_mfma_[a-z0-9]+_(\d+)x(\d+)x(\d+)_?(?:(\d+)b_)?", opcode):
        m, n, k, copies = (int(size or 1) for size in match.groups())
        return 2 * m * n * k * copies * warps
    raise AssertionError(f"matrix instruction of unknown shape: {instruction.opcode}")


def _tcgen05_shape(instruction: Instruction, code: MachineCode) -> tuple[int, int, int]:
    """M, N and K from the instruction descriptor, a constant that an earlier instruction moves to a register."""
    register = re.search(r"idesc\[(UR\d+)\]", instruction.operands)
    assert register is not None, instruction
    value = None
    for other in code.instructions():
        if other is instruction:
            break
        if other.operands.startswith(register[1] + ","):
            constant = re.fullmatch(rf"{register[1]}, (0x[0-9a-f]+)", other.operands)
            value = int(constant[1], 16) if constant and other.opcode == "UMOV" else None
    assert value is not None, f"the descriptor of {instruction} is not constant"
    tf32 = (value >> 7 & 7) == 2  # the format of A: 0 is float16, 1 bfloat16
    return (value >> 24 & 31) * 16, (value >> 17 & 63) * 8, 8 if tf32 else 16
