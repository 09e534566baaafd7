"""The emulated machine: a scheduler of partitions and asynchronous operations, and mbarriers.

Partitions are threads of which exactly one runs at a time. At every synchronisation point and every asynchronous issue
a seeded random choice selects what comes next: a partition, or a pending operation, which then completes. Race
detection does not depend on that choice: every agent (a partition, its wgmmas, its TMA stores, the loads of one
mbarrier) has a vector clock, released by an arrive and acquired by a wait, and two conflicting accesses to shared
memory must be ordered by those clocks.
"""

import linecache
import random
import re
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

OWN_FILES = {
    str(Path(__file__).with_name(f"{name}.py"))
    for name in ("machine", "memory", "values", "assembly", "language", "hopper", "emulator")
}


class EmulationError(AssertionError):
    """The kernel breaks a rule of the machine."""


class Stopped(BaseException):
    """Unwinds the remaining partitions after one has failed."""


def kernel_frame():
    """The innermost frame of the kernel's own source."""
    frame = sys._getframe(1)
    while frame.f_code.co_filename in OWN_FILES and frame.f_back:
        frame = frame.f_back
    return frame


def where() -> str:
    frame = kernel_frame()
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"


def assigned_name() -> str:
    """The name to which the kernel's current line assigns."""
    frame = kernel_frame()
    line = linecache.getline(frame.f_code.co_filename, frame.f_lineno)
    match = re.match(r"\s*(\w+)\s*(?::[^=]+)?=[^=]", line)
    return match[1] if match else f"<{where()}>"


def join(clock: dict, other: dict) -> None:
    for agent, time in other.items():
        clock[agent] = max(clock.get(agent, 0), time)


@dataclass(eq=False)
class Operation:
    """An asynchronous operation: `land` runs at a random time after the issue, and after `after` has landed."""

    kind: str
    land: Callable[[], None]
    where: str
    time: int = 0
    after: "Operation | None" = None
    landed: bool = False


@dataclass(eq=False)
class Partition:
    name: str
    num_warps: int
    clock: dict = field(default_factory=dict)
    baton: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    weight: float = 1.0
    ready: Callable[[], bool] | None = None  # None: can always continue
    waits: Callable[[], str] = str
    done: bool = False
    issued: dict = field(default_factory=dict)  # kind -> how many operations so far
    in_flight: dict = field(default_factory=dict)  # kind -> operations that no wait has retired, oldest first
    unfenced: list = field(default_factory=list)  # its stores to shared memory since the last fence

    def __post_init__(self):
        self.clock[self] = 1

    def retire(self, kind: str, outstanding: int) -> None:
        """Completes all but the newest `outstanding` operations of a kind, and orders what follows after them."""
        operations = self.in_flight.get(kind, [])
        keep = max(len(operations) - outstanding, 0)
        for operation in operations[:keep]:
            machine().complete(operation)
            self.clock[kind, self] = operation.time
        self.in_flight[kind] = operations[keep:]


class Machine:
    """One program."""

    def __init__(self, seed: str, num_warps: int, program: tuple[int, ...], programs: tuple[int, ...]):
        self.program, self.programs = program, programs
        self.random = random.Random(seed)
        self.current = self.new_partition("default", num_warps)
        self.partitions = [self.current]
        self.pending: list[Operation] = []
        self.eagerness = 10 ** self.random.uniform(-2, 1)  # weight of landing an operation against running a partition
        self.barriers: list[Barrier] = []
        self.failure: BaseException | None = None

    def new_partition(self, name: str, num_warps: int) -> Partition:
        return Partition(name, num_warps, weight=10 ** self.random.uniform(-1.5, 0))

    def issue(self, kind: str, land: Callable[[], None], *, in_order: bool = False, tracked: bool = True) -> Operation:
        """Starts an operation; if `tracked`, a wait of the same partition retires it."""
        me = self.current
        operation = Operation(kind, land, where())
        if tracked:
            queue = me.in_flight.setdefault(kind, [])
            me.issued[kind] = operation.time = me.issued.get(kind, 0) + 1
            operation.after = queue[-1] if queue and in_order else None
            queue.append(operation)
        self.pending.append(operation)
        return operation

    def complete(self, operation: Operation) -> None:
        if operation.landed:
            return
        if operation.after:
            self.complete(operation.after)
        operation.landed = True
        operation.after = None
        self.pending.remove(operation)
        operation.land()

    def step(self, ready: Callable[[], bool] | None = None, waits: Callable[[], str] = str) -> None:
        """Yields until this partition is chosen again, with `ready` not before that is true."""
        me = self.current
        me.ready, me.waits = ready, waits
        if self._hand_over() is not me:
            me.baton.acquire()
            if self.failure:
                raise Stopped
        me.ready = None

    def _hand_over(self) -> Partition:
        """Lands operations until a partition is chosen, and gives it the baton."""
        me = self.current
        while isinstance(chosen := self._choose(), Operation):
            self.complete(chosen)
        if chosen is not me:
            self.current = chosen
            chosen.baton.release()
        return chosen

    def _choose(self) -> Partition | Operation:
        able = [p for p in self.partitions if not p.done and (p.ready is None or p.ready())]
        landable = [o for o in self.pending if o.after is None or o.after.landed]
        if not able and not landable:
            waits = "\n  ".join(p.waits() for p in self.partitions if not p.done)
            raise EmulationError(f"deadlock: nothing is pending and every partition waits\n  {waits}")
        weights = [p.weight for p in able] + [self.eagerness] * len(landable)
        return self.random.choices(able + landable, weights)[0]

    def specialize(self, default: Callable[[], object], workers: list[tuple[str, int, Callable[[], object]]]) -> object:
        """Runs the workers in partitions of their own, concurrently with `default`; returns the result of `default`."""
        me = self.current
        partitions = [self.new_partition(name, num_warps) for name, num_warps, _ in workers]
        for partition in partitions:
            join(partition.clock, me.clock)
        me.clock[me] += 1
        self.partitions += partitions
        threads = [
            threading.Thread(target=self._run, args=(partition, body), daemon=True)
            for partition, (_, _, body) in zip(partitions, workers, strict=True)
        ]
        for thread in threads:
            thread.start()
        try:
            self.step()
            result = default()
            self.step(lambda: all(p.done for p in partitions), lambda: f"{me.name} has ended")
        except BaseException as error:
            self._fail(error)
            raise self.failure from None
        finally:
            for thread in threads:
                thread.join()
        for partition in partitions:
            join(me.clock, partition.clock)
        return result

    @torch.no_grad()  # a thread-local setting
    def _run(self, me: Partition, body: Callable[[], object]) -> None:
        try:
            me.baton.acquire()
            if self.failure:
                return
            body()
            self.check_retired(me)
            me.done = True
            self._hand_over()
        except BaseException as error:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        """Keeps the first error and wakes every partition to unwind."""
        if self.failure is None:
            self.failure = error
            for partition in self.partitions:
                partition.baton.release()

    def check_retired(self, partition: Partition) -> None:
        for kind, operations in partition.in_flight.items():
            if operations:
                raise EmulationError(
                    f"{partition.name} ends with a {kind} of {operations[0].where} in flight, never waited for"
                )

    def finish(self) -> None:
        me = self.current
        self.check_retired(me)
        for barrier in self.barriers:
            if me.clock.get(("loads", barrier), 0) < barrier.issued:
                raise EmulationError(f"the kernel ends with a TMA load onto {barrier.label} that no wait has seen")


RUNNING: list[Machine] = []


def machine() -> Machine:
    """The machine of the running program."""
    return RUNNING[-1]


class Barrier:
    """An mbarrier: a phase completes when no arrivals and no bytes are outstanding."""

    def __init__(self, label: str, count: int):
        self.label, self.count = label, count
        self.pending, self.bytes, self.phase = count, 0, 0
        self.awaited = 0  # expected bytes for which no load has been issued
        self.issued, self.loads = 0, 0  # loads issued and landed
        self.gathered: dict = {}  # clocks of the arrivals in the current phase
        self.released: dict = {}  # clocks of the completed phases
        machine().barriers.append(self)

    def arrive(self, count: int) -> None:
        me = machine().current
        if count > self.pending:
            raise EmulationError(
                f"{where()}: {count} arrivals on {self.label}, which expects {self.pending} more of {self.count}"
            )
        self.pending -= count
        join(self.gathered, me.clock)
        me.clock[me] += 1
        self._complete()

    def expect(self, nbytes: int) -> None:
        """mbarrier.arrive.expect_tx, which also arrives."""
        self.bytes += nbytes
        self.awaited += nbytes
        self.arrive(1)

    def promise(self, nbytes: int) -> None:
        self.issued += 1
        self.awaited -= nbytes
        if self.awaited < 0:
            raise EmulationError(f"{where()}: loads bring {-self.awaited} bytes more than {self.label} expects")

    def land(self, nbytes: int) -> int:
        self.bytes -= nbytes
        self.loads += 1
        self.gathered["loads", self] = self.loads
        self._complete()
        return self.loads

    def _complete(self) -> None:
        if self.pending == 0 and self.bytes < 0:
            raise EmulationError(f"{self.label} got {-self.bytes} bytes more than phase {self.phase} expects")
        if self.pending == 0 and self.bytes == 0:
            self.phase += 1
            self.pending = self.count
            join(self.released, self.gathered)

    def wait(self, parity: int) -> None:
        me, line = machine().current, where()
        machine().step(
            lambda: self.phase & 1 != parity,
            lambda: (
                f"{me.name} at {line} waits on {self.label} for parity {parity}: it is in phase {self.phase}, "
                f"{self.pending} of {self.count} arrivals and {self.bytes} bytes outstanding"
            ),
        )
        join(me.clock, self.released)
