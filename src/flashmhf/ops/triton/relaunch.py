"""Replay of a recorded launch: only its pointers are filled in."""

from typing import Any

import torch
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime import driver

from flashmhf.ops.recording import Recorder, Slots


class Relaunch:
    """A launch without its tensors, and the slots of the recording that hold them.

    It calls Triton's compiled kernel directly: the cache key of the operator's call covers everything on which Triton
    specialises. Not on AMD, where Triton also specialises on the size of a tensor's storage, and not for kernels with
    pre-run hooks; those go through Triton's launcher.
    """

    def __init__(self, launch: Any, compiled: Any, recording: Recorder) -> None:
        self.kernel, self.num_warps, self.num_stages = launch.kernel, launch.num_warps, launch.num_stages
        self.launch_class = type(launch)
        self.grid = (*launch.grid, 1, 1)[:3]
        self.arguments: list[Any] = []
        self.pointers: list[tuple[int, int]] = []  # position and slot
        self.descriptors: list[tuple[int, int, Any]] = []
        for position, name in enumerate(self.kernel.arg_names):
            value = launch.arguments[name]
            base = getattr(value, "base", value)  # the tensor of a TMA descriptor
            slot = recording.pointer(base) if isinstance(base, Tensor) else None
            self.arguments.append(value if slot is None else None)
            if slot is not None and base is value:
                self.pointers.append((position, slot))
            elif slot is not None:
                self.descriptors.append((position, slot, _rebased(value, None)))
        self.reads = tuple(slot for _, slot, *_ in (*self.pointers, *self.descriptors))
        direct = isinstance(compiled, CompiledKernel) and torch.version.hip is None and not self.kernel.pre_run_hooks
        self.start = compiled[self.grid] if direct else self._start_through_triton
        self.stream = driver.active.get_current_stream if direct else _no_stream

    def run(self, slots: Slots) -> None:
        arguments = self.arguments.copy()
        for position, slot in self.pointers:
            arguments[position] = slots[slot]
        for position, slot, descriptor in self.descriptors:
            arguments[position] = _rebased(descriptor, slots[slot])
        device = slots[0].get_device()  # type: ignore[union-attr]
        if device < 0 or device == torch.cuda.current_device():
            self.start(*arguments, stream=self.stream(device))
        else:
            with torch.cuda.device(device):  # Triton launches on the current device
                self.start(*arguments, stream=self.stream(device))

    def _start_through_triton(self, *arguments: Any, stream: Any) -> None:
        named = dict(zip(self.kernel.arg_names, arguments, strict=True))
        self.launch_class(self.kernel, self.grid, named, self.num_warps, self.num_stages).start()


def _no_stream(device: int) -> None:
    return None


def _rebased(descriptor: Any, base: Tensor | None) -> Any:
    """The same TMA descriptor for another tensor, without its checks: the call's cache key implies that they pass."""
    copy = object.__new__(type(descriptor))
    copy.__dict__ = {**descriptor.__dict__, "base": base}
    return copy
