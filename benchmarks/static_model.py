"""Predicts the fraction of tensor-core peak that each kernel can reach on an H100 and an A100, from its compiled code.

python benchmarks/static_model.py                 prints every row; writes docs/static_model.csv and .md
python benchmarks/static_model.py --target sm_80  prints one target's rows, writes nothing

Nothing runs, so nothing here is a measurement; docs/static_model.md lists the assumptions. Rows of benchmarks/results
that time the same kernel are shown next to the prediction, and flagged if they are off by more than 15 %.
"""

import argparse
import math
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from compile_kernels import DTYPES, TARGETS, TargetTile, compiled_kernel, read, shipped
from flashmhf.benchmarking.workloads import LayerShape
from flashmhf.ops.hopper import tiles as hopper_tiles
from gpu_bench import SHAPES
from gpu_kernels import KernelCase, launches
from kernel_table import tile_name
from loop_costs import PROCESSORS, Clocks, loop_clocks
from machine_code import machine_code
from matrix_work import PRODUCTS, WARPGROUPS, partitions
from model_table import Prediction, line_of, measured, measurements, short_table, write_csv
from occupancy import resident_programs

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs/static_model.md"
MARKERS = ("<!-- begin model -->\n", "<!-- end model -->\n")
MODELS = {"128m": LayerShape(), **SHAPES}
TOKENS = (4096, 16384, 65536)
MEMORY_BOUND = ("decode", "prologue_forward", "prologue_backward")  # not predicted


class Loop(NamedTuple):
    """A kernel's main loop, and its occupancy: resident programs per SM."""

    case: TargetTile
    shipped: bool
    clocks: Clocks
    programs_per_sm: int


def cases(target: str) -> list[tuple[TargetTile, bool]]:
    """Every kernel to predict in bfloat16, and whether it ships."""
    kernels = [case for case in shipped(target) if case.dtype == DTYPES[2] and case.kernel not in MEMORY_BOUND]
    if target != "sm_90a":
        return [(case, True) for case in kernels]
    by_kernel: dict[str, Any] = {**hopper_tiles.CANDIDATES}
    candidates = [
        TargetTile(target, f"hopper_{kernel}", D, DTYPES[2], tile)
        for kernel, by_dim in by_kernel.items()
        for D, tiles in by_dim.items()
        for tile in tiles
    ]
    return [(case, case in kernels) for case in dict.fromkeys(kernels + candidates)]


def read_loop(kernel_and_ships: tuple[TargetTile, bool]) -> Loop:
    """Compiles a kernel and counts the clocks of its main loop."""
    case, ships = kernel_and_ships
    target, kernel, D, dtype, tile = case
    launch = launches(target, KernelCase(kernel, (4096, 8, 8, 7, 384), D, dtype, tile))[0]
    compiled = compiled_kernel(launch, TARGETS[target])
    clocks = loop_clocks(machine_code(compiled.asm), partitions(compiled), PROCESSORS[target], tma_bytes(case))
    found = read(compiled, TARGETS[target])
    resident = resident_programs(target, found.registers, found.shared_bytes, compiled.metadata.num_warps)
    return Loop(case, ships, clocks, resident)


def tma_bytes(case: TargetTile) -> int:
    """Bytes that a Hopper kernel's producer loads per iteration: K, U and V, or Q and dO; 0 for other kernels."""
    _, kernel, D, dtype, tile = case
    rows = {
        "hopper_forward": 3 * tile.block_f,
        "hopper_backward_dq": 3 * tile.block_f,
        "hopper_backward": 2 * tile.block_t,
    }
    return rows.get(kernel, 0) * D * dtype.itemsize


def predict(loop: Loop, name: str, T: int) -> Prediction:
    """At a model's shape, with its hidden size split into heads of the kernel's head dim."""
    target, kernel, D, dtype, tile = loop.case
    shape, processor = MODELS[name], PROCESSORS[target]
    H, E, F = shape.hidden_size // D, shape.num_subnetworks, shape.subnetwork_size
    block_t = tile.block_t * WARPGROUPS.get(kernel, 1)
    tiles = H * math.ceil(T / block_t) * E * math.ceil(F / tile.block_f)
    launch = launches(target, KernelCase(kernel, (T, H, H, E, F), D, dtype, _one_tile_per_program(tile)))[0]
    programs = math.prod(launch.grid)
    # Programs on one SM share its rates, so a round is one program per SM.
    rounds, iterations = math.ceil(programs / processor.count), math.ceil(tiles / programs)
    flops = PRODUCTS[kernel] * 2 * T * H * D * E * F
    min_clocks = flops / (processor.count * processor.matrix_flops)
    overlapped, exposed = (
        min_clocks / (rounds * iterations * clocks) for clocks in (loop.clocks.overlapped, loop.clocks.exposed)
    )
    waves = math.ceil(programs / (processor.count * loop.programs_per_sm))
    return Prediction(
        target, kernel, D, tile_name(tile._asdict()), loop.shipped, loop.clocks, loop.programs_per_sm,
        name, T, programs, waves, overlapped, exposed,
    )  # fmt: skip


def _one_tile_per_program(tile: Any) -> Any:
    """The tile of a kernel with one program per tile: a persistent program counts as many of those."""
    return tile._replace(persistent=False) if getattr(tile, "persistent", False) else tile


def two_kernels(tokens: Prediction, weights: Prediction) -> Prediction:
    """The portable backward: five and six products, of which the algorithm needs eight."""
    return tokens._replace(
        kernel="backward", tile="", clocks=None, programs_per_sm=None, programs=None, waves=None,
        overlapped=8 / (5 / tokens.overlapped + 6 / weights.overlapped),
        exposed=8 / (5 / tokens.exposed + 6 / weights.exposed),
    )  # fmt: skip


def predictions(loops: list[Loop]) -> list[Prediction]:
    """Predictions of all kernels at all shapes, and of the portable backward's two kernels together."""
    rows = [predict(loop, name, T) for loop in loops for name in MODELS for T in TOKENS]
    weights = {_place(row): row for row in rows if row.kernel == "backward_dkuv"}
    return rows + [two_kernels(row, weights[_place(row)]) for row in rows if row.kernel == "backward_dq"]


def _place(row: Prediction) -> tuple[str, int, str, int]:
    return row.target, row.head_dim, row.shape, row.tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", choices=PROCESSORS, help="print only this target's rows, and write nothing")
    target = parser.parse_args().target
    kernels = [kernel for name in ([target] if target else PROCESSORS) for kernel in cases(name)]
    with ProcessPoolExecutor() as pool:
        loops = list(pool.map(read_loop, kernels))
    lines = measurements(ROOT / "benchmarks/results")
    rows = [row._replace(measured=measured(row, lines)) for row in predictions(loops)]
    for row in rows:
        print(line_of(row))
    if not target:
        write_csv(rows, DOCUMENT.with_suffix(".csv"))
        before, _, rest = DOCUMENT.read_text().partition(MARKERS[0])
        after = rest.partition(MARKERS[1])[2]
        DOCUMENT.write_text(before + MARKERS[0] + short_table(rows) + MARKERS[1] + after)


if __name__ == "__main__":
    main()
