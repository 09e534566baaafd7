"""The operator and whole layers: time and peak memory of the forward pass and of forward and backward."""

import gc
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from flashmhf.benchmarking.measuring import (
    PASSES,
    Row,
    dtype_name,
    gradient_bytes,
    interleaved_times,
    peak_bytes,
    timed_call,
)
from flashmhf.benchmarking.variants import backend_of, build_layers
from flashmhf.benchmarking.workloads import LayerShape
from flashmhf.ops.flash_mhf import flash_mhf

# Variant -> the function or module, its inputs, the gradient of its output.
Variants = dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...], Tensor]]


def bench_layer(
    shape: LayerShape,
    tokens: int,
    dtype: torch.dtype,
    device: torch.device,
    repeats: int,
    variants: tuple[str, ...],
    *,
    passes: tuple[str, ...] = PASSES,
    tolerate: tuple[type[Exception], ...] = (torch.OutOfMemoryError,),
) -> list[Row]:
    """Whole layers, projections and gate included.

    Args:
        variants: names of `LAYERS`; the first is the baseline of ratios.
        passes: some of PASSES.
        tolerate: exceptions that fail one variant, whose row says so, and not the others.
    """
    layers = build_layers(shape, variants, dtype, device)
    x, dy = (torch.randn(tokens, shape.hidden_size, dtype=dtype, device=device) for _ in range(2))
    x.requires_grad_()
    return _measure({name: (layer, (x,), dy) for name, layer in layers.items()}, repeats, passes, tolerate)


def bench_op(
    shape: LayerShape, tokens: int, dtype: torch.dtype, device: torch.device, repeats: int, variants: tuple[str, ...]
) -> list[Row]:
    """The operator without projections, once per backend in `variants`."""
    options: dict[str, Any] = {"dtype": dtype, "device": device}
    H, E, F = shape.num_heads, shape.num_subnetworks, shape.subnetwork_size
    D = shape.hidden_size // H
    weights = [torch.randn(H, E, F, D, **options) / D**0.5 for _ in range(3)]
    leaves = (torch.randn(tokens, H, D, **options), *weights, torch.rand(tokens, H, E, device=device))
    for leaf in leaves:
        leaf.requires_grad_()
    dout = torch.randn(tokens, H, D, **options)

    def call(backend: str) -> Callable[..., Tensor]:
        return lambda *inputs: flash_mhf(*inputs, backend=backend)

    return _measure({name: (call(name), leaves, dout) for name in variants}, repeats, PASSES, (torch.OutOfMemoryError,))


def _measure(
    variants: Variants, repeats: int, passes: tuple[str, ...], tolerate: tuple[type[Exception], ...]
) -> list[Row]:
    return [row for measured_pass in passes for row in _measure_pass(variants, measured_pass, repeats, tolerate)]


def _measure_pass(
    variants: Variants, measured_pass: str, repeats: int, tolerate: tuple[type[Exception], ...]
) -> Iterator[Row]:
    calls = {name: timed_call(*variant, measured_pass) for name, variant in variants.items()}
    baseline, (_, _, dout) = next(iter(variants.items()))
    failures = {name: reason for name, call in calls.items() if (reason := _failure(call, tolerate))}
    calls = {name: call for name, call in calls.items() if name not in failures}
    times = interleaved_times(calls, dout.device, repeats, warm_up=False)
    for name, (function, *_) in variants.items():
        row = {"variant": name, "tokens": len(dout), "dtype": dtype_name(dout.dtype), "measured_pass": measured_pass}
        if name in failures:
            yield {**row, "failed": failures[name]}
            continue
        peak = peak_bytes(calls[name], dout.device)
        peak -= gradient_bytes(function) if measured_pass != "forward" else 0
        yield {
            **row,
            "backend": _backend(name, function, dout),
            **vars(times[name]),
            "ratio": None if baseline in failures else times[name].median_ms / times[baseline].median_ms,
            "peak_mib": peak / 2**20,
            "peak_bytes_per_token": peak / len(dout),
        }


def _backend(name: str, function: Callable[..., Tensor], dout: Tensor) -> str | None:
    return backend_of(function, len(dout), dout.dtype) if isinstance(function, nn.Module) else name


def _failure(call: Callable[[], Any], tolerate: tuple[type[Exception], ...]) -> str | None:
    """The error of a call that cannot be measured."""
    try:
        call()
    except tolerate as error:
        reason = describe(error)
    else:
        return None
    gc.collect()  # memory that the failed call still holds
    torch.cuda.empty_cache()
    return reason


def describe(error: Exception) -> str:
    """Type and message of an error, in one line of at most about 200 characters."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
