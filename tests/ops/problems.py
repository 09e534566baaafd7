"""Random problems, and the error budget that applies to every backend."""

from dataclasses import dataclass

import torch
from torch import Tensor

from flashmhf.ops import reference

FEW = 256
REORDERED = 4096  # elements: of fewer, eager may get all that matter right by chance
ORDERS = 8
NAMES = ("out", "dq", "dk", "du", "dv", "dgate")


@dataclass(frozen=True)
class Shape:
    """The leading dimensions of q, then the sizes as in ops/problem.py."""

    lead: tuple[int, ...]
    H: int
    H_kv: int
    E: int
    F: int
    D: int


def make_inputs(shape: Shape, dtype: torch.dtype, gate: bool = True, seed: int = 0) -> list[Tensor | None]:
    """Random q, k, u, v, gate and output gradient; the gate is float32, or float64 with float64."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    weight_shape = (shape.H_kv, shape.E, shape.F, shape.D)
    q = randn(*shape.lead, shape.H, shape.D)
    k, u, v = (randn(*weight_shape) / shape.D**0.5 for _ in range(3))
    gate_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    r = torch.rand(*shape.lead, shape.H, shape.E, generator=generator).to(gate_dtype) if gate else None
    dout = randn(*shape.lead, shape.H, shape.D)
    return [*(x.to(dtype) for x in (q, k, u, v)), r, dout.to(dtype)]


def exact_results(inputs: list[Tensor | None]) -> list[Tensor | None]:
    """Output and gradients of the reference in float64, for the rounded inputs."""
    *arguments, dout = (None if x is None else x.double() for x in inputs)
    needs = tuple(x is not None for x in arguments)
    return [reference.forward(*arguments), *reference.backward(dout, *arguments, needs)]


def eager_results(inputs: list[Tensor | None]) -> list[Tensor | None]:
    """Output and gradients of the reference in the inputs' precision: eager PyTorch.

    For results of few elements, which eager may get right by chance, the worst over several orders of summation.
    """
    results = _eager_results(inputs)
    if all(x is None or x.numel() >= REORDERED for x in results):
        return results
    exact = exact_results(inputs)
    generator = torch.Generator().manual_seed(0)
    for _ in range(ORDERS):
        reordered = _reordered_eager_results(inputs, generator)
        for i, (worst, other, right) in enumerate(zip(results, reordered, exact, strict=True)):
            if worst is None or worst.numel() >= REORDERED:
                continue
            if relative_error(other, right) > relative_error(worst, right):
                results[i] = other
    return results


def _eager_results(inputs: list[Tensor | None]) -> list[Tensor | None]:
    *arguments, dout = inputs
    needs = tuple(x is not None for x in arguments)
    return [reference.forward(*arguments), *reference.backward(dout, *arguments, needs)]


def _reordered_eager_results(inputs: list[Tensor | None], generator: torch.Generator) -> list[Tensor | None]:
    """With everything permuted that sums run over: tokens, rows of K, U and V, elements of a head."""
    q, k, u, v, gate, dout = inputs
    sizes = q.shape[:-2].numel(), *k.shape[2:]
    orders = [torch.randperm(size, generator=generator) for size in sizes]

    def of_tokens(x: Tensor | None, order: Tensor) -> Tensor | None:
        return None if x is None else x.reshape(-1, *x.shape[-2:])[order].view_as(x)

    def permute(q: Tensor, dout: Tensor, *rest: Tensor | None, orders: list[Tensor]) -> list[Tensor | None]:
        """q and dout (or their like), then K, U and V, then the gate."""
        *weights, gate = rest
        tokens, rows, elements = orders
        like_q = [of_tokens(x, tokens)[..., elements] for x in (q, dout)]
        return [*like_q, *(x[:, :, rows][..., elements] for x in weights), of_tokens(gate, tokens)]

    q, dout, k, u, v, gate = permute(q, dout, k, u, v, gate, orders=orders)
    results = _eager_results([q, k, u, v, gate, dout])
    return permute(*results, orders=[order.argsort() for order in orders])


def relative_error(got: Tensor, exact: Tensor) -> float:
    """Frobenius norm of the difference divided by that of `exact`."""
    return float((got.double() - exact).norm() / exact.norm().clamp_min(torch.finfo(torch.float64).tiny))


def assert_within_budget(
    name: str, got: Tensor, eager: Tensor, exact: Tensor, precision: torch.dtype, num_activations: int = FEW
) -> None:
    """At most twice the error of eager PyTorch at the same precision, plus the rounding of the result; never NaN.

    num_activations: values of M, whose roundings are all that is random: dV of one token is an outer product of them.
    """
    assert got.shape == exact.shape, name
    assert got.dtype == eager.dtype, name
    assert not got.isnan().any(), f"{name}: NaN"
    if exact.numel() == 0 or exact.norm() == 0:
        assert got.double().norm() == 0, name
        return
    budget = 2 * relative_error(eager, exact) + rounding(got, precision, num_activations)
    error = relative_error(got, exact)
    assert error <= budget, f"{name}: relative error {error:.2e}, budget {budget:.2e}"


def rounding(got: Tensor, precision: torch.dtype, num_activations: int = FEW) -> float:
    if precision == torch.float64:  # the reference rounds as well
        return 64 * torch.finfo(torch.float64).eps
    if min(got.numel(), num_activations) < FEW:  # eager may be exact by chance: roundings of M, SiLU(M), P, long sums
        return 4 * torch.finfo(precision).eps
    return torch.finfo(got.dtype).eps / 2
