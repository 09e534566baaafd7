"""Every backend, forward and all gradients, against the float64 reference within the error budget."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from problems import NAMES, Shape, assert_within_budget, eager_results, exact_results, make_inputs

from flashmhf.ops import backends
from flashmhf.ops.flash_mhf import flash_mhf
from flashmhf.ops.problem import Problem
from flashmhf.ops.triton import backward as triton_backward
from flashmhf.ops.triton import tiles

SHAPES = [
    Shape((7,), 2, 2, 3, 5, 8),
    Shape((1,), 4, 2, 1, 1, 16),
    Shape((0,), 2, 1, 2, 3, 8),
    Shape((), 2, 1, 2, 3, 8),
    Shape((2, 3), 3, 1, 2, 40, 24),
    Shape((2, 1, 5), 2, 2, 1, 70, 80),
    Shape((35,), 2, 2, 2, 33, 96),
    Shape((17,), 1, 1, 15, 4, 128),
]
LARGER = [
    Shape((300,), 2, 2, 3, 200, 96),
    Shape((130,), 4, 1, 2, 384, 128),
    Shape((19,), 1, 1, 1, 1000, 256),
    Shape((3,), 2, 2, 2, 50, 300),
]
# (T, H / H_kv, E, F, D): every pair of values of T (0 1 17 300), group (1 2 4), E (1 3 15), F (1 40 200 384) and
# D (24 80 96 128) occurs.
ODD = [
    (17, 2, 3, 384, 96), (300, 4, 1, 384, 128), (0, 4, 3, 40, 24), (0, 1, 15, 1, 96), (1, 2, 15, 200, 128),
    (17, 4, 1, 1, 80), (1, 1, 3, 384, 80), (1, 4, 1, 40, 96), (300, 2, 15, 40, 80), (300, 1, 1, 200, 24),
    (17, 2, 15, 384, 24), (300, 2, 3, 1, 128), (300, 1, 15, 200, 24), (0, 2, 1, 200, 80), (17, 1, 15, 40, 128),
    (17, 2, 3, 200, 96), (1, 2, 1, 1, 24), (0, 2, 15, 384, 128),
    (1, 4, 15, 200, 96), (300, 4, 3, 1, 96),
]  # fmt: skip
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(params=[row.name for row in backends.BACKENDS if row.name != "hopper"])
def backend(request) -> str:
    """Every backend except `hopper`, which does not support float32 (tests/ops/hopper).

    Without a GPU, Triton's kernels run in its interpreter.
    """
    if reason := backends.backends()[request.param]:
        pytest.skip(reason)
    return request.param


def check(backend: str, inputs: list) -> None:
    *arguments, dout = inputs
    problem = Problem.of(*arguments)
    if reason := backends.backends(problem)[backend]:
        pytest.skip(reason)
    leaves = [None if x is None else x.detach().requires_grad_() for x in arguments]
    out = flash_mhf(*leaves, backend=backend)
    assert out.is_contiguous()
    grads = torch.autograd.grad(out, [x for x in leaves if x is not None], dout)
    got = [out.detach(), *grads]
    activations = problem.T * problem.H * problem.E * problem.F
    for name, mine, eager, exact in zip(NAMES, got, eager_results(inputs), exact_results(inputs), strict=False):
        assert_within_budget(name, mine, eager, exact, precision=dout.dtype, num_activations=activations)


@pytest.mark.parametrize("gate", [True, False], ids=["gate", "no_gate"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_gradients(backend, shape, dtype, gate, poisoned_memory):
    check(backend, make_inputs(shape, dtype, gate))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_triton_forward_without_splitting_the_rows(shape, monkeypatch, poisoned_memory):
    monkeypatch.setattr(tiles, "SPLIT_MAX_TOKENS", 0)
    check("triton", make_inputs(shape, torch.float32))


@pytest.mark.parametrize("gate", [True, False], ids=["gate", "no_gate"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, Shape((70,), 4, 2, 1, 70, 64)], ids=str)
def test_triton_backward_with_tokens_first(shape, dtype, gate, monkeypatch, poisoned_memory):
    monkeypatch.setattr(
        triton_backward, "tile_for", lambda *arguments: tiles.tile_for(*arguments)._replace(tokens_first=True)
    )
    check("triton", make_inputs(shape, dtype, gate))


@pytest.mark.parametrize("gate", [True, False], ids=["gate", "no_gate"])
@pytest.mark.parametrize("shape", [*SHAPES, Shape((70,), 4, 2, 1, 70, 64)], ids=str)
def test_triton_fused_backward(shape, gate, fused):
    check("triton", make_inputs(shape, torch.float16, gate))


@pytest.mark.slow
@pytest.mark.parametrize("gate", [True, False], ids=["gate", "no_gate"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", LARGER, ids=str)
def test_larger_shapes(backend, shape, dtype, gate, poisoned_memory):
    check(backend, make_inputs(shape, dtype, gate))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("T", "group", "E", "F", "D"), ODD)
def test_odd_shapes_triton(T, group, E, F, D, dtype, poisoned_memory):
    check("triton", make_inputs(Shape((T,), group, 1, E, F, D), dtype))


@pytest.mark.slow
@pytest.mark.parametrize(("T", "group", "E", "F", "D"), ODD)
def test_odd_shapes_triton_fused_backward(T, group, E, F, D, fused):
    check("triton", make_inputs(Shape((T,), group, 1, E, F, D), torch.float16))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_shape_blockwise(data, poisoned_memory):
    H_kv = data.draw(st.integers(1, 3))
    shape = Shape(
        lead=tuple(data.draw(st.lists(st.integers(0, 6), max_size=3))),
        H=H_kv * data.draw(st.integers(1, 3)),
        H_kv=H_kv,
        E=data.draw(st.integers(1, 5)),
        F=data.draw(st.integers(1, 60)),
        D=data.draw(st.integers(1, 40)),
    )
    dtype = data.draw(st.sampled_from(DTYPES))
    check("blockwise", make_inputs(shape, dtype, data.draw(st.booleans()), seed=data.draw(st.integers(0, 999))))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_shape_onednn(data, poisoned_memory):
    H_kv, dtype = data.draw(st.integers(1, 3)), data.draw(st.sampled_from(backends.ONEDNN_DTYPES))
    shape = Shape(
        lead=tuple(data.draw(st.lists(st.integers(0, 6), max_size=3))),
        H=H_kv * data.draw(st.integers(1, 3)),
        H_kv=H_kv,
        E=data.draw(st.integers(1, 5)),
        F=data.draw(st.integers(1, 60)),
        D=data.draw(st.integers(1, 20)) * (2 if dtype == torch.bfloat16 else 1),
    )
    check("onednn", make_inputs(shape, dtype, data.draw(st.booleans()), seed=data.draw(st.integers(0, 999))))


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_shape_triton(data, poisoned_memory):
    H_kv = data.draw(st.integers(1, 2))
    shape = Shape(
        lead=tuple(data.draw(st.lists(st.integers(0, 4), max_size=3))),
        H=H_kv * data.draw(st.integers(1, 2)),
        H_kv=H_kv,
        E=data.draw(st.integers(1, 3)),
        F=data.draw(st.integers(1, 70)),
        D=data.draw(st.integers(1, 70)),
    )
    dtype = data.draw(st.sampled_from((torch.float32, torch.float16)))
    check("triton", make_inputs(shape, dtype, data.draw(st.booleans()), seed=data.draw(st.integers(0, 999))))


LAYOUTS = {
    "sliced sequence": lambda x: torch.cat([x[:, :1], x, x[:, :1]], 1)[:, 1:-1],
    "sequence first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "heads first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "last dimensions swapped": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "every second element": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "reversed batch": lambda x: torch.cat([x, x])[torch.arange(len(x))],
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_strides(backend, layout):
    inputs = make_inputs(Shape((3, 4), 2, 2, 2, 20, 16), torch.float32)
    q, k, u, v, gate, dout = inputs
    check(backend, [layout(q), k, u, v, layout(gate), layout(dout)])
    check(backend, [q, layout(k), u, layout(v), gate, dout])


def test_three_leading_strides(backend):
    """More strides than the kernels support: copied, with the same results."""
    q, k, u, v, gate, dout = make_inputs(Shape((2, 3, 4), 2, 2, 2, 20, 16), torch.float32)
    padded = torch.nn.functional.pad(q, (0, 0, 0, 0, 1, 1, 1, 1))[:, 1:-1, 1:-1]
    assert torch.equal(padded, q)
    check(backend, [padded, k, u, v, gate, dout])


def test_zero_strides(backend):
    """`.sum().backward()` passes an expanded gradient; a broadcast q or gate has zero strides, too."""
    q, k, u, v, gate, _ = make_inputs(Shape((3, 4), 2, 2, 2, 20, 16), torch.float32)
    check(backend, [q, k, u, v, gate, torch.ones(()).expand(q.shape)])
    check(backend, [q[:1].expand(q.shape), k, u, v, gate[:, :1].expand(gate.shape), q.clone()])


@pytest.mark.parametrize("needed", ["q", "k", "u", "v", "gate", "k gate", "q v", "u v"])
def test_only_the_gradients_that_are_needed(backend, needed, poisoned_memory):
    inputs = make_inputs(Shape((5,), 4, 2, 2, 20, 16), torch.float32)
    *arguments, dout = inputs
    named = dict(zip(("q", "k", "u", "v", "gate"), arguments, strict=True))
    for name in needed.split():
        named[name].requires_grad_()
    out = flash_mhf(**named, backend=backend)
    out.backward(dout)
    exact = dict(zip(NAMES, exact_results(inputs), strict=True))
    for name, tensor in named.items():
        if name in needed.split():
            torch.testing.assert_close(tensor.grad.double(), exact[f"d{name}"], rtol=1e-4, atol=1e-5)
        else:
            assert tensor.grad is None


def test_gate_in_another_precision(backend):
    inputs = make_inputs(Shape((5,), 2, 2, 3, 20, 16), torch.float32)
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        inputs[4] = inputs[4].to(dtype)
        check(backend, inputs)


def test_non_finite_inputs_affect_only_their_own_row(backend):
    q, k, u, v, gate, _ = make_inputs(Shape((9,), 2, 2, 2, 20, 16), torch.float32)
    clean = flash_mhf(q, k, u, v, gate, backend=backend)
    q[3, 1, 5] = float("inf")
    q[6, 0, 2] = float("nan")
    dirty = flash_mhf(q, k, u, v, gate, backend=backend)
    spoiled = torch.zeros(9, 2, dtype=torch.bool)
    spoiled[3, 1] = spoiled[6, 0] = True
    assert not dirty[spoiled].isfinite().all()
    torch.testing.assert_close(dirty[~spoiled], clean[~spoiled])


def test_same_inputs_give_the_same_bits(backend):
    *arguments, dout = make_inputs(Shape((50,), 4, 2, 2, 40, 16), torch.float32)
    leaves = [x.requires_grad_() for x in arguments]

    def run() -> tuple:
        out = flash_mhf(*leaves, backend=backend)
        return (out, *torch.autograd.grad(out, leaves, dout))

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)
