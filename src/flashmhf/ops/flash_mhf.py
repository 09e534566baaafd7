"""The public function."""

import torch
from torch import Tensor

from flashmhf.ops import custom_op  # noqa: F401  (registers the operator)
from flashmhf.ops.autocast import cast_inputs


def flash_mhf(
    q: Tensor, k: Tensor, u: Tensor, v: Tensor, gate: Tensor | None = None, *, backend: str = "auto"
) -> Tensor:
    """Multi-head FFN over E gated sub-networks: `sum_e gate[..., e] * ((SiLU(q K_e^T) * (q U_e^T)) V_e)` per head.

    The T x (E F) activations are never written to memory, forward or backward (except by `backend="reference"`).
    Differentiable twice in every tensor; works under torch.compile(fullgraph=True), activation checkpointing and
    autocast (q, k, u and v are then cast to the autocast dtype, the gate is not).

    Args:
        q: (..., H, D). Any leading dimensions, any strides; float64, float32, float16 or bfloat16.
        k, u, v: (H_kv, E, F, D), q's dtype and device. H is a multiple of H_kv; head h uses row h // (H / H_kv).
        gate: (..., H, E), any of the dtypes above, or None for all ones. float32 is recommended.
        backend: "auto", or a name of `flashmhf.backends()`, which then runs or raises and never falls back.

    Returns:
        (..., H, D), contiguous, in q's dtype.

    Raises:
        ValueError: an argument does not fit; names it, what was expected and what was given.

    Source: arXiv 2512.06989, section 3; `ops/reference.py` is the formula.
    """
    q, k, u, v = cast_inputs(q, k, u, v)
    return torch.ops.flashmhf.flash_mhf(q, k, u, v, gate, backend)
