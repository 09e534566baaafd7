"""SiLU through tanh.approx.f32, in Triton's interpreter, with random errors up to the documented one."""

import numpy as np
import pytest
import torch
from problems import NAMES, Shape, assert_within_budget, eager_results, exact_results, make_inputs

pytest.importorskip("triton")

import triton
import triton.language as tl
from triton.runtime.interpreter import TensorHandle

from flashmhf.ops.flash_mhf import flash_mhf
from flashmhf.ops.triton import backward as backward_module
from flashmhf.ops.triton import common, launch, tiles

TANH_ERROR = 2**-11  # what NVIDIA documents for tanh.approx.f32, relative
# From here on float32's tanh is 1. We assume the same of the hardware's, which is documented only for infinity.
# SiLU' multiplies 1 - tanh by M, so with an error there float16 would exceed its budget at M = 64.
SATURATED = 9.02


@pytest.fixture
def fast_tanh(monkeypatch):
    """Makes the kernels in the interpreter use tanh as on NVIDIA; returns its arguments so far."""
    if torch.cuda.is_available():
        pytest.skip("a GPU has its own tanh")
    calls = []
    random = np.random.default_rng(0)

    def tanh(x: tl.tensor) -> tl.tensor:
        calls.append(x)
        x_data = x.handle.data
        error = np.where(abs(x_data) < SATURATED, TANH_ERROR * random.uniform(-1, 1, x_data.shape), 0)
        data = (np.tanh(x_data.astype(np.float64)) * (1 + error)).clip(-1, 1).astype(np.float32)
        return tl.tensor(TensorHandle(data, tl.float32), x.type)

    monkeypatch.setattr(common, "tanh", tanh)
    monkeypatch.setattr(launch, "has_fast_tanh", lambda device, dtype: dtype.itemsize == 2)
    return calls


def check(inputs: list) -> list:
    *arguments, dout = inputs
    leaves = [None if x is None else x.detach().requires_grad_() for x in arguments]
    out = flash_mhf(*leaves, backend="triton")
    got = [out.detach(), *torch.autograd.grad(out, [x for x in leaves if x is not None], dout)]
    for name, mine, eager, exact in zip(NAMES, got, eager_results(inputs), exact_results(inputs), strict=False):
        assert_within_budget(name, mine, eager, exact, precision=dout.dtype)
    return got


SHAPES = [
    Shape((7,), 2, 2, 3, 5, 8),
    Shape((2, 3), 3, 1, 2, 40, 24),
    Shape((35,), 2, 2, 2, 33, 96),
    Shape((17,), 1, 1, 15, 4, 128),
    Shape((150,), 2, 1, 2, 70, 64),
]


@pytest.mark.parametrize("fused", [False, True], ids=["two_kernels", "fused"])
@pytest.mark.parametrize("gate", [True, False], ids=["gate", "no_gate"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_within_the_budget(shape, gate, fused, fast_tanh, monkeypatch):
    if fused:
        monkeypatch.setattr(backward_module, "fused_tile", lambda *_: tiles.Tile(16, 16, 4, 1))
    check(make_inputs(shape, torch.float16, gate))
    assert fast_tanh


@pytest.mark.parametrize("scale", [2**-6, 8.0, 64.0])
def test_small_and_large_arguments(scale, fast_tanh):
    """M from 0.02 to hundreds: tanh of tiny arguments, and where it saturates."""
    q, *rest = make_inputs(Shape((40,), 2, 2, 2, 40, 32), torch.float16)
    check([q * scale, *rest])


def test_float32_never_uses_it(fast_tanh):
    check(make_inputs(Shape((7,), 2, 2, 3, 5, 8), torch.float32))
    assert not fast_tanh


def test_non_finite_inputs_affect_only_their_own_row(fast_tanh):
    q, k, u, v, gate, dout = make_inputs(Shape((9,), 2, 2, 2, 20, 16), torch.float16)

    def run(q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        q = q.clone().requires_grad_()
        out = flash_mhf(q, k, u, v, gate, backend="triton")
        return out.detach(), torch.autograd.grad(out, q, dout)[0]

    dirty_q = q.clone()
    dirty_q[3, 1, 5], dirty_q[6, 0, 2], dirty_q[7, 0, 0] = float("inf"), float("nan"), -float("inf")
    spoiled = torch.zeros(9, 2, dtype=torch.bool)
    spoiled[3, 1] = spoiled[6, 0] = spoiled[7, 0] = True
    for dirty, clean in zip(run(dirty_q), run(q), strict=True):
        assert not dirty[spoiled].isfinite().all(-1).any()
        # With other random errors of tanh: close, not equal.
        torch.testing.assert_close(dirty[~spoiled], clean[~spoiled], rtol=2e-2, atol=2e-2)


def test_where_it_is_used(monkeypatch):
    gpu = torch.device("cuda")
    for name in tiles.TABLE:
        monkeypatch.setattr(tiles, "device_class", lambda device, name=name: name)
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            monkeypatch.setattr(tiles, "INTERPRETED", False)
            assert tiles.has_fast_tanh(gpu, dtype) == (dtype.itemsize == 2 and name != "gfx942")
            monkeypatch.setattr(tiles, "INTERPRETED", True)
            assert not tiles.has_fast_tanh(gpu, dtype)


@triton.jit
def tanh_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, common.tanh(tl.load(x_ptr + offs)))


@pytest.mark.gpu
def test_the_hardware_is_no_worse_than_assumed():
    x = torch.cat([torch.linspace(-100, 100, 2**20), torch.linspace(-1, 1, 2**20)]).cuda()
    out = torch.empty_like(x)
    tanh_kernel[(x.numel() // 1024,)](x, out, BLOCK=1024)
    exact = torch.tanh(x.double())
    assert ((out.double() - exact).abs() <= TANH_ERROR * exact.abs()).all()
    assert (out.abs()[x.abs() >= SATURATED] == 1).all()
