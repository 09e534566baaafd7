"""Step `graphs`: few tokens under a CUDA graph and under torch.compile(mode="reduce-overhead"), against eager."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from flashmhf.benchmarking.measuring import Row, dtype_name, graphed
from flashmhf.layers import FlashMHF
from gpu_bench import Bench, Case
from gpu_checks import SMOKE_DIM
from gpu_kernels import relative_error


def graphs(bench: Bench) -> Iterator[Case]:
    """On fresh inputs, forward and backward. Compilation takes longest and comes last."""
    for mode, check in (("cuda graph", _replayed), ("reduce-overhead", _compiled)):
        for name in bench.shapes:
            for T in (1, 3) if bench.dry_run else (1, 16, 64):
                for backend in bench.passed_backends(SMOKE_DIM, bench.dtype):
                    measure = functools.partial(_check_graph, bench, name, T, backend, mode, check)
                    yield Case(f"{mode} {backend} {name} T={T}", measure)


def _check_graph(
    bench: Bench, name: str, T: int, backend: str, mode: str, check: Callable[..., dict[str, tuple[Tensor, Tensor]]]
) -> list[Row]:
    shape = bench.shapes[name]
    layer = FlashMHF(
        shape.hidden_size,
        shape.num_heads,
        shape.num_subnetworks,
        shape.subnetwork_size,
        init="scaled",
        q_norm=True,
        backend=bench.runs_as(backend),
        dtype=bench.dtype,
        device=bench.device,
    )
    xs = [bench.randn(T, shape.hidden_size, dtype=bench.dtype) for _ in range(4)]
    budget = torch.finfo(bench.dtype).eps  # cuBLAS may select another product, so the last bit may differ
    case: dict[str, Any] = {
        "mode": mode,
        "backend": backend,
        "shape": name,
        "tokens": T,
        "dtype": dtype_name(bench.dtype),
    }
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
            got = out if got is None else got  # a graph writes to `out`; without a graph, the call returns its result
            results[f"out {i}"] = (got.clone(), layer(x))
    return results


def _compiled(bench: Bench, layer: FlashMHF, xs: list[Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    torch.compiler.reset()
    options = {"backend": "aot_eager"} if bench.dry_run else {"mode": "reduce-overhead"}
    compiled: Callable[..., Tensor] = torch.compile(layer, **options)  # type: ignore[call-overload]
    results = {}
    for i, x in enumerate(xs):  # compiles, records, replays
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
