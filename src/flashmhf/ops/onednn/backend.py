"""The backend "onednn": bfloat16 and float32 on x86 CPUs."""

import torch
from torch import Tensor

from flashmhf.ops.onednn import launch
from flashmhf.ops.onednn.backward import backward_region
from flashmhf.ops.onednn.few_tokens import few_tokens_region
from flashmhf.ops.onednn.forward import forward_region
from flashmhf.ops.onednn.launch import BLOCK_ROWS, BLOCK_TOKENS, max_threads, problem_arguments, run
from flashmhf.ops.onednn.prologue import backward as prologue_backward
from flashmhf.ops.onednn.prologue import forward as prologue_forward
from flashmhf.ops.tensors import Gradients, Inputs

__all__ = ["backward", "forward", "prologue_backward", "prologue_forward"]

FEW_TOKENS = 4
MIN_PARAMETERS = 2**19  # read by each thread: with fewer, waking it takes longer


def forward(q: Tensor, k: Tensor, u: Tensor, v: Tensor, gate: Tensor | None) -> Tensor:
    """q (..., H, D), k, u, v (H_kv, E, F, D), gate (..., H, E) or None -> (..., H, D) in q's dtype."""
    q_THD, k, u, v, gate_THE = _plain(q, k, u, v, gate)
    out = torch.empty_like(q_THD)
    if q_THD.shape[0] == 0:
        return out.view(q.shape)
    threads = max_threads()
    arguments = problem_arguments(q_THD, k, gate_THE, threads, launch.FORWARD_PANEL_BYTES // q.element_size())
    arguments |= {"u": u.data_ptr(), "v": v.data_ptr(), "out": out.data_ptr()}
    if q_THD.shape[0] <= FEW_TOKENS:
        arguments["items"] = arguments["heads"]
        threads = min(threads, max(3 * k.numel() // MIN_PARAMETERS, 1))
        run(few_tokens_region, arguments, _few_tokens_buffers(arguments), threads)
    else:
        run(forward_region, arguments, _forward_buffers(arguments), threads)
    return out.view(q.shape)


def backward(
    dout: Tensor, q: Tensor, k: Tensor, u: Tensor, v: Tensor, gate: Tensor | None, needs: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """Gradients for q, k, u, v and gate, None where `needs` says so."""
    grads = Gradients.empty(Inputs(q, k, u, v, gate), needs)
    q_THD, k, u, v, gate_THE = _plain(q, k, u, v, gate)
    if q_THD.shape[0] == 0:
        for grad in grads:
            if grad is not None:
                grad.zero_()
        return grads
    dout = dout.reshape(q_THD.shape).contiguous()
    threads = max_threads()
    arguments = problem_arguments(q_THD, k, gate_THE, threads, launch.BACKWARD_PANEL_ELEMENTS)
    arguments |= {"u": u.data_ptr(), "v": v.data_ptr(), "dout": dout.data_ptr()}
    if grads.dq is not None:
        arguments["dq"] = grads.dq.data_ptr()
    dgate = grads.dgate
    if dgate is not None:
        dgate = dgate if dgate.dtype == torch.float32 else torch.empty_like(gate_THE)
        arguments["dgate"] = dgate.data_ptr()
    cut = arguments["segments"]
    parts = [
        None if x is None or cut == 1 else torch.empty(cut, *x.shape, dtype=torch.float32, device="cpu")
        for x in grads.of_weights
    ]
    arguments["weights_are_partial"] = int(cut > 1)
    for name, grad, part in zip(("dk", "du", "dv"), grads.of_weights, parts, strict=True):
        target = grad if part is None else part
        if target is not None:
            arguments[name] = target.data_ptr()
    run(backward_region, arguments, _backward_buffers(arguments), threads)
    for grad, part in zip(grads.of_weights, parts, strict=True):
        if grad is not None and part is not None:
            grad.copy_(part.sum(0))
    if grads.dgate is not None and dgate is not None and dgate is not grads.dgate:
        grads.dgate.copy_(dgate.view(grads.dgate.shape))
    return grads


def _plain(q: Tensor, k: Tensor, u: Tensor, v: Tensor, gate: Tensor | None) -> tuple[Tensor, ...]:
    """Contiguous, with one dimension of tokens, and the gate in float32; no gate is one value for all."""
    q_THD = q.reshape(-1, *q.shape[-2:]).contiguous()
    if gate is None:
        gate_THE = torch.ones(1, dtype=torch.float32, device="cpu")
    else:
        gate_THE = gate.reshape(-1, *gate.shape[-2:]).float().contiguous()
    return q_THD, k.contiguous(), u.contiguous(), v.contiguous(), gate_THE


def _few_tokens_buffers(a: dict[str, int]) -> dict[str, int]:
    """Bytes of a thread's buffers."""
    row, block = a["head_dim"] * 4, a["tokens"] * a["head_dim"] * 4
    return {"x": block, "sum": block, "ku": 2 * row, "v": row}


def _forward_buffers(a: dict[str, int]) -> dict[str, int]:
    D, size = a["head_dim"], 2 if a["is_bfloat16"] else 4
    tile, panel = BLOCK_TOKENS * BLOCK_ROWS, (a["panel_rows"] + 1) * D
    buffers = {"ku_t": 2 * panel * size, "v": panel * size, "mn": 2 * tile * 4}
    if a["is_bfloat16"]:
        buffers |= {"p": tile * 2, "sum": _rows_of_sums(a) * D * 4}
    return buffers


def _backward_buffers(a: dict[str, int]) -> dict[str, int]:
    D, size = a["head_dim"], 2 if a["is_bfloat16"] else 4
    tile, panel = BLOCK_TOKENS * BLOCK_ROWS, (a["panel_rows"] + 1) * D
    buffers = {
        "ku_t": 2 * panel * size,
        "v_t": panel * size,
        "mn": 2 * tile * 4,
        "da": tile * 4,
        "products": 2 * BLOCK_ROWS * 4,
    }
    if "dq" in a:
        buffers["ku"] = 2 * panel * size
    if "dk" in a or "du" in a:
        buffers |= {"q_t": BLOCK_TOKENS * D * size, "dku_t": 2 * panel * 4}
    if "dv" in a:
        buffers |= {"dout_t": BLOCK_TOKENS * D * size, "dv_t": panel * 4}
    if a["is_bfloat16"]:
        buffers |= {"dmn": 2 * tile * 2, "dmn_pairs": 2 * tile * 2, "p_pairs": tile * 2}
        if "dq" in a:
            buffers["sum"] = _rows_of_sums(a) * D * 4
    return buffers


def _rows_of_sums(a: dict[str, int]) -> int:
    if a["panel_rows"] == a["rows"]:
        return BLOCK_TOKENS
    return -(-a["tokens"] // a["segments"]) * (a["heads"] // a["kv_heads"])
