"""Sections `correctness` and `graphs`: is what the kernels compute right, on fresh random data, on this very GPU?"""

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from flashmhf.benchmarking import Row
from flashmhf.benchmarking.measuring import graphed
from flashmhf.layers import FlashMHF
from flashmhf.ops import reference
from flashmhf.ops.flash_mhf import flash_mhf
from flashmhf.ops.gated_mhf import gated_mhf
from flashmhf.ops.triton.tiles import Tile, device_class, table_rows
from gpu_bench import Bench, Case, name_of
from gpu_compile import compile_ahead
from gpu_kernels import check_kernel, checked, relative_error

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# T, H, H_kv, E, F. Few tokens split the rows over programs.
SIZES = ((300, 4, 2, 3, 200), (1024, 2, 2, 2, 384))
FEW_TOKENS_SIZES = ((3, 4, 2, 3, 200), (16, 2, 2, 2, 384))
WIDE = (16, 16, 1, 64, 128)  # H, H_kv, E, F, D
TOY_SIZES = ((20, 4, 2, 2, 40),)


def correctness(bench: Bench) -> Iterator[Case]:
    """Every row of the tile table for this device: forward and all gradients under the error budget, NaN-poisoned."""
    rows = list(_shipped(bench))
    compile_once = functools.cache(functools.partial(_compile_all, bench, rows))
    for kernel, dtype, D, tile in rows:
        check = functools.partial(_check_row, bench, kernel, dtype, D, tile, compile_once)
        yield f"{kernel} {name_of(dtype)} D={D}", check
    T, H, E, F = (20, 2, 3, 40) if bench.dry_run else (1000, 4, 5, 200)
    for dtype, D in itertools.product(DTYPES, (48,) if bench.dry_run else (48, 64, 128, 256)):
        for backend in bench.backends(H, H, E, F, D, dtype):
            check_gated = functools.partial(_gated, bench, backend, T, H, E, F, D, dtype)
            yield f"gated {backend} {name_of(dtype)} D={D}", check_gated
    for backend in bench.backends(*WIDE, bench.dtype):
        yield f"beyond 32 bits {backend}", functools.partial(_beyond_32_bits, bench, backend)


def _shipped(bench: Bench) -> Iterator[tuple[str, torch.dtype, int, Tile]]:
    """Kernel, dtype, head dim and tile: each row at its own head dim, and at one that is no power of two."""
    for dtype in DTYPES:
        if bench.dry_run and dtype == torch.bfloat16:
            continue  # Triton's interpreter multiplies bfloat16 wrongly
        for kernel, block_d, tile in table_rows(device_class(bench.device), dtype.itemsize):
            if not bench.dry_run or block_d == 32:
                yield kernel, dtype, block_d, tile
                yield kernel, dtype, block_d * 3 // 4, tile


def _sizes(bench: Bench, kernel: str) -> tuple[tuple[int, int, int, int, int], ...]:
    if bench.dry_run:
        return TOY_SIZES
    return FEW_TOKENS_SIZES if kernel == "decode" else SIZES


def _compile_all(bench: Bench, rows: list[tuple[str, torch.dtype, int, Tile]]) -> None:
    if not bench.dry_run:
        cases = [(kernel, size, D, dtype, tile) for kernel, dtype, D, tile in rows for size in _sizes(bench, kernel)]
        compile_ahead(device_class(bench.device), cases)  # what fails here fails again when it is launched


def _check_row(
    bench: Bench, kernel: str, dtype: torch.dtype, D: int, tile: Tile, compile_once: Callable[[], None]
) -> list[Row]:
    compile_once()
    rows = []
    for size in _sizes(bench, kernel):
        rows += check_kernel(kernel, bench.inputs(*size, D, dtype), tile)
    return rows


def _gated(bench: Bench, backend: str, T: int, H: int, E: int, F: int, D: int, dtype: torch.dtype) -> list[Row]:
    """Norm and gate kernels and the operator, composed as the layer composes them."""
    q, k, u, v, _, dout = bench.inputs(T, H, H, E, F, D, dtype)
    inputs = [q, k, u, v, bench.randn(H, D, E, dtype=dtype) / D**0.5, bench.randn(H, D, dtype=dtype)]

    def run(function: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.detach().to(dtype, copy=True).requires_grad_() for x in inputs]
        out = function(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, dout.to(dtype))]

    def formula(*leaves: Tensor) -> Tensor:
        return reference.gated_forward(*leaves, "sigmoid", 1.0, 1e-6)  # type: ignore[call-arg, arg-type]

    got = run(functools.partial(gated_mhf, backend=backend), dtype)
    eager, exact = run(formula, dtype), run(formula, torch.float64)
    sizes = f"T {T}, H {H} / {H}, E {E}, F {F}"
    case = {"kernel": f"gated_mhf, {backend}", "dtype": name_of(dtype), "D": D, "tile": "table", "sizes": sizes}
    names = ("out", "dq", "dk", "du", "dv", "dgate_weight", "dnorm_weight")
    return [checked(case, *result) for result in zip(names, got, eager, exact, strict=True)]


def _beyond_32_bits(bench: Bench, backend: str) -> list[Row]:
    """More elements of q than a 32-bit offset reaches: the last tokens must be those of a short call."""
    H, *_, D = WIDE
    T = 64 if bench.dry_run else 2**31 // (H * D) + 1000
    q, k, u, v, _, _ = bench.inputs(T, *WIDE, bench.dtype)
    tail = flash_mhf(q[-150:].clone(), k, u, v, backend=backend)
    error, budget = relative_error(flash_mhf(q, k, u, v, backend=backend)[-150:], tail), torch.finfo(q.dtype).eps
    case = {"kernel": f"forward, {backend}", "dtype": name_of(q.dtype), "D": D, "tile": "table"}
    sizes = f"q of {q.numel():,} elements, its last tokens"
    return [{**case, "sizes": sizes, "result": "out", "error": error, "budget": budget, "passed": error <= budget}]


def graphs(bench: Bench) -> Iterator[Case]:
    """Few tokens under a CUDA graph and under torch.compile(mode="reduce-overhead"), on fresh inputs, against eager."""
    for name in bench.shapes:
        for T in (1, 3) if bench.dry_run else (1, 16, 64):
            for mode, check in (("cuda graph", _replayed), ("reduce-overhead", _compiled)):
                yield f"{mode} {name} T={T}", functools.partial(_check_graph, bench, name, T, mode, check)


def _check_graph(
    bench: Bench, name: str, T: int, mode: str, check: Callable[..., dict[str, tuple[Tensor, Tensor]]]
) -> list[Row]:
    shape = bench.shapes[name]
    layer = FlashMHF(
        shape.hidden_size,
        shape.num_heads,
        shape.num_subnetworks,
        shape.subnetwork_size,
        init="scaled",
        q_norm=True,
        dtype=bench.dtype,
        device=bench.device,
    )
    xs = [bench.randn(T, shape.hidden_size, dtype=bench.dtype) for _ in range(4)]
    budget = torch.finfo(bench.dtype).eps  # another product may be chosen, so the last bit is free
    case: dict[str, Any] = {"mode": mode, "shape": name, "tokens": T, "dtype": name_of(bench.dtype)}
    rows = []
    for result, (got, eager) in check(bench, layer, xs).items():
        error = relative_error(got, eager)
        rows.append({**case, "result": result, "error": error, "budget": budget, "passed": error <= budget})
    return rows


def _replayed(bench: Bench, layer: FlashMHF, xs: list[Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    static_x = xs[0].clone()
    replay, out = graphed(functools.partial(layer, static_x), bench.device)
    with torch.no_grad():
        results = {}
        for i, x in enumerate(xs):
            static_x.copy_(x)
            got = replay()
            got = out if got is None else got  # a graph writes where it wrote before; without one, the call returns
            results[f"out {i}"] = (got.clone(), layer(x))
    return results


def _compiled(bench: Bench, layer: FlashMHF, xs: list[Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    torch.compiler.reset()
    options = {"backend": "aot_eager"} if bench.dry_run else {"mode": "reduce-overhead"}
    compiled: Callable[..., Tensor] = torch.compile(layer, **options)  # type: ignore[call-overload]
    results = {}
    for i, x in enumerate(xs):  # the first compiles, the second records, the others replay
        with torch.no_grad():
            torch.compiler.cudagraph_mark_step_begin()
            results[f"out {i}"] = (compiled(x).clone(), layer(x))
    names = [name for name, _ in layer.named_parameters()]
    for i, x in enumerate(xs):
        x.requires_grad_()
        leaves, dy = [x, *layer.parameters()], torch.randn_like(x)
        torch.compiler.cudagraph_mark_step_begin()
        got = [grad.clone() for grad in torch.autograd.grad(compiled(x), leaves, dy)]
        eager = torch.autograd.grad(layer(x), leaves, dy)
        for name, pair in zip(["x", *names], zip(got, eager, strict=True), strict=True):
            results[f"d {name} {i}"] = pair
    return results
