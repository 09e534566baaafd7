"""Time and memory of the operator and of whole layers, against the layers that they replace.

Variants are timed in turn, A B A B, on random inputs, and compared by medians within one run, because the speed of a
machine drifts. Memory is that of activations: the peak of the allocator above what was there before, without the
parameters' gradients, which every layer has to return.
"""

import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.profiler import ProfilerActivity, profile

from flashmhf.layers import FlashMHF, SwiGLU
from flashmhf.ops.flash_mhf import flash_mhf

PASSES = ("forward", "forward+backward")


@dataclass(frozen=True)
class Shape:
    """Of the layers under test; the defaults are the paper's 128M model."""

    hidden_size: int = 768
    num_heads: int = 6
    num_subnetworks: int = 8
    subnetwork_size: int = 256

    @property
    def swiglu_size(self) -> int:
        """Width of the SwiGLU with the same matrix FLOPs: its 3 d d_ff against 3 d d_ff + 2 d^2."""
        return self.num_subnetworks * self.subnetwork_size + 2 * self.hidden_size // 3


@dataclass(frozen=True)
class Measurement:
    """One row: a variant at a number of tokens."""

    variant: str
    tokens: int
    dtype: str
    measured_pass: str
    median_ms: float
    ratio: float  # of the medians, to the first variant
    peak_mib: float
    peak_bytes_per_token: float


class NaiveMHF(nn.Module):
    """The layer as one writes it down first: every head's activations in memory, matrix products in the best layout."""

    def __init__(self, layer: FlashMHF) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        layer: Any = self.layer
        q_THD = layer._query(x)
        gate_THE = torch.einsum("thd,hde->the", q_THD, layer._gate_weight()).float().sigmoid()
        gate_HTE = (gate_THE / gate_THE.sum(-1, keepdim=True) * layer.output_scale).transpose(0, 1).to(x.dtype)
        q_HTD = q_THD.transpose(0, 1)
        k_HRD, u_HRD, v_HRD = (weight.flatten(1, 2) for weight in (layer.k, layer.u, layer.v))
        p_HTR = nnf.silu(q_HTD @ k_HRD.mT) * (q_HTD @ u_HRD.mT)
        p_HTR = (p_HTR.unflatten(-1, (layer.num_subnetworks, -1)) * gate_HTE.unsqueeze(-1)).flatten(-2)
        return layer.out_proj((p_HTR @ v_HRD).transpose(0, 1).flatten(1))


def bench_layer(
    shape: Shape, tokens: int, dtype: torch.dtype, device: torch.device, repeats: int, variants: tuple[str, ...]
) -> list[Measurement]:
    """Whole layers, projections and gate included."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"dtype": dtype, "device": device}
    flash = FlashMHF(
        shape.hidden_size, shape.num_heads, shape.num_subnetworks, shape.subnetwork_size, init="scaled", **options
    )
    layers: dict[str, nn.Module] = {
        "swiglu": SwiGLU(shape.hidden_size, shape.swiglu_size, init="scaled", **options),
        "naive": NaiveMHF(flash),
        "flashmhf": flash,
    }
    x = torch.randn(tokens, shape.hidden_size, **options).requires_grad_()
    dy = torch.randn(tokens, shape.hidden_size, **options)
    return _measure({name: (layers[name], (x,), dy) for name in variants}, tokens, dtype, repeats)


def bench_op(
    shape: Shape, tokens: int, dtype: torch.dtype, device: torch.device, repeats: int, variants: tuple[str, ...]
) -> list[Measurement]:
    """The operator alone, once for each backend in `variants`."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"dtype": dtype, "device": device}
    D = shape.hidden_size // shape.num_heads
    q = torch.randn(tokens, shape.num_heads, D, **options).requires_grad_()
    weights = [
        (
            torch.randn(shape.num_heads, shape.num_subnetworks, shape.subnetwork_size, D, **options) / D**0.5
        ).requires_grad_()
        for _ in range(3)
    ]
    gate = torch.rand(tokens, shape.num_heads, shape.num_subnetworks, device=device).requires_grad_()
    dout = torch.randn(tokens, shape.num_heads, D, **options)

    def call(backend: str) -> Callable[..., Tensor]:
        return lambda *inputs: flash_mhf(*inputs, backend=backend)

    return _measure({name: (call(name), (q, *weights, gate), dout) for name in variants}, tokens, dtype, repeats)


def provenance() -> dict[str, Any]:
    """Machine, versions, commit and command: what a measurement must say of itself."""
    processor = platform.processor()
    cpu_info = Path("/proc/cpuinfo")
    if cpu_info.exists():
        names = [line.partition(":")[2].strip() for line in cpu_info.read_text().splitlines() if "model name" in line]
        processor = f"{len(names)} x {names[0]}" if names else processor
    return {
        "machine": torch.cuda.get_device_name() if torch.cuda.is_available() else processor,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": _commit(),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
    }


def markdown(rows: list[Measurement]) -> str:
    """A table of measurements."""
    lines = [
        "| variant | tokens | dtype | pass | median ms | ratio | peak MiB | bytes a token |",
        "|---|---:|---|---|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {row.variant} | {row.tokens:,} | {row.dtype} | {row.measured_pass} | {row.median_ms:,.2f} "
        f"| {row.ratio:.2f} | {row.peak_mib:,.1f} | {row.peak_bytes_per_token:,.0f} |"
        for row in rows
    ]
    return "\n".join(lines)


def as_dicts(rows: list[Measurement]) -> list[dict[str, Any]]:
    return [asdict(row) for row in rows]


def peak_bytes(call: Callable[[], Any], device: torch.device) -> int:
    """The most that the allocator held during `call` above what it held before."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    held = most = 0
    events = profiler.profiler.kineto_results.events()
    for event in sorted((event for event in events if event.name() == "[memory]"), key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def _measure(
    variants: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...], Tensor]],
    tokens: int,
    dtype: torch.dtype,
    repeats: int,
) -> list[Measurement]:
    rows = []
    for measured_pass in PASSES:
        calls = {name: timed_call(*variant, measured_pass) for name, variant in variants.items()}
        device = next(iter(variants.values()))[2].device
        medians = interleaved_median_ms(calls, device, repeats)
        reference = next(iter(medians.values()))
        for name, call in calls.items():
            peak = peak_bytes(call, device) - (gradient_bytes(variants[name][0]) if measured_pass != "forward" else 0)
            rows.append(
                Measurement(
                    name,
                    tokens,
                    str(dtype).removeprefix("torch."),
                    measured_pass,
                    medians[name],
                    medians[name] / reference,
                    peak / 2**20,
                    peak / tokens,
                )
            )
    return rows


def timed_call(
    function: Callable[..., Tensor], inputs: tuple[Tensor, ...], dout: Tensor, measured_pass: str
) -> Callable[[], Any]:
    """What is timed: one of PASSES of a function or module."""
    if measured_pass == "forward":

        def run() -> Any:
            with torch.no_grad():
                return function(*inputs)

    else:
        parameters = list(function.parameters()) if isinstance(function, nn.Module) else []
        leaves = [*inputs, *parameters]

        def run() -> Any:
            edge = get_gradient_edge(function(*inputs))  # as in a model, nobody holds the output during the backward
            return torch.autograd.grad(edge, leaves, dout)

    return run


def gradient_bytes(function: Callable[..., Tensor]) -> int:
    """Of all parameters."""
    parameters = function.parameters() if isinstance(function, nn.Module) else ()
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters)


def interleaved_median_ms(calls: dict[str, Callable[[], Any]], device: torch.device, repeats: int) -> dict[str, float]:
    """Median milliseconds of each call, timed in turn after one warm-up."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(repeats):
        for name, call in calls.items():
            times[name].append(_elapsed_ms(call, device))
    return {name: statistics.median(values) for name, values in times.items()}


def _elapsed_ms(call: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        stop.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(stop)
    started = time.perf_counter()
    call()
    return (time.perf_counter() - started) * 1e3


def _commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
