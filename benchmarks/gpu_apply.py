"""From merged rows to measured.json: what is verified on a GPU, which tiles are fastest, what `auto` selects.

A pure function of the rows: without rows the file is empty. A row only counts for the kernel sources that it ran; rows
of other sources are reported and ignored. One wrong result in any run excludes a tile.
"""

import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from flashmhf.files import atomic_write
from flashmhf.ops import measured
from flashmhf.ops.hopper import tiles as hopper_tiles
from gpu_bench import LAYER_KERNELS
from gpu_facts import kernel_hashes
from gpu_rows import Row, failed, read_lines, rows_of

MIN_SPEEDUP = 1.03  # less may be noise
DTYPES = ("bfloat16", "float16")
DECISIVE = "bfloat16"  # whose times decide; float16 runs the same code with other opcodes
PROVENANCE = ("device", "commit", "code", "date")

Entry = measured.Entry
Report = Callable[[str], None]


def apply(merged: Path, target: Path = measured.FILE) -> str:
    """Rewrites `target` from the rows of `merged`; returns a report of what changes, what does not, and why.

    Raises:
        UnusableError: `merged` cannot be read.
    """
    lines: list[str] = []
    rows = rows_of(read_lines(merged)[0])
    entries = [*hopper_entries(_current(rows, "hopper", lines.append), lines.append)]
    entries += triton_entries(_current(rows, "triton", lines.append), lines.append)
    before = measured.parse(target.read_text())
    lines += [f"no longer: {_claim(old)}" for old in before if _claim(old) not in map(_claim, entries)]
    atomic_write(target, json.dumps(entries, indent=1) + "\n")
    return "\n".join([*lines, f"{target.name}: {len(entries)} entries"])


def hopper_entries(rows: list[Row], report: Report) -> Iterator[Entry]:
    """Tiles, verified configurations, and the number of tokens from which they beat the portable backend."""
    for D in hopper_tiles.BLOCK_DS:
        of_dim = [row for row in rows if "D" in row and hopper_tiles.block_d(row["D"]) == D]
        chosen: dict[str, Any] = {}
        for kernel in hopper_tiles.TABLE:
            tile, entry = _choose(kernel, D, of_dim, report)
            chosen[kernel] = tile
            if entry is not None:
                yield entry
        for dtype in DTYPES:
            yield from _verified(D, dtype, chosen, [row for row in of_dim if row.get("dtype") == dtype], report)


def _choose(kernel: str, D: int, rows: list[Row], report: Report) -> tuple[Row | None, Entry | None]:
    """The fields of the tile to ship, and its entry if measured times have chosen it."""
    present: Any = hopper_tiles.TABLE[kernel][hopper_tiles.BLOCK_DS.index(D)]
    shipped = None if present is None else present._asdict()
    candidates: dict[str, Any] = {**hopper_tiles.CANDIDATES}
    tiles = [tile._asdict() for tile in candidates[kernel].get(D, ())]
    right = [tile for tile in tiles if _worst(_about(rows, kernel, tile, DECISIVE))]
    times = {json.dumps(tile): _times(rows, kernel, "hopper", tile, DECISIVE) for tile in right}
    for tile in tiles:
        if (broken := _broken(_about(rows, kernel, tile, DECISIVE))) is not None:
            report(f"excluded: hopper {kernel} D={D} {tile}: {broken}")
    timed = {key: values for key, values in times.items() if values}
    common = set.intersection(*map(set, timed.values())) if timed else set()
    if not common:
        return shipped, None
    means = {key: math.exp(sum(math.log(values[at]) for at in common) / len(common)) for key, values in timed.items()}
    best = min(means, key=lambda key: means[key])
    own = json.dumps(shipped)
    if own in means and means[own] < MIN_SPEEDUP * means[best]:
        best = own
    tile = json.loads(best)
    proof = _provenance(rows) | {
        "cases": len(common),
        "mean_ms": round(means[best], 6),
        "shipped_mean_ms": round(means[own], 6) if own in means else None,
    }
    report(f"{'keeps' if best == own else 'changes'}: hopper {kernel} D={D} {tile}: {proof}")
    return tile, {"claim": "hopper tile", "kernel": kernel, "D": D, "tile": tile, "proof": proof}


def _verified(D: int, dtype: str, chosen: dict[str, Any], rows: list[Row], report: Report) -> Iterator[Entry]:
    name = f"hopper D={D} {dtype}"
    worst: dict[str, Row] = {}
    for kernel in hopper_tiles.TABLE:
        about = _about(rows, kernel, chosen[kernel], dtype)
        found = _worst(about)
        if found is None:
            return report(f"not verified: {name}: {kernel}: {_broken(about) or 'no check of the tile that ships'}")
        worst[kernel] = {key: found[key] for key in ("result", "error", "budget", "sizes") if key in found}
    report(f"verified: {name}: {worst}")
    yield {"claim": "hopper verified", "D": D, "dtype": dtype, "proof": _provenance(rows) | worst}
    tokens, proof, reason = _faster_from(chosen, rows, dtype)
    if tokens is None:
        return report(f"not selected by auto: {name}: {reason}")
    report(f"selected by auto from {tokens} tokens: {name}: {proof}")
    proof = _provenance(rows) | {"ms": proof}
    yield {"claim": "hopper faster", "D": D, "dtype": dtype, "from_tokens": tokens, "proof": proof}


def _faster_from(chosen: dict[str, Any], rows: list[Row], dtype: str) -> tuple[int | None, Row, str]:
    """The smallest measured number of tokens from which forward and forward + backward are faster at every size."""
    hopper = [_times(rows, kernel, "hopper", chosen[kernel], dtype) for kernel in LAYER_KERNELS]
    triton = [_times(rows, kernel, "triton", None, dtype) for kernel in LAYER_KERNELS]
    if any(_worst(_about(rows, kernel, None, dtype, "triton")) is None for kernel in LAYER_KERNELS):
        return None, {}, "no check of the portable backend"
    measured_at = set.intersection(*map(set, (*hopper, *triton)))
    fastest: int | None = None
    proof: Row = {}
    for tokens, places in itertools.groupby(sorted(measured_at, key=_tokens_of, reverse=True), key=_tokens_of):
        for at in places:
            mine, theirs = ([times[at] for times in pair] for pair in (hopper, triton))
            if mine[0] * MIN_SPEEDUP > theirs[0] or sum(mine) * MIN_SPEEDUP > sum(theirs):
                return fastest, proof, f"at {tokens} tokens {mine} ms against {theirs} ms, forward and backward"
            proof[f"{at[2]} {tokens}"] = {"hopper": mine, "triton": theirs}
        fastest = tokens
    return fastest, proof, "its times and the portable backend's were not measured in the same run"


def triton_entries(rows: list[Row], report: Report) -> Iterator[Entry]:
    """Tiles that `tune` found faster, and where the fused backward beats two kernels."""
    entries: dict[tuple[Any, ...], Entry] = {}
    for row in rows:
        if row["step"] != "tune" or "best" not in row:
            continue
        element_bytes = 4 if row["dtype"] == "float32" else 2
        place = {"device": row["device_class"], "element_bytes": element_bytes, "kernel": row["kernel"], "D": row["D"]}
        name = " ".join(map(str, place.values()))
        broken = _broken(
            other for other in rows
            if other.get("tile") == "x".join(map(str, row["best"]))
            and all(other.get(key) == row[key] for key in ("device_class", "kernel", "D", "dtype"))
        )  # fmt: skip
        if broken is not None or not row.get("passed"):
            report(f"excluded: triton {name} {row['best']}: {broken or 'no check'}")
        elif row["speedup"] < MIN_SPEEDUP:
            report(f"keeps: triton {name} {row['shipped']}: the best of the grid is {row['speedup']:.3f}x as fast")
        else:
            report(f"changes: triton {name} to {row['best']}: {row['speedup']:.3f}x as fast as {row['shipped']}")
            keys = ("speedup", "shipped_ms", "best_ms", "error", "budget")
            proof = _provenance([row]) | {key: row[key] for key in keys}
            entries["tile", *place.values()] = {"claim": "triton tile", **place, "tile": row["best"], "proof": proof}
        if broken is None and "two_kernels_ms" in row:
            key = ("fused", row["device_class"], row["D"])
            entries.pop(key, None)  # the latest measurement decides
            entries |= _fused(key, row, report)
    yield from entries.values()


def _fused(key: tuple[Any, ...], row: Row, report: Report) -> dict[tuple[Any, ...], Entry]:
    own = row["best_ms"] if row["speedup"] >= MIN_SPEEDUP else row["shipped_ms"]
    times = {"fused_ms": own, "two_kernels_ms": row["two_kernels_ms"]}
    if not all(own[T] * MIN_SPEEDUP < row["two_kernels_ms"][T] for T in own):
        report(f"keeps two kernels: {key[1]} D={key[2]}: {times}")
        return {}
    report(f"fused backward is faster: {key[1]} D={key[2]}: {times}")
    return {key: {"claim": "fused faster", "device": key[1], "D": key[2], "proof": _provenance([row]) | times}}


def _current(rows: list[Row], backend: str, report: Report) -> list[Row]:
    """The rows that ran the present kernel sources on a GPU."""
    own = kernel_hashes()[backend]
    current = [row for row in rows if row["device"] != "cpu" and row["kernels"].get(backend) == own]
    if stale := {row["commit"] or row["code"] for row in rows if row["kernels"].get(backend) != own}:
        report(f"rows of other kernel sources of {backend} are ignored, measure again: {', '.join(sorted(stale))}")
    return [row | {"proves": {backend: own}} for row in current]


def _about(rows: list[Row], kernel: str, tile: Row | None, dtype: str, backend: str = "hopper") -> list[Row]:
    """All rows about one tile of a kernel."""
    key = {"backend": backend, "kernel": kernel, "tile": tile, "dtype": dtype}
    return [row for row in rows if all(row.get(name) == value for name, value in key.items())]


def _worst(rows: list[Row]) -> Row | None:
    """The check with the highest error relative to its budget; None if one failed or there is none."""
    checks = [row for row in rows if "passed" in row]
    if any(map(failed, rows)) or not checks:
        return None
    return max(checks, key=lambda row: row["error"] / row["budget"])


def _broken(rows: Iterable[Row]) -> str | None:
    """The first failure."""
    row = next(filter(failed, rows), None)
    if row is None:
        return None
    return (
        row.get("failed")
        or f"{row['result']}: error {row['error']}, budget {row['budget']}, {row.get('changed')} repeats differ"
    )


Place = tuple[str, str, str, int]  # device, code, shape, tokens


def _times(rows: list[Row], kernel: str, backend: str, tile: Row | None, dtype: str) -> dict[Place, float]:
    """Median milliseconds of a tile at every place where the operator was timed."""
    return {
        (row["device"], row["code"], row["shape"], row["tokens"]): row["median_ms"]
        for row in _about(rows, kernel, tile, dtype, backend)
        if row["step"] in ("op", "dims") and "median_ms" in row
    }


def _tokens_of(place: Place) -> int:
    return place[-1]


def _provenance(rows: list[Row]) -> Row:
    """Provenance and kernel sources of the last row."""
    return {key: rows[-1][key] for key in (*PROVENANCE, "proves")}


def _claim(entry: Entry) -> str:
    return json.dumps({key: value for key, value in entry.items() if key != "proof"})
