"""The machine under gluon_emulator.py: partitions that take turns, asynchronous operations, mbarriers.

Partitions are threads of which exactly one runs. At every synchronisation point and at every asynchronous issue a
seeded random choice says who goes on: a partition, or a pending operation, which then lands. Races do not depend on
that choice: every agent (a partition, its wgmmas, its bulk stores, the loads of one mbarrier) has a vector clock, which
an arrive releases and a wait acquires, and two accesses to overlapping shared memory must be ordered by those clocks.
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
    str(Path(__file__).with_name(f"gluon_{name}.py"))
    for name in ("machine", "memory", "values", "assembly", "language", "hopper", "emulator")
}


class EmulationError(AssertionError):
    """The kernel breaks a rule of the machine."""


class Stopped(BaseException):
    """Unwinds the other partitions after one has failed."""


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
    """The name that the kernel's current line assigns to."""
    frame = kernel_frame()
    line = linecache.getline(frame.f_code.co_filename, frame.f_lineno)
    match = re.match(r"\s*(\w+)\s*(?::[^=]+)?=[^=]", line)
    return match[1] if match else f"<{where()}>"


def join(clock: dict, other: dict) -> None:
    for agent, time in other.items():
        clock[agent] = max(clock.get(agent, 0), time)


@dataclass(eq=False)
class Operation:
    """Something asynchronous: `land` happens at a random moment after the issue, and after that of `after`."""

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
    ready: Callable[[], bool] | None = None  # None: can always go on
    waits: Callable[[], str] = str
    done: bool = False
    issued: dict = field(default_factory=dict)  # kind -> how many operations so far
    in_flight: dict = field(default_factory=dict)  # kind -> operations that no wait has retired, oldest first
    unfenced: list = field(default_factory=list)  # its stores to shared memory that no fence follows yet

    def __post_init__(self):
        self.clock[self] = 1

    def retire(self, kind: str, outstanding: int) -> None:
        """Completes all but the newest `outstanding` operations of this kind, and orders what follows after them."""
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
        self.eagerness = 10 ** self.random.uniform(-2, 1)  # of operations to land, against partitions to go on
        self.barriers: list[Barrier] = []
        self.failure: BaseException | None = None

    def new_partition(self, name: str, num_warps: int) -> Partition:
        return Partition(name, num_warps, weight=10 ** self.random.uniform(-1.5, 0))

    def issue(self, kind: str, land: Callable[[], None], *, in_order: bool = False, tracked: bool = True) -> Operation:
        """Starts an operation; `tracked` ones are retired by a wait of the same partition."""
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
        """Lets others go on, until this partition is chosen; with `ready`, not before that is true."""
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
        """Runs the workers in partitions of their own beside `default`; returns what `default` returns."""
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

    @torch.no_grad()  # which is a thread's own
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
        """Keeps the first error and wakes every partition, so that each unwinds."""
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
    """That of the program that runs."""
    return RUNNING[-1]


class Barrier:
    """An mbarrier: a phase completes when no arrival and no byte is outstanding."""

    def __init__(self, label: str, count: int):
        self.label, self.count = label, count
        self.pending, self.bytes, self.phase = count, 0, 0
        self.awaited = 0  # bytes expected for which no load has been issued
        self.issued, self.loads = 0, 0  # loads issued, and landed
        self.gathered: dict = {}  # clocks of who arrived
        self.released: dict = {}  # of the completed phases
        machine().barriers.append(self)

    def arrive(self, count: int) -> None:
        me = machine().current
        if count > self.pending:
            raise EmulationError(
                f"{where()}: {count} arrivals on {self.label}, which wants {self.pending} of {self.count}"
            )
        self.pending -= count
        join(self.gathered, me.clock)
        me.clock[me] += 1
        self._complete()

    def expect(self, nbytes: int) -> None:
        """mbarrier.arrive.expect_tx: it arrives, too."""
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
