"""Proposes rows of the tile table (src/flashmhf/ops/triton/tiles.py) for the GPU at hand.

    python benchmarks/tune.py [--kernels forward,decode] [--dims 64,128] [--dtypes bfloat16] [--time-limit 540]

Of a grid of tiles those stay that compile without a spill and fit the device. Each is checked against the formula in
float64 on data of its own, then timed in turn with the shipped row. Prints the rows for the table; everything measured
goes to benchmarks/results/tune-DEVICE.json, which a later run of the same command completes.
`TRITON_INTERPRET=1 python benchmarks/tune.py --dry-run` does the same at toy sizes on the CPU.
"""

import argparse
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import gpu_kernels
from compile_kernels import SHARED_LIMITS, Compiled, grid
from flashmhf.benchmarking import Row
from flashmhf.benchmarking.layer import describe
from flashmhf.benchmarking.measuring import copy_call, interleaved_times
from flashmhf.ops.triton.tiles import BLOCK_DS, KERNELS, TABLE, Tile, device_class, table_rows
from gpu_bench import Bench, Case, OutOfTimeError, check_device, name_of
from gpu_compile import compile_ahead
from gpu_record import Record

TOY_GRID = [Tile(16, 16, 4, 1), Tile(32, 16, 4, 1)]
HIDDEN_SIZE, E, F = 1024, 7, 384  # the 370M model's
TOKENS = {"decode": (1, 4, 16)}
MANY_TOKENS = (1024, 16384)
FINALISTS = 3
WORTH_IT = 1.03  # a smaller gain may be noise, and the shipped row stays


def tune(
    bench: Bench,
    kernels: tuple[str, ...] = KERNELS,
    dims: tuple[int, ...] = (128, 64),
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16,),
) -> Iterator[Case]:
    """One case for each row of the table that is asked for."""
    if bench.dry_run:
        dims, dtypes = (32,), (torch.float16,)
    for dtype, D, kernel in itertools.product(dtypes, dims, kernels):
        shipped = {(kernel, D): tile for kernel, D, tile in table_rows(device_class(bench.device), dtype.itemsize)}
        if (kernel, D) in shipped:
            yield f"{kernel} {name_of(dtype)} D={D}", functools.partial(_tune, bench, kernel, dtype, D, shipped)


def _tune(bench: Bench, kernel: str, dtype: torch.dtype, D: int, shipped: dict[tuple[str, int], Tile]) -> list[Row]:
    row: Row = {"kernel": kernel, "dtype": name_of(dtype), "D": D, "shipped": list(shipped[kernel, D])}
    fitting = _fitting(bench, kernel, dtype, D)
    tiles, wrong = [shipped[kernel, D]], []
    for tile in fitting:
        if bench.remaining_s() <= 0:
            raise OutOfTimeError
        if reason := _why_wrong(bench, kernel, dtype, D, tile):
            wrong.append(f"{tuple(tile)}: {reason}")
        elif tile not in tiles:
            tiles.append(tile)
    first = _times(bench, kernel, dtype, D, tiles, min(bench.repeats, 3))
    finalists = sorted(tiles[1:], key=lambda tile: _slowdown(first, tile, tiles[0]))[:FINALISTS]
    times = _times(bench, kernel, dtype, D, [tiles[0], *finalists], bench.repeats)
    best = min(times, key=lambda tile: _slowdown(times, tile, tiles[0]))
    speedup = 1 / _slowdown(times, best, tiles[0])
    row |= {"best": list(best), "speedup": speedup, "shipped_ms": times[tiles[0]], "best_ms": times[best]}
    if kernel == "backward_one_pass":
        row["two_kernels_ms"] = _two_kernels_ms(bench, dtype, D, shipped)
    return [{**row, "fitting": len(fitting), "wrong": wrong}]


def _fitting(bench: Bench, kernel: str, dtype: torch.dtype, D: int) -> list[Tile]:
    """The tiles of the grid that compile without a spill, in the device's shared memory."""
    if bench.dry_run:
        return TOY_GRID
    target = device_class(bench.device)
    tiles = grid(kernel)
    results = compile_ahead(target, [(kernel, _checked_sizes(bench, kernel), D, dtype, tile) for tile in tiles])
    compiled = [(tile, result) for tile, result in zip(tiles, results, strict=True) if isinstance(result, Compiled)]
    if not compiled:
        raise RuntimeError(f"no tile of the grid compiles; the first: {results[0]}")
    limit = SHARED_LIMITS[target]
    return [tile for tile, result in compiled if not result.spilled and result.shared_bytes <= limit]


def _why_wrong(bench: Bench, kernel: str, dtype: torch.dtype, D: int, tile: Tile) -> str | None:
    """What a tile gets wrong, or cannot do, on fresh data."""
    try:
        rows = gpu_kernels.check_kernel(kernel, bench.inputs(*_checked_sizes(bench, kernel), D, dtype), tile)
    except Exception as error:  # what the compiler let pass, the driver may refuse
        return describe(error)
    errors = [f"{row['result']} off by {row['error']:.2g}" for row in rows if not row["passed"]]
    return ", ".join(errors) or None


def _checked_sizes(bench: Bench, kernel: str) -> tuple[int, int, int, int, int]:
    """T, H, H_kv, E, F."""
    if bench.dry_run:
        return 20, 2, 2, 2, 32
    return (16 if kernel == "decode" else 500), 4, 4, 3, F


def _times(
    bench: Bench, kernel: str, dtype: torch.dtype, D: int, tiles: list[Tile], repeats: int
) -> dict[Tile, dict[int, float]]:
    """Tile -> tokens -> milliseconds."""
    times: dict[Tile, dict[int, float]] = {tile: {} for tile in tiles}
    for T, inputs in _timed_inputs(bench, kernel, dtype, D):
        # Few tokens: as in a model, the weights come from memory.
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
    """Geometric mean, over numbers of tokens, of the time as a ratio to the shipped row's."""
    logs = [math.log(times[tile][T] / times[shipped][T]) for T in times[tile]]
    return math.exp(sum(logs) / len(logs))


def _two_kernels_ms(bench: Bench, dtype: torch.dtype, D: int, shipped: dict[tuple[str, int], Tile]) -> dict[int, float]:
    """What the one-pass form replaces. Both kinds of kernel are timed by the same clock, minutes apart at most."""
    total = {}
    for T, inputs in _timed_inputs(bench, "backward_one_pass", dtype, D):
        kernels = ("backward_tokens", "backward_weights")
        calls: dict[str, Callable[[], Any]] = {
            kernel: gpu_kernels.KERNELS[kernel](inputs, shipped[kernel, D]) for kernel in kernels
        }
        times = interleaved_times(calls, bench.device, bench.repeats)
        total[T] = sum(measured.median_ms for measured in times.values())
    return total


def proposal(rows: list[Row]) -> str:
    """The table's lines for what was tuned, with a better tile where it is worth it."""
    device = device_class(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    lines = []
    for element_bytes in TABLE[device]:
        tiles: dict[str, dict[int, Tile]] = {}
        for kernel, D, tile in table_rows(device, element_bytes):
            tiles.setdefault(kernel, {})[D] = tile
        for kernel, shipped in tiles.items():
            of_kernel = [row for row in rows if row.get("kernel") == kernel and _bytes(row) == element_bytes]
            better = {row["D"]: Tile(*row["best"]) for row in of_kernel if row["speedup"] >= WORTH_IT}
            if better:
                text = ", ".join(_text((shipped | better).get(D)) for D in BLOCK_DS)
                lines.append(f'"{kernel}": ({text}),  # {device}, {element_bytes} bytes')
            for row in of_kernel:
                if "two_kernels_ms" in row and all(
                    row["best_ms"][T] < row["two_kernels_ms"][T] for T in row["best_ms"]
                ):
                    lines.append(f'("{device}", {row["D"]}),  # one pass is faster than two kernels')
    return "\n".join(lines) or "# the shipped rows are the best of the grid"


def _bytes(row: Row) -> int:
    return getattr(torch, row["dtype"]).itemsize


def _text(tile: Tile | None) -> str:
    return "None" if tile is None else f"Tile{tuple(tile)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", default=",".join(KERNELS))
    parser.add_argument("--dims", default="128,64")
    parser.add_argument("--dtypes", default="bfloat16", help="float16 shares the rows of bfloat16")
    parser.add_argument("--time-limit", type=float, default=540, metavar="SECONDS")
    parser.add_argument("--output", type=Path, help="Default: benchmarks/results/tune-DEVICE")
    parser.add_argument("--dry-run", action="store_true")
    arguments = parser.parse_args()
    kernels, dims, dtypes = (getattr(arguments, name).split(",") for name in ("kernels", "dims", "dtypes"))
    for option, given, known in (
        ("kernels", kernels, KERNELS),
        ("dims", dims, tuple(map(str, BLOCK_DS))),
        ("dtypes", dtypes, ("bfloat16", "float16", "float32")),
    ):
        if unknown := set(given) - set(known):
            parser.error(f"--{option}: expected some of {', '.join(known)}, got {min(unknown)!r}")
    check_device(parser, arguments.dry_run)
    bench = Bench(arguments.dry_run, arguments.time_limit)
    device = "cpu" if arguments.dry_run else torch.cuda.get_device_name().lower().replace(" ", "-")
    record = Record(arguments.output or Path(f"benchmarks/results/tune-{device}"), bench)
    cases = tune(bench, tuple(kernels), tuple(map(int, dims)), tuple(getattr(torch, name) for name in dtypes))
    record.run("tune", cases, proposal)
    print(record.sections["tune"]["summary"])
    if not record.sections["tune"]["complete"]:
        print("# incomplete: run the command again")


if __name__ == "__main__":
    main()
