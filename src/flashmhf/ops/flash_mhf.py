"""`flash_mhf`, the public function, and the PyTorch operators behind it: schemas, fake tensors, derivatives.

The operators are opaque to torch.compile and run on the backend that `backends.select` returns. Second derivatives go
through the reference, so they work on every backend, at the reference's memory cost.
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from flashmhf.ops import backends, call_cache, reference
from flashmhf.ops.autocast import autocast_dtype, cast_inputs, without_autocast
from flashmhf.ops.autograd import is_transformed, register_autograd
from flashmhf.ops.batching import TOKENS, WEIGHTS, register_vmap
from flashmhf.ops.namespace import NAMESPACE
from flashmhf.ops.problem import Problem
from flashmhf.ops.second_derivatives import differentiate_gradients

_LIBRARY = torch.library.Library(NAMESPACE, "DEF")
_LIBRARY.define(
    "flash_mhf(Tensor q, Tensor k, Tensor u, Tensor v, Tensor? gate, str backend) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.define(
    "flash_mhf_backward(Tensor dout, Tensor q, Tensor k, Tensor u, Tensor v, Tensor? gate, bool[] needs, str backend)"
    " -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_FLASH_MHF = getattr(torch.ops, NAMESPACE).flash_mhf.default
_FLASH_MHF_BACKWARD = getattr(torch.ops, NAMESPACE).flash_mhf_backward.default


def flash_mhf(
    q: Tensor, k: Tensor, u: Tensor, v: Tensor, gate: Tensor | None = None, *, backend: str = "auto"
) -> Tensor:
    """Multi-head FFN over E gated sub-networks: `sum_e gate[..., e] * ((SiLU(q K_e^T) * (q U_e^T)) V_e)` per head.

    The T x (E F) activations are never written to memory, forward or backward (except by `backend="reference"`).
    Differentiable twice in every tensor; works under torch.compile(fullgraph=True), activation checkpointing and
    autocast (q, k, u and v are then cast to the autocast dtype, the gate is not).

    Works under the transforms of `torch.func`. Reverse mode runs on the backend; so does `vmap`, in one call. Forward
    mode (`jvp`, `jacfwd`, dual numbers) and second derivatives compute the reference's formula, in its time and memory.

    Args:
        q: (..., H, D). Any leading dimensions, any strides; float64, float32, float16 or bfloat16.
        k: (H_kv, E, F, D), q's dtype and device. H is a multiple of H_kv; head h reads parameter head
            h // (H / H_kv).
        u: as k.
        v: as k.
        gate: (..., H, E), any of the dtypes above, or None for all ones. float32 is recommended.
        backend: "auto", or a name in `flashmhf.backends()`; a named backend runs or raises, it never falls back.

    Returns:
        (..., H, D), contiguous, in q's dtype.

    Raises:
        ValueError: an invalid argument; the message names it, what was expected and what was given.

    Source: arXiv 2512.06989, section 3; `ops/reference.py` is the formula.
    """
    if autocast_dtype(q.device.type) is not None:
        q, k, u, v = cast_inputs(q, k, u, v)
        if is_transformed():  # autocast cannot be disabled inside the operator
            with without_autocast(q.device.type):
                return _FLASH_MHF(q, k, u, v, gate, backend)
    return _FLASH_MHF(q, k, u, v, gate, backend)


@torch.library.impl(_LIBRARY, "flash_mhf", "CompositeExplicitAutograd")
def _forward(q: Tensor, k: Tensor, u: Tensor, v: Tensor, gate: Tensor | None, backend: str) -> Tensor:
    return call_cache.run(_select, _compute_forward, (q, k, u, v, gate), (backend,))


@torch.library.impl(_LIBRARY, "flash_mhf_backward", "CompositeExplicitAutograd")
def _backward(
    dout: Tensor, q: Tensor, k: Tensor, u: Tensor, v: Tensor, gate: Tensor | None, needs: list[bool], backend: str
) -> list[Tensor]:
    """The gradients that are needed, in the order of the inputs (an operator cannot return None in a list)."""
    return call_cache.run(_select, _compute_backward, (q, k, u, v, gate, dout), (backend, *needs))


def _compute_forward(run: ModuleType, tensors: tuple[Any, ...], options: tuple[Any, ...]) -> Tensor:
    return run.forward(*tensors).contiguous()


def _compute_backward(run: ModuleType, tensors: tuple[Any, ...], options: tuple[Any, ...]) -> list[Tensor]:
    *inputs, dout = tensors
    _, *needs = options
    return [grad.contiguous() for grad in run.backward(dout, *inputs, tuple(needs)) if grad is not None]


def _select(tensors: tuple[Any, ...], options: tuple[Any, ...]) -> ModuleType:
    return backends.select(Problem.of(*tensors[:5]), options[0])


@torch.library.register_fake(f"{NAMESPACE}::flash_mhf", lib=_LIBRARY)
def _forward_fake(q: Tensor, k: Tensor, u: Tensor, v: Tensor, gate: Tensor | None, backend: str) -> Tensor:
    Problem.of(q, k, u, v, gate)
    backends.check_name(backend)
    return q.new_empty(q.shape)


@torch.library.register_fake(f"{NAMESPACE}::flash_mhf_backward", lib=_LIBRARY)
def _backward_fake(
    dout: Tensor, q: Tensor, k: Tensor, u: Tensor, v: Tensor, gate: Tensor | None, needs: list[bool], backend: str
) -> list[Tensor]:
    inputs = (q, k, u, v, gate)
    return [x.new_empty(x.shape) for x, need in zip(inputs, needs, strict=True) if need and x is not None]


def _differentiate_forward(tensors, options, needs, dout: Tensor) -> list[Tensor | None]:
    grads = iter(_FLASH_MHF_BACKWARD(dout, *tensors, list(needs), *options))
    return [next(grads) if need else None for need in needs]


def _differentiate_backward(tensors, options, needs, *grad_grads: Tensor | None) -> tuple[Tensor | None, ...]:
    return differentiate_gradients(tensors, needs, grad_grads, lambda inputs: _gradients(*inputs, *options))


def _forward_formula(q: Tensor, k: Tensor, u: Tensor, v: Tensor, gate: Tensor | None, backend: str) -> Tensor:
    _select((q, k, u, v, gate), (backend,))
    return reference.forward(q, k, u, v, gate)


def _gradients(
    dout: Tensor, q: Tensor, k: Tensor, u: Tensor, v: Tensor, gate: Tensor | None, needs: list[bool], backend: str
) -> list[Tensor]:
    """The formula of the backward operator."""
    return [grad for grad in reference.backward(dout, q, k, u, v, gate, tuple(needs)) if grad is not None]


register_autograd(_LIBRARY, "flash_mhf", _forward, _differentiate_forward, _forward_formula)
register_autograd(_LIBRARY, "flash_mhf_backward", _backward, _differentiate_backward, _gradients)
register_vmap(_LIBRARY, "flash_mhf", (TOKENS, WEIGHTS, WEIGHTS, WEIGHTS, TOKENS), _select)
