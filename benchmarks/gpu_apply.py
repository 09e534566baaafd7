"""From merged rows to measured.json: what a GPU has verified, which tiles are fastest, what `auto` takes.

A pure function of the rows: without any the file is empty. A row counts for the kernel sources that it ran; where those
have changed since, it proves nothing and says so. One wrong result, of whatever run, is enough to keep a tile out.
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

WORTH_IT = 1.03  # a smaller gain may be noise
DTYPES = ("bfloat16", "float16")
DECISIVE = "bfloat16"  # whose times choose a tile; float16 runs the same code with other instructions
ORIGIN = ("device", "commit", "code", "date")

Entry = measured.Entry
Say = Callable[[str], None]


def apply(merged: Path, target: Path = measured.FILE) -> str:
    """Rewrites `target` from the rows of `merged`; returns what flips and why, and what does not and why not.

    Raises:
        UnusableError: `merged` cannot be read.
    """
    said: list[str] = []
    rows = rows_of(read_lines(merged)[0])
    entries = [*hopper_entries(_current(rows, "hopper", said.append), said.append)]
    entries += triton_entries(_current(rows, "triton", said.append), said.append)
    before = measured.parse(target.read_text())
    said += [f"no longer: {_claim(old)}" for old in before if _claim(old) not in map(_claim, entries)]
    atomic_write(target, json.dumps(entries, indent=1) + "\n")
    return "\n".join([*said, f"{target.name}: {len(entries)} entries"])


def hopper_entries(rows: list[Row], say: Say) -> Iterator[Entry]:
    """Tiles, verified configurations, and from how many tokens on they are faster than the portable backend."""
    for D in hopper_tiles.BLOCK_DS:
        of_dim = [row for row in rows if "D" in row and hopper_tiles.block_d(row["D"]) == D]
        chosen: dict[str, Any] = {}
        for kernel in hopper_tiles.TABLE:
            tile, entry = _choose(kernel, D, of_dim, say)
            chosen[kernel] = tile
            if entry is not None:
                yield entry
        for dtype in DTYPES:
            yield from _verified(D, dtype, chosen, [row for row in of_dim if row.get("dtype") == dtype], say)


def _choose(kernel: str, D: int, rows: list[Row], say: Say) -> tuple[Row | None, Entry | None]:
    """The fields of the tile to ship, and the entry that says so, where times have chosen it."""
    present: Any = hopper_tiles.TABLE[kernel][hopper_tiles.BLOCK_DS.index(D)]
    shipped = None if present is None else present._asdict()
    candidates: dict[str, Any] = {**hopper_tiles.CANDIDATES}
    tiles = [tile._asdict() for tile in candidates[kernel].get(D, ())]
    right = [tile for tile in tiles if _worst(_about(rows, kernel, tile, DECISIVE))]
    times = {json.dumps(tile): _times(rows, kernel, "hopper", tile, DECISIVE) for tile in right}
    for tile in tiles:
        if (broken := _broken(_about(rows, kernel, tile, DECISIVE))) is not None:
            say(f"stays out: hopper {kernel} D={D} {tile}: {broken}")
    timed = {key: values for key, values in times.items() if values}
    common = set.intersection(*map(set, timed.values())) if timed else set()
    if not common:
        return shipped, None
    means = {key: math.exp(sum(math.log(values[at]) for at in common) / len(common)) for key, values in timed.items()}
    best = min(means, key=lambda key: means[key])
    own = json.dumps(shipped)
    if own in means and means[own] < WORTH_IT * means[best]:
        best = own
    tile = json.loads(best)
    proof = _origin(rows) | {
        "cases": len(common),
        "mean_ms": round(means[best], 6),
        "shipped_mean_ms": round(means[own], 6) if own in means else None,
    }
    say(f"{'keeps' if best == own else 'flips'}: hopper {kernel} D={D} {tile}: {proof}")
    return tile, {"claim": "hopper tile", "kernel": kernel, "D": D, "tile": tile, "proof": proof}


def _verified(D: int, dtype: str, chosen: dict[str, Any], rows: list[Row], say: Say) -> Iterator[Entry]:
    name = f"hopper D={D} {dtype}"
    worst: dict[str, Row] = {}
    for kernel in hopper_tiles.TABLE:
        about = _about(rows, kernel, chosen[kernel], dtype)
        found = _worst(about)
        if found is None:
            return say(f"not verified: {name}: {kernel}: {_broken(about) or 'no check of the tile that ships'}")
        worst[kernel] = {key: found[key] for key in ("result", "error", "budget", "sizes") if key in found}
    say(f"verified: {name}: {worst}")
    yield {"claim": "hopper verified", "D": D, "dtype": dtype, "proof": _origin(rows) | worst}
    tokens, proof, reason = _faster_from(chosen, rows, dtype)
    if tokens is None:
        return say(f"not taken by auto: {name}: {reason}")
    say(f"taken by auto from {tokens} tokens on: {name}: {proof}")
    yield {
        "claim": "hopper faster", "D": D, "dtype": dtype, "from_tokens": tokens, "proof": _origin(rows) | {"ms": proof}
    }  # fmt: skip


def _faster_from(chosen: dict[str, Any], rows: list[Row], dtype: str) -> tuple[int | None, Row, str]:
    """The least measured number of tokens from which on forward, and forward + backward, are faster at every size."""
    hopper = [_times(rows, kernel, "hopper", chosen[kernel], dtype) for kernel in LAYER_KERNELS]
    triton = [_times(rows, kernel, "triton", None, dtype) for kernel in LAYER_KERNELS]
    if any(_worst(_about(rows, kernel, None, dtype, "triton")) is None for kernel in LAYER_KERNELS):
        return None, {}, "no check of the portable backend beside it"
    measured_at = set.intersection(*map(set, (*hopper, *triton)))
    fastest: int | None = None
    proof: Row = {}
    for tokens, places in itertools.groupby(sorted(measured_at, key=_tokens_of, reverse=True), key=_tokens_of):
        for at in places:
            mine, theirs = ([times[at] for times in pair] for pair in (hopper, triton))
            if mine[0] * WORTH_IT > theirs[0] or sum(mine) * WORTH_IT > sum(theirs):
                return fastest, proof, f"at {tokens} tokens {mine} ms against {theirs} ms, forward and backward"
            proof[f"{at[2]} {tokens}"] = {"hopper": mine, "triton": theirs}
        fastest = tokens
    return fastest, proof, "its times and the portable backend's were not measured beside each other"


def triton_entries(rows: list[Row], say: Say) -> Iterator[Entry]:
    """Tiles that `tune` found faster, and where one pass beats two kernels."""
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
            say(f"stays out: triton {name} {row['best']}: {broken or 'no check'}")
        elif row["speedup"] < WORTH_IT:
            say(f"keeps: triton {name} {row['shipped']}: the best of the grid is {row['speedup']:.3f} times as fast")
        else:
            say(f"flips: triton {name} to {row['best']}: {row['speedup']:.3f} times as fast as {row['shipped']}")
            keys = ("speedup", "shipped_ms", "best_ms", "error", "budget")
            proof = _origin([row]) | {key: row[key] for key in keys}
            entries["tile", *place.values()] = {"claim": "triton tile", **place, "tile": row["best"], "proof": proof}
        if broken is None and "two_kernels_ms" in row:
            key = ("one pass", row["device_class"], row["D"])
            entries.pop(key, None)  # the latest measurement decides
            entries |= _fused(key, row, say)
    yield from entries.values()


def _fused(key: tuple[Any, ...], row: Row, say: Say) -> dict[tuple[Any, ...], Entry]:
    own = row["best_ms"] if row["speedup"] >= WORTH_IT else row["shipped_ms"]
    times = {"fused_ms": own, "two_kernels_ms": row["two_kernels_ms"]}
    if not all(own[T] * WORTH_IT < row["two_kernels_ms"][T] for T in own):
        say(f"keeps two kernels: {key[1]} D={key[2]}: {times}")
        return {}
    say(f"one pass is faster: {key[1]} D={key[2]}: {times}")
    return {key: {"claim": "fused faster", "device": key[1], "D": key[2], "proof": _origin([row]) | times}}


def _current(rows: list[Row], backend: str, say: Say) -> list[Row]:
    """The rows that ran the kernels as they are now, on a GPU."""
    own = kernel_hashes()[backend]
    current = [row for row in rows if row["device"] != "cpu" and row["kernels"].get(backend) == own]
    if stale := {row["commit"] or row["code"] for row in rows if row["kernels"].get(backend) != own}:
        say(f"of other kernel sources of {backend}, measure again: {', '.join(sorted(stale))}")
    return [row | {"proves": {backend: own}} for row in current]


def _about(rows: list[Row], kernel: str, tile: Row | None, dtype: str, backend: str = "hopper") -> list[Row]:
    """All that was said of one tile of a kernel."""
    key = {"backend": backend, "kernel": kernel, "tile": tile, "dtype": dtype}
    return [row for row in rows if all(row.get(name) == value for name, value in key.items())]


def _worst(rows: list[Row]) -> Row | None:
    """The check that came closest to its budget, or None where one is wrong or there is none."""
    checks = [row for row in rows if "passed" in row]
    if any(map(failed, rows)) or not checks:
        return None
    return max(checks, key=lambda row: row["error"] / row["budget"])


def _broken(rows: Iterable[Row]) -> str | None:
    """The first thing that went wrong."""
    row = next(filter(failed, rows), None)
    if row is None:
        return None
    return (
        row.get("failed") or f"{row['result']} off by {row['error']} of {row['budget']}, {row.get('changed')} changed"
    )


Place = tuple[str, str, str, int]  # device, code, shape, tokens


def _times(rows: list[Row], kernel: str, backend: str, tile: Row | None, dtype: str) -> dict[Place, float]:
    """Median milliseconds of a tile wherever the operator was timed."""
    return {
        (row["device"], row["code"], row["shape"], row["tokens"]): row["median_ms"]
        for row in _about(rows, kernel, tile, dtype, backend)
        if row["step"] in ("op", "dims") and "median_ms" in row
    }


def _tokens_of(place: Place) -> int:
    return place[-1]


def _origin(rows: list[Row]) -> Row:
    """Where the last of the rows comes from, and of which kernel sources."""
    return {key: rows[-1][key] for key in (*ORIGIN, "proves")}


def _claim(entry: Entry) -> str:
    return json.dumps({key: value for key, value in entry.items() if key != "proof"})
