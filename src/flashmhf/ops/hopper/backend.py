"""The backend's interface, as `ops/backends.py` loads it.

The prologue and the backward for head dims above 128 use the portable Triton kernels.
"""

import torch
from torch import Tensor

from flashmhf.ops.hopper.backward import backward as fused_backward
from flashmhf.ops.hopper.backward_dq import backward_dq
from flashmhf.ops.hopper.forward import forward
from flashmhf.ops.hopper.tiles import backward_tile
from flashmhf.ops.triton.backward import backward as portable_backward
from flashmhf.ops.triton.prologue import prologue_backward, prologue_forward

__all__ = ["backward", "forward", "prologue_backward", "prologue_forward"]

RECORDABLE = True  # launches follow from the metadata of the tensors (`ops/call_cache.py`)


def backward(
    dout: Tensor, q: Tensor, k: Tensor, u: Tensor, v: Tensor, gate: Tensor | None, needs: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """Gradients for q, k, u, v and gate, None where `needs` says so.

    The fused kernel computes eight products; its dQ and dgate differ in their last bits from run to run. Under
    deterministic algorithms a separate kernel computes those, eleven products in all. If no weight requires a gradient,
    only that kernel runs, with five.
    """
    if backward_tile(q.shape[-1]) is None:
        return portable_backward(dout, q, k, u, v, gate, needs)
    needs_weights = any(needs[1:4])
    if needs_weights and not torch.are_deterministic_algorithms_enabled():
        return fused_backward(dout, q, k, u, v, gate, needs)
    dq, dgate = backward_dq(dout, q, k, u, v, gate, needs)
    if not needs_weights:
        return dq, None, None, None, dgate
    _, dk, du, dv, _ = fused_backward(dout, q, k, u, v, gate, (False, *needs[1:4], False))
    return dq, dk, du, dv, dgate
