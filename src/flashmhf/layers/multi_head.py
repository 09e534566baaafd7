"""FlashMHF as an `nn.Module` with plain arguments, and its special cases MH-FFN and Dense-MoE.

All map (..., hidden_size) to (..., hidden_size).
"""

import math
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from flashmhf.layers import initialisation
from flashmhf.layers.former_shapes import ROWS, from_former_shape
from flashmhf.layers.initialisation import (
    INITS,
    REFERENCE_STD,
    check_choice,
    check_epsilon,
    check_flags,
    check_multiple,
    check_positive,
    check_scales,
    default_scales,
    init_projections,
)
from flashmhf.layers.plain import is_plain
from flashmhf.layers.sizes import sizes_like_swiglu
from flashmhf.ops.autograd import is_transformed
from flashmhf.ops.backends import check_name
from flashmhf.ops.gated_mhf import gated_mhf
from flashmhf.ops.prologue import GATES


def local(parameter: Tensor) -> Tensor:
    """What the operator computes with: this rank's shard of a DTensor, the values of a quantised tensor.

    Both are recognised by their methods, so that a layer imports neither torch.distributed nor torchao.
    """
    if type(parameter) is nn.Parameter:
        return parameter
    if hasattr(parameter, "to_local"):
        return parameter.to_local()
    return parameter if type(parameter).dequantize is Tensor.dequantize else parameter.dequantize()


class HeadRMSNorm(nn.Module):
    """Per-head RMSNorm with a weight (num_heads, head_dim), in float32. In FlashMHF the operator applies it.

    Args:
        num_heads: heads H.
        head_dim: head dim D.
        eps: added to the mean square.
        device: of the weight.
        dtype: of the weight.
    """

    def __init__(self, num_heads: int, head_dim: int, eps: float = 1e-6, *, device=None, dtype=None) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(num_heads, head_dim, device=device, dtype=dtype))

    def forward(self, q: Tensor) -> Tensor:
        """q (..., num_heads, head_dim) -> the same shape."""
        x = q if q.dtype == torch.float64 else q.float()
        return (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * local(self.weight)).to(q.dtype)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.eps}"


class FlashMHF(nn.Module):
    """Multi-head FFN over gated parallel sub-networks, a drop-in for a Transformer's feed-forward layer.

    Args:
        hidden_size: width of input and output, a multiple of num_heads; the head dim is their quotient.
        num_heads: heads H.
        num_subnetworks: sub-networks E of each head, all of which are evaluated for every token.
        subnetwork_size: width F of a sub-network; about 8/3 of the head dim, rounded up to a multiple of 64.
        num_kv_heads: heads with their own parameters K, U, V, a divisor of num_heads. Default: num_heads.
        gate_type: "sigmoid" (of the logits, divided by its sum), "softmax", or None for a plain sum over sub-networks.
        q_norm: RMSNorm each head of the projected input.
        norm_eps: its epsilon.
        projections: False leaves out in_proj and out_proj.
        bias: biases in in_proj and out_proj.
        init: "reference" is the paper's. "scaled" takes the fan-in into account; it also sets the scales below.
        score_scale: multiplies M = q K^T and N = q U^T alike. Default: 1, or num_heads with init="scaled".
        gate_scale: multiplies the gate's logits. Default: 1, or num_heads with init="scaled".
        output_scale: multiplies the gated sum over sub-networks. Default: 1, or num_subnetworks for a gated
            layer with init="scaled".
        recompute_q: save only x and the output for the backward, and project x again there. Without effect under the
            transforms of torch.func and in forward mode, which activation checkpointing does not support.
        backend: of the operator, see `flash_mhf`.
        device: of the parameters.
        dtype: of the parameters.

    Its parameters are in_proj, out_proj (Linear), k, u, v (H_kv E, F, D), gate_weight (H, D, E), q_norm.weight (H, D).
    K, U and V have three dimensions, like experts in other models, because PEFT and torchao accept no more. State dicts
    with the former (H_kv, E, F, D) are loaded, too.

    Raises:
        ValueError: an invalid argument; the message names it, what was expected and what was given.

    Source: arXiv 2512.06989, section 3.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_subnetworks: int,
        subnetwork_size: int,
        *,
        num_kv_heads: int | None = None,
        gate_type: str | None = "sigmoid",
        q_norm: bool = False,
        norm_eps: float = 1e-6,
        projections: bool = True,
        bias: bool = False,
        init: str = "reference",
        score_scale: float | None = None,
        gate_scale: float | None = None,
        output_scale: float | None = None,
        recompute_q: bool = False,
        backend: str = "auto",
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        check_positive(
            hidden_size=hidden_size,
            num_heads=num_heads,
            num_subnetworks=num_subnetworks,
            subnetwork_size=subnetwork_size,
            num_kv_heads=num_kv_heads,
        )
        check_multiple("hidden_size", hidden_size, "num_heads", num_heads)
        check_multiple("num_heads", num_heads, "num_kv_heads", num_kv_heads)
        check_choice("gate_type", gate_type, (*GATES, None))
        check_choice("init", init, INITS)
        check_flags(q_norm=q_norm, projections=projections, bias=bias, recompute_q=recompute_q)
        check_scales(score_scale=score_scale, gate_scale=gate_scale, output_scale=output_scale)
        check_epsilon(norm_eps=norm_eps)
        if bias and not projections:
            raise ValueError("bias: expected False without projections, got True")
        if gate_type is None and gate_scale not in (None, 1.0):
            raise ValueError(f"gate_scale: expected none without a gate, got {gate_scale!r}")
        self.hidden_size = hidden_size
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = hidden_size // num_heads
        self.num_subnetworks = num_subnetworks
        self.subnetwork_size = subnetwork_size
        self.gate_type = gate_type
        self.init = init
        self.recompute_q = recompute_q
        self.backend = check_name(backend)
        scales = default_scales(init, num_heads, num_subnetworks, gate_type)
        self.score_scale = scales.score if score_scale is None else score_scale
        self.gate_scale = scales.gate if gate_scale is None else gate_scale
        self.output_scale = scales.output if output_scale is None else output_scale

        factory = {"device": device, "dtype": dtype}
        linear = {"bias": bias, **factory}
        self.in_proj = nn.Linear(hidden_size, hidden_size, **linear) if projections else None
        self.out_proj = nn.Linear(hidden_size, hidden_size, **linear) if projections else None
        self.rows_shape = torch.Size((num_kv_heads, num_subnetworks, subnetwork_size, self.head_dim))
        self._local_rows_shape = (-1, *self.rows_shape[1:])  # of the heads of one rank
        shape = (num_kv_heads * num_subnetworks, subnetwork_size, self.head_dim)
        self.k, self.u, self.v = (nn.Parameter(torch.empty(shape, **factory)) for _ in ROWS)
        gate_shape = (num_heads, self.head_dim, num_subnetworks)
        self.gate_weight = None if gate_type is None else nn.Parameter(torch.empty(gate_shape, **factory))
        self.q_norm = HeadRMSNorm(num_heads, self.head_dim, norm_eps, **factory) if q_norm else None
        self.reset_parameters()

    @classmethod
    def like_swiglu(
        cls,
        hidden_size: int,
        intermediate_size: int,
        *,
        num_heads: int | None = None,
        num_subnetworks: int | None = None,
        subnetwork_size: int | None = None,
        q_norm: bool = True,
        init: str = "scaled",
        **options: Any,
    ) -> "FlashMHF":
        """A layer with the parameters of a SwiGLU, as docs/parametrisation.md recommends it.

        Args:
            hidden_size: of the SwiGLU.
            intermediate_size: d_ff of the SwiGLU.
            num_heads: Default: heads of 128, or of the largest divisor of hidden_size below it.
            num_subnetworks: Default: what brings the parameters closest to those of the SwiGLU.
            subnetwork_size: the same; by default 2 to 4 head dims, and a multiple of 64 where that is within 2 %.
            q_norm: an argument of FlashMHF.
            init: an argument of FlashMHF.
            options: further arguments of FlashMHF.

        Returns:
            A new layer.

        Raises:
            ValueError: an invalid argument, or a SwiGLU with no more parameters than in_proj and out_proj alone.
        """
        if cls in (MHFFN, DenseMoE):
            raise TypeError(f"like_swiglu: expected FlashMHF, got {cls.__name__}")
        sizes = sizes_like_swiglu(
            hidden_size,
            intermediate_size,
            num_heads=num_heads,
            num_subnetworks=num_subnetworks,
            subnetwork_size=subnetwork_size,
            num_kv_heads=options.get("num_kv_heads"),
            projections=options.get("projections", True),
        )
        return cls(hidden_size, **asdict(sizes), q_norm=q_norm, init=init, **options)

    def reset_parameters(self) -> None:
        """Initialises every parameter, according to `init`."""
        if self.q_norm is not None:
            nn.init.ones_(self.q_norm.weight)
        score_std = output_std = gate_std = REFERENCE_STD
        if self.init == "scaled":
            q_rms = 1.0 if self.q_norm is not None or self.in_proj is None else initialisation.SCALED_IN_GAIN
            unit_std = initialisation.SCALED_SCORE_RMS / (q_rms * math.sqrt(self.head_dim))
            score_std, gate_std = unit_std / self.score_scale, unit_std / self.gate_scale
            output_std = initialisation.SCALED_OUTPUT_GAIN / math.sqrt(self.num_subnetworks * self.subnetwork_size)
        if self.gate_weight is not None:
            nn.init.trunc_normal_(self.gate_weight, std=gate_std)
        init_projections(self.init, self.in_proj, self.out_proj)
        nn.init.normal_(self.k, std=score_std)
        nn.init.normal_(self.u, std=score_std)
        nn.init.normal_(self.v, std=output_std)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., hidden_size) -> (..., hidden_size)."""
        # Before the checkpoint: what parametrises a weight during the forward, like an adapter, is gone when the
        # backward recomputes.
        rows = self._rows if self.gate_type is None else self._weight  # with a gate, the operator views them, for less
        weights = (rows("k"), rows("u"), rows("v"), self._gate_weight(), self._norm_weight())
        if self.recompute_q and torch.is_grad_enabled() and not is_transformed():
            out = checkpoint(self._sub_networks, x, *weights, use_reentrant=False, context_fn=_save_operator_output)
        else:
            out = self._sub_networks(x, *weights)
        out, out_proj = out.flatten(-2), self.out_proj
        return out if out_proj is None else out_proj(out)

    def _sub_networks(
        self, x: Tensor, k: Tensor, u: Tensor, v: Tensor, gate_weight: Tensor | None, norm_weight: Tensor | None
    ) -> Tensor:
        """x (..., hidden_size) -> S (..., H, D): everything before out_proj."""
        out = gated_mhf(
            self._query(x),
            k,
            u,
            v,
            gate_weight,
            norm_weight,
            gate_type=self.gate_type or "sigmoid",
            gate_total=1.0 if self.gate_type is None else self.output_scale,
            norm_eps=0.0 if norm_weight is None or self.q_norm is None else self.q_norm.eps,
            backend=self.backend,
        )
        return out * self.output_scale if self.gate_type is None and self.output_scale != 1.0 else out

    def _query(self, x: Tensor) -> Tensor:
        """x (..., hidden_size) -> q (..., H, D) for this rank's heads; the operator applies the norm and its scale."""
        in_proj, q_norm = self.in_proj, self.q_norm
        q = x if in_proj is None else in_proj(x)
        q = q.unflatten(-1, (-1, self.head_dim))
        if q_norm is not None:
            if is_plain(q_norm, HeadRMSNorm):
                return q
            q = q_norm(q)
        return q if self.score_scale == 1.0 else q * self.score_scale

    def _norm_weight(self) -> Tensor | None:
        """The weight of the norm that the operator applies, times the scale of its result."""
        q_norm = self.q_norm
        if q_norm is None or not is_plain(q_norm, HeadRMSNorm):
            return None
        weight = local(q_norm.weight)
        return weight if self.score_scale == 1.0 else weight * self.score_scale

    def _gate_weight(self) -> Tensor | None:
        """The gate's weight, rescaled: q is already multiplied by `score_scale`, the logits need `gate_scale`."""
        if self.gate_type is None:
            return None
        weight, factor = self._weight("gate_weight"), self.gate_scale / self.score_scale
        return weight if factor == 1.0 else weight * factor

    def _rows(self, name: str) -> Tensor:
        """This rank's K, U or V as (H_kv, E, F, D)."""
        return self._weight(name).view(self._local_rows_shape)

    def _weight(self, name: str) -> Tensor:
        """This rank's shard of a parameter, without nn.Module.__getattr__, which takes three times as long."""
        parameter = self._parameters.get(name)
        return local(getattr(self, name) if parameter is None else parameter)  # None if it is parametrised

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        """nn.Module's, which also accepts K, U and V in the former shape."""
        for key in (prefix + name for name in ROWS):
            if key in state_dict:
                state_dict[key] = from_former_shape(state_dict[key], self.rows_shape)
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def extra_repr(self) -> str:
        parts = [
            f"hidden_size={self.hidden_size}, num_heads={self.num_heads}, num_subnetworks={self.num_subnetworks}",
            f"subnetwork_size={self.subnetwork_size}, gate_type={self.gate_type!r}",
        ]
        if self.num_kv_heads != self.num_heads:
            parts.append(f"num_kv_heads={self.num_kv_heads}")
        for name in ("score_scale", "gate_scale", "output_scale"):
            if getattr(self, name) != 1.0:
                parts.append(f"{name}={getattr(self, name):g}")
        return ", ".join([*parts, f"init={self.init!r}, backend={self.backend!r}"])


class MHFFN(FlashMHF):
    """The naive multi-head FFN: FlashMHF with one sub-network of `intermediate_size` rows per head and no gate.

    Args:
        hidden_size: width of input and output, a multiple of num_heads.
        num_heads: heads H.
        intermediate_size: rows of K, U and V per head.
        options: further arguments of `FlashMHF`.
    """

    def __init__(self, hidden_size: int, num_heads: int, intermediate_size: int, **options) -> None:
        super().__init__(hidden_size, num_heads, 1, intermediate_size, gate_type=None, **options)


class DenseMoE(FlashMHF):
    """A dense mixture of SwiGLU experts: FlashMHF with one head and no projections.

    Args:
        hidden_size: width of input and output.
        num_subnetworks: experts E, all of which are evaluated for every token.
        subnetwork_size: width F of an expert.
        options: further arguments of `FlashMHF`.
    """

    def __init__(self, hidden_size: int, num_subnetworks: int, subnetwork_size: int, **options) -> None:
        super().__init__(hidden_size, 1, num_subnetworks, subnetwork_size, projections=False, **options)


def _save_operator_output() -> Any:
    """Selective checkpointing: the operator's output is saved, everything else is recomputed."""
    return create_selective_checkpoint_contexts([torch.ops.flashmhf.gated_mhf.default])
