"""The operator under PyTorch's own machinery: opcheck, gradcheck, compile, autocast, checkpointing, FLOP counting."""

import pytest
import torch
from problems import Shape, make_inputs
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from flashmhf.ops import flops  # noqa: F401
from flashmhf.ops.flash_mhf import flash_mhf

SHAPE = Shape((2, 3), 4, 2, 3, 5, 6)
BACKENDS = ("reference", "blockwise")


def leaves(dtype=torch.float64, gate=True, shape=SHAPE):
    *arguments, _ = make_inputs(shape, dtype, gate)
    return [None if x is None else x.requires_grad_() for x in arguments]


@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend, gate):
    torch.library.opcheck(torch.ops.flashmhf.flash_mhf.default, (*leaves(gate=gate), backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_of_the_backward_operator(backend):
    *arguments, dout = make_inputs(SHAPE, torch.float64)
    needs = [True, False, True, True, True]
    torch.library.opcheck(torch.ops.flashmhf.flash_mhf_backward.default, (dout, *arguments, needs, backend))


@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend, gate):
    arguments = [x for x in leaves(gate=gate) if x is not None]
    assert torch.autograd.gradcheck(lambda *x: flash_mhf(*x, backend=backend), arguments)


@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_second_derivatives(backend, gate):
    arguments = [x for x in leaves(gate=gate, shape=Shape((2,), 2, 1, 2, 3, 4)) if x is not None]
    assert torch.autograd.gradgradcheck(lambda *x: flash_mhf(*x, backend=backend), arguments)


def test_second_derivatives_of_a_tensor_passed_twice():
    q, k, _, _, gate = leaves(shape=Shape((2,), 2, 1, 2, 3, 4))
    assert torch.autograd.gradgradcheck(lambda q, k, gate: flash_mhf(q, k, k, k, gate), (q, k, gate))


def test_compile_full_graph_with_a_changing_number_of_tokens():
    torch._dynamo.reset()
    q, k, u, v, gate = leaves(torch.float32)
    compiled = torch.compile(flash_mhf, fullgraph=True, backend="aot_eager")
    for length in (3, 5, 8):
        q_L, gate_L = (x.detach()[:, :1].repeat(1, length, 1, 1).requires_grad_() for x in (q, gate))
        out = compiled(q_L, k, u, v, gate_L)
        grads = torch.autograd.grad(out.square().sum(), (q_L, k, u, v, gate_L))
        eager = flash_mhf(q_L, k, u, v, gate_L)
        eager_grads = torch.autograd.grad(eager.square().sum(), (q_L, k, u, v, gate_L))
        torch.testing.assert_close(out, eager)
        torch.testing.assert_close(grads, eager_grads)


def test_autocast_casts_all_but_the_gate():
    q, k, u, v, gate = leaves(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = flash_mhf(q.bfloat16(), k, u, v, gate)
    assert out.dtype == torch.bfloat16
    expected = flash_mhf(*(x.bfloat16() for x in (q, k, u, v)), gate)
    assert torch.equal(out, expected)
    out.sum().backward()
    assert all(x.grad.dtype == torch.float32 for x in (q, k, u, v, gate))


def test_autocast_leaves_float64_alone():
    with torch.autocast("cpu", torch.bfloat16):
        assert flash_mhf(*leaves(torch.float64)).dtype == torch.float64


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing(use_reentrant):
    arguments = leaves()
    plain = torch.autograd.grad(flash_mhf(*arguments).square().sum(), arguments)
    out = checkpoint(flash_mhf, *arguments, use_reentrant=use_reentrant)
    out.square().sum().backward()
    for argument, expected in zip(arguments, plain, strict=True):
        torch.testing.assert_close(argument.grad, expected)


def test_meta_tensors_have_the_right_shape():
    arguments = [x.to("meta") for x in leaves(torch.float32)]
    assert flash_mhf(*arguments).shape == (2, 3, 4, 6)


def test_flops_are_counted():
    q, k, u, v, gate = leaves(torch.float32)
    product = 2 * q.numel() * SHAPE.E * SHAPE.F
    with FlopCounterMode(display=False) as forward:
        out = flash_mhf(q, k, u, v, gate)
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    assert forward.get_total_flops() == 3 * product
    assert backward.get_total_flops() == 8 * product
