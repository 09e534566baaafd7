"""Steps `smoke`, `rounds` and `tiles`: are the kernels' results right on this GPU, on fresh random data?

Results are compared with the formula in float64 within the error budget; memory that a kernel leaves unwritten is NaN;
and a repeated call must return the same bits, since a difference means a race.
"""

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from flashmhf.benchmarking.measuring import Row, dtype_name
from flashmhf.ops import call_cache, reference
from flashmhf.ops.backends import select
from flashmhf.ops.flash_mhf import flash_mhf
from flashmhf.ops.gated_mhf import gated_mhf
from flashmhf.ops.problem import Problem
from flashmhf.ops.triton.tiles import Tile, device_class, fused_tile, table_rows
from gpu_bench import Bench, Case, Variant
from gpu_kernels import PROLOGUE, KernelCase, Size, check_kernel, checked, expected, relative_error

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SMOKE_DIM = 128
# Tails everywhere and grouped heads, to exercise packed registers, masks and ring buffers. Then full tiles.
SMOKE_SIZES: tuple[Size, ...] = ((1000, 4, 2, 3, 200), (1024, 2, 2, 2, 384))
FEW_TOKENS_SIZES: tuple[Size, ...] = ((3, 4, 2, 3, 200), (16, 2, 2, 2, 384), (100, 4, 2, 3, 200))
SMOKE_REPEATS = 5
HEAD_DIMS = (128, 64, 256, 96)
# The smoke test's, one token, and many tiles of many heads.
ROUND_SIZES: tuple[Size, ...] = (*SMOKE_SIZES, (1, 2, 1, 1, 1), (8192, 8, 8, 7, 384))
CANDIDATE_SIZE = SMOKE_SIZES[0]
ROUNDS = 20
TILE_SIZES: dict[str, tuple[Size, ...]] = {"decode": FEW_TOKENS_SIZES[:2]}
TOY_SIZE: Size = (20, 4, 2, 2, 40)
WIDE = (16, 16, 1, 64, 128)  # H, H_kv, E, F, D
BACKWARD_RESULTS = ("dq", "dk", "du", "dv", "dgate")
# Kernel -> which gradients to request so that it runs.
NEEDS = {"backward": (True,) * 5, "backward_dq": (True, False, False, False, True)}
ATOMIC_RESULTS = ("dq", "dgate")  # the fused backward accumulates these with atomics


def smoke(bench: Bench) -> Iterator[Case]:
    """Everything that `auto` or `hopper` would run at head dim 128 in bfloat16, then every tile to be timed.

    What is most likely to hang comes last, so that the rest can be timed even if it does.
    """
    variants = [*bench.variants(SMOKE_DIM, bench.dtype)]
    for variant in (variant for variant in variants if variant.shipped):
        yield from _smoke_cases(bench, variant, few_tokens=variant.name == "triton" and variant.kernel == "forward")
    yield from _gated_cases(bench, (bench.dtype,), (SMOKE_DIM,))
    for variant in (variant for variant in variants if not variant.shipped):
        yield from _smoke_cases(bench, variant)


def _smoke_cases(bench: Bench, variant: Variant, few_tokens: bool = False) -> Iterator[Case]:
    if bench.broke(variant, bench.dtype):
        return
    many, few = ((TOY_SIZE,), ((3, *TOY_SIZE[1:]),)) if bench.dry_run else (SMOKE_SIZES, FEW_TOKENS_SIZES)
    for size in (*many, *(few if few_tokens else ())):
        check = functools.partial(_check, bench, variant, size, bench.dtype, rounds=1, repeats=SMOKE_REPEATS)
        yield _case(check, variant, bench.dtype, size)


def rounds(bench: Bench) -> Iterator[Case]:
    """Hopper's kernels at all head dims, twenty times, as races are rare; then, once, everything else to be timed."""
    dims, dtypes = ((64, SMOKE_DIM), (bench.dtype,)) if bench.dry_run else (HEAD_DIMS, DTYPES[:2])
    for shipped, dtype, D in itertools.product((True, False), dtypes, dims):
        for variant in bench.variants(D, dtype):
            if variant.shipped != shipped or bench.broke(variant, dtype):
                continue
            thorough = variant.backend == "hopper" and variant.shipped
            for size in (TOY_SIZE,) if bench.dry_run else ROUND_SIZES if thorough else (CANDIDATE_SIZE,):
                times = max(2, ROUNDS * 1000 // max(size[0], 1000)) if thorough and not bench.dry_run else 1
                repeats = ROUNDS if thorough else 2
                check = functools.partial(_check, bench, variant, size, dtype, rounds=times, repeats=repeats)
                yield _case(check, variant, dtype, size)


def _case(check: Callable[[], Iterator[Row]], variant: Variant, dtype: torch.dtype, size: Size) -> Case:
    name = f"{variant.name} {variant.kernel} {dtype_name(dtype)} D={variant.D} {size}"
    return Case(name, check, variant.row() | {"dtype": dtype_name(dtype)})


def _check(bench: Bench, variant: Variant, size: Size, dtype: torch.dtype, rounds: int, repeats: int) -> Iterator[Row]:
    """The largest error of every result over rounds of fresh data; the last round is repeated."""
    case = variant.row() | {"dtype": dtype_name(dtype), "sizes": _sizes(size), "rounds": rounds}
    worst: dict[str, Row] = {}
    for _ in range(rounds):
        inputs = bench.inputs(*size, variant.D, dtype)
        first = run(bench, variant, inputs)
        exact, eager = expected([x.double() for x in inputs]), expected(inputs)
        for name, result in first.items():
            row = checked(case, name, result, eager[name], exact[name])
            if name not in worst or row["error"] / row["budget"] > worst[name]["error"] / worst[name]["budget"]:
                worst[name] = row
    changed = dict.fromkeys(worst, 0)
    for _ in range(repeats):
        for name, result in run(bench, variant, inputs).items():
            changed[name] += not torch.equal(result, first[name])
    fused = variant.kernel == "backward" and (
        variant.backend == "hopper" or fused_tile(bench.device, dtype, variant.D) is not None
    )
    for name, row in worst.items():
        repeatable = changed[name] == 0 or (fused and name in ATOMIC_RESULTS)
        yield row | {"repeats": repeats, "changed": changed[name], "passed": row["passed"] and repeatable}


def run(bench: Bench, variant: Variant, inputs: list[Tensor]) -> dict[str, Tensor]:
    """The results of a forward or of (part of) a backward, in memory filled with NaN."""
    call = prepared(bench, variant, inputs)
    with poisoned_memory():
        results = call()
    if variant.kernel == "forward":
        return {"out": results}
    return {name: x for name, x in zip(BACKWARD_RESULTS, results, strict=True) if x is not None}


def prepared(bench: Bench, variant: Variant, inputs: list[Tensor]) -> Callable[[], Any]:
    """A call of a backend's forward or backward with a variant's tile, as the operator makes it."""
    *arguments, dout = inputs
    q, k, u, v, gate = arguments
    module: Any = select(Problem.of(q, k, u, v, gate), bench.runs_as(variant.backend))

    def call() -> Any:
        with variant.in_place():
            if variant.kernel == "forward":
                return module.forward(*arguments)
            return module.backward(dout, *arguments, NEEDS[variant.kernel])

    return call


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fills the results of torch.empty and similar with NaN: what a kernel does not write fails its check."""

    def poisoned(make: Callable[..., Tensor], *args: Any, **options: Any) -> Tensor:
        x = make(*args, **options)
        return x.fill_(float("nan")) if x.is_floating_point() else x

    new_empty = torch.Tensor.new_empty
    with (
        patch.object(torch, "empty", functools.partial(poisoned, torch.empty)),
        patch.object(torch, "empty_like", functools.partial(poisoned, torch.empty_like)),
        patch.object(torch.Tensor, "new_empty", lambda *args, **options: poisoned(new_empty, *args, **options)),
    ):
        yield
    call_cache.clear()  # recorded calls would repeat the poisoning


def _sizes(size: Size) -> str:
    T, H, H_kv, E, F = size
    return f"T {T}, H {H} / {H_kv}, E {E}, F {F}"


def tiles(bench: Bench) -> Iterator[Case]:
    """Every row of the tile table for this device, bfloat16 first; gate and norm; addresses beyond 32 bits."""
    for kernel, dtype, D, tile in _shipped(bench):
        about = {"kernel": kernel, "dtype": dtype_name(dtype), "D": D, "tile": "x".join(map(str, tile))}
        check = functools.partial(_check_tile, bench, kernel, dtype, D, tile)
        yield Case(f"{kernel} {dtype_name(dtype)} D={D}", check, about)
    yield from _gated_cases(bench, DTYPES, (48,) if bench.dry_run else (48, 64, 128, 256))
    for backend in bench.backends(*WIDE, bench.dtype):
        yield Case(f"beyond 32 bits {backend}", functools.partial(_beyond_32_bits, bench, backend))


def portable_cases(bench: Bench) -> dict[torch.dtype, list[KernelCase]]:
    """What `tiles` launches, to compile ahead."""
    cases: dict[torch.dtype, list[KernelCase]] = {}
    for kernel, dtype, D, tile in _shipped(bench):
        cases.setdefault(dtype, []).extend(
            KernelCase(kernel, size, D, dtype, tile) for size in _tile_sizes(bench, kernel)
        )
    return cases


def _shipped(bench: Bench) -> Iterator[tuple[str, torch.dtype, int, Tile]]:
    """Kernel, dtype, head dim and tile: each row at its own head dim, and at one that is not a power of two."""
    for dtype in DTYPES:
        if bench.dry_run and dtype == torch.bfloat16:
            continue  # Triton's interpreter gets bfloat16 products wrong
        for kernel, block_d, tile in table_rows(device_class(bench.device), dtype.itemsize):
            if not bench.dry_run or block_d == 32:
                yield kernel, dtype, block_d, tile
                yield kernel, dtype, block_d * 3 // 4, tile


def _tile_sizes(bench: Bench, kernel: str) -> tuple[Size, ...]:
    return (TOY_SIZE,) if bench.dry_run else TILE_SIZES.get(kernel, SMOKE_SIZES)


def _check_tile(bench: Bench, kernel: str, dtype: torch.dtype, D: int, tile: Tile) -> Iterator[Row]:
    for size in _tile_sizes(bench, kernel):
        yield from check_kernel(kernel, bench.inputs(*size, D, dtype), tile)


def _gated_cases(bench: Bench, dtypes: tuple[torch.dtype, ...], dims: tuple[int, ...]) -> Iterator[Case]:
    size = (20, 2, 2, 3, 40) if bench.dry_run else (1000, 4, 4, 5, 200)
    for dtype, D in itertools.product(dtypes, dims):
        for backend in bench.backends(*size[1:], D, dtype):
            check = functools.partial(_gated, bench, backend, size, D, dtype)
            yield Case(f"gated {backend} {dtype_name(dtype)} D={D}", check)


def _gated(bench: Bench, backend: str, size: Size, D: int, dtype: torch.dtype) -> list[Row]:
    """Norm and gate kernels and the operator, composed as the layer composes them."""
    _, H, _, E, _ = size
    q, k, u, v, _, dout = bench.inputs(*size, D, dtype)
    inputs = [q, k, u, v, bench.randn(H, D, E, dtype=dtype) / D**0.5, bench.randn(H, D, dtype=dtype)]

    def results(function: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.detach().to(dtype, copy=True).requires_grad_() for x in inputs]
        out = function(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, dout.to(dtype))]

    def formula(*leaves: Tensor) -> Tensor:
        return reference.gated_forward(*leaves, PROLOGUE)  # type: ignore[call-arg, arg-type]

    with poisoned_memory():  # the second call replays what the first one recorded
        got = [results(functools.partial(gated_mhf, backend=bench.runs_as(backend)), dtype) for _ in range(2)]
    eager, exact = results(formula, dtype), results(formula, torch.float64)
    case = {"kernel": "gated_mhf", "backend": backend, "dtype": dtype_name(dtype), "D": D, "sizes": _sizes(size)}
    names = ("out", "dq", "dk", "du", "dv", "dgate_weight", "dnorm_weight")
    return [
        checked(case | {"call": call}, *result)
        for call, of_call in zip(("first", "second"), got, strict=True)
        for result in zip(names, of_call, eager, exact, strict=True)
    ]


def _beyond_32_bits(bench: Bench, backend: str) -> list[Row]:
    """More elements of q than a 32-bit offset can address: the last tokens must equal those of a short call."""
    H, *_, D = WIDE
    T = 64 if bench.dry_run else 2**31 // (H * D) + 1000
    q, k, u, v, _, _ = bench.inputs(T, *WIDE, bench.dtype)
    call = functools.partial(flash_mhf, backend=bench.runs_as(backend))
    tail = call(q[-150:].clone(), k, u, v)
    error, budget = relative_error(call(q, k, u, v)[-150:], tail), torch.finfo(q.dtype).eps
    case = {"kernel": "beyond 32 bits", "backend": backend, "dtype": dtype_name(q.dtype), "D": D}
    sizes = f"q of {q.numel():,} elements, its last tokens"
    return [{**case, "sizes": sizes, "result": "out", "error": error, "budget": budget, "passed": error <= budget}]
