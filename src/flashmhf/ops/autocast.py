"""Autocast on any device type, including those that have no autocast."""

import contextlib

import torch
from torch import Tensor

# Queried once: torch.compile of torch 2.11 cannot trace is_autocast_available.
AUTOCAST_DEVICE_TYPES = frozenset(
    device_type
    for device_type in ("cpu", "cuda", "xpu", "mps", "mtia", "hpu", "xla", "ipu", "maia")
    if torch.amp.is_autocast_available(device_type)
)
_NO_OP = contextlib.nullcontext()


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """Autocast's dtype, or None where it is off."""
    if device_type in AUTOCAST_DEVICE_TYPES and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return None


def cast_inputs(*inputs: Tensor) -> tuple[Tensor, ...]:
    """The inputs in autocast's dtype. float64 inputs are not cast, nor is anything where autocast is off."""
    dtype = autocast_dtype(inputs[0].device.type)
    if dtype is None:
        return inputs
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in inputs)


def without_autocast(device_type: str) -> contextlib.AbstractContextManager:
    """Disables autocast."""
    if autocast_dtype(device_type) is None:
        return _NO_OP
    return torch.autocast(device_type, enabled=False)
