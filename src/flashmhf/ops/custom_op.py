"""FlashMHF as a PyTorch operator: schema, shapes for tracing, derivatives.

The operators are opaque to torch.compile and run whichever backend `backends.select` gives. Second derivatives go
through the reference formula, so they work on every backend at the reference's cost in memory.
"""

from typing import Any

import torch
from torch import Tensor

from flashmhf.ops import backends, reference
from flashmhf.ops.problem import Problem
from flashmhf.ops.second_derivatives import differentiate_gradients

_LIBRARY = torch.library.Library("flashmhf", "DEF")
_LIBRARY.define(
    "flash_mhf(Tensor q, Tensor k, Tensor u, Tensor v, Tensor? gate, str backend) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.define(
    "flash_mhf_backward(Tensor dout, Tensor q, Tensor k, Tensor u, Tensor v, Tensor? gate, bool[] needs, str backend)"
    " -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.impl(_LIBRARY, "flash_mhf", "CompositeExplicitAutograd")
def _forward(q: Tensor, k: Tensor, u: Tensor, v: Tensor, gate: Tensor | None, backend: str) -> Tensor:
    return backends.select(Problem.of(q, k, u, v, gate), backend).forward(q, k, u, v, gate).contiguous()


@torch.library.impl(_LIBRARY, "flash_mhf_backward", "CompositeExplicitAutograd")
def _backward(
    dout: Tensor, q: Tensor, k: Tensor, u: Tensor, v: Tensor, gate: Tensor | None, needs: list[bool], backend: str
) -> list[Tensor]:
    """The gradients that are needed, in the order of the inputs (an operator's list holds no None)."""
    run = backends.select(Problem.of(q, k, u, v, gate), backend)
    grads = run.backward(dout, q, k, u, v, gate, tuple(needs))
    return [grad.contiguous() for grad in grads if grad is not None]


@torch.library.register_fake("flashmhf::flash_mhf", lib=_LIBRARY)
def _forward_fake(q: Tensor, k: Tensor, u: Tensor, v: Tensor, gate: Tensor | None, backend: str) -> Tensor:
    Problem.of(q, k, u, v, gate)
    return q.new_empty(q.shape)


@torch.library.register_fake("flashmhf::flash_mhf_backward", lib=_LIBRARY)
def _backward_fake(
    dout: Tensor, q: Tensor, k: Tensor, u: Tensor, v: Tensor, gate: Tensor | None, needs: list[bool], backend: str
) -> list[Tensor]:
    inputs = (q, k, u, v, gate)
    return [x.new_empty(x.shape) for x, need in zip(inputs, needs, strict=True) if need and x is not None]


def _save_forward(ctx, inputs, output) -> None:
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _differentiate_forward(ctx, dout: Tensor):
    needs = list(ctx.needs_input_grad[:5])
    grads = iter(torch.ops.flashmhf.flash_mhf_backward(dout, *ctx.saved_tensors, needs, ctx.backend))
    return (*(next(grads) if need else None for need in needs), None)


def _save_backward(ctx, inputs, output) -> None:
    *tensors, ctx.needs, _ = inputs
    ctx.save_for_backward(*tensors)


def _differentiate_backward(ctx, grad_grads: list[Tensor | None]):
    def gradients(inputs: list[Any]) -> list[Tensor]:
        dout, q, k, u, v, gate = inputs
        return [grad for grad in reference.backward(dout, q, k, u, v, gate, tuple(ctx.needs)) if grad is not None]

    return (*differentiate_gradients(ctx.saved_tensors, ctx.needs_input_grad[:6], grad_grads, gradients), None, None)


torch.library.register_autograd(
    "flashmhf::flash_mhf", _differentiate_forward, setup_context=_save_forward, lib=_LIBRARY
)
torch.library.register_autograd(
    "flashmhf::flash_mhf_backward", _differentiate_backward, setup_context=_save_backward, lib=_LIBRARY
)
