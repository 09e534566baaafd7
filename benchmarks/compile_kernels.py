"""Compiles Triton kernels for GPUs that are not here and reads registers, spills and instructions off the result.

python benchmarks/compile_kernels.py                     every row of the tile tables, into docs/kernels.csv and .md
python benchmarks/compile_kernels.py --search sm_90a     what a grid of candidate tiles costs on one target
"""

import argparse
import importlib
import itertools
import os
import re
import subprocess
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime.jit import create_function_from_signature

from flashmhf.ops.hopper import tiles as hopper_tiles
from flashmhf.ops.triton import tiles
from flashmhf.ops.triton.launch import Launch
from flashmhf.ops.triton.prologue import NUM_STAGES, NUM_WARPS, block_t
from flashmhf.ops.triton.tiles import BLOCK_DS, TABLE, Tile, table_rows
from gpu_kernels import launches
from kernel_table import Row, options, summary, write_csv
from matrix_work import issued_ratio, matrix_work

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_86": GPUTarget("cuda", 86, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90a": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_LIMITS = {
    "sm_80": 166912,
    "sm_86": 101376,
    "sm_89": 101376,
    "sm_90a": 232448,
    "sm_100": 232448,
    "sm_120": 101376,
    "gfx942": 65536,
}  # bytes a program
DTYPES = {2: torch.bfloat16, 4: torch.float32}
GRID = [Tile(*sizes) for sizes in itertools.product((16, 32, 64, 128), (16, 32, 64, 128), (1, 2, 4, 8), (1, 2))]
TURNABLE = ("backward_dkuv", "backward_fused")
DOCUMENT = Path(__file__).parents[1] / "docs/kernels.md"
PROLOGUE_KERNELS = ("prologue_forward", "prologue_backward")
HOPPER_KERNELS = ("hopper_forward", "hopper_backward", "hopper_backward_dq")
HOPPER_WARPS = 8  # consumers; the producer is one more
INTRODUCTION = """\
All rows, in [kernels.csv](kernels.csv), compiled by Triton {}: bfloat16 and float32, E 7, F 384. `issued` is the
matrix FLOPs that all warps issue for a tile over those that the algorithm has for it: above 1, warps multiply the same.

"""
MARKERS = ("<!-- begin compiled -->\n", "<!-- end compiled -->\n")


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of a launch. `spilled`: bytes of stack and local memory a thread (AMD: registers).

    `issued`: matrix FLOPs of a tile over the algorithm's own, for a row of a table; None without matrix instructions.
    """

    registers: int
    spilled: int
    shared_bytes: int
    matrix_instructions: int
    issued: float | None = None


def plan(
    kernel: str, T: int, H: int, H_kv: int, E: int, F: int, D: int, dtype: torch.dtype, tile: Any,
    target: str = "sm_90a",
) -> Launch:  # fmt: skip
    """The first launch of one of gpu_kernels.KERNELS on a device class, planned on tensors without data."""
    return launches(target, (kernel, (T, H, H_kv, E, F), D, dtype, tile))[0]


@dataclass(frozen=True)
class Source:
    """All that decides what a launch compiles to and where Triton's cache keeps it. Other processes understand it."""

    module: str
    kernel: str
    signature: dict[str, Any]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: dict[str, Any]
    target: GPUTarget

    @classmethod
    def of(cls, launch: Launch, target: GPUTarget) -> "Source":
        """Packed by the launcher's own functions: what they say of a constant differs from Triton to Triton."""
        kernel, backend = launch.kernel, make_backend(target)
        given = {
            **launch.arguments,
            "num_warps": launch.num_warps,
            "num_stages": launch.num_stages,
            "debug": kernel.debug or triton.knobs.runtime.debug,
            "instrumentation_mode": triton.knobs.compilation.instrumentation_mode,
        }
        bound = create_function_from_signature(kernel.signature, kernel.params, backend)(**given)
        options, signature, constants, attributes = kernel._pack_args(backend, given, *bound)
        name = (kernel.module, kernel.fn.__qualname__)
        return cls(*name, signature, constants, attributes, options.__dict__, target)

    @property
    def key(self) -> str:
        """Sources of one key share one compiled kernel."""
        return f"{self._tree().hash()} {sorted(self.options.items())} {self.target}"

    def compile(self) -> Any:
        """Triton's compiled kernel, with its assembly in `asm`."""
        return triton.compile(self._tree(), target=self.target, options=self.options)

    def _tree(self) -> ASTSource:
        kernel = getattr(importlib.import_module(self.module), self.kernel)
        kind = GluonASTSource if kernel.is_gluon() else ASTSource
        return kind(kernel, self.signature, self.constants, self.attributes)


def compiled_kernel(launch: Launch, target: GPUTarget) -> Any:
    """Triton's compiled kernel, with its assembly in `asm`, compiled as the launcher would."""
    return Source.of(launch, target).compile()


def compile_source(source: Source) -> Compiled:
    """What the compiler makes of a source."""
    return read(source.compile(), source.target)


def read(compiled: Any, target: GPUTarget) -> Compiled:
    """What a kernel that Triton compiled for a target asks for."""
    return _read_amd(compiled) if target.backend == "hip" else _read_nvidia(compiled)


def _read_nvidia(compiled) -> Compiled:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        tool = os.path.join(os.path.dirname(triton.__file__), "backends/nvidia/bin/cuobjdump")
        usage = subprocess.run([tool, "-res-usage", cubin.name], capture_output=True, text=True, check=True).stdout
    registers, stack, local = (_number(rf"{key}:(\d+)", usage) for key in ("REG", "STACK", "LOCAL"))
    ptx = compiled.asm["ptx"]
    matrix = len(re.findall(r"wgmma\.mma_async|mma\.sync|tcgen05\.mma", ptx))
    return Compiled(registers, stack + local, compiled.metadata.shared, matrix)


def _read_amd(compiled) -> Compiled:
    assembly = compiled.asm["amdgcn"]
    registers = _number(r"\.vgpr_count:\s+(\d+)", assembly)
    spilled = _number(r"\.vgpr_spill_count:\s+(\d+)", assembly)
    return Compiled(registers, spilled, compiled.metadata.shared, len(re.findall(r"v_mfma", assembly)))


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    assert match is not None, pattern
    return int(match[1])


def compile_row(case: tuple[str, str, int, torch.dtype, Any]) -> Compiled | str:
    """One kernel at one tile for one target, or the compiler's complaint."""
    target, kernel, D, dtype, tile = case
    try:
        T, H_kv = (16, 2) if kernel == "decode" else (4096, 8)  # the harder of its variants: stacked heads
        compiled = compiled_kernel(plan(kernel, T, 8, H_kv, 7, 384, D, dtype, tile, target), TARGETS[target])
        issued = issued_ratio(matrix_work(compiled), kernel, tile, D)
        return replace(read(compiled, TARGETS[target]), issued=issued)
    except Exception as error:
        return repr(error)[:80]


def grid(kernel: str) -> list[Tile]:
    """The candidates for a kernel's tile: both ways of its scores where it knows two."""
    turned = [tile._replace(tokens_first=True) for tile in GRID] if kernel in TURNABLE else []
    return GRID + turned


def search(target: str, kernels: list[str], dims: list[int], dtypes: list[torch.dtype]) -> None:
    """Prints what every tile of a grid costs on one target."""
    cases = [
        (target, kernel, D, dtype, tile)
        for kernel, D, dtype in itertools.product(kernels, dims, dtypes)
        for tile in grid(kernel)
    ]
    with ProcessPoolExecutor() as pool:
        for (_, kernel, D, dtype, tile), result in zip(cases, pool.map(compile_row, cases, chunksize=4), strict=True):
            print(kernel, D, dtype, *tile, result, flush=True)


def shipped(target: str) -> list[tuple[str, str, int, torch.dtype, Any]]:
    """Every row of the tile tables for a target, and the prologue's kernels, whose tile is the number of tokens alone.

    float16 compiles to the code of bfloat16 with other instructions.
    """
    rows: list[tuple[str, str, int, torch.dtype, Any]] = [
        (target, kernel, block_d, DTYPES[element_bytes], tile)
        for element_bytes in TABLE[target]
        for kernel, block_d, tile in table_rows(target, element_bytes)
    ]
    rows += [
        (target, kernel, block_d, dtype, Tile(block_t(block_d), 0, NUM_WARPS, NUM_STAGES))
        for dtype in DTYPES.values()
        for kernel in PROLOGUE_KERNELS
        for block_d in BLOCK_DS
    ]
    if target == "sm_90a":
        rows += [
            (target, kernel, block_d, torch.bfloat16, tile)
            for kernel in HOPPER_KERNELS
            for block_d, tile in zip(
                hopper_tiles.BLOCK_DS, hopper_tiles.TABLE[kernel.removeprefix("hopper_")], strict=True
            )
            if tile is not None
        ]
    return rows


def document() -> tuple[list[Row], str]:
    """What every shipped row compiles to: all rows, and a summary in Markdown."""
    cases = [case for target in TARGETS for case in shipped(target)]
    rows = []
    with ProcessPoolExecutor() as pool:
        for case, compiled in zip(cases, pool.map(compile_row, cases), strict=True):
            assert isinstance(compiled, Compiled), (case, compiled)
            rows.append(Row(*described(case), *vars(compiled).values()))
    return rows, INTRODUCTION.format(triton.__version__) + summary(rows, SHARED_LIMITS)


def described(case: tuple[str, str, int, torch.dtype, Any]) -> tuple[str, str, str, int, int, int, int, int, str]:
    """The columns of the table that say which row it is."""
    target, kernel, D, dtype, tile = case
    warps, stages = tile[2:4] if isinstance(tile, Tile) else (HOPPER_WARPS, tile.stages)
    name = str(dtype).removeprefix("torch.")
    return target, kernel, name, D, tile.block_t, tile.block_f, warps, stages, options(tile._asdict())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--search", choices=TARGETS)
    parser.add_argument("--kernels", nargs="+", choices=tiles.KERNELS, default=list(tiles.KERNELS))
    parser.add_argument("--dims", type=int, nargs="+", default=list(BLOCK_DS))
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"])
    arguments = parser.parse_args()
    if arguments.search:
        search(arguments.search, arguments.kernels, arguments.dims, [getattr(torch, name) for name in arguments.dtypes])
        return
    rows, text = document()
    write_csv(rows, DOCUMENT.with_suffix(".csv"))
    before, _, rest = DOCUMENT.read_text().partition(MARKERS[0])
    after = rest.partition(MARKERS[1])[2]
    DOCUMENT.write_text(before + MARKERS[0] + text + MARKERS[1] + after)


if __name__ == "__main__":
    main()
