"""The operator and whole layers: time and peak memory of the forward pass and of forward and backward."""

import gc
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from flashmhf.benchmarking.measuring import (
    PASSES,
    Row,
    gradient_bytes,
    interleaved_times,
    peak_bytes,
    timed_call,
)
from flashmhf.benchmarking.variants import Shape, backend_of, build_layers
from flashmhf.ops.flash_mhf import flash_mhf

# Variant -> the function or module, its inputs, the gradient of its output.
Variants = dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...], Tensor]]


def bench_layer(
    shape: Shape,
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
        variants: names of `LAYERS`; the first is what ratios refer to.
        passes: some of PASSES.
        tolerate: what a variant may raise; its row then says so, and the others are still compared.
    """
    layers = build_layers(shape, variants, dtype, device)
    x, dy = (torch.randn(tokens, shape.hidden_size, dtype=dtype, device=device) for _ in range(2))
    x.requires_grad_()
    return _measure({name: (layer, (x,), dy) for name, layer in layers.items()}, repeats, passes, tolerate)


def bench_op(
    shape: Shape, tokens: int, dtype: torch.dtype, device: torch.device, repeats: int, variants: tuple[str, ...]
) -> list[Row]:
    """The operator alone, once for each backend in `variants`."""
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
    rows = []
    for measured_pass in passes:
        calls = {name: timed_call(*variant, measured_pass) for name, variant in variants.items()}
        dout = next(iter(variants.values()))[2]
        common = {"tokens": len(dout), "dtype": str(dout.dtype).removeprefix("torch."), "measured_pass": measured_pass}
        failures: dict[str, str] = {}
        for name in variants:
            if reason := _failure(calls[name], tolerate):
                failures[name] = reason
                del calls[name]
        times = interleaved_times(calls, dout.device, repeats, warm_up=False)
        reference = times.get(next(iter(variants)))
        for name, variant in variants.items():
            row = {"variant": name, **common}
            if name in failures:
                rows.append({**row, "failed": failures[name]})
                continue
            peak = peak_bytes(calls[name], dout.device)
            peak -= gradient_bytes(variant[0]) if measured_pass != "forward" else 0
            rows.append(
                {
                    **row,
                    "backend": _backend(name, variant[0], dout),
                    **vars(times[name]),
                    "ratio": None if reference is None else times[name].median_ms / reference.median_ms,
                    "peak_mib": peak / 2**20,
                    "peak_bytes_per_token": peak / len(dout),
                }
            )
    return rows


def _backend(name: str, function: Callable[..., Tensor], dout: Tensor) -> str | None:
    return backend_of(function, len(dout), dout.dtype) if isinstance(function, nn.Module) else name


def _failure(call: Callable[[], Any], tolerate: tuple[type[Exception], ...]) -> str | None:
    """Why a call cannot be measured."""
    try:
        call()
    except tolerate as error:
        reason = describe(error)
    else:
        return None
    gc.collect()  # what the failed call still held
    torch.cuda.empty_cache()
    return reason


def describe(error: Exception) -> str:
    """The kind of an error and the beginning of what it says, on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
