"""What an operator finds out once for all calls whose tensors differ in their contents and addresses alone.

Checking a problem, choosing its backend and planning its launches take some hundred microseconds of Python, more than a
short kernel runs. All of it follows from metadata, which is the key here. No tensor is kept.
"""

import threading
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

ALIGNMENT = 16  # bytes: Triton compiles other code for a pointer that has it, and TMA needs it
MOST_CALLS = 1024  # then all are forgotten, so that ever new numbers of tokens do not fill the memory


class Call:
    """The backend of a call that has been checked, and what it has found out since, by its order.

    `with call:` around what the backend runs lets `once` and the launches (`ops/triton/plans.py`) find it.
    """

    def __init__(self, module: ModuleType) -> None:
        self.module = module
        self.steps: dict[int, Any] = {}

    def __enter__(self) -> None:
        running.call, running.steps = self, 0

    def __exit__(self, *error: object) -> None:
        running.call = None


class _Running(threading.local):
    call: Call | None = None
    steps = 0  # of the call so far


running = _Running()
_calls: dict[tuple[Any, ...], Call] = {}


def find(select: Callable[..., ModuleType], tensors: tuple[Tensor | None, ...], options: tuple[Any, ...]) -> Call:
    """The call of an operator on real tensors.

    Args:
        select: called as select(tensors, options) for a call that is new; checks it and returns the backend's module.
        tensors: every tensor that the operator is given.
        options: whatever else the launches depend on; hashable.
    """
    key: list[Any] = [select, options, torch.are_deterministic_algorithms_enabled()]
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
        call = Call(select(tensors, options))
        if len(_calls) >= MOST_CALLS:
            _calls.clear()
        _calls[found] = call
    return call


def once(function: Callable[..., Any], *arguments: Any) -> Any:
    """`function(*arguments)`, which must follow from the call that this thread is in: found out once for it."""
    call = running.call
    if call is None:
        return function(*arguments)
    number = running.steps
    running.steps = number + 1
    known = call.steps.get(number)
    if known is None or known[0] is not function:
        known = call.steps[number] = (function, function(*arguments))
    return known[1]


def forget() -> None:
    """For whoever changes what follows from metadata: the backends, or their tables of tiles."""
    _calls.clear()
