"""How a call is cut into work for several threads, what the kernels are told, and the parallel region.

The threads are those of PyTorch's own operators, as many as `torch.get_num_threads()`: other pools would compete with
them for the cores. A forked process, which inherits GNU OpenMP's record of the threads but not the threads, has one.
An item of work is a parameter head with a segment of the tokens; a thread takes one after another.
"""

import ctypes
import functools
import hashlib
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from flashmhf.ops.onednn import library

logger = logging.getLogger(__name__)

BLOCK_TOKENS = 64  # of a tile, whose activations stay in a core's second cache
BLOCK_ROWS = 128
# Of K, of U and of V each, what a thread packs at once. The backward packs them twice and holds their gradients.
FORWARD_PANEL_BYTES, BACKWARD_PANEL_ELEMENTS = 2**19, 2**16
MIN_SEGMENT = 512  # tokens, so that packing the parameters costs little
BALANCE = 0.9  # of the threads' time that shall not be lost by waiting for the last
ALIGNMENT = 64


def _fingerprint() -> str:
    """Of all sources: Numba's cache of compiled code looks at a function's signature and own file only."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


# Addresses, sizes, options, and the buffers' offsets in a thread's workspace.
ARGUMENTS = np.dtype(
    [
        (name, np.int64)
        for name in (
            "brgemm release thread_number next_item items segments workspace workspace_bytes "
            "tokens heads kv_heads rows width head_dim panel_rows is_bfloat16 gate_stride "
            "q k u v gate out dout dq dk du dv dgate weights_are_partial "
            "buffer_ku_t buffer_v buffer_v_t buffer_ku buffer_mn buffer_p buffer_sum buffer_da buffer_dmn "
            "buffer_dmn_pairs buffer_p_pairs buffer_products buffer_q_t buffer_dout_t buffer_dku_t buffer_dv_t "
            "gate_weight norm_weight gate_out subnetworks is_softmax dgate_weight_t dnorm_weight "
            "buffer_x buffer_dx buffer_unit buffer_normed buffer_inverse_rms buffer_logits "
            "buffer_dlogits buffer_gate_weight_t "
            f"sources_{_fingerprint()}"
        ).split()
    ]
    + [("gate_total", np.float64), ("norm_eps", np.float64)]
)
POSITIONS = {name: position for position, name in enumerate(ARGUMENTS.names or ())}
SIGNATURE = numba.types.void(numba.types.CPointer(numba.from_dtype(ARGUMENTS)))


def region(function: Any) -> Any:
    """Compiles a function of the arguments that every thread runs, or loads it from Numba's cache."""
    try:
        return numba.cfunc(SIGNATURE, error_model="numpy", cache=True)(function)
    except (OSError, RuntimeError) as error:  # a full disk; no folder that can be written
        logger.info("the onednn backend's kernels are compiled in every process: %s", error)
        return numba.cfunc(SIGNATURE, error_model="numpy")(function)


_is_forked = False


def _after_fork() -> None:
    global _is_forked
    _is_forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def max_threads() -> int:
    """How many threads a region may have."""
    return 1 if _is_forked else torch.get_num_threads()


def run(function: Any, arguments: Mapping[str, int], buffers: Mapping[str, int], threads: int) -> None:
    """Runs a region.

    Args:
        function: made by `region`.
        arguments: by name; what is left out is zero.
        buffers: names and bytes of the buffers that each thread has for itself.
        threads: `max_threads()`, or fewer.
    """
    values, size = [0] * len(POSITIONS), 0
    for name, value in arguments.items():
        values[POSITIONS[name]] = value
    for name, number_of_bytes in buffers.items():
        values[POSITIONS[f"buffer_{name}"]] = size
        size += -(-number_of_bytes // ALIGNMENT) * ALIGNMENT
    threads = min(threads, arguments["items"])
    workspace = torch.empty(threads * size + ALIGNMENT, dtype=torch.uint8, device="cpu")
    counter = np.zeros(1, np.int64)
    values[POSITIONS["workspace"]] = -(-workspace.data_ptr() // ALIGNMENT) * ALIGNMENT
    values[POSITIONS["workspace_bytes"]] = size
    values[POSITIONS["next_item"]] = counter.ctypes.data
    values[POSITIONS["release"]] = library.address(library.RELEASE)
    values[POSITIONS["thread_number"]] = library.address(library.THREAD_NUMBER)
    record = np.array(values, np.int64)
    if threads == 1:
        function.ctypes(record.ctypes.data)
    else:
        _parallel()(function.address, record.ctypes.data, threads, 0)


def bits(x: float) -> int:
    """A float as an argument."""
    return int(np.float64(x).view(np.int64))


@functools.cache
def _parallel() -> Any:
    prototype = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    return prototype(library.address(library.PARALLEL))


def segments(kv_heads: int, tokens: int, threads: int) -> int:
    """Into how many segments the tokens of each head are cut: as few as keep all threads busy."""
    most = max(tokens // MIN_SEGMENT, 1)
    best, best_balance = 1, 0.0
    for count in range(1, most + 1):
        balance = kv_heads * count / (math.ceil(kv_heads * count / threads) * threads)
        if balance > best_balance:
            best, best_balance = count, balance
        if balance >= BALANCE:
            break
    return best


def problem_arguments(q: Tensor, k: Tensor, gate: Tensor, threads: int, panel_elements: int) -> dict[str, int]:
    """What both kernels need. q (T, H, D), k (H_kv, E, F, D), gate (T, H, E), or (1,) for none."""
    (T, H, D), (H_kv, E, F, _) = q.shape, k.shape
    has_gate = gate.dim() == 3
    cut = segments(H_kv, T, threads)
    panel = max(panel_elements // (D * BLOCK_ROWS), 1) * BLOCK_ROWS
    return {
        "brgemm": library.address(library.BRGEMM[q.dtype]),
        "items": H_kv * cut,
        "segments": cut,
        "tokens": T,
        "heads": H,
        "kv_heads": H_kv,
        "rows": E * F,
        "width": F if has_gate else E * F,
        "head_dim": D,
        "panel_rows": min(panel, E * F),
        "is_bfloat16": int(q.dtype == torch.bfloat16),
        "gate_stride": H * E if has_gate else 0,
        "q": q.data_ptr(),
        "k": k.data_ptr(),
        "gate": gate.data_ptr(),
    }
