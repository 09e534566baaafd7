"""Shared memory of the emulated machine: Gluon's views, and race detection.

Every access is recorded with its agent and time; a new one must be ordered after each conflicting earlier one (see
machine.py). Stores of the generic proxy must be fenced before the asynchronous proxy (wgmma, TMA) accesses the data.
"""

import functools
import math
from dataclasses import dataclass

import torch

from gluon.machine import Barrier, EmulationError, Partition, assigned_name, machine, where
from gluon.values import TORCH_DTYPES, Value


@dataclass(eq=False)
class Access:
    verb: str
    writes: bool
    asynchronous: bool
    region: tuple  # offset, shape, strides
    partition: Partition
    where: str
    agent: object
    time: float  # infinite until a load has landed
    fenced: bool = False

    def __str__(self) -> str:
        return f"{self.verb} ({self.partition.name}, {self.where})"

    def ordered_before(self, partition: Partition) -> bool:
        return partition.clock.get(self.agent, 0) >= self.time

    def in_flight(self) -> bool:
        return self.agent is not self.partition and not self.ordered_before(self.partition)


class Allocation:
    def __init__(self, shape: list[int]):
        self.name = assigned_name()
        self.size = math.prod(shape)
        self.accesses: list[Access] = []
        self.barriers: dict[int, Barrier] = {}
        self.overlap = functools.cache(self._overlap)

    def _overlap(self, one: tuple, other: tuple) -> bool:
        touched = torch.zeros(self.size, dtype=torch.bool)
        touched.as_strided(one[1], one[2], one[0]).fill_(True)
        return bool(touched.as_strided(other[1], other[2], other[0]).any())

    def check(self, new: Access, label: str) -> None:
        for old in self.accesses:
            if not (new.writes or old.writes) or not self.overlap(old.region, new.region):
                continue
            if not old.ordered_before(new.partition):
                state = "is still in flight" if old.in_flight() else "is not ordered before it by a wait"
                raise EmulationError(f"race on {label}: {new}, while {old} {state}")
            if new.asynchronous and old.writes and not old.asynchronous and not old.fenced:
                raise EmulationError(f"no fence_async_shared on {label}: {new}, after {old}")

    def record(self, new: Access) -> None:
        """Keeps the access and drops those that it supersedes: what is ordered after it is ordered after them, too."""
        self.accesses = [
            old
            for old in self.accesses
            if old.region != new.region or not (new.writes or (old.agent == new.agent and not old.writes))
        ]
        self.accesses.append(new)


class SharedMemory:
    """A view of an allocation: gl.shared_memory_descriptor."""

    def __init__(self, allocation: Allocation, data: torch.Tensor, written: torch.Tensor, dtype, layout, label: str):
        self.allocation, self.data, self.written = allocation, data, written
        self.dtype, self.layout, self.label = dtype, layout, label

    @classmethod
    def allocate(cls, dtype, shape: list[int], layout) -> "SharedMemory":
        allocation = Allocation(shape)
        data = torch.zeros(shape, dtype=TORCH_DTYPES[dtype])
        data.fill_(math.nan if data.is_floating_point() else -77)
        written = torch.zeros(shape, dtype=torch.bool)
        return cls(allocation, data, written, dtype, layout, allocation.name)

    @property
    def shape(self) -> list[int]:
        return list(self.data.shape)

    @property
    def type(self) -> "SharedMemory":
        return self

    @property
    def rank(self) -> int:
        return self.data.ndim

    @property
    def numel(self) -> int:
        return self.data.numel()

    def _view(self, change, suffix: str = "") -> "SharedMemory":
        data, written = change(self.data), change(self.written)
        return SharedMemory(self.allocation, data, written, self.dtype, self.layout, self.label + suffix)

    def index(self, index) -> "SharedMemory":
        index = int(index)
        if not 0 <= index < self.data.shape[0]:
            raise EmulationError(f"{where()}: {self.label} has no index {index}, only {self.data.shape[0]}")
        return self._view(lambda data: data[index], f"[{index}]")

    def slice(self, start: int, length: int, dim: int = 0) -> "SharedMemory":
        if not 0 <= start <= start + length <= self.data.shape[dim]:
            raise EmulationError(f"{where()}: {self.label} has no slice {start}:{start + length} in dimension {dim}")
        suffix = "[" + ":, " * dim + f"{start}:{start + length}]"
        return self._view(lambda data: data.narrow(dim, start, length), suffix)

    def permute(self, order) -> "SharedMemory":
        return self._view(lambda data: data.permute(*order))

    def reshape(self, shape) -> "SharedMemory":
        return self._view(lambda data: data.view(*shape))

    def load(self, layout) -> Value:
        me = machine().current
        self.access("a load reads it", writes=False, asynchronous=False, agent=me, time=me.clock[me])
        return Value(self.data.clone(), layout)

    def store(self, value: Value) -> None:
        if value.data.dtype != self.data.dtype or value.shape != self.shape:
            raise EmulationError(
                f"{where()}: {self.label} is {self.dtype} {self.shape}, not {value.dtype} {value.shape}"
            )
        me = machine().current
        self.access("a store writes it", writes=True, asynchronous=False, agent=me, time=me.clock[me])
        self.write(value.data)

    def _keep_alive(self) -> None:
        pass

    def write(self, data: torch.Tensor) -> None:
        self.data.copy_(data)
        self.written.fill_(True)

    def access(self, verb: str, *, writes: bool, asynchronous: bool, agent, time: float) -> Access:
        """Checks and records an access by the current partition, or by `agent` on its behalf."""
        data = self.data
        region = (data.storage_offset(), tuple(data.shape), data.stride())
        me = machine().current
        new = Access(verb, writes, asynchronous, region, me, where(), agent, time)
        self.allocation.check(new, self.label)
        if not writes and not bool(self.written.all()):
            raise EmulationError(f"{self.label} is uninitialised: {new}")
        self.allocation.record(new)
        if writes and not asynchronous:
            me.unfenced.append(new)
        return new

    def init_barrier(self, count: int) -> None:
        self.allocation.barriers[self.data.storage_offset()] = Barrier(self.label, count)

    def barrier(self) -> Barrier:
        barrier = self.allocation.barriers.get(self.data.storage_offset())
        if barrier is None or self.data.numel() != 1:
            raise EmulationError(f"{where()}: {self.label} is not an initialised mbarrier")
        return barrier
