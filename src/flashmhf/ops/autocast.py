"""Autocast on any device type, those that have none included."""

import contextlib

import torch


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype that autocast asks for, or None where it is off."""
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return None


def without_autocast(device_type: str) -> contextlib.AbstractContextManager:
    """Autocast switched off."""
    if torch.amp.is_autocast_available(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()
