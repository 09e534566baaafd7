"""The feed-forward layers that FlashMHF is compared with: PKV and SwiGLU, (..., hidden_size) to (..., hidden_size)."""

import math

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from flashmhf.layers import initialisation
from flashmhf.layers.initialisation import (
    INITS,
    REFERENCE_STD,
    check_choice,
    check_flags,
    check_multiple,
    check_positive,
    init_projections,
)
from flashmhf.layers.multi_head import local


class PKV(nn.Module):
    """Attention over learned keys and values: each head of the projected input attends to `num_slots` parameter rows.

    Args:
        hidden_size: width of input and output, a multiple of num_heads.
        num_heads: heads; the head dim is hidden_size / num_heads.
        num_slots: parameter rows per head.
        bias: biases in in_proj and out_proj.
        init: "reference" or "scaled", as in `FlashMHF`.
        device: of the parameters.
        dtype: of the parameters.

    Its parameters are in_proj, out_proj (Linear), k, v (num_heads, num_slots, head_dim).

    Source: the baseline "PKV" of arXiv 2512.06989.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_slots: int,
        *,
        bias: bool = False,
        init: str = "reference",
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        check_positive(hidden_size=hidden_size, num_heads=num_heads, num_slots=num_slots)
        check_multiple("hidden_size", hidden_size, "num_heads", num_heads)
        check_choice("init", init, INITS)
        check_flags(bias=bias)
        self.num_heads = num_heads
        self.head_dim = hidden_size // num_heads
        self.num_slots = num_slots
        self.init = init
        factory = {"device": device, "dtype": dtype}
        self.in_proj = nn.Linear(hidden_size, hidden_size, bias=bias, **factory)
        self.out_proj = nn.Linear(hidden_size, hidden_size, bias=bias, **factory)
        shape = (num_heads, num_slots, self.head_dim)
        self.k, self.v = (nn.Parameter(torch.empty(shape, **factory)) for _ in range(2))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialises every parameter, according to `init`."""
        init_projections(self.init, self.in_proj, self.out_proj)
        key_std = value_std = REFERENCE_STD
        if self.init == "scaled":
            # No fan-in: the logits' 1 / sqrt(head_dim) compensates it.
            key_std = initialisation.SCALED_PKV_KEY_RMS / initialisation.SCALED_IN_GAIN
            value_std = initialisation.SCALED_PKV_VALUE_STD
        nn.init.normal_(self.k, std=key_std)
        nn.init.normal_(self.v, std=value_std)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., hidden_size) -> (..., hidden_size)."""
        T = x.shape[:-1].numel()
        q = self.in_proj(x)
        q_1HTD = q.view(1, T, q.shape[-1] // self.head_dim, self.head_dim).transpose(1, 2)
        k_1HSD, v_1HSD = (local(weight).to(q.dtype).unsqueeze(0) for weight in (self.k, self.v))
        out_1HTD = nnf.scaled_dot_product_attention(q_1HTD, k_1HSD, v_1HSD)
        return self.out_proj(out_1HTD.transpose(1, 2).reshape(q.shape))

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, num_slots={self.num_slots}, init={self.init!r}"


class SwiGLU(nn.Module):
    """The feed-forward layer of Llama, with its parameter names.

    Args:
        hidden_size: width of input and output.
        intermediate_size: d_ff.
        bias: biases in all three projections.
        init: "reference": normal with std 0.02, like transformers' Llama; "scaled": by fan-in, larger in down_proj.
        device: of the parameters.
        dtype: of the parameters.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        bias: bool = False,
        init: str = "reference",
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        check_positive(hidden_size=hidden_size, intermediate_size=intermediate_size)
        check_choice("init", init, INITS)
        check_flags(bias=bias)
        self.init = init
        options = {"bias": bias, "device": device, "dtype": dtype}
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, **options)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, **options)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, **options)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialises every parameter, according to `init`."""
        score_std = output_std = REFERENCE_STD
        if self.init == "scaled":
            score_std = initialisation.SCALED_SCORE_RMS / math.sqrt(self.gate_proj.in_features)
            output_std = initialisation.SCALED_OUTPUT_GAIN / math.sqrt(self.down_proj.in_features)
        for projection, std in (
            (self.gate_proj, score_std),
            (self.up_proj, score_std),
            (self.down_proj, output_std),
        ):
            nn.init.normal_(projection.weight, std=std)
            if projection.bias is not None:
                nn.init.zeros_(projection.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., hidden_size) -> (..., hidden_size)."""
        return self.down_proj(nnf.silu(self.gate_proj(x)) * self.up_proj(x))

    def extra_repr(self) -> str:
        return f"init={self.init!r}"
