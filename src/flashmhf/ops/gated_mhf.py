"""Per-head norm, gate and `flash_mhf` as one operator that saves only its inputs.

The normed Q and the gate are recomputed in the backward. Like `flash_mhf` it runs on the backend that
`backends.select` returns; second derivatives go through the reference.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from flashmhf.ops import backends, call_cache, reference
from flashmhf.ops.autocast import autocast_dtype, cast_inputs, without_autocast
from flashmhf.ops.autograd import is_transformed, register_autograd
from flashmhf.ops.batching import TOKENS, WEIGHTS, register_vmap
from flashmhf.ops.namespace import NAMESPACE
from flashmhf.ops.problem import DTYPES, Problem
from flashmhf.ops.prologue import GATES, Prologue
from flashmhf.ops.second_derivatives import differentiate_gradients

_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")
_TENSORS = "Tensor q, Tensor k, Tensor u, Tensor v, Tensor? gate_weight, Tensor? norm_weight"
_OPTIONS = "str gate_type, float gate_total, float norm_eps, str backend"
_LIBRARY.define(f"gated_mhf({_TENSORS}, {_OPTIONS}) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
_LIBRARY.define(
    f"gated_mhf_backward(Tensor dout, {_TENSORS}, bool[] needs, {_OPTIONS}) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_GATED_MHF = getattr(torch.ops, NAMESPACE).gated_mhf.default
_GATED_MHF_BACKWARD = getattr(torch.ops, NAMESPACE).gated_mhf_backward.default


def gated_mhf(
    q: Tensor,
    k: Tensor,
    u: Tensor,
    v: Tensor,
    gate_weight: Tensor | None = None,
    norm_weight: Tensor | None = None,
    *,
    gate_type: str = "sigmoid",
    gate_total: float = 1.0,
    norm_eps: float = 1e-6,
    backend: str = "auto",
) -> Tensor:
    """`flash_mhf` of the normed q, with a gate computed from it.

    Args:
        q, k, u, v, backend: as in `flash_mhf`; q is the projected input before its norm. With gate_weight, k, u and v
            may also be (H_kv E, F, D), and so are their gradients.
        gate_weight: (H, D, E), the weight of the gate's logits, or None for a plain sum over sub-networks.
        norm_weight: (H, D), the weight of an RMSNorm of each head, or None for no norm.
        gate_type: "sigmoid" (of the logits, divided by its sum over E) or "softmax"; not used without gate_weight.
        gate_total: what the gate sums to over E; 1 without gate_weight.
        norm_eps: epsilon of the norm; not used without norm_weight.

    Returns:
        (..., H, D), contiguous, in q's dtype. Norm and gate are computed in float32.

    Raises:
        ValueError: an invalid argument; the message names it, what was expected and what was given.
    """
    if autocast_dtype(q.device.type) is not None:
        q, k, u, v = cast_inputs(q, k, u, v)
        if is_transformed():  # autocast cannot be disabled inside the operator
            with without_autocast(q.device.type):
                return _GATED_MHF(q, k, u, v, gate_weight, norm_weight, gate_type, gate_total, norm_eps, backend)
    return _GATED_MHF(q, k, u, v, gate_weight, norm_weight, gate_type, gate_total, norm_eps, backend)


@torch.library.impl(_LIBRARY, "gated_mhf", "CompositeExplicitAutograd")
def _forward(q, k, u, v, gate_weight, norm_weight, gate_type, gate_total, norm_eps, backend) -> Tensor:
    tensors = (q, k, u, v, gate_weight, norm_weight)
    return call_cache.run(_select, _compute_forward, tensors, (gate_type, gate_total, norm_eps, backend))


@torch.library.impl(_LIBRARY, "gated_mhf_backward", "CompositeExplicitAutograd")
def _backward(
    dout, q, k, u, v, gate_weight, norm_weight, needs, gate_type, gate_total, norm_eps, backend
) -> list[Tensor]:
    """The gradients that are needed, in the order of the inputs (an operator cannot return None in a list)."""
    tensors = (q, k, u, v, gate_weight, norm_weight, dout)
    grads = call_cache.run(_select, _compute_backward, tensors, (gate_type, gate_total, norm_eps, backend, *needs))
    return _in_shapes(grads, tensors, needs)


def rows(k: Tensor, u: Tensor, v: Tensor, gate_weight: Tensor | None) -> tuple[Tensor, ...]:
    """K, U and V as (H_kv, E, F, D). Below autograd this costs nothing in a replayed call."""
    if gate_weight is None or k.dim() != 3:
        return k, u, v
    E = gate_weight.shape[-1]
    return tuple(x.view(x.shape[0] // E, E, *x.shape[1:]) for x in (k, u, v))


def _in_shapes(grads: list[Tensor], tensors: tuple[Any, ...], needs: Sequence[bool]) -> list[Tensor]:
    """Gradients of K, U and V in the shape in which these were given."""
    if tensors[1].dim() != 3:
        return grads
    inputs = [x for x, need in zip(tensors, needs, strict=False) if need]
    return [grad if grad.dim() == x.dim() else grad.view(x.shape) for grad, x in zip(grads, inputs, strict=True)]


def _compute_forward(run: ModuleType, tensors: tuple[Any, ...], options: tuple[Any, ...]) -> Tensor:
    q, k, u, v, gate_weight, norm_weight = tensors
    k, u, v = rows(k, u, v, gate_weight)
    with without_autocast(q.device.type):
        normed, gate = run.prologue_forward(q, gate_weight, norm_weight, Prologue(*options[:3]))
        return run.forward(normed, k, u, v, gate).contiguous()


def _compute_backward(run: ModuleType, tensors: tuple[Any, ...], options: tuple[Any, ...]) -> list[Tensor]:
    q, k, u, v, gate_weight, norm_weight, dout = tensors
    k, u, v = rows(k, u, v, gate_weight)
    prologue, needs = Prologue(*options[:3]), options[4:]
    needs_prologue = needs[0] or needs[4] or needs[5]
    op_needs = (needs_prologue, *needs[1:4], needs_prologue and gate_weight is not None)
    dq = dgate_weight = dnorm_weight = None
    with without_autocast(q.device.type):
        normed, gate = run.prologue_forward(q, gate_weight, norm_weight, prologue)
        dnormed, dk, du, dv, dgate = run.backward(dout, normed, k, u, v, gate, op_needs)
        del normed, gate
        if dnormed is not None:
            dq, dgate_weight, dnorm_weight = run.prologue_backward(
                q, gate_weight, norm_weight, prologue, dnormed.contiguous(), dgate
            )
    grads = (dq, dk, du, dv, dgate_weight, dnorm_weight)
    return [grad.contiguous() for grad, need in zip(grads, needs, strict=True) if need and grad is not None]


def _select(tensors: tuple[Any, ...], options: tuple[Any, ...]) -> ModuleType:
    q, k, u, v, gate_weight, norm_weight, *_ = tensors
    gate_type, gate_total, norm_eps, backend, *_ = options
    prologue = Prologue(gate_type, gate_total, norm_eps)
    return backends.select(_check(q, k, u, v, gate_weight, norm_weight, prologue), backend)


@torch.library.register_fake(f"{NAMESPACE}::gated_mhf", lib=_LIBRARY)
def _forward_fake(q, k, u, v, gate_weight, norm_weight, gate_type, gate_total, norm_eps, backend) -> Tensor:
    _check(q, k, u, v, gate_weight, norm_weight, Prologue(gate_type, gate_total, norm_eps))
    backends.check_name(backend)
    return q.new_empty(q.shape)


@torch.library.register_fake(f"{NAMESPACE}::gated_mhf_backward", lib=_LIBRARY)
def _backward_fake(
    dout, q, k, u, v, gate_weight, norm_weight, needs, gate_type, gate_total, norm_eps, backend
) -> list[Tensor]:
    inputs = (q, k, u, v, gate_weight, norm_weight)
    return [x.new_empty(x.shape) for x, need in zip(inputs, needs, strict=True) if need and x is not None]


def _check(q, k, u, v, gate_weight, norm_weight, prologue: Prologue) -> Problem:
    if gate_weight is not None and k.dim() == 3:
        _check_rows(k, u, v, gate_weight)
    rows_k, rows_u, rows_v = rows(k, u, v, gate_weight)
    problem = replace(Problem.of(q, rows_k, rows_u, rows_v), has_gate=gate_weight is not None)
    if prologue.gate_type not in GATES:
        raise ValueError(f"gate_type: expected one of {', '.join(GATES)}, got {prologue.gate_type!r}")
    if not math.isfinite(prologue.gate_total):
        raise ValueError(f"gate_total: expected a finite number, got {prologue.gate_total}")
    if gate_weight is None and prologue.gate_total != 1.0:
        raise ValueError(f"gate_total: expected 1 without gate_weight, got {prologue.gate_total:g}")
    if not 0.0 <= prologue.norm_eps < math.inf:
        raise ValueError(f"norm_eps: expected a finite number >= 0, got {prologue.norm_eps}")
    _check_weight("gate_weight", gate_weight, (problem.H, problem.D, problem.E), q.device)
    _check_weight("norm_weight", norm_weight, (problem.H, problem.D), q.device)
    return problem


def _check_rows(k: Tensor, u: Tensor, v: Tensor, gate_weight: Tensor) -> None:
    """Of (H_kv E, F, D)."""
    E = gate_weight.shape[-1] if gate_weight.dim() == 3 else 0
    if E < 1 or k.shape[0] % E != 0:
        raise ValueError(
            f"k: expected a multiple of gate_weight's E rows (H, D, E), got {tuple(k.shape)} and "
            f"{tuple(gate_weight.shape)}"
        )
    for name, x in (("u", u), ("v", v)):
        if x.shape != k.shape:
            raise ValueError(f"{name}: expected k's shape {tuple(k.shape)}, got {tuple(x.shape)}")


def _check_weight(name: str, weight: Tensor | None, shape: tuple[int, ...], device: torch.device) -> None:
    if weight is None:
        return
    if weight.shape != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(weight.shape)}")
    if weight.dtype not in DTYPES:
        raise ValueError(f"{name}: expected float64, float32, float16 or bfloat16, got {weight.dtype}")
    if weight.device != device:
        raise ValueError(f"{name}: expected q's device {device}, got {weight.device}")


def _differentiate_forward(tensors, options, needs, dout: Tensor) -> list[Tensor | None]:
    grads = iter(_GATED_MHF_BACKWARD(dout, *tensors, list(needs), *options))
    return [next(grads) if need else None for need in needs]


def _differentiate_backward(tensors, options, needs, *grad_grads: Tensor | None) -> tuple[Tensor | None, ...]:
    return differentiate_gradients(tensors, needs, grad_grads, lambda inputs: _gradients(*inputs, *options))


def _forward_formula(q, k, u, v, gate_weight, norm_weight, *options) -> Tensor:
    _select((q, k, u, v, gate_weight, norm_weight), options)
    k, u, v = rows(k, u, v, gate_weight)
    return reference.gated_forward(q, k, u, v, gate_weight, norm_weight, Prologue(*options[:3]))


def _gradients(dout, q, k, u, v, gate_weight, norm_weight, needs, *options) -> list[Tensor]:
    """The formula of the backward operator."""
    tensors = (q, k, u, v, gate_weight, norm_weight)
    k, u, v = rows(k, u, v, gate_weight)
    inputs = (q, k, u, v, gate_weight, norm_weight)
    grads = reference.gated_backward(dout, *inputs, tuple(needs), Prologue(*options[:3]))
    return _in_shapes([grad for grad in grads if grad is not None], tensors, needs)


register_autograd(_LIBRARY, "gated_mhf", _forward, _differentiate_forward, _forward_formula)
register_autograd(_LIBRARY, "gated_mhf_backward", _backward, _differentiate_backward, _gradients)
register_vmap(_LIBRARY, "gated_mhf", (TOKENS, *(WEIGHTS,) * 5), _select)
