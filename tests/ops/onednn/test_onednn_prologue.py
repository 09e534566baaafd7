"""Norm and gate, forward and backward, against PyTorch's operators in float64 and, for odd values, in float32."""

import pytest
import torch

from flashmhf.ops import prologue
from flashmhf.ops.prologue import Prologue

# Threads, and (T, H, D, E).
SIZES = {
    "one token": (1, (1, 3, 8, 4)),
    "one sub-network": (1, (70, 2, 24, 1)),
    "many sub-networks": (1, (65, 1, 16, 33)),
    "head dim 1": (1, (9, 2, 1, 3)),
    "segments": (3, (131, 1, 10, 5)),
    "segments that differ in size": (5, (501, 2, 6, 3)),
}
PARTS = {"both": (True, True), "gate": (True, False), "norm": (False, True), "neither": (False, False)}


def tensors(sizes, dtype, has_gate=True, has_norm=True) -> list:
    """q, gate_weight, norm_weight, and the gradients of normed and gate."""
    T, H, D, E = sizes
    shapes = [(T, H, D), (H, D, E) if has_gate else None, (H, D) if has_norm else None, (T, H, D)]
    shapes.append((T, H, E) if has_gate else None)
    dtypes = [dtype, torch.float32, torch.float32, dtype, torch.float32]
    return [None if s is None else torch.randn(s).to(d) for s, d in zip(shapes, dtypes, strict=True)]


def results(module, inputs, options) -> list:
    *arguments, dnormed, dgate = inputs
    forward = getattr(module, "prologue_forward", None) or module.forward
    backward = getattr(module, "prologue_backward", None) or module.backward
    return [*forward(*arguments, options), *backward(*arguments, options, dnormed.clone(), dgate)]


@pytest.mark.parametrize("gate_type", prologue.GATES)
@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("sizes", SIZES)
def test_against_float64(sizes, parts, gate_type, dtype, onednn, cut, poisoned_memory):
    threads, shape = SIZES[sizes]
    cut(threads)
    inputs = tensors(shape, dtype, *PARTS[parts])
    options = Prologue(gate_type, 2.5, 1e-3)
    got, eager = results(onednn, inputs, options), results(prologue, inputs, options)
    exact = results(prologue, [None if x is None else x.double() for x in inputs], options)
    for mine, other, want in zip(got, eager, exact, strict=True):
        assert (mine is None) == (want is None)
        if mine is not None:
            assert (mine.dtype, mine.shape) == (other.dtype, other.shape)
            assert not mine.isnan().any()
            error, budget = ((x.double() - want).norm() for x in (mine, other))
            assert error <= 2 * budget + 4 * torch.finfo(torch.float32).eps * want.norm()


ODD = {
    "NaN": torch.nan,
    "infinity": torch.inf,
    "minus infinity": -torch.inf,
    "overflow": 1e30,
    "large": 200.0,
    "subnormal": 1e-40,
    "zero": 0.0,
}


@pytest.mark.parametrize("gate_type", prologue.GATES)
@pytest.mark.parametrize("parts", ["both", "gate", "norm"])
@pytest.mark.parametrize("value", ODD)
def test_odd_values_as_in_pytorch_and_only_in_their_row(value, parts, gate_type, onednn, cut):
    cut(3)
    inputs = tensors((70, 2, 8, 3), torch.float32, *PARTS[parts])
    options = Prologue(gate_type, 1.0, 1e-6)
    clean = results(onednn, inputs, options)
    inputs[0][5, 1] = ODD[value]
    inputs[0][7, 0, 3] = ODD[value]
    got, want = results(onednn, inputs, options), results(prologue, inputs, options)
    others = [t for t in range(70) if t not in (5, 7)]
    for i, (mine, other, before) in enumerate(zip(got, want, clean, strict=True)):
        if mine is not None:
            torch.testing.assert_close(mine, other, equal_nan=True, rtol=1e-4, atol=1e-5)
            assert i > 2 or torch.equal(mine[others], before[others])


def test_extreme_logits(onednn):
    """All scores vanish, one dominates, all overflow."""
    q = torch.tensor([-300.0, -90.0, -88.5, -20.0, 0.0, 88.5, 200.0, 3e38]).view(-1, 1, 1)
    inputs = [q, torch.tensor([[[1.0, 0.5, -1.0]]]), None, torch.randn(8, 1, 1), torch.randn(8, 1, 3)]
    for gate_type in prologue.GATES:
        options = Prologue(gate_type, 3.0, 1e-6)
        for mine, other in zip(*(results(x, inputs, options) for x in (onednn, prologue)), strict=True):
            torch.testing.assert_close(mine, other, equal_nan=True)


def test_no_tokens(onednn, dtype):
    normed, gate, dq, dgate_weight, dnorm_weight = results(
        onednn, tensors((0, 2, 8, 3), dtype), Prologue("sigmoid", 1.0, 1e-6)
    )
    assert (normed.shape, gate.shape, dq.shape) == ((0, 2, 8), (0, 2, 3), (0, 2, 8))
    assert not dgate_weight.any()
    assert not dnorm_weight.any()


def test_weights_of_every_dtype_and_layout(onednn, cut):
    cut(2)
    options = Prologue("sigmoid", 1.0, 1e-6)
    q, gate_weight, norm_weight, dnormed, dgate = tensors((67, 2, 8, 3), torch.float32)
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        weights = gate_weight.to(dtype), norm_weight.to(dtype)
        got = results(onednn, [q, *weights, dnormed, dgate], options)
        assert [x.dtype for x in got[3:]] == [dtype, dtype]
        strided = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, *weights)]
        for mine, other in zip(got, results(onednn, [*strided, dnormed, dgate], options), strict=True):
            assert torch.equal(mine, other)
