"""As a script: does the step `compile` compile everything that the steps `smoke` and `op` launch for Hopper?

Prints the number of kernels; fails with those that are not compiled ahead. Needs no GPU: nothing is compiled.
"""

import importlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from unittest.mock import patch

import torch

import gpu_checks
import gpu_machine
from compile_kernels import TARGETS, Source
from flashmhf.ops.triton import tiles
from gpu_bench import FUSED, SHAPES, Bench
from gpu_kernels import launches, recorded

TARGET = "sm_90a"


class PlanningBench(Bench):
    """The bench of a Hopper GPU, for planning only."""

    def __init__(self) -> None:
        super().__init__(dry_run=True, until=0)
        self.dry_run, self.dtype, self.shapes = False, torch.bfloat16, SHAPES
        self.device = torch.device("meta")

    def backends(self, *problem: Any) -> list[str]:
        return list(FUSED)

    def randn(self, *size: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(*size, dtype=dtype, device="meta")


def compiled(bench: Bench) -> set[str]:
    """The keys of what the step `compile` of the first plan compiles."""
    keys = set()

    def plan(target: str, cases: Iterable[Any]) -> list[str]:
        for case in cases:
            keys.update(key(launch) for launch in launches(target, case))
        return []

    with patch.object(gpu_machine, "compile_ahead", plan), patch.object(gpu_machine, "device_class", lambda _: TARGET):
        for case in gpu_machine.compile_first(bench):
            list(case.measure())
    return keys


def launched(bench: Bench) -> Iterator[tuple[str, str]]:
    """What each variant of smoke and op launches, and its key."""
    op = [(16384, shape.num_heads, shape.num_heads, shape.num_subnetworks, 384) for shape in SHAPES.values()]
    sizes = [*gpu_checks.SMOKE_SIZES, *gpu_checks.FEW_TOKENS_SIZES, *op]
    for variant in bench.variants(128, torch.bfloat16):
        for size in sizes:
            call: Callable[[], Any] = gpu_checks.prepared(bench, variant, bench.inputs(*size, 128, torch.bfloat16))
            for launch in recorded(call):
                yield f"{variant.name} {variant.kernel} {size}: {launch.kernel.fn.__name__}", key(launch)


def key(launch: Any) -> str:
    return Source.of(launch, TARGETS[TARGET]).key


def main() -> None:
    bench = PlanningBench()
    backend = "flashmhf.ops.{}.backend"
    with (
        patch.object(gpu_checks, "select", lambda problem, name: importlib.import_module(backend.format(name))),
        patch.object(tiles, "device_class", lambda device: TARGET),
    ):
        ahead, needed = compiled(bench), list(launched(bench))
    missing = {name for name, key in needed if key not in ahead}
    assert not missing, missing
    print(len({key for _, key in needed}))


if __name__ == "__main__":
    main()
