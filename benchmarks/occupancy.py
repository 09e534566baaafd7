"""Occupancy: resident programs per SM, by their registers, shared memory and warps.

python benchmarks/occupancy.py    the forward's rows of the tile table, as `OCCUPANCY` in ops/triton/tiles.py has them
"""

from typing import NamedTuple

from compile_kernels import BLOCK_DS, DTYPES, TABLE, Compiled, TargetTile, compile_row


class Limits(NamedTuple):
    """An SM's (AMD: compute unit's) 32-bit registers (AMD: per lane and SIMD), bytes, warps and programs."""

    registers: int
    shared_bytes: int
    warps: int
    programs: int


LIMITS = {
    "sm_80": Limits(65536, 167936, 64, 32),
    "sm_86": Limits(65536, 102400, 48, 16),
    "sm_89": Limits(65536, 102400, 48, 24),
    "sm_90a": Limits(65536, 233472, 64, 32),
    "sm_100": Limits(65536, 233472, 64, 32),
    "sm_120": Limits(65536, 102400, 48, 24),
    "gfx942": Limits(512, 65536, 32, 32),
}
RESERVED_BYTES = 1024  # of shared memory per program, by CUDA
SIMDS = 4  # per compute unit
REGISTER_UNIT = 8  # registers per thread are allocated in units of 8


def resident_programs(target: str, registers: int, shared_bytes: int, num_warps: int) -> int:
    """Resident programs of `num_warps` warps per SM; `registers` are per thread."""
    limits = LIMITS[target]
    registers = -(-registers // REGISTER_UNIT) * REGISTER_UNIT
    if target == "gfx942":
        warps, reserved = SIMDS * min(limits.registers // registers, limits.warps // SIMDS), 0
    else:
        warps, reserved = min(limits.registers // (32 * registers), limits.warps), RESERVED_BYTES
    return min(limits.programs, warps // num_warps, limits.shared_bytes // (shared_bytes + reserved))


def resident(target: str, element_bytes: int, kernel: str) -> tuple[int, ...]:
    """Resident programs per SM for each of BLOCK_DS, as the installed Triton compiles the rows."""
    counts = []
    for block_d, tile in zip(BLOCK_DS, TABLE[target][element_bytes][kernel], strict=True):
        compiled = compile_row(TargetTile(target, kernel, block_d, DTYPES[element_bytes], tile))
        assert isinstance(compiled, Compiled), compiled
        counts.append(resident_programs(target, compiled.registers, compiled.shared_bytes, tile.num_warps))
    return tuple(counts)


def main() -> None:
    for target in TABLE:
        for element_bytes in TABLE[target]:
            rows = {kernel: resident(target, element_bytes, kernel) for kernel in ("decode", "forward")}
            print(target, element_bytes, rows, flush=True)


if __name__ == "__main__":
    main()
