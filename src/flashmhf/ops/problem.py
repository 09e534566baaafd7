"""Validation of shapes, dtypes and devices, and the legend of the dimensions.

    T     tokens: the product of all leading dimensions of q (batch B x sequence L)
    H     heads
    H_kv  parameter heads; H is a multiple of H_kv, head h reads parameter head h // (H / H_kv)
    E     parallel sub-networks per head
    F     width of one sub-network (d_ff = E x F rows of K, U and V per head)
    D     head dim

A suffix on a tensor's name spells its shape: `q_THD`, `k_HEFD`, `gate_THE`.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Problem:
    """What decides whether a backend can run a call.

    Attributes:
        T: tokens, the product of all leading dimensions of q.
        H: heads.
        H_kv: heads with their own K, U and V.
        E: sub-networks per head.
        F: width of a sub-network.
        D: head dim.
        dtype: of q, k, u and v.
        device: of all tensors.
        has_gate: whether there is a gate.
    """

    T: int
    H: int
    H_kv: int
    E: int
    F: int
    D: int
    dtype: torch.dtype
    device: torch.device
    has_gate: bool

    @classmethod
    def of(cls, q: Tensor, k: Tensor, u: Tensor, v: Tensor, gate: Tensor | None = None) -> "Problem":
        """Describes the call `flash_mhf(q, k, u, v, gate)`.

        Raises:
            ValueError: an invalid argument; the message names it, what was expected and what was given.
        """
        _check_shapes(q, k, u, v, gate)
        _check_dtypes(q, k, u, v, gate)
        H_kv, E, F, D = k.shape
        tokens = math.prod(q.shape[:-2])  # Size.numel() would specialise a traced graph on this number of tokens
        return cls(tokens, q.shape[-2], H_kv, E, F, D, q.dtype, q.device, gate is not None)


def _check_shapes(q: Tensor, k: Tensor, u: Tensor, v: Tensor, gate: Tensor | None) -> None:
    if q.dim() < 2:
        raise ValueError(f"q: expected shape (..., H, D), got {tuple(q.shape)}")
    if k.dim() != 4:
        raise ValueError(f"k: expected shape (H_kv, E, F, D), got {tuple(k.shape)}")
    for name, tensor in (("u", u), ("v", v)):
        if tensor.shape != k.shape:
            raise ValueError(f"{name}: expected k's shape {tuple(k.shape)}, got {tuple(tensor.shape)}")
    H, D = q.shape[-2:]
    H_kv, E, F, D_k = k.shape
    if min(H, H_kv, E, F, D_k) < 1:
        raise ValueError(f"q, k: expected H, H_kv, E, F, D >= 1, got q {tuple(q.shape)} and k {tuple(k.shape)}")
    if D_k != D:
        raise ValueError(f"q: expected the head dim of k, {D_k}, as its last size, got {tuple(q.shape)}")
    if H % H_kv != 0:
        raise ValueError(f"q: expected a number of heads divisible by k's {H_kv}, got {H}")
    if gate is not None and gate.shape != (*q.shape[:-1], E):
        raise ValueError(f"gate: expected shape {(*q.shape[:-1], E)}, got {tuple(gate.shape)}")


def _check_dtypes(q: Tensor, k: Tensor, u: Tensor, v: Tensor, gate: Tensor | None) -> None:
    expected = "float64, float32, float16 or bfloat16"
    if q.dtype not in DTYPES:
        raise ValueError(f"q: expected {expected}, got {q.dtype}")
    for name, tensor in (("k", k), ("u", u), ("v", v)):
        if tensor.dtype != q.dtype:
            raise ValueError(f"{name}: expected q's dtype {q.dtype}, got {tensor.dtype}")
    if gate is not None and gate.dtype not in DTYPES:
        raise ValueError(f"gate: expected {expected}, got {gate.dtype}")
    for name, other in (("k", k), ("u", u), ("v", v), ("gate", gate)):
        if other is not None and other.device != q.device:
            raise ValueError(f"{name}: expected q's device {q.device}, got {other.device}")
