"""The backend `hopper` on the emulator: numerics, and when it is selected."""

import dataclasses

import pytest

pytest.importorskip("triton")

import torch
from problems import Shape, assert_within_budget, eager_results, exact_results, make_inputs

from flashmhf.ops import backends
from flashmhf.ops.flash_mhf import flash_mhf
from flashmhf.ops.hopper import tiles
from flashmhf.ops.hopper.launch import for_tma
from flashmhf.ops.problem import Problem
from gluon.hopper_backend import DTYPES, HOOKS, SHAPES, emulate_hopper, results, within_budget


@pytest.mark.parametrize("gate", [True, False], ids=["gate", "no_gate"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_gradients(shape, dtype, gate, monkeypatch):
    emulate_hopper(monkeypatch)
    within_budget(make_inputs(shape, dtype, gate))


def test_forward_at_head_dim_256(monkeypatch):
    emulate_hopper(monkeypatch)
    inputs = make_inputs(Shape((70,), 2, 1, 2, 50, 256), torch.bfloat16)
    out = flash_mhf(*inputs[:5], backend="hopper")
    assert_within_budget("out", out, eager_results(inputs)[0], exact_results(inputs)[0], precision=torch.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_many_interleavings(seed, monkeypatch):
    emulate_hopper(monkeypatch)
    within_budget(make_inputs(Shape((700,), 2, 1, 3, 150, 64), torch.bfloat16, seed=seed))


def test_strides(monkeypatch):
    emulate_hopper(monkeypatch)
    q, k, u, v, gate, dout = make_inputs(Shape((3, 40), 2, 2, 2, 20, 64), torch.float16)
    for layout in (
        lambda x: torch.cat([x[:, :1], x, x[:, :1]], 1)[:, 1:-1],
        lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        lambda x: x.repeat_interleave(2, -1)[..., ::2],
        lambda x: x[:1, :1].expand(x.shape),
    ):
        within_budget([layout(q), k, u, v, layout(gate), layout(dout)])
    within_budget([q, k.mT.contiguous().mT, u, v[..., :].clone(), gate.half(), dout])


def test_non_finite_inputs_affect_only_their_own_row(monkeypatch):
    emulate_hopper(monkeypatch)
    q, k, u, v, gate, _ = make_inputs(Shape((150,), 2, 2, 2, 20, 96), torch.bfloat16)
    monkeypatch.setitem(HOOKS, "tanh", lambda x: type(x)(torch.tanh(x.data), x.layout))
    clean = flash_mhf(q, k, u, v, gate, backend="hopper")
    q[3, 1, 5] = float("inf")
    q[66, 0, 2] = float("nan")
    dirty = flash_mhf(q, k, u, v, gate, backend="hopper")
    spoiled = torch.zeros(150, 2, dtype=torch.bool)
    spoiled[3, 1] = spoiled[66, 0] = True
    assert not dirty[spoiled].isfinite().any(1).all()
    assert torch.equal(dirty[~spoiled], clean[~spoiled])


def test_no_tokens(monkeypatch):
    emulate_hopper(monkeypatch)
    inputs = make_inputs(Shape((0,), 2, 1, 2, 20, 64), torch.bfloat16)
    for mine, exact in zip(results(inputs), exact_results(inputs), strict=True):
        assert torch.equal(mine.double(), exact)


def test_tensors_that_tma_cannot_address_are_copied():
    x = torch.randn(6, 2, 64, dtype=torch.bfloat16)
    assert for_tma(x) is x
    assert for_tma(x[::2]).data_ptr() == x.data_ptr()
    for unaligned in (
        x.transpose(1, 2),
        x[..., 1:57],
        x[:1].expand(6, 2, 64),
        torch.randn(5, 2, 12).bfloat16()[..., :8],
    ):
        copy = for_tma(unaligned)
        assert copy.is_contiguous()
        assert torch.equal(copy, unaligned)


def test_reasons_why_it_cannot_run(monkeypatch):
    gpu = Problem(3, 2, 2, 1, 4, 64, torch.bfloat16, torch.device("cuda"), has_gate=False)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(backends, "interprets_triton", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    (hopper,) = (row for row in backends.BACKENDS if row.name == "hopper")
    assert hopper.unsupported_reason(gpu) is None
    assert "has not been measured" in hopper.auto_skip_reason(gpu)
    for change, reason in (
        ({"dtype": torch.float32}, "supports bfloat16 and float16, got torch.float32"),
        ({"D": 36}, "supports head dims that are multiples of 8, got 36"),
        ({"D": 264}, "supports head dims up to 256, got 264"),
    ):
        assert hopper.unsupported_reason(dataclasses.replace(gpu, **change)) == reason
    with monkeypatch.context() as patch:
        patch.setattr(backends, "_triton_version", lambda: "3.5.1")
        assert hopper.unsupported_reason(gpu) == "needs Triton 3.6 or later, got 3.5.1"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (10, 0))
    assert hopper.unsupported_reason(gpu) == "needs compute capability 9.0, got (10, 0)"


def test_auto_selects_it_where_it_measured_faster(monkeypatch):
    emulate_hopper(monkeypatch)
    inputs = make_inputs(Shape((70,), 1, 1, 1, 20, 64), torch.bfloat16)
    problem = Problem.of(*inputs[:5])
    other = backends.select(problem, "auto").__name__
    assert other in ("flashmhf.ops.onednn.backend", "flashmhf.ops.blockwise")
    monkeypatch.setattr(tiles, "FASTER_FROM", {(64, "bfloat16"): 64})
    assert backends.select(problem, "auto").__name__ == "flashmhf.ops.hopper.backend"
    monkeypatch.setattr(tiles, "FASTER_FROM", {(64, "bfloat16"): 128})
    assert backends.select(problem, "auto").__name__ == other


def test_selecting_it_by_name_warns_once(monkeypatch, caplog):
    emulate_hopper(monkeypatch)
    backends._warn_once.cache_clear()
    problem = Problem.of(*make_inputs(Shape((70,), 1, 1, 1, 20, 64), torch.bfloat16)[:5])
    backends.select(problem, "hopper")
    backends.select(problem, "hopper")
    (record,) = caplog.records
    assert "not been verified on a GPU" in record.getMessage()
    monkeypatch.setattr(tiles, "VERIFIED", frozenset({(64, "bfloat16")}))
    backends._warn_once.cache_clear()
    backends.select(problem, "hopper")
    assert len(caplog.records) == 1
