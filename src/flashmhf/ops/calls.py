"""Operators that do the same again for tensors that differ in their contents and addresses alone.

Checking a problem, choosing its backend and planning its launches take some hundred microseconds of Python, more than a
short kernel runs. All of it follows from metadata. So the first call with some metadata is recorded (`recording.py`),
and what it allocated and launched is done again for the next. No tensor is kept.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from flashmhf.ops.recording import Program, record

ALIGNMENT = 16  # bytes: Triton compiles other code for a pointer that has it, and TMA needs it
MAX_CALLS = 1024  # then all are forgotten, so that ever new numbers of tokens do not fill the memory

Compute = Callable[[ModuleType, tuple[Any, ...], tuple[Any, ...]], Any]


class Call:
    """The backend of a call that has been checked, and its program once it has one."""

    def __init__(self, module: ModuleType, tensors: tuple[Any, ...]) -> None:
        self.module = module
        self.device_type: str = tensors[0].device.type
        self.program: Program | None = None
        self.recordable = getattr(module, "RECORDABLE", False)


_calls: dict[tuple[Any, ...], Call] = {}


def run(
    select: Callable[[tuple[Any, ...], tuple[Any, ...]], ModuleType],
    compute: Compute,
    tensors: tuple[Tensor | None, ...],
    options: tuple[Any, ...],
) -> Any:
    """The result of an operator on real tensors: a tensor or a list of them.

    Args:
        select: called as select(tensors, options); checks them and returns the backend's module.
        compute: called as compute(module, tensors, options); launches what follows from metadata and options alone if
            the module says that it is RECORDABLE.
        tensors: every tensor that the operator is given.
        options: all else that it is given; hashable.
    """
    key: list[Any] = [compute, options, torch.are_deterministic_algorithms_enabled()]
    if tensors[0] is not None and tensors[0].dtype is torch.float32:
        key.append(torch.get_float32_matmul_precision())
    for x in tensors:
        if x is None:
            key.append(None)
        else:
            key += (x.shape, x.stride(), x.dtype, x.device, x.data_ptr() % ALIGNMENT)
    found = tuple(key)
    call = _calls.get(found)
    if call is None:
        call = Call(select(tensors, options), tensors)
        if len(_calls) >= MAX_CALLS:
            _calls.clear()
        _calls[found] = call
    program = call.program
    if program is not None:
        return program.run(tensors, call.device_type)
    if not call.recordable or _some_are_one(tensors):
        return compute(call.module, tensors, options)
    result, call.program = record(lambda: compute(call.module, tensors, options), tensors)
    call.recordable = call.program is not None
    return result


def forget() -> None:
    """For whoever changes what follows from metadata: the backends, or their tables of tiles."""
    _calls.clear()


def _some_are_one(tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether a recording could not tell two tensors apart."""
    present = [id(x) for x in tensors if x is not None]
    return len(set(present)) < len(present)
