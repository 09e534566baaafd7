"""Records what a computation allocates, launches and calls, and replays it on other tensors."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from flashmhf.ops.autocast import without_autocast

Slots = list[Tensor | None]  # the inputs, then every result of a step
# Replayed through torch's Python functions, which take a third of the time of calling the operator.
_ZEROS = frozenset((torch.ops.aten.zeros.default, torch.ops.aten.new_zeros.default))
_ALLOCATIONS = frozenset(
    (
        torch.ops.aten.empty.memory_format,
        torch.ops.aten.empty_like.default,
        torch.ops.aten.empty_strided.default,
        torch.ops.aten.new_empty.default,
    )
)


@dataclass(frozen=True)
class Step:
    """One step of a program: run(slots), and the slots that it reads and writes its result to."""

    run: Callable[[Slots], None]
    reads: tuple[int, ...]
    makes: int | None = None
    pure: bool = False  # no effect besides its result
    calls_operator: bool = False


class Program:
    """The steps of a recorded computation, and which slots hold its result."""

    def __init__(self, steps: list[Step], num_inputs: int, num_slots: int, result: int | list[int]) -> None:
        self.result = result
        self.empty_slots: Slots = [None] * (num_slots - num_inputs)
        results = {result} if isinstance(result, int) else set(result)
        live = _without_dead_steps(steps, results)
        self.calls_operators = any(step.calls_operator for step in live)
        self.steps = [step.run for step in _with_releases(live, results, num_inputs)]

    def replay(self, tensors: Sequence[Tensor | None], device_type: str) -> Any:
        """The result for other tensors on a device of this type."""
        slots: Slots = [*tensors, *self.empty_slots]
        if self.calls_operators:
            with without_autocast(device_type):
                for step in self.steps:
                    step(slots)
        else:
            for step in self.steps:
                step(slots)
        result = self.result
        return slots[result] if isinstance(result, int) else [slots[index] for index in result]


def _without_dead_steps(steps: list[Step], results: set[int]) -> list[Step]:
    """Dead-code elimination: drops pure steps whose results nothing reads."""
    live, kept = set(results), []
    for step in reversed(steps):
        if not step.pure or step.makes in live:
            live.update(step.reads)
            kept.append(step)
    return kept[::-1]


def _with_releases(steps: list[Step], results: set[int], num_inputs: int) -> list[Step]:
    """Adds steps that drop each intermediate after its last use, so that memory is freed as early as when recorded."""
    last = {slot: number for number, step in enumerate(steps) for slot in (*step.reads, step.makes) if slot is not None}
    released: list[Step] = []
    for number, step in enumerate(steps):
        released.append(step)
        dead = [slot for slot, end in last.items() if end == number and slot >= num_inputs and slot not in results]
        if dead and number + 1 < len(steps):
            released.append(Step(_release(dead), ()))
    return released


def _release(dead: list[int]) -> Callable[[Slots], None]:
    def run(slots: Slots) -> None:
        for slot in dead:
            slots[slot] = None

    return run


class Recorder(TorchDispatchMode):
    """Sees every operator call as a dispatch mode; launches are reported to it by `Launch.run`."""

    def __init__(self, tensors: Sequence[Tensor | None]) -> None:
        super().__init__()
        self.steps: list[Step] = []
        self.complete = True  # False once something cannot be replayed
        self.paused = False
        self.count = len(tensors)
        self.slots = WeakIdKeyDictionary()  # weak: recording must not extend the lifetime of intermediates
        self.sources: dict[int, int] = {}  # slot of a view -> slot of a tensor with the same address
        for slot, x in enumerate(tensors):
            if x is not None:
                self.slots[x] = slot
        self.inputs = tensors

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        if not self.paused:
            self._add_call(function, args, kwargs, out)
        return out

    def launch(self, start: Callable[[], Any]) -> Any:
        """Runs start() without recording the operators that it calls (Triton's interpreter calls some)."""
        self.paused = True
        try:
            return start()
        finally:
            self.paused = False

    def add_launch(self, run: Callable[[Slots], None], reads: tuple[int, ...]) -> None:
        """Adds a kernel launch, which may write to the slots that it reads."""
        self.steps.append(Step(run, reads))

    def pointer(self, x: Tensor) -> int | None:
        """The slot of a tensor with x's address. None if x is unknown: the computation then cannot be replayed."""
        slot = self.slots.get(x)
        if slot is None:
            self.complete = False
            return None
        return self.sources.get(slot, slot)

    def _add_call(self, function: Any, args: Any, kwargs: Any, out: Any) -> None:
        if not isinstance(out, Tensor):
            self.complete = False
            return
        slots = [self.slots.get(x) if isinstance(x, Tensor) else None for x in args]
        known = all(slot is not None for x, slot in zip(args, slots, strict=True) if isinstance(x, Tensor))
        nested = any(isinstance(y, Tensor) for x in (*args, *kwargs.values()) if isinstance(x, list | tuple) for y in x)
        if not known or nested or any(isinstance(x, Tensor) for x in kwargs.values()):
            self.complete = False
            return
        reads = [(index, slot) for index, slot in enumerate(slots) if slot is not None]
        target = self.slots.get(out)
        mutable = function._schema.is_mutable
        if target is None:
            target = self.slots[out] = self.count
            self.count += 1
            for x, slot in zip(args, slots, strict=True):
                if slot is not None and x.data_ptr() == out.data_ptr() != 0 and x.dtype == out.dtype:
                    self.sources[target] = self.sources.get(slot, slot)
        if function in _ALLOCATIONS or function in _ZEROS:
            self.steps.append(self._allocation(out, target, function in _ZEROS))
        else:
            run = _call(function, args, kwargs, reads, target)
            self.steps.append(Step(run, tuple(slot for _, slot in reads), target, not mutable, calls_operator=True))

    def _allocation(self, out: Tensor, target: int, zeros: bool) -> Step:
        """An allocation; through `empty_like` of an input with the same metadata if there is one, the fastest way."""
        size, stride, dtype, device = out.shape, out.stride(), out.dtype, out.device
        like = (
            slot
            for slot, x in enumerate(self.inputs)
            if x is not None and (x.shape, x.stride(), x.dtype, x.device) == (size, stride, dtype, device)
        )
        model = next(like, -1)

        def empty_like(slots: Slots) -> None:
            slots[target] = torch.empty_like(slots[model])  # type: ignore[arg-type]

        def empty(slots: Slots) -> None:
            slots[target] = torch.empty_strided(size, stride, dtype=dtype, device=device)

        def zero(slots: Slots) -> None:
            slots[target] = torch.zeros(size, dtype=dtype, device=device)

        if zeros:
            return Step(zero, (), target, True)
        return Step(empty, (), target, True) if model < 0 else Step(empty_like, (model,), target, True)


def _call(function: Any, args: Any, kwargs: Any, reads: list[tuple[int, int]], target: int) -> Callable[[Slots], None]:
    places = dict(reads)
    constants = [None if index in places else x for index, x in enumerate(args)]

    def run(slots: Slots) -> None:
        arguments = constants.copy()
        for index, slot in reads:
            arguments[index] = slots[slot]
        slots[target] = function(*arguments, **kwargs)

    return run


class _Recording(threading.local):
    recorder: Recorder | None = None


_recording = _Recording()


def recorder() -> Recorder | None:
    """The recorder of this thread's computation, or None if it is not being recorded."""
    return _recording.recorder


def record(compute: Callable[[], Any], tensors: Sequence[Tensor | None]) -> tuple[Any, Program | None]:
    """The result of a computation on distinct tensors, and a program that replays it, or None if it cannot be."""
    recorder = _recording.recorder = Recorder(tensors)
    try:
        with recorder:
            result = compute()
    finally:
        _recording.recorder = None
    slots = [recorder.slots.get(x) for x in ([result] if isinstance(result, Tensor) else result)]
    if not recorder.complete or None in slots:
        return result, None
    return result, Program(
        recorder.steps, len(tensors), recorder.count, slots[0] if isinstance(result, Tensor) else slots
    )
