"""Steps `op`, `dims`, `layer`, `decode` and `growth`: time and memory against baselines.

Only what passed its check earlier in the lease is timed.
"""

import functools
import math
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import torch

from flashmhf.benchmarking.decode import bench_decode
from flashmhf.benchmarking.layer import bench_layer, describe
from flashmhf.benchmarking.measuring import Row, dtype_name, interleaved_times, matmul_call
from flashmhf.benchmarking.workloads import LayerShape
from gpu_bench import Bench, Case
from gpu_checks import HEAD_DIMS, SMOKE_DIM, prepared

PRODUCTS = {
    "forward": 3,
    "backward": 8,
    "backward_dq": 5,
}  # of the algorithm; a kernel may recompute some
OP_TOKENS = (16384, 4096, 65536, 1024)
DIMS_TOKENS = (4096, 16384)
DIMS_HIDDEN_SIZE = 2048
LAYER_TOKENS = (16384, 4096)
DECODE_TOKENS = (1, 16, 64, 128)
GROWTH_SHAPE = "370m"
LAYERS_OF = {"triton": "flashmhf-triton", "hopper": "flashmhf-hopper"}


def op(bench: Bench) -> Iterator[Case]:
    """TFLOP/s of the operator as a ratio to cuBLAS at 8192^3 in the same run, for every tile that passed."""
    for T in (16, 48) if bench.dry_run else OP_TOKENS:
        for name, shape in reversed(bench.shapes.items()):
            yield Case(f"{name} T={T}", functools.partial(_op, bench, name, shape, SMOKE_DIM, bench.dtype, T))


def dims(bench: Bench) -> Iterator[Case]:
    """The same for what `op` leaves out: other head dims in bfloat16, and float16."""
    D_hidden = 128 if bench.dry_run else DIMS_HIDDEN_SIZE
    for dtype in (bench.dtype,) if bench.dry_run else (torch.bfloat16, torch.float16):
        for D in (64,) if bench.dry_run else HEAD_DIMS:
            if (D, dtype) != (SMOKE_DIM, torch.bfloat16):
                E, F = (2, 24) if bench.dry_run else (15, 384)
                shape = LayerShape(
                    hidden_size=D_hidden // D * D, num_heads=D_hidden // D, num_subnetworks=E, subnetwork_size=F
                )
                for T in (16,) if bench.dry_run else DIMS_TOKENS:
                    measure = functools.partial(_op, bench, f"D={D}", shape, D, dtype, T)
                    yield Case(f"{dtype_name(dtype)} D={D} T={T}", measure)


def _op(bench: Bench, name: str, shape: LayerShape, D: int, dtype: torch.dtype, T: int) -> Iterator[Row]:
    H, E, F = shape.hidden_size // D, shape.num_subnetworks, shape.subnetwork_size
    inputs = bench.inputs(T, H, H, E, F, D, dtype)
    matmul, matmul_flops = matmul_call(bench.device, dtype)
    variants = [variant for variant in bench.variants(D, dtype) if bench.passed(variant, dtype)]
    for kernel, products in PRODUCTS.items():
        named = {variant.name: variant for variant in variants if variant.kernel == kernel}
        common = {"dtype": dtype_name(dtype), "shape": name, "tokens": T, "measured_pass": kernel}
        calls = {"matmul": matmul}
        for key, variant in named.items():
            yield {"state": "trying", **variant.row(), **common}
            call = prepared(bench, variant, inputs)
            if reason := _invalid_reason(bench, call):
                yield {**variant.row(), **common, **reason}
            else:
                calls[key] = call
        yield {"state": "timing"}
        matmul()
        times = interleaved_times(calls, bench.device, bench.repeats, warm_up=False)
        cublas = matmul_flops / times.pop("matmul").median_ms / 1e9
        for key, measured in times.items():
            tflops = products * 2 * T * shape.hidden_size * E * F / measured.median_ms / 1e9
            speed = {"tflops": tflops, "cublas_tflops": cublas, "ratio_to_cublas": tflops / cublas}
            yield {**named[key].row(), **common, **vars(measured), **speed}


def _invalid_reason(bench: Bench, call: Callable[[], Any]) -> Row | None:
    """Why a call cannot be timed. Raises if the device is broken."""
    try:
        call()
        bench.synchronize()
    except torch.OutOfMemoryError as error:
        return {"skipped": describe(error)}
    except Exception as error:  # out of registers, of shared memory; an illegal access
        bench.synchronize()
        return {"failed": describe(error)}
    return None


def layer(bench: Bench) -> Iterator[Case]:
    """Whole layers at equal FLOPs, against SwiGLU in eager mode and by liger; then compiled, which takes longest."""
    eager = ["swiglu", *(["swiglu-liger"] if find_spec("liger_kernel") else []), "swiglu-checkpointed"]
    for names in (eager, ["swiglu", "swiglu-compiled"]):
        if bench.dry_run and "swiglu-compiled" in names:
            continue
        for T in (16,) if bench.dry_run else LAYER_TOKENS:
            for name in reversed(bench.shapes):
                yield Case(f"{name} T={T} {names[-1]}", functools.partial(_layer, bench, name, T, names))


def _layer(bench: Bench, name: str, T: int, names: list[str]) -> list[Row]:
    variants = (*names, *_layers(bench))
    rows = bench_layer(bench.shapes[name], T, bench.dtype, bench.device, bench.repeats, variants, tolerate=(Exception,))
    return [{"shape": name, "against": names[-1], **row} for row in rows]


def _layers(bench: Bench) -> tuple[str, ...]:
    """FlashMHF on each backend that passed."""
    if bench.dry_run:
        return ("flashmhf",)
    return tuple(LAYERS_OF[backend] for backend in bench.passed_backends(SMOKE_DIM, bench.dtype))


def decode(bench: Bench) -> Iterator[Case]:
    """A few tokens through whole layers under CUDA graphs: time, and bandwidth of reading the weights."""
    for T in (1, 3) if bench.dry_run else DECODE_TOKENS:
        for name in reversed(bench.shapes):
            yield Case(f"{name} T={T}", functools.partial(_decode, bench, name, T))


def _decode(bench: Bench, name: str, T: int) -> list[Row]:
    variants = ("swiglu", *_layers(bench))
    rows = bench_decode(bench.shapes[name], T, bench.dtype, bench.device, bench.repeats, variants)
    return [{"shape": name, **row} for row in rows]


def growth(bench: Bench) -> Iterator[Case]:
    """Forward + backward of one layer from 4k to 1M tokens: do time and memory grow linearly?"""
    name = "toy" if bench.dry_run else GROWTH_SHAPE
    if not _layers(bench):
        return
    for T in [16, 32, 64] if bench.dry_run else [2**power for power in range(12, 21)]:
        yield Case(f"{name} T={T}", functools.partial(_grow, bench, name, T))


def _grow(bench: Bench, name: str, T: int) -> list[Row]:
    repeats = 1 if bench.dry_run else 5
    options: dict[str, Any] = {"passes": ("forward+backward",), "tolerate": (Exception,)}
    rows = bench_layer(bench.shapes[name], T, bench.dtype, bench.device, repeats, _layers(bench), **options)
    return [{"shape": name, **row} for row in rows]


def growth_fit(rows: list[Row]) -> Row:
    """The exponent of time in T, by least squares in log-log space, and the range of peak bytes/token."""
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
