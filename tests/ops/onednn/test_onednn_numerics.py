"""Panels of rows, segments of tokens, odd sizes, gates, layouts: within the error budget of every backend."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from problems import NAMES, Shape, assert_within_budget, eager_results, exact_results, make_inputs

from flashmhf.ops.problem import Problem

ALL = (True,) * 5
# Threads, rows of a panel (None: all), segments and panels that follow, and the shape.
CASES = {
    "one tile": (1, None, 1, 1, Shape((9,), 2, 2, 3, 5, 8)),
    "blocks of tokens, the last of one": (1, None, 1, 1, Shape((129,), 2, 1, 2, 20, 8)),
    "blocks of rows, the last of one": (1, None, 1, 1, Shape((9,), 2, 1, 3, 43, 8)),
    "panels": (1, 128, 1, 3, Shape((131,), 2, 2, 3, 90, 16)),
    "panels, groups": (1, 128, 1, 3, Shape((70,), 6, 2, 3, 101, 8)),
    "panels of several blocks": (1, 256, 1, 3, Shape((5,), 2, 1, 5, 107, 8)),
    "segments": (3, None, 3, 1, Shape((131,), 1, 1, 2, 20, 16)),
    "segments, groups": (5, None, 5, 1, Shape((163,), 3, 1, 2, 21, 8)),
    "segments, groups, panels": (3, 128, 3, 3, Shape((133,), 4, 2, 3, 91, 8)),
    "segments that differ in size": (7, 128, 7, 2, Shape((501,), 2, 1, 1, 129, 6)),
    "sub-networks of one row": (2, 128, 2, 2, Shape((67,), 2, 1, 141, 1, 8)),
    "odd head dims": (2, None, 2, 1, Shape((67,), 2, 1, 3, 7, 10)),
}


def results(backend, inputs: list, needs: tuple[bool, ...] = ALL) -> list:
    *arguments, dout = inputs
    needs = tuple(need and x is not None for need, x in zip(needs, arguments, strict=True))
    return [backend.forward(*arguments), *backend.backward(dout, *arguments, needs)]


def check(backend, inputs: list) -> None:
    problem = Problem.of(*inputs[:5])
    activations = problem.T * problem.H * problem.E * problem.F
    got = results(backend, inputs)
    for name, mine, eager, exact in zip(NAMES, got, eager_results(inputs), exact_results(inputs), strict=True):
        if exact is not None:
            assert_within_budget(name, mine, eager, exact, precision=inputs[0].dtype, num_activations=activations)


@pytest.mark.parametrize("gate", [True, False], ids=["gate", "no_gate"])
@pytest.mark.parametrize("case", CASES)
def test_panels_and_segments(case, dtype, gate, onednn, cut, poisoned_memory):
    from flashmhf.ops.onednn import launch

    threads, panel_rows, segments, panels, shape = CASES[case]
    cut(threads, panel_rows, shape.D, dtype)
    inputs = make_inputs(shape, dtype, gate)
    arguments = launch.problem_arguments(inputs[0], inputs[1], torch.ones(1), threads, launch.BACKWARD_PANEL_ELEMENTS)
    assert arguments["segments"] % segments == 0
    assert -(-arguments["rows"] // arguments["panel_rows"]) == panels
    check(onednn, inputs)


@pytest.mark.parametrize("gate", [True, False], ids=["gate", "no_gate"])
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("tokens", [1, 2, 4, 5])
def test_few_tokens(tokens, threads, dtype, gate, onednn, cut, monkeypatch, poisoned_memory):
    """Up to FEW_TOKENS the forward pass reads the parameters row by row."""
    assert onednn.FEW_TOKENS == 4
    monkeypatch.setattr(onednn, "MIN_PARAMETERS", 100)
    cut(threads, None, 16)
    check(onednn, make_inputs(Shape((tokens,), 6, 2, 3, 21, 16), dtype, gate))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_panels_and_segments(data, dtype, onednn, cut, poisoned_memory):
    H_kv, even = data.draw(st.integers(1, 3)), 2 if dtype == torch.bfloat16 else 1
    shape = Shape(
        lead=(data.draw(st.integers(0, 300)),),
        H=H_kv * data.draw(st.integers(1, 3)),
        H_kv=H_kv,
        E=data.draw(st.integers(1, 5)),
        F=data.draw(st.integers(1, 70)),
        D=even * data.draw(st.integers(1, 12)),
    )
    cut(data.draw(st.integers(1, 4)), data.draw(st.sampled_from((128, 256))), shape.D, dtype)
    check(onednn, make_inputs(shape, dtype, data.draw(st.booleans()), seed=data.draw(st.integers(0, 999))))


@pytest.mark.parametrize("threads", [1, 3])
def test_partial_gradients_are_those_of_a_full_backward(threads, dtype, onednn, cut, poisoned_memory):
    cut(threads, 128, 8, dtype)
    inputs = make_inputs(Shape((131,), 4, 2, 3, 91, 8), dtype)
    full = results(onednn, inputs)[1:]
    for number in range(1, 2**5):
        needs = tuple(bool(number >> i & 1) for i in range(5))
        for need, grad, want in zip(needs, results(onednn, inputs, needs)[1:], full, strict=True):
            assert (grad is not None) == need
            assert grad is None or torch.equal(grad, want)


@pytest.mark.parametrize("gate_dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_gates_of_another_dtype(gate_dtype, dtype, onednn, cut, poisoned_memory):
    cut(3, 128, 8, dtype)
    inputs = make_inputs(Shape((131,), 2, 1, 3, 91, 8), dtype)
    inputs[4] = inputs[4].to(gate_dtype)
    got = results(onednn, inputs)
    assert got[5].dtype == gate_dtype
    want = results(onednn, [*inputs[:4], inputs[4].float(), inputs[5]])
    assert torch.equal(got[5], want[5].to(gate_dtype))
    for mine, other in zip(got[:5], want[:5], strict=True):
        assert torch.equal(mine, other)


LAYOUTS = {
    "tokens of a longer sequence": lambda x: torch.cat([x, x])[: len(x)],
    "heads first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "last dimension first": lambda x: x.movedim(-1, 0).contiguous().movedim(0, -1),
    "every second element": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "not aligned": lambda x: torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_layouts(layout, dtype, onednn, poisoned_memory):
    inputs = make_inputs(Shape((67,), 4, 2, 3, 20, 8), dtype)
    expected = results(onednn, inputs)
    for i in range(len(inputs)):
        for got, want in zip(
            results(onednn, [*inputs[:i], layout(inputs[i]), *inputs[i + 1 :]]), expected, strict=True
        ):
            assert torch.equal(got, want)


def test_no_tokens(dtype, onednn, poisoned_memory):
    inputs = make_inputs(Shape((2, 0), 4, 2, 3, 20, 8), dtype)
    out, dq, *dweights, dgate = results(onednn, inputs)
    assert (out.shape, dq.shape, dgate.shape) == ((2, 0, 4, 8), (2, 0, 4, 8), (2, 0, 4, 3))
    assert not any(grad.any() for grad in dweights)


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16], ids=str)
def test_the_default_dtype_has_no_influence(default, dtype, onednn, cut):
    from flashmhf.ops.onednn import library

    cut(3, 128, 8, dtype)
    inputs = make_inputs(Shape((131,), 2, 1, 3, 91, 8), dtype)
    expected = results(onednn, inputs)
    torch.set_default_dtype(default)
    library._unsupported_reason.cache_clear()
    try:
        assert library.unsupported_reason(dtype) is None
        got = results(onednn, inputs)
        assert onednn.forward(*inputs[:4], None).isfinite().all()
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(map(torch.equal, got, expected))


def test_non_finite_rows_stay_alone(dtype, onednn, cut):
    """Also in the gradients of q and of the gate."""
    cut(2, 128, 8, dtype)
    inputs = make_inputs(Shape((67,), 2, 1, 3, 91, 8), dtype)
    clean = results(onednn, inputs)
    for which, row, value in ((0, 3, torch.nan), (4, 5, torch.inf), (5, 66, -torch.inf)):
        inputs[which][row] = value
    dirty = results(onednn, inputs)
    others = [t for t in range(67) if t not in (3, 5, 66)]
    for i in (0, 1, 5):
        assert torch.equal(dirty[i][others], clean[i][others])
        assert not dirty[i][3].isfinite().any()
