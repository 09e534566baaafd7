"""Every kernel by name, ready to run with any tile, and the results it should have."""

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor

from flashmhf.benchmarking.measuring import Row, dtype_name
from flashmhf.ops import reference
from flashmhf.ops.hopper import backward as hopper_backward
from flashmhf.ops.hopper import backward_dq as hopper_dq
from flashmhf.ops.hopper import forward as hopper_forward
from flashmhf.ops.hopper.dq_accum import allocate_dq_accum, convert_dq
from flashmhf.ops.hopper.tiles import BackwardTile, DqTile, ForwardTile, HopperTile
from flashmhf.ops.prologue import Prologue
from flashmhf.ops.tensors import Gradients, Inputs
from flashmhf.ops.triton import tiles
from flashmhf.ops.triton.backward import plan_backward_dkuv, plan_backward_dq, plan_backward_fused
from flashmhf.ops.triton.forward import num_splits, plan_combine, plan_forward
from flashmhf.ops.triton.launch import Launch
from flashmhf.ops.triton.prologue import plan_prologue_backward, plan_prologue_forward, programs_per_head
from flashmhf.ops.triton.tiles import Tile

BACKENDS = ("triton", "hopper")

Size = tuple[int, int, int, int, int]  # T, H, H_kv, E, F


class KernelCase(NamedTuple):
    """A kernel of KERNELS; or one of BACKENDS, without a tile, for all that a layer launches forward and backward."""

    kernel: str
    size: Size
    D: int
    dtype: torch.dtype
    tile: Tile | HopperTile | None


@dataclass
class Prepared:
    """A kernel with inputs, tile and buffers for its results. A call launches it and returns the results."""

    launches: list[Launch]
    results: dict[str, Tensor]
    sums: dict[str, Tensor] = field(default_factory=dict)  # float32 accumulators
    rounded: Callable[[str, Tensor], Tensor] = lambda name, total: total  # accumulator -> result

    def __call__(self) -> dict[str, Tensor]:
        for total in self.sums.values():
            total.zero_()
        for launch in self.launches:
            launch.run()
        for name, total in self.sums.items():
            self.results[name].copy_(self.rounded(name, total))
        return self.results


def _forward(inputs: list[Tensor], tile: Tile) -> Prepared:
    q, k, u, v, gate, _ = inputs
    out, splits = poisoned(q), num_splits(q, k, tile)
    if splits == 1:
        return Prepared([plan_forward(q, k, u, v, gate, out, tile)], {"out": out})
    partial = poisoned(q.new_empty(splits, *q.shape, dtype=torch.float32))
    launches = [plan_forward(q, k, u, v, gate, partial, tile, splits), plan_combine(partial, out)]
    return Prepared(launches, {"out": out})


def _backward_dq(inputs: list[Tensor], tile: Tile) -> Prepared:
    q, k, u, v, gate, dout = inputs
    dq, dgate = poisoned(q), poisoned(gate)
    grads = Gradients(dq, None, None, None, dgate)
    launch = plan_backward_dq(dout, Inputs(q, k, u, v, gate), grads, tile)
    return Prepared([launch], {"dq": dq, "dgate": dgate})


def _backward_dkuv(inputs: list[Tensor], tile: Tile) -> Prepared:
    q, k, u, v, gate, dout = inputs
    dk, du, dv = (poisoned(weight) for weight in (k, u, v))
    launch = plan_backward_dkuv(dout, Inputs(q, k, u, v, gate), Gradients(None, dk, du, dv, None), tile)
    return Prepared([launch], {"dk": dk, "du": du, "dv": dv})


def _backward_fused(inputs: list[Tensor], tile: Tile) -> Prepared:
    q, k, u, v, gate, dout = inputs
    names = ("dq", "dgate", "dk", "du", "dv")
    results = {name: poisoned(x) for name, x in zip(names, (q, gate, k, u, v), strict=True)}
    dk, du, dv = (results[name] for name in ("dk", "du", "dv"))
    sums = {name: torch.empty_like(results[name], dtype=torch.float32) for name in ("dq", "dgate")}
    grads = Gradients(sums["dq"], dk, du, dv, sums["dgate"])
    launch = plan_backward_fused(dout, Inputs(q, k, u, v, gate), grads, tile)
    return Prepared([launch], results, sums)


def _hopper_forward(inputs: list[Tensor], tile: ForwardTile) -> Prepared:
    q, k, u, v, gate, _ = inputs
    out = poisoned(q)
    return Prepared([hopper_forward.plan_forward(q, k, u, v, gate, out, tile)], {"out": out})


def _hopper_backward(inputs: list[Tensor], tile: BackwardTile) -> Prepared:
    q, k, u, v, gate, dout = inputs
    names = ("dq", "dgate", "dk", "du", "dv")
    results = {name: poisoned(x) for name, x in zip(names, (q, gate, k, u, v), strict=True)}
    dk, du, dv = (results[name] for name in ("dk", "du", "dv"))
    dq_accum, dgate_accum = allocate_dq_accum(q, tile), torch.empty_like(gate)
    grads = Gradients(dq_accum, dk, du, dv, dgate_accum)
    launches = hopper_backward.plan_backward_split(dout, Inputs(q, k, u, v, gate), grads, tile)

    def rounded(name: str, total: Tensor) -> Tensor:
        return convert_dq(total, q, tile) if name == "dq" else total

    return Prepared(launches, results, {"dq": dq_accum, "dgate": dgate_accum}, rounded)


def _hopper_backward_dq(inputs: list[Tensor], tile: DqTile) -> Prepared:
    q, k, u, v, gate, dout = inputs
    dq, dgate = poisoned(q), poisoned(gate)
    grads = Gradients(dq, None, None, None, dgate)
    launch = hopper_dq.plan_backward_dq(dout, Inputs(q, k, u, v, gate), grads, tile)
    return Prepared([launch], {"dq": dq, "dgate": dgate})


def _prologue_forward(inputs: list[Tensor], tile: Any) -> Prepared:
    q, *_, gate, _ = inputs
    results = {"normed": poisoned(q), "gate": poisoned(gate)}
    return Prepared([plan_prologue_forward(q, *_prologue_weights(q, gate), PROLOGUE, *results.values())], results)


def _prologue_backward(inputs: list[Tensor], tile: Any) -> Prepared:
    q, *_, dgate, dq = inputs
    weights = _prologue_weights(q, dgate)
    programs = programs_per_head(*q.shape)
    names = ("dgate_weights", "dnorm_weights")
    results = {
        name: poisoned(x.new_empty(programs, *x.shape, dtype=torch.float32))
        for name, x in zip(names, weights, strict=True)
    }
    return Prepared([plan_prologue_backward(q, *weights, PROLOGUE, dq, dgate, *results.values())], results | {"dq": dq})


def _prologue_weights(q: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """Random weights of the gate and the norm."""
    (_, H, D), E = q.shape, gate.shape[-1]
    return torch.randn(H, D, E, dtype=q.dtype, device=q.device), torch.randn(H, D, dtype=q.dtype, device=q.device)


PROLOGUE = Prologue("sigmoid", 1.0, 1e-6)

# Kernel -> prepares it for inputs (q, k, u, v, gate, dout) and a tile. The prologue's kernels choose their tiles
# themselves; the backward one overwrites dout, which is its dq.
KERNELS: dict[str, Callable[[list[Tensor], Any], Prepared]] = {
    "decode": _forward,
    "forward": _forward,
    "backward_dq": _backward_dq,
    "backward_dkuv": _backward_dkuv,
    "backward_fused": _backward_fused,
    "hopper_forward": _hopper_forward,
    "hopper_backward": _hopper_backward,
    "hopper_backward_dq": _hopper_backward_dq,
    "prologue_forward": _prologue_forward,
    "prologue_backward": _prologue_backward,
}


def launches(target: str, case: KernelCase, device: str = "meta") -> list[Launch]:
    """What a case launches on a device class, planned on tensors of `device`."""
    kernel, (T, H, H_kv, E, F), D, dtype, tile = case
    q, dout = (torch.empty(T, H, D, dtype=dtype, device=device) for _ in range(2))
    weights = [torch.empty(H_kv, E, F, D, dtype=dtype, device=device) for _ in range(3)]
    inputs = [q, *weights, torch.empty(T, H, E, device=device), dout]
    with patch.object(tiles, "device_class", lambda device: target):
        if kernel not in BACKENDS:
            return KERNELS[kernel](inputs, tile).launches
        return recorded(functools.partial(_layer, importlib.import_module(f"flashmhf.ops.{kernel}.backend"), *inputs))


def recorded(call: Callable[[], Any]) -> list[Launch]:
    """What a call would launch."""
    found: list[Launch] = []
    with patch.object(Launch, "run", lambda launch: found.append(launch)):
        call()
    return found


def _layer(backend: Any, q: Tensor, k: Tensor, u: Tensor, v: Tensor, gate: Tensor, dout: Tensor) -> None:
    """A layer with a gate, with and without Q norm, forward and backward, with trained and with frozen weights; and
    the operator without a gate.
    """
    (_, H, D), E = q.shape, gate.shape[-1]
    gate_weight, norm = (torch.empty(shape, dtype=q.dtype, device=q.device) for shape in ((H, D, E), (H, D)))
    for norm_weight in (None, norm):
        backend.prologue_forward(q, gate_weight, norm_weight, PROLOGUE)
        backend.prologue_backward(q, gate_weight, norm_weight, PROLOGUE, dout, gate)
    for share in (gate, None):
        backend.forward(q, k, u, v, share)
        for trained in (True, False):
            backend.backward(dout, q, k, u, v, share, (True, *[trained] * 3, share is not None))


def poisoned(like: Tensor) -> Tensor:
    """Same shape, filled with NaN: what a kernel does not write fails its check."""
    return torch.full_like(like, float("nan"), memory_format=torch.contiguous_format)


def expected(inputs: list[Tensor]) -> dict[str, Tensor]:
    """Every result by the reference formula, in the inputs' dtype."""
    *arguments, dout = inputs
    q, k, u, v, gate = arguments
    grads = reference.backward(dout, q, k, u, v, gate, (True,) * 5)
    names = ("out", "dq", "dk", "du", "dv", "dgate")
    return dict(zip(names, (reference.forward(q, k, u, v, gate), *grads), strict=True))  # type: ignore[arg-type]


def relative_error(got: Tensor, exact: Tensor) -> float:
    """Relative Frobenius norm; infinity for NaN."""
    error = float((got.double() - exact.double()).norm() / exact.double().norm())
    return error if error == error else float("inf")


def checked(case: dict[str, Any], name: str, result: Tensor, eager: Tensor, exact: Tensor) -> Row:
    """One row: the error, and its budget of twice eager PyTorch's error plus the rounding of the result."""
    error = relative_error(result, exact)
    budget = 2 * relative_error(eager, exact) + torch.finfo(result.dtype).eps / 2
    return {**case, "result": name, "error": error, "budget": budget, "passed": error <= budget}


def check_kernel(kernel: str, inputs: list[Tensor], tile: Tile | HopperTile) -> list[Row]:
    """Runs a kernel of the operator and compares all its results with the formula in float64."""
    got = KERNELS[kernel](inputs, tile)()
    exact, eager = expected([x.double() for x in inputs]), expected(inputs)
    q, k = inputs[:2]
    T, H, D = q.shape
    sizes = f"T {T}, H {H} / {k.shape[0]}, E {k.shape[1]}, F {k.shape[2]}"
    case = {"kernel": kernel, "dtype": dtype_name(q.dtype), "D": D, "tile": "x".join(map(str, tile)), "sizes": sizes}
    return [checked(case, name, result, eager[name], exact[name]) for name, result in got.items()]
