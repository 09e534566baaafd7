"""Compiles Triton kernels without a GPU and reports registers, spills, shared memory and matrix instructions.

python benchmarks/compile_kernels.py                     every row of the tile tables, into docs/kernels.csv and .md
python benchmarks/compile_kernels.py --search sm_90a     what a grid of candidate tiles compiles to on one target
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
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime.jit import create_function_from_signature

from flashmhf.benchmarking.measuring import dtype_name
from flashmhf.ops.hopper import tiles as hopper_tiles
from flashmhf.ops.triton import tiles
from flashmhf.ops.triton.launch import Launch
from flashmhf.ops.triton.prologue import NUM_STAGES, NUM_WARPS, block_t
from flashmhf.ops.triton.tiles import BLOCK_DS, TABLE, Tile, table_rows
from gpu_kernels import KernelCase, launches
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
}  # bytes per program
DTYPES = {2: torch.bfloat16, 4: torch.float32}
GRID = [Tile(*sizes) for sizes in itertools.product((16, 32, 64, 128), (16, 32, 64, 128), (1, 2, 4, 8), (1, 2))]
TRANSPOSABLE = ("backward_dkuv", "backward_fused")  # kernels that know both orders of their scores
DOCUMENT = Path(__file__).parents[1] / "docs/kernels.md"
PROLOGUE_KERNELS = ("prologue_forward", "prologue_backward")
HOPPER_KERNELS = ("hopper_forward", "hopper_backward", "hopper_backward_dq")
HOPPER_WARPS = 8  # consumers; the producer has one more
INTRODUCTION = """\
All rows, in [kernels.csv](kernels.csv), compiled by Triton {}: bfloat16 and float32, E 7, F 384. `issued` is the
ratio of matrix FLOPs issued by all warps per tile to the algorithm's: above 1, warps repeat products.

"""
MARKERS = ("<!-- begin compiled -->\n", "<!-- end compiled -->\n")


class TargetTile(NamedTuple):
    """A kernel with a tile, for one target."""

    target: str
    kernel: str
    D: int
    dtype: torch.dtype
    tile: Any


@dataclass(frozen=True)
class Compiled:
    """What a launch compiles to.

    Attributes:
        spilled: bytes of stack and local memory per thread (AMD: registers).
        issued: matrix FLOPs per tile over the algorithm's, for a row of a table; None without matrix instructions.
    """

    registers: int
    spilled: int
    shared_bytes: int
    matrix_instructions: int
    issued: float | None = None


@dataclass(frozen=True)
class Source:
    """Everything that determines what a launch compiles to, and its key in Triton's cache. It can be pickled."""

    module: str
    kernel: str
    signature: dict[str, Any]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: dict[str, Any]
    target: GPUTarget

    @classmethod
    def of(cls, launch: Launch, target: GPUTarget) -> "Source":
        """Packed by the launcher's own functions, because the encoding of constants depends on Triton's version."""
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
        """Sources with equal keys share one compiled kernel."""
        return f"{self._tree().hash()} {sorted(self.options.items())} {self.target}"

    def compile(self) -> Any:
        """Triton's compiled kernel, with its assembly in `asm`."""
        return triton.compile(self._tree(), target=self.target, options=self.options)

    def _tree(self) -> ASTSource:
        kernel = getattr(importlib.import_module(self.module), self.kernel)
        kind = GluonASTSource if kernel.is_gluon() else ASTSource
        return kind(kernel, self.signature, self.constants, self.attributes)


def compiled_kernel(launch: Launch, target: GPUTarget) -> Any:
    """Triton's compiled kernel, exactly as the launcher would compile it, with its assembly in `asm`."""
    return Source.of(launch, target).compile()


def compile_source(source: Source) -> Compiled:
    """Registers, spills and so on of a source."""
    return read(source.compile(), source.target)


def read(compiled: Any, target: GPUTarget) -> Compiled:
    """Registers, spills and so on of a kernel that Triton compiled for a target."""
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


def compile_row(case: TargetTile) -> Compiled | str:
    """What a kernel compiles to, or the compiler's error."""
    target, kernel, D, dtype, tile = case
    try:
        T, H_kv = (16, 2) if kernel == "decode" else (4096, 8)  # decode's harder variant: stacked heads
        launch = launches(target, KernelCase(kernel, (T, 8, H_kv, 7, 384), D, dtype, tile))[0]
        compiled = compiled_kernel(launch, TARGETS[target])
        issued = issued_ratio(matrix_work(compiled), kernel, tile, D)
        return replace(read(compiled, TARGETS[target]), issued=issued)
    except Exception as error:
        return repr(error)[:80]


def grid(kernel: str) -> list[Tile]:
    """The candidate tiles of a kernel, with both orders of its scores if it knows two."""
    transposed = [tile._replace(tokens_first=True) for tile in GRID] if kernel in TRANSPOSABLE else []
    return GRID + transposed


def search(target: str, kernels: list[str], dims: list[int], dtypes: list[torch.dtype]) -> None:
    """Prints what every tile of a grid compiles to on one target."""
    cases = [
        TargetTile(target, kernel, D, dtype, tile)
        for kernel, D, dtype in itertools.product(kernels, dims, dtypes)
        for tile in grid(kernel)
    ]
    with ProcessPoolExecutor() as pool:
        for (_, kernel, D, dtype, tile), result in zip(cases, pool.map(compile_row, cases, chunksize=4), strict=True):
            print(kernel, D, dtype, *tile, result, flush=True)


def shipped(target: str) -> list[TargetTile]:
    """Every row of the tile tables for a target, and the prologue's kernels, whose tile has only a number of tokens.

    float16 compiles to the same code as bfloat16, with other opcodes.
    """
    rows = [
        TargetTile(target, kernel, block_d, DTYPES[element_bytes], tile)
        for element_bytes in TABLE[target]
        for kernel, block_d, tile in table_rows(target, element_bytes)
    ]
    rows += [
        TargetTile(target, kernel, block_d, dtype, Tile(block_t(block_d), 0, NUM_WARPS, NUM_STAGES))
        for dtype in DTYPES.values()
        for kernel in PROLOGUE_KERNELS
        for block_d in BLOCK_DS
    ]
    if target == "sm_90a":
        rows += [
            TargetTile(target, kernel, block_d, torch.bfloat16, tile)
            for kernel in HOPPER_KERNELS
            for block_d, tile in zip(
                hopper_tiles.BLOCK_DS, hopper_tiles.TABLE[kernel.removeprefix("hopper_")], strict=True
            )
            if tile is not None
        ]
    return rows


def document() -> tuple[list[Row], str]:
    """What every shipped tile compiles to: all rows, and a summary in Markdown."""
    cases = [case for target in TARGETS for case in shipped(target)]
    rows = []
    with ProcessPoolExecutor() as pool:
        for case, compiled in zip(cases, pool.map(compile_row, cases), strict=True):
            assert isinstance(compiled, Compiled), (case, compiled)
            rows.append(Row(*described(case), *vars(compiled).values()))
    return rows, INTRODUCTION.format(triton.__version__) + summary(rows, SHARED_LIMITS)


def described(case: TargetTile) -> tuple[str, str, str, int, int, int, int, int, str]:
    """The columns of the table that identify a row."""
    target, kernel, D, dtype, tile = case
    warps, stages = tile[2:4] if isinstance(tile, Tile) else (HOPPER_WARPS, tile.stages)
    return target, kernel, dtype_name(dtype), D, tile.block_t, tile.block_f, warps, stages, options(tile._asdict())


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
