"""The backend's interface, as `ops/backends.py` loads it: Hopper's own kernels, and the portable ones for the rest.

The rest is norm and gate, and the backward for head dims above 128, of tokens alone, or deterministic.
"""

import torch
from torch import Tensor

from flashmhf.ops.hopper.backward import backward as one_pass_backward
from flashmhf.ops.hopper.forward import forward
from flashmhf.ops.hopper.tiles import backward_tile
from flashmhf.ops.triton.backward import backward as portable_backward
from flashmhf.ops.triton.prologue import prologue_backward, prologue_forward

__all__ = ["backward", "forward", "prologue_backward", "prologue_forward"]

RECORDABLE = True  # what is launched follows from the metadata of the tensors (`ops/calls.py`)


def backward(
    dout: Tensor, q: Tensor, k: Tensor, u: Tensor, v: Tensor, gate: Tensor | None, needs: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """Gradients for q, k, u, v and gate, None where `needs` says so."""
    fits = backward_tile(q.shape[-1]) is not None and any(needs[1:4])
    run = one_pass_backward if fits and not torch.are_deterministic_algorithms_enabled() else portable_backward
    return run(dout, q, k, u, v, gate, needs)
