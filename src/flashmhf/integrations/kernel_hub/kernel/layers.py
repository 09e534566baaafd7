"""The layer as `kernels.kernelize` replaces it: a forward, and no state of its own."""

from typing import Any

import torch
from torch import Tensor, nn

from flashmhf.ops.gated_mhf import gated_mhf


class FlashMHF(nn.Module):
    """The forward of `flashmhf.FlashMHF`, or of any module with these members.

    K, U and V are (H_kv E, F, D) or (H_kv, E, F, D). Without projections, gate or norm the member is None. Hooks of
    `q_norm` are not called, since the operator applies its weight. `recompute_q` has no effect.
    """

    can_torch_compile: bool = True

    head_dim: int
    num_subnetworks: int
    in_proj: nn.Module | None
    out_proj: nn.Module | None
    k: Tensor
    u: Tensor
    v: Tensor
    gate_type: str | None
    gate_weight: Tensor | None
    q_norm: Any
    score_scale: float
    gate_scale: float
    output_scale: float

    def forward(self, x: Tensor) -> Tensor:
        q = x if self.in_proj is None else self.in_proj(x)
        q = q.unflatten(-1, (-1, self.head_dim))
        norm_weight: Tensor | None = None
        norm_eps = 0.0
        if self.q_norm is not None:
            norm_weight, norm_eps = self.q_norm.weight * self.score_scale, self.q_norm.eps
        elif self.score_scale != 1.0:
            q = q * self.score_scale
        rows = torch.Size((-1, self.num_subnetworks, *self.k.shape[-2:]))
        gate_weight = self.gate_weight
        if gate_weight is not None:
            gate_weight = gate_weight * (self.gate_scale / self.score_scale)
        out = gated_mhf(
            q,
            self.k.view(rows),
            self.u.view(rows),
            self.v.view(rows),
            gate_weight,
            norm_weight,
            gate_type=self.gate_type or "sigmoid",
            gate_total=1.0 if gate_weight is None else self.output_scale,
            norm_eps=norm_eps,
        )
        if gate_weight is None:
            out = out * self.output_scale
        return out.flatten(-2) if self.out_proj is None else self.out_proj(out.flatten(-2))
