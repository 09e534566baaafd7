"""Sections `op`, `layer`, `decode` and `growth`: how fast, in how much memory, against what."""

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import torch

from flashmhf.benchmarking import LAYERS, Row, Shape, bench_decode, bench_layer
from flashmhf.benchmarking.measuring import interleaved_times, matmul_call
from flashmhf.ops.flash_mhf import flash_mhf
from gpu_bench import Bench, Case, name_of

NAIVE_MOST_TOKENS = 16384
GROWTH_SHAPE = "370m"


def op(bench: Bench) -> Iterator[Case]:
    """TFLOP/s of the operator as a ratio to cuBLAS at 8192^3 in the same run; 3 products forward, 8 backward."""
    for dtype, (name, shape) in itertools.product((torch.bfloat16, torch.float16), bench.shapes.items()):
        H, E, F = shape.num_heads, shape.num_subnetworks, shape.subnetwork_size
        for backend in bench.backends(H, H, E, F, shape.hidden_size // H, dtype):
            for T in (16, 48) if bench.dry_run else (1024, 4096, 16384, 65536):
                measure = functools.partial(_op, bench, backend, dtype, name, shape, T)
                yield f"{backend} {name_of(dtype)} {name} T={T}", measure


def _op(bench: Bench, backend: str, dtype: torch.dtype, name: str, shape: Shape, T: int) -> list[Row]:
    H, E, F = shape.num_heads, shape.num_subnetworks, shape.subnetwork_size
    *leaves, dout = bench.inputs(T, H, H, E, F, shape.hidden_size // H, dtype)
    for leaf in leaves:
        leaf.requires_grad_()
    run = functools.partial(flash_mhf, backend=backend)
    matmul, matmul_flops = matmul_call(bench.device, dtype)
    calls: dict[str, Callable[[], Any]] = {
        "matmul": matmul,
        "forward": functools.partial(run, *(leaf.detach() for leaf in leaves)),
        "backward": functools.partial(torch.autograd.grad, run(*leaves), leaves, dout, retain_graph=True),
    }
    times = interleaved_times(calls, bench.device, bench.repeats)
    cublas = matmul_flops / times["matmul"].median_ms / 1e9
    rows = []
    for measured_pass, products in (("forward", 3), ("backward", 8)):
        tflops = products * 2 * T * shape.hidden_size * E * F / times[measured_pass].median_ms / 1e9
        case = {"backend": backend, "shape": name, "dtype": name_of(dtype), "tokens": T, "measured_pass": measured_pass}
        speed = {"tflops": tflops, "cublas_tflops": cublas, "ratio_to_cublas": tflops / cublas}
        rows.append({**case, **vars(times[measured_pass]), **speed})
    return rows


def layer(bench: Bench) -> Iterator[Case]:
    """Whole layers at matched parameters: time and peak memory, forward and forward + backward."""
    for name in bench.shapes:
        for T in (1, 16) if bench.dry_run else (1, 16, 128, 1024, 4096, 16384, 65536):
            yield f"{name} T={T}", functools.partial(_layer, bench, name, T)


def _layer(bench: Bench, name: str, T: int) -> list[Row]:
    left_out = {"naive"} if T > NAIVE_MOST_TOKENS else set()
    if find_spec("liger_kernel") is None:
        left_out.add("swiglu-liger")
    shape = bench.shapes[name]
    H, E, F = shape.num_heads, shape.num_subnetworks, shape.subnetwork_size
    if "hopper" not in bench.backends(H, H, E, F, shape.hidden_size // H, bench.dtype):
        left_out.add("flashmhf-hopper")
    if bench.dry_run:
        left_out |= {"swiglu-compiled", "flashmhf-compiled"}
    variants = tuple(variant for variant in LAYERS if variant not in left_out)
    rows = bench_layer(shape, T, bench.dtype, bench.device, bench.repeats, variants, tolerate=(Exception,))
    return [{"shape": name, **row} for row in rows]


def decode(bench: Bench) -> Iterator[Case]:
    """A few tokens through whole layers under CUDA graphs: time, and the rate of reading the weights once."""
    for name, shape in bench.shapes.items():
        for T in (1, 3) if bench.dry_run else (1, 2, 4, 8, 16, 32, 64, 128):
            yield f"{name} T={T}", functools.partial(_decode, bench, name, shape, T)


def _decode(bench: Bench, name: str, shape: Shape, T: int) -> list[Row]:
    rows = bench_decode(shape, T, bench.dtype, bench.device, bench.repeats, ("swiglu", "flashmhf"))
    return [{"shape": name, **row} for row in rows]


def growth(bench: Bench) -> Iterator[Case]:
    """Forward + backward of one layer from 4k to 1M tokens: does time grow as T does, and memory no faster?"""
    name = "toy" if bench.dry_run else GROWTH_SHAPE
    tokens = [16, 32, 64] if bench.dry_run else [2**power for power in range(12, 21)]
    for T in tokens:
        yield f"{name} T={T}", functools.partial(_grow, bench, name, T)


def _grow(bench: Bench, name: str, T: int) -> list[Row]:
    repeats = 1 if bench.dry_run else 5
    options: dict[str, Any] = {"passes": ("forward+backward",), "tolerate": (Exception,)}
    rows = bench_layer(bench.shapes[name], T, bench.dtype, bench.device, repeats, ("flashmhf",), **options)
    return [{"shape": name, **row} for row in rows]


def growth_fit(rows: list[Row]) -> Row:
    """The exponent of time in T, by least squares of its logarithm, and the range of peak bytes a token."""
    rows = [row for row in rows if "median_ms" in row]
    if len(rows) < 2:
        return {}
    xs, ys = ([math.log(row[key]) for row in rows] for key in ("tokens", "median_ms"))
    x_mean, y_mean = sum(xs) / len(xs), sum(ys) / len(ys)
    covariance = sum((x - x_mean) * (y - y_mean) for x, y in zip(xs, ys, strict=True))
    bytes_per_token = [row["peak_bytes_per_token"] for row in rows]
    return {
        "tokens": [rows[0]["tokens"], rows[-1]["tokens"]],
        "exponent_of_time": covariance / sum((x - x_mean) ** 2 for x in xs),
        "peak_bytes_per_token": [min(bytes_per_token), max(bytes_per_token)],
    }
