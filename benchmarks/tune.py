"""Proposes rows of the tile table (src/flashmhf/ops/triton/tiles.py) for the GPU at hand.

    python benchmarks/tune.py [--kernels forward,decode] [--dims 64,128] [--dtypes bfloat16] [--time-limit 540]

The candidates are the tiles of a grid that compile without spills and fit the device. Each is checked against the
formula in float64 on its own data, then timed in turns with the shipped row. This is the step `tune` of
benchmarks/gpu.py with options: rows are stored as there, the same command resumes, and `gpu.py --apply` puts faster
tiles into the table.
`TRITON_INTERPRET=1 python benchmarks/tune.py --dry-run` does the same at toy sizes on the CPU.
"""

import argparse
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

import gpu_kernels
from compile_kernels import SHARED_LIMITS, Compiled, grid
from flashmhf.benchmarking.layer import describe
from flashmhf.benchmarking.measuring import Row, copy_call, dtype_name, interleaved_times
from flashmhf.ops.triton.tiles import BLOCK_DS, KERNELS, Tile, device_class, table_rows
from gpu import add_options, run_safely
from gpu_bench import Bench, Case, OutOfTimeError
from gpu_compile import compile_ahead
from gpu_kernels import KernelCase, Size
from gpu_plan import Step

TOY_GRID = [Tile(16, 16, 4, 1), Tile(32, 16, 4, 1)]
HIDDEN_SIZE, E, F = 1024, 7, 384  # the 370M model's
TOKENS = {"decode": (1, 4, 16)}
MANY_TOKENS = (1024, 16384)
TIME_LIMIT_S = 540
FINALISTS = 3


def tune(
    bench: Bench,
    kernels: Sequence[str] = KERNELS,
    dims: Sequence[int] = (128, 64),
    dtypes: Sequence[str] = ("bfloat16",),
) -> Iterator[Case]:
    """One case per requested row of the table."""
    if bench.dry_run:
        dims, dtypes = (32,), ("float16",)
    for dtype, D, kernel in itertools.product((getattr(torch, name) for name in dtypes), dims, kernels):
        shipped = {(kernel, D): tile for kernel, D, tile in table_rows(device_class(bench.device), dtype.itemsize)}
        if (kernel, D) in shipped:
            yield Case(
                f"{kernel} {dtype_name(dtype)} D={D}", functools.partial(_tune, bench, kernel, dtype, D, shipped)
            )


def _tune(bench: Bench, kernel: str, dtype: torch.dtype, D: int, shipped: dict[tuple[str, int], Tile]) -> list[Row]:
    fitting = _fitting(bench, kernel, dtype, D)
    own = shipped[kernel, D]
    checks, wrong = _checks(bench, kernel, dtype, D, [own, *(tile for tile in fitting if tile != own)])
    if own not in checks:
        raise RuntimeError(f"the shipped tile is wrong: {wrong[0]}")
    first = _times(bench, kernel, dtype, D, list(checks), min(bench.repeats, 3))
    finalists = sorted(set(checks) - {own}, key=lambda tile: _slowdown(first, tile, own))[:FINALISTS]
    times = _times(bench, kernel, dtype, D, [own, *finalists], bench.repeats)
    best = min(times, key=lambda tile: _slowdown(times, tile, own))
    row: Row = {
        "kernel": kernel, "dtype": dtype_name(dtype), "D": D, "shipped": list(own), "best": list(best),
        "speedup": 1 / _slowdown(times, best, own), "shipped_ms": times[own], "best_ms": times[best],
        **{key: checks[best][key] for key in ("error", "budget", "passed")},
        "fitting": len(fitting), "wrong": wrong,
    }  # fmt: skip
    if kernel == "backward_fused":
        row["two_kernels_ms"] = _two_kernels_ms(bench, dtype, D, shipped)
    return [row]


def _checks(
    bench: Bench, kernel: str, dtype: torch.dtype, D: int, tiles: list[Tile]
) -> tuple[dict[Tile, Row], list[str]]:
    """The worst result of each correct tile on fresh data, and the failures of the others."""
    checks: dict[Tile, Row] = {}
    wrong = []
    for tile in tiles:
        if bench.remaining_s() <= 0:
            raise OutOfTimeError
        try:
            rows = gpu_kernels.check_kernel(kernel, bench.inputs(*_checked_sizes(bench, kernel), D, dtype), tile)
        except Exception as error:  # the driver may reject what compiles
            wrong.append(f"{tuple(tile)}: {describe(error)}")
            continue
        worst = max(rows, key=lambda row: row["error"] / row["budget"])
        if all(row["passed"] for row in rows):
            checks[tile] = worst
        else:
            wrong.append(f"{tuple(tile)}: {worst['result']}: error {worst['error']:.2g}")
    return checks, wrong


def _fitting(bench: Bench, kernel: str, dtype: torch.dtype, D: int) -> list[Tile]:
    """The tiles of the grid that compile without spills and fit the device's shared memory."""
    if bench.dry_run:
        return TOY_GRID
    target = device_class(bench.device)
    tiles = grid(kernel)
    results = compile_ahead(
        target, [KernelCase(kernel, _checked_sizes(bench, kernel), D, dtype, tile) for tile in tiles]
    )
    compiled = [(tile, result) for tile, result in zip(tiles, results, strict=True) if isinstance(result, Compiled)]
    if not compiled:
        raise RuntimeError(f"no tile of the grid compiles; the first error: {results[0]}")
    limit = SHARED_LIMITS[target]
    return [tile for tile, result in compiled if not result.spilled and result.shared_bytes <= limit]


def _checked_sizes(bench: Bench, kernel: str) -> Size:
    if bench.dry_run:
        return 20, 2, 2, 2, 32
    return (16 if kernel == "decode" else 500), 4, 4, 3, F


def _times(
    bench: Bench, kernel: str, dtype: torch.dtype, D: int, tiles: list[Tile], repeats: int
) -> dict[Tile, dict[int, float]]:
    """Tile -> tokens -> milliseconds."""
    times: dict[Tile, dict[int, float]] = {tile: {} for tile in tiles}
    for T, inputs in _timed_inputs(bench, kernel, dtype, D):
        # With few tokens, as in a model, weights come from memory and not from a cache.
        before_each = copy_call(bench.device)[0] if kernel == "decode" and not bench.dry_run else None
        calls: dict[str, Callable[[], Any]] = {
            str(i): gpu_kernels.KERNELS[kernel](inputs, tile) for i, tile in enumerate(tiles)
        }
        for i, measured in interleaved_times(calls, bench.device, repeats, before_each).items():
            times[tiles[int(i)]][T] = measured.median_ms
    return times


def _timed_inputs(bench: Bench, kernel: str, dtype: torch.dtype, D: int) -> Iterator[tuple[int, list[torch.Tensor]]]:
    for T in (16,) if bench.dry_run else TOKENS.get(kernel, MANY_TOKENS):
        sizes = (2, 2, 2, 32) if bench.dry_run else (HIDDEN_SIZE // D, HIDDEN_SIZE // D, E, F)
        yield T, bench.inputs(T, *sizes, D, dtype)


def _slowdown(times: dict[Tile, dict[int, float]], tile: Tile, shipped: Tile) -> float:
    """Geometric mean over numbers of tokens of the time relative to the shipped row's."""
    logs = [math.log(times[tile][T] / times[shipped][T]) for T in times[tile]]
    return math.exp(sum(logs) / len(logs))


def _two_kernels_ms(bench: Bench, dtype: torch.dtype, D: int, shipped: dict[tuple[str, int], Tile]) -> dict[int, float]:
    """The time of the two kernels that the fused one replaces, measured at most minutes apart."""
    total = {}
    for T, inputs in _timed_inputs(bench, "backward_fused", dtype, D):
        kernels = ("backward_dq", "backward_dkuv")
        calls: dict[str, Callable[[], Any]] = {
            kernel: gpu_kernels.KERNELS[kernel](inputs, shipped[kernel, D]) for kernel in kernels
        }
        times = interleaved_times(calls, bench.device, bench.repeats)
        total[T] = sum(measured.median_ms for measured in times.values())
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", default=",".join(KERNELS))
    parser.add_argument("--dims", default="128,64")
    parser.add_argument("--dtypes", default="bfloat16", help="float16 has the rows of bfloat16")
    add_options(parser)
    arguments = parser.parse_args()
    kernels, dims, dtypes = (getattr(arguments, name).split(",") for name in ("kernels", "dims", "dtypes"))
    for option, given, known in (
        ("kernels", kernels, KERNELS),
        ("dims", dims, tuple(map(str, BLOCK_DS))),
        ("dtypes", dtypes, ("bfloat16", "float16", "float32")),
    ):
        if unknown := set(given) - set(known):
            parser.error(f"--{option}: expected some of {', '.join(known)}, got {min(unknown)!r}")
    seconds = arguments.time_limit or TIME_LIMIT_S
    options = {"kernels": kernels, "dims": list(map(int, dims)), "dtypes": dtypes}
    step = Step("tune", int(seconds), "a grid of portable tiles", "tune:tune", options, shows="speedup")
    run_safely((step,), seconds, arguments)


if __name__ == "__main__":
    main()
