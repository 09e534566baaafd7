"""What the cases of a step need: the device, sizes, inputs, the time left, and which checks have passed."""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashmhf.benchmarking.measuring import Row, dtype_name
from flashmhf.benchmarking.workloads import LayerShape
from flashmhf.ops.backends import backends
from flashmhf.ops.hopper import tiles as hopper_tiles
from flashmhf.ops.problem import Problem
from gpu_rows import failed, rows_of

SHAPES = {
    "370m": LayerShape(hidden_size=1024, num_heads=8, num_subnetworks=7, subnetwork_size=384),
    "1.3b": LayerShape(hidden_size=2048, num_heads=16, num_subnetworks=15, subnetwork_size=384),
}
TOY = LayerShape(hidden_size=128, num_heads=2, num_subnetworks=2, subnetwork_size=24)
REPEATS = 20
FUSED = ("hopper", "triton")
LAYER_KERNELS = ("forward", "backward")  # what a layer launches by default


class Case(NamedTuple):
    """One measurement of a step.

    Attributes:
        name: unique in its step.
        measure: returns or yields rows. A row {"state": "trying", ...} precedes what may crash the process; after a
            crash that row identifies the failure, and the case runs again and continues without it.
        about: identifies the case in the row of a failure.
    """

    name: str
    measure: Callable[[], Iterable[Row]]
    about: Row = {}


class OutOfTimeError(Exception):
    """Raised in a case that reaches the time limit; the case is left for the next run."""


@dataclass(frozen=True)
class Variant:
    """A fused backend with one tile of a kernel; `tile` is None for the portable backend, which has its table's."""

    name: str
    backend: str
    kernel: str  # of hopper_tiles.TABLE
    D: int
    tile: hopper_tiles.HopperTile | None = None

    @property
    def shipped(self) -> bool:
        return self.name == self.backend

    def row(self) -> Row:
        """The keys that identify it in a row."""
        fields = None if self.tile is None else self.tile._asdict()
        return {"variant": self.name, "backend": self.backend, "kernel": self.kernel, "D": self.D, "tile": fields}

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """A context in which the backend runs this tile in place of the shipped one."""
        name, column = self.kernel.upper(), hopper_tiles.BLOCK_DS.index(hopper_tiles.block_d(self.D))
        before = getattr(hopper_tiles, name)
        if self.tile is not None:
            setattr(hopper_tiles, name, (*before[:column], self.tile, *before[column + 1 :]))
        try:
            yield
        finally:
            setattr(hopper_tiles, name, before)


class Bench:
    """The device; or, for a dry run, the CPU with toy sizes and another backend in place of the GPU's."""

    def __init__(self, dry_run: bool, until: float, lines: Iterable[Row] = ()) -> None:
        self._until = until
        self._rows = rows_of(lines)
        self.dry_run = dry_run
        self.device = torch.device("cpu" if dry_run else "cuda")
        self.dtype = torch.float32 if dry_run else torch.bfloat16  # of steps with a single dtype
        self.repeats = 1 if dry_run else REPEATS
        self.shapes = {"toy": TOY} if dry_run else SHAPES

    def rows(self, step: str) -> list[Row]:
        """What a step has measured so far."""
        return [row for row in self._rows if row["step"] == step]

    def remaining_s(self) -> float:
        return self._until - time.monotonic()

    def synchronize(self) -> None:
        """Waits for the device; raises its errors."""
        if not self.dry_run:
            torch.cuda.synchronize(self.device)

    def backends(self, H: int, H_kv: int, E: int, F: int, D: int, dtype: torch.dtype) -> list[str]:
        """The fused backends that support such a problem here, the fastest by design first."""
        if self.dry_run:
            return list(FUSED)
        problem = Problem(65536, H, H_kv, E, F, D, dtype, self.device, has_gate=True)
        reasons = backends(problem)
        return [name for name in FUSED if reasons[name] is None]

    def runs_as(self, backend: str) -> str:
        """The backend that runs under that name."""
        return "blockwise" if self.dry_run else backend

    def variants(self, D: int, dtype: torch.dtype) -> Iterator[Variant]:
        """Every forward and backward to check and time at a head dim: portable, Hopper as shipped, other tiles."""
        names = self.backends(2, 2, 2, 384, D, dtype)
        if "triton" in names:
            yield from (Variant("triton", "triton", kernel, D) for kernel in hopper_tiles.TABLE)
        if "hopper" in names:
            yield from sorted(_hopper_variants(D), key=lambda variant: not variant.shipped)

    def passed(self, variant: Variant, dtype: torch.dtype) -> bool:
        """Whether a variant was checked at its head dim and all its checks passed."""
        rows = self._about(variant, dtype)
        return any("passed" in row for row in rows) and not any(failed(row) for row in rows)

    def broke(self, variant: Variant, dtype: torch.dtype) -> bool:
        """Whether a variant hung or crashed a process; another attempt would take as long."""
        return any("failed" in row for row in self._about(variant, dtype))

    def _about(self, variant: Variant, dtype: torch.dtype) -> list[Row]:
        about = variant.row() | {"dtype": dtype_name(dtype)}
        return [row for row in self._rows if all(row.get(key) == value for key, value in about.items())]

    def passed_backends(self, D: int, dtype: torch.dtype) -> list[str]:
        """The fused backends whose shipped forward and backward passed."""
        variants = self.variants(D, dtype)
        shipped = [variant for variant in variants if variant.shipped and variant.kernel in LAYER_KERNELS]
        wrong = {variant.backend for variant in shipped if not self.passed(variant, dtype)}
        return [name for name in FUSED if name in {variant.backend for variant in shipped} - wrong]

    def randn(self, *size: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(*size, device=self.device, dtype=torch.float32).to(dtype)

    def inputs(self, T: int, H: int, H_kv: int, E: int, F: int, D: int, dtype: torch.dtype) -> list[Tensor]:
        """q, k, u, v, gate and the output's gradient."""
        weights = [self.randn(H_kv, E, F, D, dtype=dtype) / D**0.5 for _ in range(3)]
        gate = torch.rand(T, H, E, device=self.device)
        return [self.randn(T, H, D, dtype=dtype), *weights, gate, self.randn(T, H, D, dtype=dtype)]


def _hopper_variants(D: int) -> Iterator[Variant]:
    """One per candidate, named by its differences from the shipped tile."""
    block_d = hopper_tiles.block_d(D)
    candidates: dict[str, Any] = {**hopper_tiles.CANDIDATES}
    for kernel, of_dims in candidates.items():
        shipped = hopper_tiles.TABLE[kernel][hopper_tiles.BLOCK_DS.index(block_d)]
        if shipped is None:
            yield Variant("hopper", "hopper", kernel, D)  # which runs the portable kernel
        for tile in of_dims.get(block_d, ()):
            yield Variant(" ".join(["hopper", *_differences(tile, shipped)]), "hopper", kernel, D, tile)


def _differences(tile: Any, shipped: Any) -> list[str]:
    fields = tile._asdict()
    return [f"{key}={value}" for key, value in fields.items() if shipped is None or getattr(shipped, key) != value]
