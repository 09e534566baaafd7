"""FlashMHF as a PyTorch operator: schema, shapes for tracing, derivatives.

The operators are opaque to torch.compile and run whichever backend `backends.select` gives. Second derivatives go
through the reference formula, so they work on every backend at the reference's cost in memory.
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from flashmhf.ops import backends, calls, reference
from flashmhf.ops.autograd import register_autograd
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
    return calls.run(_select, _compute_forward, (q, k, u, v, gate), (backend,))


@torch.library.impl(_LIBRARY, "flash_mhf_backward", "CompositeExplicitAutograd")
def _backward(
    dout: Tensor, q: Tensor, k: Tensor, u: Tensor, v: Tensor, gate: Tensor | None, needs: list[bool], backend: str
) -> list[Tensor]:
    """The gradients that are needed, in the order of the inputs (an operator's list holds no None)."""
    return calls.run(_select, _compute_backward, (q, k, u, v, gate, dout), (backend, *needs))


def _compute_forward(run: ModuleType, tensors: tuple[Any, ...], options: tuple[Any, ...]) -> Tensor:
    return run.forward(*tensors).contiguous()


def _compute_backward(run: ModuleType, tensors: tuple[Any, ...], options: tuple[Any, ...]) -> list[Tensor]:
    *inputs, dout = tensors
    _, *needs = options
    return [grad.contiguous() for grad in run.backward(dout, *inputs, tuple(needs)) if grad is not None]


def _select(tensors: tuple[Any, ...], options: tuple[Any, ...]) -> ModuleType:
    return backends.select(Problem.of(*tensors[:5]), options[0])


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


def _differentiate_forward(tensors, options, needs, dout: Tensor) -> list[Tensor | None]:
    grads = iter(torch.ops.flashmhf.flash_mhf_backward(dout, *tensors, list(needs), *options))
    return [next(grads) if need else None for need in needs]


def _differentiate_backward(tensors, options, needs, *grad_grads: Tensor | None) -> tuple[Tensor | None, ...]:
    needed, _ = options

    def gradients(inputs: list[Any]) -> list[Tensor]:
        dout, q, k, u, v, gate = inputs
        return [grad for grad in reference.backward(dout, q, k, u, v, gate, tuple(needed)) if grad is not None]

    return differentiate_gradients(tensors, needs, grad_grads, gradients)


register_autograd(_LIBRARY, "flash_mhf", _forward, _differentiate_forward)
register_autograd(_LIBRARY, "flash_mhf_backward", _backward, _differentiate_backward)
