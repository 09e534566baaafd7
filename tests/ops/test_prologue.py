"""Norm and gate, forward and backward, in PyTorch and Triton, against their formulas in float64."""

import pytest
import torch

from flashmhf.ops import prologue, reference
from flashmhf.ops.prologue import Prologue
from flashmhf.ops.triton import prologue as kernels

SHAPES = [(2, 3, 4, 6, 5), (70, 2, 24, 1), (1, 3, 80, 3), (300, 1, 16, 17)]  # (..., H, D, E)
SIGMOID = Prologue("sigmoid", 1.0, 1e-6)
IMPLEMENTATIONS = {
    "PyTorch": (prologue.forward, prologue.backward),
    "triton": (kernels.prologue_forward, kernels.prologue_backward),
}


@pytest.fixture(params=[2**18, 50], ids=["one block", "many blocks"], autouse=True)
def block_elements(request, monkeypatch):
    monkeypatch.setattr(prologue, "CPU_BLOCK_ELEMENTS", request.param)


def tensors(shape, dtype):
    *leading, H, D, E = shape
    q = torch.randn(*leading, H, D, dtype=torch.float64).to(dtype)
    gate_weight, norm_weight = (torch.randn(*size, dtype=torch.float64).to(dtype) for size in ((H, D, E), (H, D)))
    return q, gate_weight / D**0.5, norm_weight


def formula(q, gate_weight, norm_weight, options):
    normed = q if norm_weight is None else reference.head_norm(q, norm_weight, options.norm_eps)
    if gate_weight is None:
        return normed, None
    return normed, options.gate_total * reference.head_gate(normed, gate_weight, options.gate_type)


def check(implementation, shape, dtype, options, has_gate=True, has_norm=True, tolerance=None):
    """Values and gradients against the formula in float64; where q is rounded after the norm, so is the formula's."""
    forward, backward = IMPLEMENTATIONS[implementation]
    q, gate_weight, norm_weight = tensors(shape, dtype)
    gate_weight, norm_weight = gate_weight if has_gate else None, norm_weight if has_norm else None
    exact = [None if x is None else x.double().requires_grad_() for x in (q, gate_weight, norm_weight)]
    normed, gate = forward(q, gate_weight, norm_weight, options)
    normed_64, gate_64 = formula(*exact, options)
    close = tolerance or {"rtol": 1e-5, "atol": 1e-6} if dtype != torch.float64 else {"rtol": 1e-7, "atol": 1e-9}
    torch.testing.assert_close(normed.double(), normed_64.detach(), **close)
    dnormed = torch.randn_like(q)
    outputs, vectors = [normed_64], [dnormed.double()]
    dgate = None
    if gate is not None:
        assert gate.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(gate.double(), gate_64.detach(), **close)
        dgate = torch.randn_like(gate)
        outputs, vectors = [*outputs, gate_64], [*vectors, dgate.double()]
    grads = backward(q, gate_weight, norm_weight, options, dnormed.clone(), dgate)
    wanted = [x for x in exact if x is not None]
    expected = iter(torch.autograd.grad(outputs, wanted, vectors))
    for grad, x in zip(grads, (q, gate_weight, norm_weight), strict=True):
        if x is not None:
            assert grad.dtype == x.dtype
            want = next(expected)
            assert (grad.double() - want).norm() <= (close["rtol"] * 5) * want.norm() + 1e-12


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", prologue.GATES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_norm_and_gate(implementation, kind, shape, poisoned_memory):
    check(implementation, shape, torch.float32, Prologue(kind, 2.5, 1e-3))


@pytest.mark.parametrize(("has_gate", "has_norm"), [(True, False), (False, True), (False, False)])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_without_gate_or_norm(implementation, has_gate, has_norm, poisoned_memory):
    check(implementation, SHAPES[0], torch.float32, SIGMOID, has_gate, has_norm)


def test_float64():
    check("PyTorch", SHAPES[0], torch.float64, SIGMOID)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_low_precision_is_computed_in_float32(implementation, dtype, poisoned_memory):
    eps = torch.finfo(dtype).eps
    check(implementation, SHAPES[1], dtype, SIGMOID, tolerance={"rtol": eps, "atol": 2 * eps})
    check(implementation, SHAPES[1], dtype, SIGMOID, has_norm=False, tolerance={"rtol": eps, "atol": 1e-6})


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_strides(implementation):
    q, gate_weight, norm_weight = tensors((6, 2, 16, 3), torch.float32)
    strided = torch.randn(3, 2, 16, 6).permute(3, 1, 2, 0)[..., 0].unflatten(0, (2, 3))  # (2, 3, 2, 16)
    forward, _ = IMPLEMENTATIONS[implementation]
    for x in (strided, q[:1].expand(5, 2, 16)):
        got = forward(x, gate_weight, norm_weight, SIGMOID)
        for a, b in zip(got, forward(x.contiguous(), gate_weight, norm_weight, SIGMOID), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_no_tokens(implementation):
    q, gate_weight, norm_weight = tensors((0, 4, 6, 5), torch.float32)
    forward, backward = IMPLEMENTATIONS[implementation]
    normed, gate = forward(q, gate_weight, norm_weight, SIGMOID)
    assert (normed.shape, gate.shape) == ((0, 4, 6), (0, 4, 5))
    _, dgate_weight, dnorm_weight = backward(q, gate_weight, norm_weight, SIGMOID, normed, gate)
    assert not dgate_weight.any()
    assert not dnorm_weight.any()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_gate_with_vanishing_scores_stays_finite(implementation):
    q, weight = torch.full((1, 4, 6), -100.0), torch.ones(4, 6, 5)
    forward, backward = IMPLEMENTATIONS[implementation]
    _, gate = forward(q, weight, None, SIGMOID)
    assert gate.isfinite().all()
    dq, dweight, _ = backward(q, weight, None, SIGMOID, torch.zeros_like(q), torch.ones_like(gate))
    assert dq.isfinite().all()
    assert dweight.isfinite().all()
