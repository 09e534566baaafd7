"""Every kernel by name, ready to run with a tile of one's choice, and what its results should be."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from flashmhf.benchmarking import Row
from flashmhf.ops import reference
from flashmhf.ops.triton.backward import plan_backward_tokens, plan_backward_weights
from flashmhf.ops.triton.forward import plan_combine, plan_forward, splits_for
from flashmhf.ops.triton.launch import Launch
from flashmhf.ops.triton.tiles import Tile
from gpu_bench import name_of


@dataclass
class Prepared:
    """A kernel with its inputs, its tile and room for its results. A call launches it and returns the results."""

    launches: list[Launch]
    results: dict[str, Tensor]
    sums: dict[str, Tensor] = field(default_factory=dict)  # float32; the kernel adds to them

    def __call__(self) -> dict[str, Tensor]:
        for total in self.sums.values():
            total.zero_()
        for launch in self.launches:
            launch.run()
        for name, total in self.sums.items():
            self.results[name].copy_(total)
        return self.results


def _forward(inputs: list[Tensor], tile: Tile) -> Prepared:
    q, k, u, v, gate, _ = inputs
    out, splits = poisoned(q), splits_for(q, k, tile)
    if splits == 1:
        return Prepared([plan_forward(q, k, u, v, gate, out, tile)], {"out": out})
    partial = poisoned(q.new_empty(splits, *q.shape, dtype=torch.float32))
    launches = [plan_forward(q, k, u, v, gate, partial, tile, splits), plan_combine(partial, out)]
    return Prepared(launches, {"out": out})


def _backward_tokens(inputs: list[Tensor], tile: Tile) -> Prepared:
    q, k, u, v, gate, dout = inputs
    dq, dgate = poisoned(q), poisoned(gate)
    launch = plan_backward_tokens(dout, q, k, u, v, gate, dq, dgate, tile)
    return Prepared([launch], {"dq": dq, "dgate": dgate})


def _backward_weights(inputs: list[Tensor], tile: Tile) -> Prepared:
    q, k, u, v, gate, dout = inputs
    dk, du, dv = (poisoned(weight) for weight in (k, u, v))
    launch = plan_backward_weights(dout, q, k, u, v, gate, dk, du, dv, tile)
    return Prepared([launch], {"dk": dk, "du": du, "dv": dv})


def _backward_one_pass(inputs: list[Tensor], tile: Tile) -> Prepared:
    q, k, u, v, gate, dout = inputs
    names = ("dq", "dgate", "dk", "du", "dv")
    results = {name: poisoned(x) for name, x in zip(names, (q, gate, k, u, v), strict=True)}
    dk, du, dv = (results[name] for name in ("dk", "du", "dv"))
    sums = {name: torch.empty_like(results[name], dtype=torch.float32) for name in ("dq", "dgate")}
    launch = plan_backward_weights(dout, q, k, u, v, gate, dk, du, dv, tile, *sums.values())
    return Prepared([launch], results, sums)


# A kernel of the tile table -> what prepares it for inputs (q, k, u, v, gate, dout) and a tile.
KERNELS: dict[str, Callable[[list[Tensor], Tile], Prepared]] = {
    "decode": _forward,
    "forward": _forward,
    "backward_tokens": _backward_tokens,
    "backward_weights": _backward_weights,
    "backward_one_pass": _backward_one_pass,
}


def poisoned(like: Tensor) -> Tensor:
    """Of the same shape, full of NaN: what a kernel does not write fails its check."""
    return torch.full_like(like, float("nan"), memory_format=torch.contiguous_format)


def expected(inputs: list[Tensor]) -> dict[str, Tensor]:
    """Every result by the formula, in the dtype of the inputs."""
    *arguments, dout = inputs
    q, k, u, v, gate = arguments
    grads = reference.backward(dout, q, k, u, v, gate, (True,) * 5)
    names = ("out", "dq", "dk", "du", "dv", "dgate")
    return dict(zip(names, (reference.forward(q, k, u, v, gate), *grads), strict=True))  # type: ignore[arg-type]


def relative_error(got: Tensor, exact: Tensor) -> float:
    """Relative Frobenius norm; NaN counts as infinite."""
    error = float((got.double() - exact.double()).norm() / exact.double().norm())
    return error if error == error else float("inf")


def checked(case: dict[str, Any], name: str, result: Tensor, eager: Tensor, exact: Tensor) -> Row:
    """One row: the error, and the budget of twice eager PyTorch's plus the rounding of the result."""
    error = relative_error(result, exact)
    budget = 2 * relative_error(eager, exact) + torch.finfo(result.dtype).eps / 2
    return {**case, "result": name, "error": error, "budget": budget, "passed": error <= budget}


def check_kernel(kernel: str, inputs: list[Tensor], tile: Tile) -> list[Row]:
    """Runs a kernel on inputs and compares all its results with the formula in float64."""
    got = KERNELS[kernel](inputs, tile)()
    exact, eager = expected([x.double() for x in inputs]), expected(inputs)
    q, k = inputs[:2]
    T, H, D = q.shape
    sizes = f"T {T}, H {H} / {k.shape[0]}, E {k.shape[1]}, F {k.shape[2]}"
    case = {"kernel": kernel, "dtype": name_of(q.dtype), "D": D, "tile": "x".join(map(str, tile)), "sizes": sizes}
    return [checked(case, name, result, eager[name], exact[name]) for name, result in got.items()]
