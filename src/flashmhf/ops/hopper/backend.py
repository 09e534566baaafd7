"""The backend's interface, as `ops/backends.py` loads it: Hopper's own kernels, and the portable ones for the rest.

The rest is norm and gate, and the backward for head dims above 128.
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

RECORDABLE = True  # what is launched follows from the metadata of the tensors (`ops/calls.py`)


def backward(
    dout: Tensor, q: Tensor, k: Tensor, u: Tensor, v: Tensor, gate: Tensor | None, needs: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """Gradients for q, k, u, v and gate, None where `needs` says so.

    One pass, eight products. Its dQ and dR differ in their last bits from run to run: where they must not, a kernel of
    their own computes them, eleven products in all; where no weight wants a gradient, that kernel alone, five.
    """
    if backward_tile(q.shape[-1]) is None:
        return portable_backward(dout, q, k, u, v, gate, needs)
    of_weights = any(needs[1:4])
    if of_weights and not torch.are_deterministic_algorithms_enabled():
        return fused_backward(dout, q, k, u, v, gate, needs)
    dq, dgate = backward_dq(dout, q, k, u, v, gate, needs)
    if not of_weights:
        return dq, None, None, None, dgate
    _, dk, du, dv, _ = fused_backward(dout, q, k, u, v, gate, (False, *needs[1:4], False))
    return dq, dk, du, dv, dgate
