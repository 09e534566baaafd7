"""The per-head norm and the gate against their formulas, whole and in blocks."""

import pytest
import torch

from flashmhf.ops import prologue, reference

BLOCKS = {"one block": 2**20, "many blocks": 50}


@pytest.fixture(params=BLOCKS.values(), ids=BLOCKS.keys(), autouse=True)
def block_elements(request, monkeypatch):
    monkeypatch.setattr(prologue, "BLOCK_ELEMENTS", request.param)


def tensors(dtype=torch.float64):
    q = torch.randn(2, 3, 4, 6, dtype=dtype, requires_grad=True)
    gate_weight = torch.randn(4, 6, 5, dtype=dtype, requires_grad=True)
    norm_weight = torch.randn(4, 6, dtype=dtype, requires_grad=True)
    return q, gate_weight, norm_weight


@pytest.mark.parametrize("kind", prologue.GATES)
def test_gate(kind):
    q, weight, _ = tensors()
    gate = prologue.head_gate(q, weight, kind)
    torch.testing.assert_close(gate, reference.head_gate(q, weight, kind))
    torch.testing.assert_close(gate.sum(-1), torch.ones(2, 3, 4, dtype=torch.float64))
    assert torch.autograd.gradcheck(lambda q, w: prologue.head_gate(q, w, kind), (q, weight))
    assert torch.autograd.gradgradcheck(lambda q, w: prologue.head_gate(q, w, kind), (q, weight))


def test_norm():
    q, _, weight = tensors()
    torch.testing.assert_close(prologue.head_norm(q, weight, 1e-6), reference.head_norm(q, weight, 1e-6))
    assert torch.autograd.gradcheck(lambda q, w: prologue.head_norm(q, w, 1e-6), (q, weight))
    assert torch.autograd.gradgradcheck(lambda q, w: prologue.head_norm(q, w, 1e-6), (q, weight))


def test_low_precision_is_computed_in_float32(poisoned_memory):
    q, gate_weight, norm_weight = (x.detach().bfloat16().requires_grad_() for x in tensors())
    exact = [x.detach().float() for x in (q, gate_weight, norm_weight)]
    with torch.autocast("cpu", torch.bfloat16):
        gate = prologue.head_gate(q, gate_weight, "sigmoid")
        normed = prologue.head_norm(q, norm_weight, 1e-6)
    assert gate.dtype == torch.float32
    torch.testing.assert_close(gate, reference.head_gate(exact[0], exact[1], "sigmoid"))
    assert normed.dtype == torch.bfloat16
    assert torch.equal(normed, reference.head_norm(exact[0], exact[2], 1e-6).bfloat16())
    (gate.sum() + normed.sum()).backward()
    assert q.grad.dtype == gate_weight.grad.dtype == norm_weight.grad.dtype == torch.bfloat16


def test_no_tokens():
    q, gate_weight, norm_weight = tensors()
    assert prologue.head_gate(q[:0], gate_weight, "sigmoid").shape == (0, 3, 4, 5)
    assert prologue.head_norm(q[:0], norm_weight, 1e-6).shape == (0, 3, 4, 6)


def test_a_gate_whose_scores_vanish_stays_finite():
    q = torch.full((1, 4, 6), -100.0, requires_grad=True)
    weight = torch.ones(4, 6, 5, requires_grad=True)
    gate = prologue.head_gate(q, weight, "sigmoid")
    gate.sum().backward()
    assert gate.isfinite().all()
    assert q.grad.isfinite().all()
    assert weight.grad.isfinite().all()


def test_unknown_gate():
    q, weight, _ = tensors()
    with pytest.raises(ValueError, match="kind: expected one of sigmoid, softmax, got 'relu'"):
        prologue.head_gate(q, weight, "relu")
