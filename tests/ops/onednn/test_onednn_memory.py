"""What a call holds besides its inputs and results does not grow with the tokens."""

import pytest
import torch

from flashmhf.benchmarking.measuring import peak_bytes
from flashmhf.ops.prologue import Prologue


@pytest.mark.parametrize("threads", [1, 2])
def test_memory_is_bounded_by_a_block_of_tokens(threads, dtype, onednn):
    torch.set_num_threads(threads)
    k, u, v = (torch.randn(2, 2, 256, 16, dtype=dtype) for _ in range(3))

    def extra_bytes(T: int) -> tuple[int, int]:
        q, dout = (torch.randn(T, 2, 16, dtype=dtype) for _ in range(2))
        gate = torch.rand(T, 2, 2)
        forward = peak_bytes(lambda: onednn.forward(q, k, u, v, gate), q.device) - q.nbytes
        results = q.nbytes + gate.nbytes + k.nbytes + u.nbytes + v.nbytes
        backward = peak_bytes(lambda: onednn.backward(dout, q, k, u, v, gate, (True,) * 5), q.device)
        return forward, backward - results

    few, many = extra_bytes(2048), extra_bytes(16384)
    assert all(x < 1.2 * y for x, y in zip(many, few, strict=True))


def test_memory_of_norm_and_gate(dtype, onednn):
    gate_weight, norm_weight, options = torch.randn(2, 16, 3), torch.randn(2, 16), Prologue("sigmoid", 1.0, 1e-6)

    def extra_bytes(T: int) -> tuple[int, int]:
        q, dgate = torch.randn(T, 2, 16, dtype=dtype), torch.randn(T, 2, 3)
        dnormed = torch.randn_like(q)
        arguments = (q, gate_weight, norm_weight, options)
        forward = peak_bytes(lambda: onednn.prologue_forward(*arguments), q.device) - q.nbytes - dgate.nbytes
        return forward, peak_bytes(lambda: onednn.prologue_backward(*arguments, dnormed, dgate), q.device)

    few, many = extra_bytes(2048), extra_bytes(16384)
    assert all(x < 1.2 * y for x, y in zip(many, few, strict=True))
