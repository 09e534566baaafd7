"""What the Hopper launchers share: TMA descriptors and flat tokens."""

from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from flashmhf.ops.hopper.tiles import block_d

GLUON_DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.float32: gl.float32}
PROCESSORS = 132  # of an H100 or H200 with SXM
TMA_ALIGNMENT = 16  # bytes, of the address and of every stride but the last


def flat(x: Tensor) -> Tensor:
    """(..., H, X) -> (T, H, X); copies only what one stride of the tokens cannot describe."""
    return x.reshape(-1, *x.shape[-2:])


def for_tma(x: Tensor) -> Tensor:
    """x itself, or a contiguous copy where TMA cannot address it."""
    strides = [stride * x.element_size() for stride in x.stride()[:-1]]
    aligned = x.data_ptr() % TMA_ALIGNMENT == 0 and all(s % TMA_ALIGNMENT == 0 and s > 0 for s in strides)
    return x if aligned and x.stride(-1) == 1 else x.contiguous()


def token_descriptor(x: Tensor, block_t: int) -> TensorDescriptor:
    """Of (T, H, D): boxes of block_t tokens of one head. out must fit as it is: it is contiguous."""
    return _descriptor(for_tma(x), [block_t, 1, block_d(x.shape[-1])])


def weight_descriptor(x: Tensor, block_f: int) -> TensorDescriptor:
    """Of (H_kv, E, F, D): boxes of block_f rows of one sub-network; a tail is filled with zeros."""
    return _descriptor(for_tma(x.contiguous().flatten(0, 1)), [1, block_f, block_d(x.shape[-1])])


def gate_arguments(gate: Tensor | None, stand_in: Tensor) -> dict[str, Any]:
    """The pointer and the strides of (T, H, E), any; without a gate some pointer that nobody follows."""
    strides = (0, 0, 0) if gate is None else gate.stride()
    names = ("stride_gatel", "stride_gateh", "stride_gatee")
    return {"gate_ptr": stand_in if gate is None else gate, **dict(zip(names, strides, strict=True))}


def processors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; for a launch that is planned elsewhere those of the largest Hopper."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else PROCESSORS


def _descriptor(x: Tensor, block: list[int]) -> TensorDescriptor:
    layout = gl.NVMMASharedLayout.get_default_for(block, GLUON_DTYPES[x.dtype])
    return TensorDescriptor(x, list(x.shape), list(x.stride()), block, layout)
