"""Every kernel by name, ready to run with a tile of one's choice, and what its results should be."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flashmhf.benchmarking import Row
from flashmhf.ops import reference
from flashmhf.ops.triton.backward import plan_backward_tokens, plan_backward_weights
from flashmhf.ops.triton.forward import plan_combine, plan_forward, splits_for
from flashmhf.ops.triton.tiles import Tile
from gpu_bench import name_of

Run = Callable[[], dict[str, Tensor]]  # launches, and returns the results by name


def _forward(inputs: list[Tensor], tile: Tile) -> Run:
    q, k, u, v, gate, _ = inputs
    out, splits = poisoned(q), splits_for(q, k, tile)
    if splits == 1:
        launches = [plan_forward(q, k, u, v, gate, out, tile)]
    else:
        partial = poisoned(q.new_empty(splits, *q.shape, dtype=torch.float32))
        launches = [plan_forward(q, k, u, v, gate, partial, tile, splits), plan_combine(partial, out)]

    def run() -> dict[str, Tensor]:
        for launch in launches:
            launch.run()
        return {"out": out}

    return run


def _backward_tokens(inputs: list[Tensor], tile: Tile) -> Run:
    q, k, u, v, gate, dout = inputs
    dq, dgate = poisoned(q), poisoned(gate)
    launch = plan_backward_tokens(dout, q, k, u, v, gate, dq, dgate, tile)

    def run() -> dict[str, Tensor]:
        launch.run()
        return {"dq": dq, "dgate": dgate}

    return run


def _backward_weights(inputs: list[Tensor], tile: Tile) -> Run:
    q, k, u, v, gate, dout = inputs
    dk, du, dv = (poisoned(weight) for weight in (k, u, v))
    launch = plan_backward_weights(dout, q, k, u, v, gate, dk, du, dv, tile)

    def run() -> dict[str, Tensor]:
        launch.run()
        return {"dk": dk, "du": du, "dv": dv}

    return run


def _backward_one_pass(inputs: list[Tensor], tile: Tile) -> Run:
    q, k, u, v, gate, dout = inputs
    dk, du, dv = (poisoned(weight) for weight in (k, u, v))
    dq, dgate = (poisoned(x.float()) for x in (q, gate))
    launch = plan_backward_weights(dout, q, k, u, v, gate, dk, du, dv, tile, dq, dgate)

    def run() -> dict[str, Tensor]:
        dq.zero_()
        dgate.zero_()
        launch.run()
        return {"dq": dq.to(q.dtype), "dgate": dgate, "dk": dk, "du": du, "dv": dv}

    return run


# A kernel of the tile table -> a function of inputs (q, k, u, v, gate, dout) and tile.
KERNELS: dict[str, Callable[[list[Tensor], Tile], Run]] = {
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
