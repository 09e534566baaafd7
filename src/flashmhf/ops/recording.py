"""What a computation allocates, launches and calls, recorded once and done again on other tensors."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from flashmhf.ops.autocast import without_autocast

Slots = list[Tensor | None]  # the given tensors, then every result of a step
# These are done again through torch's own functions, which take a third of the time of an operator's call.
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
    """One of a program's steps: run(slots), and the slots that it reads and makes."""

    run: Callable[[Slots], None]
    reads: tuple[int, ...]
    makes: int | None = None
    pure: bool = False  # has no effect but its result
    calls_operator: bool = False


class Program:
    """Steps, and which slots are the result."""

    def __init__(self, steps: list[Step], given: int, slots: int, result: int | list[int]) -> None:
        self.result = result
        self.room: Slots = [None] * (slots - given)
        results = {result} if isinstance(result, int) else set(result)
        needed = _needed(steps, results)
        self.calls_operators = any(step.calls_operator for step in needed)
        self.steps = [step.run for step in _with_releases(needed, results, given)]

    def run(self, tensors: Sequence[Tensor | None], device_type: str) -> Any:
        """The result for other tensors on a device of this type."""
        slots: Slots = [*tensors, *self.room]
        if self.calls_operators:
            with without_autocast(device_type):
                for step in self.steps:
                    step(slots)
        else:
            for step in self.steps:
                step(slots)
        result = self.result
        return slots[result] if isinstance(result, int) else [slots[index] for index in result]


def _needed(steps: list[Step], results: set[int]) -> list[Step]:
    """Without those whose results nobody reads."""
    wanted, kept = set(results), []
    for step in reversed(steps):
        if not step.pure or step.makes in wanted:
            wanted.update(step.reads)
            kept.append(step)
    return kept[::-1]


def _with_releases(steps: list[Step], results: set[int], given: int) -> list[Step]:
    """With steps that drop what is read no more, as the recorded computation did, so that its memory is free again."""
    last = {slot: number for number, step in enumerate(steps) for slot in (*step.reads, step.makes) if slot is not None}
    released: list[Step] = []
    for number, step in enumerate(steps):
        released.append(step)
        dead = [slot for slot, end in last.items() if end == number and slot >= given and slot not in results]
        if dead and number + 1 < len(steps):
            released.append(Step(_release(dead), ()))
    return released


def _release(dead: list[int]) -> Callable[[Slots], None]:
    def run(slots: Slots) -> None:
        for slot in dead:
            slots[slot] = None

    return run


class Recorder(TorchDispatchMode):
    """Sees every operator that is called, and is told of launches."""

    def __init__(self, tensors: Sequence[Tensor | None]) -> None:
        super().__init__()
        self.steps: list[Step] = []
        self.complete = True
        self.paused = False
        self.count = len(tensors)
        self.slots = WeakIdKeyDictionary()  # what dies here must be free to die
        self.sources: dict[int, int] = {}  # of a view that begins where another slot's tensor does
        for slot, x in enumerate(tensors):
            if x is not None:
                self.slots[x] = slot
        self.given = tensors

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        if not self.paused:
            self._add_call(function, args, kwargs, out)
        return out

    def launch(self, start: Callable[[], Any]) -> Any:
        """start(), whose operators (the interpreter of Triton calls some) are not steps."""
        self.paused = True
        try:
            return start()
        finally:
            self.paused = False

    def add_launch(self, run: Callable[[Slots], None], reads: tuple[int, ...]) -> None:
        """A step that a backend brings along: it may write to what it reads."""
        self.steps.append(Step(run, reads))

    def pointer(self, x: Tensor) -> int | None:
        """A slot whose tensor begins at the same address; None if it came from elsewhere, and nothing is recorded."""
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
        made = self.slots.get(out)
        mutable = function._schema.is_mutable
        if made is None:
            made = self.slots[out] = self.count
            self.count += 1
            for x, slot in zip(args, slots, strict=True):
                if slot is not None and x.data_ptr() == out.data_ptr() != 0 and x.dtype == out.dtype:
                    self.sources[made] = self.sources.get(slot, slot)
        if function in _ALLOCATIONS or function in _ZEROS:
            self.steps.append(self._allocation(out, made, function in _ZEROS))
        else:
            run = _call(function, args, kwargs, reads, made)
            self.steps.append(Step(run, tuple(slot for _, slot in reads), made, not mutable, calls_operator=True))

    def _allocation(self, out: Tensor, made: int, zeros: bool) -> Step:
        """Empty like a given tensor, if one is like it, which is the fastest way."""
        size, stride, dtype, device = out.shape, out.stride(), out.dtype, out.device
        like = (
            slot
            for slot, x in enumerate(self.given)
            if x is not None and (x.shape, x.stride(), x.dtype, x.device) == (size, stride, dtype, device)
        )
        model = next(like, -1)

        def empty_like(slots: Slots) -> None:
            slots[made] = torch.empty_like(slots[model])  # type: ignore[arg-type]

        def empty(slots: Slots) -> None:
            slots[made] = torch.empty_strided(size, stride, dtype=dtype, device=device)

        def zero(slots: Slots) -> None:
            slots[made] = torch.zeros(size, dtype=dtype, device=device)

        if zeros:
            return Step(zero, (), made, True)
        return Step(empty, (), made, True) if model < 0 else Step(empty_like, (model,), made, True)


def _call(function: Any, args: Any, kwargs: Any, reads: list[tuple[int, int]], made: int) -> Callable[[Slots], None]:
    places = dict(reads)
    constants = [None if index in places else x for index, x in enumerate(args)]

    def run(slots: Slots) -> None:
        arguments = constants.copy()
        for index, slot in reads:
            arguments[index] = slots[slot]
        slots[made] = function(*arguments, **kwargs)

    return run


class _Recording(threading.local):
    recorder: Recorder | None = None


_recording = _Recording()


def recorder() -> Recorder | None:
    """Of this thread's computation, if it is being recorded."""
    return _recording.recorder


def record(compute: Callable[[], Any], tensors: Sequence[Tensor | None]) -> tuple[Any, Program | None]:
    """The result of a computation on distinct tensors, and a program that does it again unless that is impossible."""
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
