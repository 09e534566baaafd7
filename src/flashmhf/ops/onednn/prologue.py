"""Norm and gate from the projected Q, and their gradients: `ops/prologue.py`, one parallel region per pass."""

from collections.abc import Mapping

import torch
from torch import Tensor

from flashmhf.ops.onednn import library
from flashmhf.ops.onednn.launch import BLOCK_TOKENS, bits, max_threads, run, segments
from flashmhf.ops.onednn.prologue_kernels import prologue_backward_region, prologue_forward_region
from flashmhf.ops.prologue import Prologue

MIN_ELEMENTS = 2**14  # of Q for each thread: with fewer, waking it takes longer


def forward(
    q: Tensor, gate_weight: Tensor | None, norm_weight: Tensor | None, prologue: Prologue
) -> tuple[Tensor, Tensor | None]:
    """As in `ops/prologue.py`."""
    normed = q if norm_weight is None else torch.empty(q.shape, dtype=q.dtype, device="cpu")
    gate = None
    if gate_weight is not None:
        gate = torch.empty((*q.shape[:-1], gate_weight.shape[-1]), dtype=torch.float32, device="cpu")
    q_THD = q.reshape(-1, *q.shape[-2:]).contiguous()
    if q_THD.shape[0] > 0 and (gate_weight is not None or norm_weight is not None):
        weights = _float32(gate_weight, norm_weight)
        arguments = _arguments(q_THD, weights, prologue)
        if norm_weight is not None:
            arguments["out"] = normed.data_ptr()
        if gate is not None:
            arguments["gate_out"] = gate.data_ptr()
        run(prologue_forward_region, arguments, _buffers(arguments), _threads(q_THD))
    return normed, gate


def backward(
    q: Tensor,
    gate_weight: Tensor | None,
    norm_weight: Tensor | None,
    prologue: Prologue,
    dnormed: Tensor,
    dgate: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """As in `ops/prologue.py`; overwrites `dnormed`, which is contiguous, with the gradient of q."""
    q_THD = q.reshape(-1, *q.shape[-2:]).contiguous()
    if gate_weight is None and norm_weight is None:
        return dnormed, None, None
    weights = _float32(gate_weight, norm_weight)
    arguments = _arguments(q_THD, weights, prologue)
    (T, H, D), cut = q_THD.shape, arguments["segments"]
    E = arguments["subnetworks"]
    dgate_weight_t, dnorm_weight = (
        torch.zeros(shape, dtype=torch.float32, device="cpu") for shape in ((cut, H, E, D), (cut, H, D))
    )
    if T > 0:
        dgate = None if dgate is None else dgate.float().contiguous()
        arguments |= {
            "dq": dnormed.data_ptr(),
            "dgate": 0 if dgate is None else dgate.data_ptr(),
            "dgate_weight_t": dgate_weight_t.data_ptr(),
            "dnorm_weight": dnorm_weight.data_ptr(),
        }
        run(prologue_backward_region, arguments, _buffers(arguments), _threads(q_THD))
    return (
        dnormed.view(q.shape),
        None if gate_weight is None else dgate_weight_t.sum(0).mT.to(gate_weight.dtype),
        None if norm_weight is None else dnorm_weight.sum(0).to(norm_weight.dtype),
    )


def _threads(q: Tensor) -> int:
    return min(max_threads(), max(q.numel() // MIN_ELEMENTS, 1))


def _float32(*weights: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if weight is None else weight.float().contiguous() for weight in weights)


def _arguments(q: Tensor, weights: tuple[Tensor | None, ...], prologue: Prologue) -> dict[str, int]:
    """q (T, H, D); the tensors in `weights` have to live as long as the call."""
    (T, H, D), (gate_weight, norm_weight) = q.shape, weights
    cut = segments(H, T, _threads(q))
    return {
        "brgemm": library.address(library.BRGEMM[torch.float32]),
        "items": H * cut,
        "segments": cut,
        "tokens": T,
        "heads": H,
        "head_dim": D,
        "subnetworks": 0 if gate_weight is None else gate_weight.shape[-1],
        "is_bfloat16": int(q.dtype == torch.bfloat16),
        "is_softmax": int(prologue.gate_type == "softmax"),
        "gate_total": bits(prologue.gate_total),
        "norm_eps": bits(prologue.norm_eps),
        "q": q.data_ptr(),
        "gate_weight": 0 if gate_weight is None else gate_weight.data_ptr(),
        "norm_weight": 0 if norm_weight is None else norm_weight.data_ptr(),
    }


def _buffers(a: Mapping[str, int]) -> dict[str, int]:
    """Bytes of a thread's buffers."""
    D, E = a["head_dim"], a["subnetworks"]
    block = 4 * BLOCK_TOKENS
    return {
        "x": block * D,
        "unit": block * D,
        "normed": block * D,
        "logits": block * E,
        "inverse_rms": block,
        "dx": block * D,
        "dlogits": 2 * block * E,  # and transposed
        "gate_weight_t": 4 * D * E,
    }
