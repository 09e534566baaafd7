"""What the cases of a step are given: a device, sizes, inputs, the time left, and what passed its check before."""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flashmhf.benchmarking import Row, Shape
from flashmhf.ops.backends import backends
from flashmhf.ops.hopper import tiles as hopper_tiles
from flashmhf.ops.problem import Problem
from gpu_rows import failed, rows_of

SHAPES = {"370m": Shape(1024, 8, 7, 384), "1.3b": Shape(2048, 16, 15, 384)}
TOY = Shape(128, 2, 2, 24)
REPEATS = 20
FUSED = ("hopper", "triton")

# A name, unique in its step, and what measures it and returns or yields rows.
Case = tuple[str, Callable[[], Iterable[Row]]]


class OutOfTimeError(Exception):
    """Raised in a case that the time limit cuts short; the case is left for the next run."""


@dataclass(frozen=True)
class Variant:
    """A fused backend with one tile of a kernel: of the portable backend the table's, and `tile` is None."""

    name: str
    backend: str
    kernel: str  # "forward" or "backward"
    tile: hopper_tiles.HopperTile | None = None

    def row(self) -> Row:
        """What identifies it in a row."""
        fields = None if self.tile is None else self.tile._asdict()
        return {"variant": self.name, "backend": self.backend, "kernel": self.kernel, "tile": fields}


class Bench:
    """The device, or toys for a dry run on the CPU, where another backend stands in for those of a GPU."""

    def __init__(self, dry_run: bool, until: float, lines: Iterable[Row] = ()) -> None:
        self._until = until
        self._rows = rows_of(lines)
        self.dry_run = dry_run
        self.device = torch.device("cpu" if dry_run else "cuda")
        self.dtype = torch.float32 if dry_run else torch.bfloat16  # where one is enough
        self.repeats = 1 if dry_run else REPEATS
        self.shapes = {"toy": TOY} if dry_run else SHAPES

    def remaining_s(self) -> float:
        return self._until - time.monotonic()

    def backends(self, H: int, H_kv: int, E: int, F: int, D: int, dtype: torch.dtype) -> list[str]:
        """The fused backends that run such a problem here, the fastest by design first."""
        if self.dry_run:
            return list(FUSED)
        problem = Problem(65536, H, H_kv, E, F, D, dtype, self.device, has_gate=True)
        reasons = backends(problem)
        return [name for name in FUSED if reasons[name] is None]

    def runs_as(self, backend: str) -> str:
        """The backend that is called by that name."""
        return "blockwise" if self.dry_run else backend

    def variants(self, D: int, dtype: torch.dtype) -> Iterator[Variant]:
        """Every forward and backward to check and time at a head dim: Hopper's shipped tiles first."""
        names = self.backends(2, 2, 2, 384, D, dtype)
        if "hopper" in names:
            yield from sorted(_hopper_variants(D), key=lambda variant: variant.name != "hopper")
        if "triton" in names:
            yield from (Variant("triton", "triton", kernel) for kernel in ("forward", "backward"))

    def passed(self, variant: Variant, D: int, dtype: torch.dtype) -> bool:
        """Whether a variant was checked at that (padded) head dim, and nothing that was checked of it is wrong."""
        about = variant.row() | {"dtype": name_of(dtype)}
        block_d = hopper_tiles.block_d(D)
        rows = [
            row
            for row in self._rows
            if all(row.get(key) == value for key, value in about.items()) and hopper_tiles.block_d(row["D"]) == block_d
        ]
        return any("passed" in row for row in rows) and not any(failed(row) for row in rows)

    def passed_backends(self, D: int, dtype: torch.dtype) -> list[str]:
        """The fused backends whose forward and backward, as shipped, passed."""
        variants = [variant for variant in self.variants(D, dtype) if variant.name == variant.backend]
        return [
            name
            for name in FUSED
            if any(variant.name == name for variant in variants)
            and all(self.passed(variant, D, dtype) for variant in variants if variant.name == name)
        ]

    def randn(self, *size: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(*size, device=self.device, dtype=torch.float32).to(dtype)

    def inputs(self, T: int, H: int, H_kv: int, E: int, F: int, D: int, dtype: torch.dtype) -> list[Tensor]:
        """q, k, u, v, gate and the output's gradient."""
        weights = [self.randn(H_kv, E, F, D, dtype=dtype) / D**0.5 for _ in range(3)]
        gate = torch.rand(T, H, E, device=self.device)
        return [self.randn(T, H, D, dtype=dtype), *weights, gate, self.randn(T, H, D, dtype=dtype)]


def _hopper_variants(D: int) -> Iterator[Variant]:
    """One for each candidate, named by what differs from the tile that ships."""
    block_d = hopper_tiles.block_d(D)
    for kernel, of_dims in hopper_tiles.CANDIDATES.items():
        shipped = hopper_tiles.TABLE[kernel][hopper_tiles.BLOCK_DS.index(block_d)]
        candidates: list[Any] = [*of_dims.get(block_d, ())]
        if shipped is None:
            yield Variant("hopper", "hopper", kernel)  # it runs the portable kernel
        for tile in candidates:
            yield Variant(" ".join(["hopper", *_differences(tile, shipped)]), "hopper", kernel, tile)


def _differences(tile: Any, shipped: Any) -> list[str]:
    fields = tile._asdict()
    return [f"{key}={value}" for key, value in fields.items() if shipped is None or getattr(shipped, key) != value]


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
