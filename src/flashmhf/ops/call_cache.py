"""Replays an operator's call: the first call with given metadata is recorded, later ones only swap the tensors.

Checking a problem, selecting its backend and planning its launches take some hundred microseconds of Python, longer
than a short kernel runs. All of it follows from metadata (shapes, strides, dtypes, alignment, options), so it is done
once per set of metadata (`recording.py`). No tensor is kept alive.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from flashmhf.ops.recording import Program, record

ALIGNMENT = 16  # bytes: Triton specialises on pointers with this alignment, and TMA requires it
MAX_CACHED_CALLS = 1024  # then the cache is cleared, so that ever new numbers of tokens do not fill the memory

Compute = Callable[[ModuleType, tuple[Any, ...], tuple[Any, ...]], Any]


class CachedCall:
    """The backend of a call that has been checked, and its program once it has been recorded."""

    def __init__(self, module: ModuleType, tensors: tuple[Any, ...]) -> None:
        self.module = module
        self.device_type: str = tensors[0].device.type
        self.program: Program | None = None
        self.recordable = getattr(module, "RECORDABLE", False)


_cache: dict[tuple[Any, ...], CachedCall] = {}


def run(
    select: Callable[[tuple[Any, ...], tuple[Any, ...]], ModuleType],
    compute: Compute,
    tensors: tuple[Tensor | None, ...],
    options: tuple[Any, ...],
) -> Any:
    """The result of an operator on real tensors: a tensor or a list of them.

    Args:
        select: called as select(tensors, options); checks them and returns the backend's module.
        compute: called as compute(module, tensors, options). If the module is RECORDABLE, what it launches must follow
            from metadata and options only.
        tensors: every tensor argument of the operator.
        options: every other argument; hashable.
    """
    key: list[Any] = [compute, options, torch.are_deterministic_algorithms_enabled(), torch._C._get_mkldnn_enabled()]
    if tensors[0] is not None and tensors[0].dtype is torch.float32:
        key.append(torch.get_float32_matmul_precision())
    for x in tensors:
        if x is None:
            key.append(None)
        else:
            key += (x.shape, x.stride(), x.dtype, x.device, x.data_ptr() % ALIGNMENT)
    metadata = tuple(key)
    call = _cache.get(metadata)
    if call is None:
        call = CachedCall(select(tensors, options), tensors)
        if len(_cache) >= MAX_CACHED_CALLS:
            _cache.clear()
        _cache[metadata] = call
    program = call.program
    if program is not None:
        return program.replay(tensors, call.device_type)
    if not call.recordable or _has_duplicates(tensors):
        return compute(call.module, tensors, options)
    result, call.program = record(lambda: compute(call.module, tensors, options), tensors)
    call.recordable = call.program is not None
    return result


def clear() -> None:
    """Call this after changing what follows from metadata: the table of backends, or their tile tables."""
    _cache.clear()


def _has_duplicates(tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether one tensor is passed for two arguments, which a recording cannot distinguish."""
    present = [id(x) for x in tensors if x is not None]
    return len(set(present)) < len(present)
