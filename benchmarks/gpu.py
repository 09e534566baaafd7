"""Everything that only a GPU can show, in one command of less than nine minutes.

    python benchmarks/gpu.py [--sections correctness,op,layer,decode] [--output benchmarks/results/gpu-NAME]

Writes OUTPUT.json, .md and .png after every section, so that a run that is cut short keeps what it has; sections that
OUTPUT.json already holds for this commit are not run again. `--dry-run` builds every case on the CPU at toy sizes.
"""

import argparse
import functools
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flashmhf.benchmarking import Shape, provenance
from flashmhf.benchmarking.measuring import gradient_bytes, interleaved_median_ms, peak_bytes, timed_call
from flashmhf.benchmarking.variants import NaiveMHF
from flashmhf.layers import FlashMHF, SwiGLU
from flashmhf.ops import reference
from flashmhf.ops.flash_mhf import flash_mhf
from flashmhf.ops.gated_mhf import gated_mhf
from flashmhf.ops.triton.backward import plan_backward_tokens, plan_backward_weights
from flashmhf.ops.triton.forward import plan_forward
from flashmhf.ops.triton.tiles import Tile, device_class, table_rows
from gpu_plots import plot

SHAPES = {"370m": Shape(1024, 8, 7, 384), "1.3b": Shape(2048, 16, 15, 384)}
TOY = Shape(64, 2, 2, 24)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
REPEATS = 20


class Bench:
    """The device and the sizes: real ones, or toys for a dry run."""

    def __init__(self, dry_run: bool) -> None:
        self.dry_run = dry_run
        self.device = torch.device("cpu" if dry_run else "cuda")
        self.repeats = 1 if dry_run else REPEATS
        self.shapes = {"toy": TOY} if dry_run else SHAPES
        self.tokens = (16, 48) if dry_run else (1024, 4096, 16384, 65536)
        self.layer_tokens = (1, 16) if dry_run else (1, 16, 128, 1024, 4096, 16384, 65536)

    def randn(self, *size: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(*size, device=self.device, dtype=torch.float32).to(dtype)

    def inputs(self, T: int, H: int, H_kv: int, E: int, F: int, D: int, dtype: torch.dtype) -> list[Tensor]:
        """q, k, u, v, gate and the output's gradient."""
        weights = [self.randn(H_kv, E, F, D, dtype=dtype) / D**0.5 for _ in range(3)]
        gate = torch.rand(T, H, E, device=self.device)
        return [self.randn(T, H, D, dtype=dtype), *weights, gate, self.randn(T, H, D, dtype=dtype)]


def correctness(bench: Bench) -> list[dict[str, Any]]:
    """Every row of the tile table for this device: forward and all gradients under the error budget, NaN-poisoned."""
    rows = []
    for kernel, dtype, D, tile in _cases(bench):
        for T, H, H_kv, E, F in ((300, 4, 2, 3, 200), (1024, 2, 2, 2, 384)):
            if bench.dry_run:
                T, E, F = 20, 2, 40
            inputs = bench.inputs(T, H, H_kv, E, F, D, dtype)
            case = {"kernel": kernel, "dtype": dtype, "D": D, "tile": list(tile), "sizes": [T, H, H_kv, E, F]}
            try:
                got = _run_kernel(kernel, inputs, tile)
            except Exception as error:  # whatever the compiler or the driver says, the other rows are worth their time
                rows.append(_failed(case | {"dtype": str(dtype).removeprefix("torch.")}, error) | {"passed": False})
                continue
            exact = _expected([x.double() for x in inputs])
            eager = _expected(inputs)
            rows += [_checked(case, name, result, eager[name], exact[name]) for name, result in got.items()]
    for dtype in DTYPES:
        for D in (48,) if bench.dry_run else (48, 64, 128, 256):
            rows += _gated(bench, dtype, D)
    rows.append(_beyond_32_bits(bench))
    return rows


def _failed(case: dict[str, Any], error: Exception) -> dict[str, Any]:
    return {**case, "failed": f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"}


def _checked(case: dict[str, Any], name: str, result: Tensor, eager: Tensor, exact: Tensor) -> dict[str, Any]:
    """One row: the error, and the budget of twice eager PyTorch's plus the rounding of the result."""
    error, budget = _error(result, exact), 2 * _error(eager, exact) + torch.finfo(result.dtype).eps / 2
    dtype = str(case["dtype"]).removeprefix("torch.")
    return {**case, "dtype": dtype, "result": name, "error": error, "budget": budget, "passed": error <= budget}


def _gated(bench: Bench, dtype: torch.dtype, D: int) -> list[dict[str, Any]]:
    """Norm and gate kernels and the operator, composed as the layer composes them."""
    T, H, E, F = (20, 2, 3, 40) if bench.dry_run else (1000, 4, 5, 200)
    q, k, u, v, _, dout = bench.inputs(T, H, H, E, F, D, dtype)
    inputs = [q, k, u, v, bench.randn(H, D, E, dtype=dtype) / D**0.5, bench.randn(H, D, dtype=dtype)]

    def run(function: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        out = function(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, dout.to(dtype))]

    def formula(*leaves: Tensor) -> Tensor:
        return reference.gated_forward(*leaves, "sigmoid", 1.0, 1e-6)  # type: ignore[call-arg, arg-type]

    backend = "blockwise" if bench.dry_run else "triton"
    got = run(functools.partial(gated_mhf, backend=backend), dtype)
    eager, exact = run(formula, dtype), run(formula, torch.float64)
    case = {"kernel": "gated_mhf", "dtype": dtype, "D": D, "tile": "table", "sizes": [T, H, H, E, F]}
    names = ("out", "dq", "dk", "du", "dv", "dgate_weight", "dnorm_weight")
    return [_checked(case, *result) for result in zip(names, got, eager, exact, strict=True)]


def _cases(bench: Bench):
    """Each shipped row, at its own head dim and at one that is no power of two."""
    for dtype in DTYPES:
        if bench.dry_run and dtype == torch.bfloat16:
            continue  # Triton's interpreter multiplies bfloat16 wrongly
        for kernel, block_d, tile in table_rows(device_class(bench.device), dtype.itemsize):
            for D in (block_d, block_d * 3 // 4):
                if bench.dry_run and block_d > 32:
                    continue
                yield kernel, dtype, D, tile


def _run_kernel(kernel: str, inputs: list[Tensor], tile: Tile) -> dict[str, Tensor]:
    q, k, u, v, gate, dout = inputs
    if kernel in ("decode", "forward"):
        out = torch.full_like(q, float("nan"))
        plan_forward(q, k, u, v, gate, out, tile).run()
        return {"out": out}
    if kernel == "backward_tokens":
        dq, dgate = torch.full_like(q, float("nan")), torch.full_like(gate, float("nan"))
        plan_backward_tokens(dout, q, k, u, v, gate, dq, dgate, tile).run()
        return {"dq": dq, "dgate": dgate}
    dk, du, dv = (torch.full_like(x, float("nan")) for x in (k, u, v))
    plan_backward_weights(dout, q, k, u, v, gate, dk, du, dv, tile).run()
    return {"dk": dk, "du": du, "dv": dv}


def _expected(inputs: list[Tensor]) -> dict[str, Tensor]:
    *arguments, dout = inputs
    q, k, u, v, gate = arguments
    grads = reference.backward(dout, q, k, u, v, gate, (True,) * 5)
    names = ("out", "dq", "dk", "du", "dv", "dgate")
    return dict(zip(names, (reference.forward(q, k, u, v, gate), *grads), strict=True))  # type: ignore[arg-type]


def _error(got: Tensor, exact: Tensor) -> float:
    """Relative Frobenius norm; NaN counts as infinite."""
    error = float((got.double() - exact.double()).norm() / exact.double().norm())
    return error if error == error else float("inf")


def _beyond_32_bits(bench: Bench) -> dict[str, Any]:
    """More elements of q than a 32-bit offset reaches: the last tokens must be those of a short call."""
    D, H = 128, 16
    T = 64 if bench.dry_run else 2**31 // (H * D) + 1000
    q, k, u, v, _, _ = bench.inputs(T, H, H, 1, 64, D, torch.float16 if bench.dry_run else torch.bfloat16)
    tail = flash_mhf(q[-50:].clone(), k, u, v)
    error = _error(flash_mhf(q, k, u, v)[-50:], tail)
    return {
        "kernel": "forward",
        "result": f"q of {q.numel():,} elements",
        "error": error,
        "budget": 0,
        "passed": error == 0,
    }


def op(bench: Bench) -> list[dict[str, Any]]:
    """TFLOP/s of the operator as a ratio to cuBLAS at 8192^3 in the same run; 3 products forward, 8 backward."""
    size = 64 if bench.dry_run else 8192
    rows = []
    for dtype in (torch.bfloat16, torch.float16):
        a, b = bench.randn(size, size, dtype=dtype), bench.randn(size, size, dtype=dtype)
        for name, shape in bench.shapes.items():
            H, E, F = shape.num_heads, shape.num_subnetworks, shape.subnetwork_size
            for T in bench.tokens:
                *leaves, dout = bench.inputs(T, H, H, E, F, shape.hidden_size // H, dtype)
                for leaf in leaves:
                    leaf.requires_grad_()
                calls: dict[str, Callable[[], Any]] = {
                    "cublas": functools.partial(torch.matmul, a, b),
                    "forward": functools.partial(flash_mhf, *(leaf.detach() for leaf in leaves)),
                    "backward": functools.partial(
                        torch.autograd.grad, flash_mhf(*leaves), leaves, dout, retain_graph=True
                    ),
                }
                times = interleaved_median_ms(calls, bench.device, bench.repeats)
                product = 2 * T * shape.hidden_size * E * F
                cublas = 2 * size**3 / times["cublas"] / 1e9
                for measured_pass, products in (("forward", 3), ("backward", 8)):
                    tflops = products * product / times[measured_pass] / 1e9
                    rows.append(
                        {
                            "shape": name,
                            "dtype": str(dtype).removeprefix("torch."),
                            "tokens": T,
                            "pass": measured_pass,
                            "ms": times[measured_pass],
                            "tflops": tflops,
                            "cublas_tflops": cublas,
                            "ratio_to_cublas": tflops / cublas,
                        }
                    )
    return rows


class Checkpointed(nn.Module):
    """A layer whose activations are recomputed in the backward pass."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.layer, x, use_reentrant=False)


def layer(bench: Bench) -> list[dict[str, Any]]:
    """Whole layers at matched parameters: time and peak memory, forward and forward + backward."""
    rows = []
    for name, shape in bench.shapes.items():
        options: dict[str, Any] = {"dtype": torch.float32 if bench.dry_run else torch.bfloat16, "device": bench.device}
        flash = FlashMHF(
            shape.hidden_size, shape.num_heads, shape.num_subnetworks, shape.subnetwork_size, init="scaled", **options
        )
        swiglu = SwiGLU(shape.hidden_size, shape.swiglu_size, **options)
        variants: dict[str, nn.Module] = {
            "swiglu": swiglu,
            "swiglu checkpointed": Checkpointed(swiglu),
            "flashmhf": flash,
        }
        if not bench.dry_run:
            variants["swiglu compiled"] = cast(nn.Module, torch.compile(swiglu))
            variants["flashmhf compiled"] = cast(nn.Module, torch.compile(flash))
        for T in bench.layer_tokens:
            layers = variants | ({"naive": NaiveMHF(flash)} if T <= 16384 else {})
            x = bench.randn(T, shape.hidden_size, dtype=options["dtype"]).requires_grad_()
            dy = torch.randn_like(x)
            for measured_pass in ("forward", "forward+backward"):
                calls = {variant: timed_call(module, (x,), dy, measured_pass) for variant, module in layers.items()}
                for variant in list(calls):
                    try:
                        calls[variant]()
                    except Exception as error:  # too large, or not compilable: the others are still compared
                        case = {"shape": name, "tokens": T, "pass": measured_pass, "variant": variant}
                        rows.append(_failed(case, error))
                        del calls[variant]
                times = interleaved_median_ms(calls, bench.device, bench.repeats)
                returned = gradient_bytes if measured_pass != "forward" else (lambda module: 0)
                for variant, call in calls.items():
                    rows.append(
                        {
                            "shape": name,
                            "tokens": T,
                            "pass": measured_pass,
                            "variant": variant,
                            "ms": times[variant],
                            "speedup_over_swiglu": times["swiglu"] / times[variant],
                            "peak_mib": (peak_bytes(call, bench.device) - returned(layers[variant])) / 2**20,
                        }
                    )
    return rows


def decode(bench: Bench) -> list[dict[str, Any]]:
    """A few tokens through whole layers under CUDA graphs: time, and the bandwidth of reading the weights once.

    The yardstick is the device's own copy of 1 GiB, bytes read and written, in the same run.
    """
    rows = []
    source = torch.empty(2**10 if bench.dry_run else 2**28, device=bench.device)
    target = torch.empty_like(source)
    for name, shape in bench.shapes.items():
        options: dict[str, Any] = {"dtype": torch.float32 if bench.dry_run else torch.bfloat16, "device": bench.device}
        flash = FlashMHF(
            shape.hidden_size, shape.num_heads, shape.num_subnetworks, shape.subnetwork_size, init="scaled", **options
        )
        layers = {"swiglu": SwiGLU(shape.hidden_size, shape.swiglu_size, **options), "flashmhf": flash}
        for T in (1, 3) if bench.dry_run else (1, 2, 4, 8, 16, 32, 64, 128):
            x = bench.randn(T, shape.hidden_size, dtype=options["dtype"])
            calls: dict[str, Callable[[], Any]] = {"copy": functools.partial(target.copy_, source)}
            calls |= {variant: _graphed(bench, functools.partial(module, x)) for variant, module in layers.items()}
            times = interleaved_median_ms(calls, bench.device, bench.repeats)
            copy = 2 * source.nbytes / times["copy"] / 1e6
            for variant, module in layers.items():
                gb_s = sum(p.nbytes for p in module.parameters()) / times[variant] / 1e6
                rows.append(
                    {
                        "shape": name,
                        "tokens": T,
                        "variant": variant,
                        "us": 1e3 * times[variant],
                        "weights_gb_s": gb_s,
                        "ratio_to_copy": gb_s / copy,
                        "speedup_over_swiglu": times["swiglu"] / times[variant],
                    }
                )
    return rows


@torch.no_grad()
def _graphed(bench: Bench, call: Callable[[], Tensor]) -> Callable[[], Any]:
    """The call as the replay of a CUDA graph, so that launches cost nothing."""
    if bench.dry_run:
        return torch.no_grad()(call)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


SECTIONS: dict[str, Callable[[Bench], list[dict[str, Any]]]] = {
    "correctness": correctness,
    "op": op,
    "layer": layer,
    "decode": decode,
}


def markdown(result: dict[str, Any]) -> str:
    """The whole result as tables; of the correctness section only the failures and the worst row of each kernel."""
    lines = [
        f"# {result['machine']}",
        "",
        *(f"- {k}: {v}" for k, v in result.items() if k not in ("sections", "machine")),
    ]
    for name, section in result["sections"].items():
        rows = section["rows"]
        lines += ["", f"## {name} ({section['elapsed_s']:.0f} s)", ""]
        if name == "correctness":
            failed = [row for row in rows if not row["passed"]]
            lines += [f"{len(rows) - len(failed)} of {len(rows)} results within the error budget.", ""]
            rows = failed
        if rows:
            columns = list(dict.fromkeys(column for row in rows for column in row))
            lines += ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
            lines += ["| " + " | ".join(_cell(row.get(column, "")) for column in columns) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", default=",".join(SECTIONS))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/gpu"))
    parser.add_argument("--dry-run", action="store_true")
    arguments = parser.parse_args()
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # torch's profiler would print its every start and stop
    torch.manual_seed(time.time_ns() % 2**31)  # fresh data every time
    bench = Bench(arguments.dry_run)
    result: dict[str, Any] = {**provenance(), "sections": {}}
    file = arguments.output.with_suffix(".json")
    if file.exists():
        earlier = json.loads(file.read_text())
        if earlier["commit"] == result["commit"]:
            result["sections"] = earlier["sections"]
    for name in arguments.sections.split(","):
        if name in result["sections"]:
            continue
        started = time.perf_counter()
        rows = SECTIONS[name](bench)
        result["sections"][name] = {"elapsed_s": time.perf_counter() - started, "rows": rows}
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(result, indent=1))
        arguments.output.with_suffix(".md").write_text(markdown(result))
        plot(result["sections"], arguments.output.with_suffix(".png"))
        print(f"{name}: {len(rows)} rows in {time.perf_counter() - started:.0f} s", flush=True)
    failed = [row for row in result["sections"].get("correctness", {}).get("rows", []) if not row["passed"]]
    if failed:
        print(f"correctness: {len(failed)} results outside the error budget", flush=True)
        raise SystemExit(1)


if __name__ == "__main__":
    main()
