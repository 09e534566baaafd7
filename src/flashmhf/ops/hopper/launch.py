"""What the planners of the Hopper kernels share: TMA descriptors and flattened tokens."""

import functools
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from flashmhf.ops.hopper.tiles import block_d
from flashmhf.ops.tensors import Gradients, Inputs

GLUON_DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.float32: gl.float32}
NUM_SMS = 132  # of an H100 or H200 SXM
TMA_ALIGNMENT = 16  # bytes, of the address and of every stride but the last


def flat(x: Tensor) -> Tensor:
    """(..., H, X) -> (T, H, X); copies only if the tokens do not have a single stride."""
    return x if x.dim() == 3 else x.reshape(-1, *x.shape[-2:])


def flat_inputs(inputs: Inputs) -> Inputs:
    """q and gate with flat tokens."""
    return inputs._replace(q=flat(inputs.q), gate=None if inputs.gate is None else flat(inputs.gate))


def flat_gradients(grads: Gradients) -> Gradients:
    """dq and dgate with flat tokens; views, as they are contiguous."""
    return grads._replace(**{name: flat(x) for name in ("dq", "dgate") if (x := getattr(grads, name)) is not None})


def for_tma(x: Tensor) -> Tensor:
    """x, or a contiguous copy if TMA cannot address it."""
    strides = [stride * x.element_size() for stride in x.stride()[:-1]]
    aligned = x.data_ptr() % TMA_ALIGNMENT == 0 and all(s % TMA_ALIGNMENT == 0 and s > 0 for s in strides)
    return x if aligned and x.stride(-1) == 1 else x.clone(memory_format=torch.contiguous_format)


def token_descriptor(x: Tensor, block_t: int) -> TensorDescriptor:
    """For x (T, H, D): boxes of block_t tokens of one head. An output must be contiguous, so that no copy is made."""
    return _descriptor(for_tma(x), [block_t, 1, block_d(x.shape[-1])])


def weight_descriptor(x: Tensor, block_f: int) -> TensorDescriptor:
    """For x (H_kv, E, F, D): boxes of block_f rows of one sub-network; TMA fills tails with zeros."""
    return _descriptor(for_tma(x.contiguous().flatten(0, 1)), [1, block_f, block_d(x.shape[-1])])


def gate_arguments(gate: Tensor | None, dummy: Tensor) -> dict[str, Any]:
    """Pointer and strides of gate (T, H, E); without a gate, the kernel never dereferences the dummy pointer."""
    strides = (0, 0, 0) if gate is None else gate.stride()
    names = ("stride_gatel", "stride_gateh", "stride_gatee")
    return {"gate_ptr": dummy if gate is None else gate, **dict(zip(names, strides, strict=True))}


def num_sms(device: torch.device) -> int:
    """SMs of a GPU; for a launch planned on another device, those of the largest Hopper."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else NUM_SMS


def _descriptor(x: Tensor, block: list[int]) -> TensorDescriptor:
    return TensorDescriptor(x, list(x.shape), list(x.stride()), block, _layout(tuple(block), x.dtype))


@functools.cache
def _layout(block: tuple[int, ...], dtype: torch.dtype) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for(list(block), GLUON_DTYPES[dtype])
