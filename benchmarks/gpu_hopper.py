"""Sections `hopper` and `hopper_tune`: the Hopper kernels twenty times over, as races are rare, and their tiles."""

import functools
import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from flashmhf.benchmarking import Row
from flashmhf.benchmarking.measuring import interleaved_times, matmul_call
from flashmhf.ops.flash_mhf import flash_mhf
from flashmhf.ops.hopper.forward import plan_forward
from flashmhf.ops.hopper.tiles import FORWARD_CANDIDATES, ForwardTile, forward_tile
from gpu_bench import Bench, Case, name_of
from gpu_kernels import checked, expected

NAMES = ("out", "dq", "dk", "du", "dv", "dgate")
ANY_ORDER = ("dq", "dgate")  # sums of atomic additions
HEAD_DIMS = (64, 96, 128, 256)
# T, H, H_kv, E, F: tails everywhere and grouped heads; whole tiles; one token; many tiles of many heads.
SIZES = ((1000, 4, 2, 3, 200), (1024, 2, 2, 2, 384), (1, 2, 1, 1, 1), (8192, 8, 8, 7, 384))
ROUNDS = 20


def hopper(bench: Bench) -> Iterator[Case]:
    """Errors against float64 on fresh data, and whether a result changes when the same call is repeated."""
    sizes = ((20, 4, 2, 2, 40),) if bench.dry_run else SIZES
    head_dims = (64,) if bench.dry_run else HEAD_DIMS
    for dtype, D, size in itertools.product((torch.bfloat16, torch.float16), head_dims, sizes):
        for backend in bench.backends(*size[1:], D, dtype):
            if backend == "hopper" or bench.dry_run:
                check = functools.partial(_check, bench, backend, size, D, dtype)
                yield f"{backend} {name_of(dtype)} D={D} {size}", check


def _check(bench: Bench, backend: str, size: tuple[int, int, int, int, int], D: int, dtype: torch.dtype) -> list[Row]:
    """The worst of every result over rounds of fresh data, the last of which is repeated."""
    T, H, H_kv, E, F = size
    sizes = f"T {T}, H {H} / {H_kv}, E {E}, F {F}"
    case = {"kernel": f"flash_mhf, {backend}", "dtype": name_of(dtype), "D": D, "sizes": sizes}
    rounds = 1 if bench.dry_run else max(2, ROUNDS * 1000 // max(T, 1000))
    worst: dict[str, Row] = {}
    for _ in range(rounds):
        inputs = bench.inputs(*size, D, dtype)
        first = _run(backend, inputs)
        exact, eager = expected([x.double() for x in inputs]), expected(inputs)
        for name in NAMES:
            row = checked(case, name, first[name], eager[name], exact[name])
            if name not in worst or row["error"] / row["budget"] > worst[name]["error"] / worst[name]["budget"]:
                worst[name] = row
    changed = dict.fromkeys(NAMES, 0)
    for _ in range(1 if bench.dry_run else ROUNDS):
        again = _run(backend, inputs)
        for name in NAMES:
            changed[name] += not torch.equal(again[name], first[name])
    return [
        {**row, "changed": changed[name], "passed": row["passed"] and (name in ANY_ORDER or changed[name] == 0)}
        for name, row in worst.items()
    ]


def _run(backend: str, inputs: list[Tensor]) -> dict[str, Tensor]:
    *arguments, dout = inputs
    leaves = [x.detach().requires_grad_() for x in arguments]
    out = flash_mhf(*leaves, backend=backend)
    return dict(zip(NAMES, (out.detach(), *torch.autograd.grad(out, leaves, dout)), strict=True))


TUNING_SIZE = (16384, 16, 16, 15, 384)  # T, H, H_kv, E, F: the 1.3B shape at head dim 128


def hopper_tune(bench: Bench) -> Iterator[Case]:
    """The forward's candidate tiles in turn: right on fresh data, then TFLOP/s as a ratio to cuBLAS in the same run."""
    for D, candidates in FORWARD_CANDIDATES.items():
        if bench.dry_run or "hopper" in bench.backends(*TUNING_SIZE[1:], D, torch.bfloat16):
            for tile in candidates:
                yield f"forward D={D} {tuple(tile)}", functools.partial(_time_tile, bench, D, tile)


def _time_tile(bench: Bench, D: int, tile: ForwardTile) -> list[Row]:
    case = {"kernel": "forward", "D": D, "tile": "x".join(map(str, tile)), "shipped": tile == forward_tile(D)}
    small = bench.inputs(1000, 2, 1, 3, 200, D, torch.bfloat16)
    out = torch.full_like(small[0], float("nan"))
    q, k, u, v, gate, _ = small
    launch = plan_forward(q, k, u, v, gate, out, tile)
    if bench.dry_run:  # planned, as far as it goes without the device
        return [{**case, "programs": launch.grid[0]}]
    launch.run()
    check = checked(case, "out", out, expected(small)["out"], expected([x.double() for x in small])["out"])
    if not check["passed"]:
        return [check]
    T, H, _, E, F = TUNING_SIZE
    q, k, u, v, gate, _ = bench.inputs(*TUNING_SIZE, D, torch.bfloat16)
    matmul, matmul_flops = matmul_call(bench.device, torch.bfloat16)
    launch = plan_forward(q, k, u, v, gate, torch.empty_like(q), tile)
    times = interleaved_times({"matmul": matmul, "forward": launch.run}, bench.device, bench.repeats)
    tflops = 3 * 2 * T * H * D * E * F / times["forward"].median_ms / 1e9
    cublas = matmul_flops / times["matmul"].median_ms / 1e9
    return [{**check, **vars(times["forward"]), "tflops": tflops, "ratio_to_cublas": tflops / cublas}]
