"""Autocast on any device type, those that have none included."""

import contextlib

import torch
from torch import Tensor

# Asked for once: torch.compile of torch 2.11 cannot trace the question.
AUTOCAST_DEVICE_TYPES = frozenset(
    device_type
    for device_type in ("cpu", "cuda", "xpu", "mps", "mtia", "hpu", "xla", "ipu", "maia")
    if torch.amp.is_autocast_available(device_type)
)
_NOTHING = contextlib.nullcontext()


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype that autocast asks for, or None where it is off."""
    if device_type in AUTOCAST_DEVICE_TYPES and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return None


def cast_inputs(*inputs: Tensor) -> tuple[Tensor, ...]:
    """The inputs in the dtype that autocast asks for; where it is off, and those in float64, as they are."""
    dtype = autocast_dtype(inputs[0].device.type)
    if dtype is None:
        return inputs
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in inputs)


def without_autocast(device_type: str) -> contextlib.AbstractContextManager:
    """Autocast switched off."""
    if autocast_dtype(device_type) is None:
        return _NOTHING
    return torch.autocast(device_type, enabled=False)
