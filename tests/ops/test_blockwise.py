"""The blockwise backend's tiles, and that its memory does not grow with the number of tokens."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flashmhf.benchmarking.measuring import peak_bytes
from flashmhf.ops import blockwise, reference


@given(
    T=st.integers(0, 10**6),
    H_kv=st.integers(1, 64),
    G=st.integers(1, 8),
    E=st.integers(1, 30),
    F=st.integers(1, 20_000),
)
def test_tiles_cover_the_problem_and_stay_small(T, H_kv, G, E, F):
    q = torch.empty(T, H_kv * G, 8, device="meta")
    k = torch.empty(H_kv, E, F, 8, device="meta")
    plan = blockwise.Plan.of(q, k)
    assert sum(s.stop - s.start for s in plan.heads()) == H_kv
    assert sum((e.stop - e.start) * (f.stop - f.start) for e, f in plan.parameter_rows()) == E * F
    assert all(e.stop - e.start == 1 or f.stop - f.start == F for e, f in plan.parameter_rows())
    tile = plan.block_heads * plan.block_tokens * G * plan.block_subnetworks * plan.block_width
    smallest = G * min(E * F, blockwise.MIN_TILE_ROWS)
    assert tile <= max(blockwise.ACCELERATOR_TILE_ELEMENTS, smallest)


@pytest.mark.parametrize("elements", [64, 2048])
def test_any_tile_gives_the_same_result(monkeypatch, elements):
    q, gate = torch.randn(37, 4, 8, dtype=torch.float64), torch.rand(37, 4, 3, dtype=torch.float64)
    k, u, v = (torch.randn(2, 3, 50, 8, dtype=torch.float64) for _ in range(3))
    dout = torch.randn_like(q)
    needs = (True,) * 5
    whole = [blockwise.forward(q, k, u, v, gate), *blockwise.backward(dout, q, k, u, v, gate, needs)]
    monkeypatch.setattr(blockwise, "CPU_TILE_ELEMENTS", elements)
    monkeypatch.setattr(blockwise, "MIN_TILE_ROWS", 16)
    cut = [blockwise.forward(q, k, u, v, gate), *blockwise.backward(dout, q, k, u, v, gate, needs)]
    torch.testing.assert_close(cut, whole)


def test_memory_is_bounded_by_a_block_of_tokens():
    """Besides inputs and results a call holds the same number of bytes for 2,048 tokens as for 16,384."""
    k, u, v = (torch.randn(2, 2, 256, 16) for _ in range(3))

    def extra_bytes(T: int) -> int:
        q, gate, dout = torch.randn(T, 2, 16), torch.rand(T, 2, 2), torch.randn(T, 2, 16)
        results = q.nbytes + gate.nbytes + k.nbytes + u.nbytes + v.nbytes
        peak = peak_bytes(lambda: blockwise.backward(dout, q, k, u, v, gate, (True,) * 5), q.device)
        return peak - results

    few, many = extra_bytes(2048), extra_bytes(16384)
    assert many < 1.2 * few


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_gate_of_a_single_token_is_not_rounded(dtype):
    """With one token and one sub-network its rounding error would be a factor of every result."""
    eps = torch.finfo(dtype).eps
    q, dout = torch.randn(1, 1, 512, dtype=dtype), torch.randn(1, 1, 512, dtype=dtype)
    k, u, v = (torch.randn(1, 1, 4096, 512, dtype=dtype) / 22 for _ in range(3))
    for gate in (0.75 + eps / 5, 0.75 - eps / 5):  # 0.75 when rounded
        gate_THE = torch.full((1, 1, 1), gate)
        inputs = (q, k, u, v, gate_THE)
        needs = (True,) * 5
        got = [blockwise.forward(*inputs), *blockwise.backward(dout, *inputs, needs)]
        exact = [x.double() for x in inputs]
        want = [reference.forward(*exact), *reference.backward(dout.double(), *exact, needs)]
        for mine, truth in zip(got[:5], want[:5], strict=True):
            factor = (mine.double() * truth).sum() / truth.square().sum()
            assert abs(factor - 1) < eps / 6, (mine.shape, factor - 1, eps)
