"""The emulated Hopper functions: mbarriers, TMA and wgmma."""

import math
from collections.abc import Callable

import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper.mbarrier import MBarrierLayout
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from gluon.language import allocate_shared_memory
from gluon.machine import EmulationError, machine, where
from gluon.memory import SharedMemory
from gluon.values import GLUON_DTYPES, Value, scalar

# Mbarriers


def fence_async_shared(cluster: bool = False) -> None:
    for access in machine().current.unfenced:
        access.fenced = True
    machine().current.unfenced.clear()


def barrier_wait(barrier: SharedMemory, phase, pred=True, deps=()) -> None:
    if pred:
        barrier.barrier().wait(int(phase))


def barrier_expect(barrier: SharedMemory, nbytes, pred=True) -> None:
    if pred:
        barrier.barrier().expect(int(nbytes))
        machine().step()


def barrier_arrive(barrier: SharedMemory, *, count: int = 1, pred=True) -> None:
    if pred:
        barrier.barrier().arrive(count)
        machine().step()


# Tensor memory accelerator


class Descriptor:
    """A TensorDescriptor as kernels see it."""

    def __init__(self, host: TensorDescriptor):
        tensor, self.host = host.base, host
        self.shape, self.strides = [scalar(n) for n in host.shape], [scalar(n) for n in host.strides]
        self.block_shape, self.layout = list(host.block_shape), host.layout
        self.dtype = GLUON_DTYPES[tensor.dtype]
        self.block_type = gl.block_type(self.dtype, self.block_shape)
        self.nbytes_per_cta = self.nbytes = self.block_type.nbytes
        self.type = self
        size = tensor.element_size()
        assert tensor.data_ptr() % 16 == 0, "the base address must be a multiple of 16 bytes"
        assert all(stride * size % 16 == 0 for stride in host.strides[:-1]), "strides must be multiples of 16 bytes"
        assert host.strides[-1] == 1, "the last dimension must be contiguous"
        assert self.block_shape[-1] * size >= 16, "the last dimension of a box has at least 16 bytes"
        assert all(0 < n <= 256 for n in self.block_shape), f"a box dimension is at most 256, not {self.block_shape}"
        assert all(0 < n < 2**32 for n in host.shape), "dimensions have 32 bits"
        assert all(0 <= stride * size < 2**40 for stride in host.strides), "strides have 40 bits"
        self.tensor = tensor.as_strided(tuple(host.shape), tuple(host.strides))

    def check(self, coord, shared: SharedMemory) -> list[int]:
        shapes = [shared.shape, self.block_shape]
        while shapes[1][0] == 1 and len(shapes[1]) > len(shapes[0]):
            shapes[1] = shapes[1][1:]
        if shapes[0] != shapes[1] or shared.dtype != self.dtype:
            raise EmulationError(
                f"{where()}: {shared.label} is {shared.dtype} {shared.shape}, the box {self.dtype} {self.block_shape}"
            )
        if len(coord) != len(self.block_shape) or any(isinstance(c, Value) and c.dtype != gl.int32 for c in coord):
            raise EmulationError(f"{where()}: coordinates {coord} are not {len(self.block_shape)} int32")
        return [int(c) for c in coord]

    def overlap(self, coord: list[int]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        """The part of the box inside the tensor, as slices of the tensor and of the box."""
        spans = [
            (max(c, 0), max(min(c + box, n), max(c, 0)))
            for c, box, n in zip(coord, self.block_shape, self.tensor.shape, strict=True)
        ]
        inside = tuple(slice(start, stop) for start, stop in spans)
        return inside, tuple(slice(start - c, stop - c) for (start, stop), c in zip(spans, coord, strict=True))

    def read(self, coord: list[int]) -> torch.Tensor:
        box = torch.full(self.block_shape, math.nan if self.host.padding == "nan" else 0, dtype=self.tensor.dtype)
        inside, part = self.overlap(coord)
        box[part] = self.tensor[inside]
        return box


def async_copy_global_to_shared(
    desc: Descriptor, coord, barrier, result: SharedMemory, pred=True, multicast=False
) -> None:
    if not pred:
        return
    coord, signal = desc.check(coord, result), barrier.barrier()
    signal.promise(desc.nbytes)
    access = result.access(
        "a TMA load writes it", writes=True, asynchronous=True, agent=("loads", signal), time=math.inf
    )

    def land() -> None:
        result.write(desc.read(coord).view(result.shape))
        access.time = signal.land(desc.nbytes)

    machine().issue("TMA load", land, tracked=False)
    machine().step()


def bulk_store(desc: Descriptor, coord, source: SharedMemory, write: Callable, verb: str) -> None:
    coord = desc.check(coord, source)

    def land() -> None:
        inside, part = desc.overlap(coord)
        write(desc.tensor[inside], source.data.reshape(desc.block_shape)[part])

    operation = machine().issue("TMA store", land)
    agent = ("TMA store", machine().current)
    source.access(verb, writes=False, asynchronous=True, agent=agent, time=operation.time)
    machine().step()


def async_copy_shared_to_global(desc: Descriptor, coord, source: SharedMemory) -> None:
    bulk_store(desc, coord, source, torch.Tensor.copy_, "a TMA store reads it")


def tma_reduce_add(desc: Descriptor, coord, source: SharedMemory) -> None:
    """A hook for kernels that define this builtin: adds a shared tile to global memory."""
    bulk_store(desc, coord, source, torch.Tensor.add_, "a TMA reduction reads it")


def store_wait(pendings: int = 0) -> None:
    machine().step()
    machine().current.retire("TMA store", pendings)


# Tensor cores


class Accumulator:
    """The result of an asynchronous warpgroup_mma, which may only be chained or waited for."""

    def __init__(self, data: torch.Tensor, layout, operation=None):
        self.data_in_flight, self.layout, self.operation = data, layout, operation
        self.shape, self.dtype, self.type = list(data.shape), GLUON_DTYPES[data.dtype], self
        self.taken = False

    def take(self) -> "Accumulator":
        if self.taken:
            raise EmulationError(f"{where()}: this accumulator was already consumed by a warpgroup_mma or a wait")
        self.taken = True
        return self

    def refuse(self, *_):
        issued = f"issued at {self.operation.where}" if self.operation else "of warpgroup_mma_init"
        raise EmulationError(f"{where()}: an accumulator {issued} is used before a warpgroup_mma_wait returned it")

    __getattr__ = __getitem__ = __str__ = refuse
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = __neg__ = refuse
    __lt__ = __le__ = __gt__ = __ge__ = refuse


def warpgroup_mma_init(value: Value) -> Accumulator:
    return Accumulator(value.data.clone(), value.layout)


def warpgroup_mma(a, b: SharedMemory, acc, *, use_acc=True, is_async: bool = False, **_):
    shapes_fit = a.shape[1] == b.shape[0] and [a.shape[0], b.shape[1]] == acc.shape
    if not shapes_fit or a.dtype != b.dtype or a.dtype not in (gl.bfloat16, gl.float16):
        raise EmulationError(f"{where()}: {a.dtype} {a.shape} @ {b.dtype} {b.shape} + {acc.shape}")
    start = acc.take().data_in_flight if isinstance(acc, Accumulator) else acc.data
    use_acc = bool(use_acc)
    result = torch.full_like(start, math.nan)

    def land() -> None:
        product = a.data.float() @ b.data.float()
        result.copy_(product + start if use_acc else product)

    operation = machine().issue("wgmma", land, in_order=True)
    agent = ("wgmma", machine().current)
    for operand in (a, b):
        if isinstance(operand, SharedMemory):
            operand.access("a wgmma reads it", writes=False, asynchronous=True, agent=agent, time=operation.time)
    accumulator = Accumulator(result, acc.layout, operation)
    machine().step()
    return accumulator if is_async else warpgroup_mma_wait(0, [accumulator])


def warpgroup_mma_wait(num_outstanding: int = 0, deps=None):
    if deps is None:
        raise EmulationError(f"{where()}: warpgroup_mma_wait needs deps")
    machine().step()
    machine().current.retire("wgmma", num_outstanding)
    in_flight = machine().current.in_flight["wgmma"]
    results = tuple(_waited(dep, in_flight) if isinstance(dep, Accumulator) else dep for dep in deps)
    return results[0] if len(results) == 1 else results


def _waited(accumulator: Accumulator, in_flight: list):
    accumulator.take()
    if accumulator.operation in in_flight:
        return Accumulator(accumulator.data_in_flight, accumulator.layout, accumulator.operation)
    return Value(accumulator.data_in_flight, accumulator.layout)


MBARRIER = {
    "init": lambda barrier, count: barrier.init_barrier(int(count)),
    "invalidate": lambda barrier: barrier.allocation.barriers.pop(barrier.data.storage_offset()),
    "wait": barrier_wait,
    "expect": barrier_expect,
    "arrive": barrier_arrive,
    "allocate_mbarrier": lambda batch=None, **_: allocate_shared_memory(
        gl.int64, [1] if batch is None else [batch, 1], MBarrierLayout()
    ),
}
TMA = {
    "async_copy_global_to_shared": async_copy_global_to_shared,
    "async_copy_shared_to_global": async_copy_shared_to_global,
    "store_wait": store_wait,
}
HOPPER = {
    "fence_async_shared": fence_async_shared,
    "warpgroup_mma": warpgroup_mma,
    "warpgroup_mma_init": warpgroup_mma_init,
    "warpgroup_mma_wait": warpgroup_mma_wait,
}
