"""The emulated functions of `gl`, on the machine of the running program."""

from collections.abc import Callable

import torch

from gluon import values as values
from gluon.assembly import inline_asm_elementwise
from gluon.machine import EmulationError, machine, where
from gluon.memory import SharedMemory
from gluon.values import TORCH_DTYPES, Value, as_value, binary, scalar

# Computation


def elementwise(function) -> Callable:
    return lambda x, **_: Value(function(as_value(x).data), as_value(x).layout)


def reduction(function) -> Callable:
    def reduce(x: Value, axis=None, **_) -> Value:
        data = x.data.flatten() if axis is None else x.data
        return Value(function(data, 0 if axis is None else axis), getattr(x.layout, "parent", None))

    return reduce


def torch_sum(data: torch.Tensor, axis: int) -> torch.Tensor:
    return values.checked(data.sum(axis), data.dtype)


def where_(condition, x, y) -> Value:
    dtype = values.common_dtype(x, y, False)
    x, y = as_value(x), as_value(y)
    return Value(torch.where(as_value(condition).data, x.data.to(dtype), y.data.to(dtype)), x.layout or y.layout)


def arange(start: int, end: int, layout=None) -> Value:
    return Value(torch.arange(start, end, dtype=torch.int32), layout)


def full(shape, value, dtype, layout=None) -> Value:
    return Value(as_value(value).data.to(TORCH_DTYPES[dtype]).expand([int(n) for n in shape]).clone(), layout)


def full_like(x: Value, value, shape=None, dtype=None, layout=None) -> Value:
    return full(x.shape if shape is None else shape, value, dtype or x.dtype, layout or x.layout)


def assertion(condition, message="", *_, **__) -> None:
    if not bool(as_value(condition).data.all()):
        raise EmulationError(f"{where()}: assertion fails {message}")


def runtime_range(*bounds):
    return map(scalar, range(*(int(bound) for bound in bounds)))


# Partitions and shared memory


def warp_specialize(functions_and_args, worker_num_warps, worker_num_regs=None):
    (default, default_args), *workers = functions_and_args
    assert len(workers) == len(worker_num_warps) == len(worker_num_regs or worker_num_warps)
    named = [
        (f"{function.__name__}#{i}", num_warps, lambda function=function, args=args: function(*args))
        for i, ((function, args), num_warps) in enumerate(zip(workers, worker_num_warps, strict=True), 1)
    ]
    return machine().specialize(lambda: default(*default_args), named)


def allocate_shared_memory(dtype, shape, layout, value=None) -> SharedMemory:
    shared = SharedMemory.allocate(dtype, [int(n) for n in shape], layout)
    if value is not None:
        shared.store(value)
    return shared


# Name in `gl` -> replacement

LANGUAGE = {
    "abs": elementwise(torch.abs),
    "allocate_shared_memory": allocate_shared_memory,
    "arange": arange,
    "assume": assertion,
    "atomic_add": values.atomic_add,
    "barrier": lambda **_: machine().step(),
    "broadcast": lambda x, y: (Value(t) for t in torch.broadcast_tensors(x.data, y.data)),
    "cast": lambda x, dtype, **_: as_value(x).to(dtype),
    "cdiv": lambda x, div: (x + (div - 1)) // div,
    "ceil": elementwise(torch.ceil),
    "constexpr": lambda value: value,
    "convert_layout": lambda x, layout, **_: Value(x.data, layout),
    "device_assert": assertion,
    "device_print": lambda *_, **__: None,
    "exp": elementwise(torch.exp),
    "exp2": elementwise(torch.exp2),
    "expand_dims": lambda x, axis: Value(x.data.unsqueeze(axis)),
    "fdiv": lambda x, y, **_: as_value(x) / y,
    "floor": elementwise(torch.floor),
    "fma": lambda x, y, z: Value((x.data.double() * y.data + z.data).to(x.data.dtype), x.layout),
    "full": full,
    "full_like": full_like,
    "inline_asm_elementwise": inline_asm_elementwise,
    "join": lambda a, b: Value(torch.stack((a.data, b.data), -1)),
    "load": values.load,
    "log": elementwise(torch.log),
    "log2": elementwise(torch.log2),
    "max": reduction(torch.amax),
    "max_constancy": lambda x, _: x,
    "max_contiguous": lambda x, _: x,
    "maximum": lambda x, y, **_: binary(torch.maximum, x, y),
    "min": reduction(torch.amin),
    "minimum": lambda x, y, **_: binary(torch.minimum, x, y),
    "multiple_of": lambda x, _: x,
    "num_programs": lambda axis: scalar(machine().programs[axis]),
    "num_warps": lambda: machine().current.num_warps,
    "permute": lambda x, dims: x.permute(*dims),
    "program_id": lambda axis: scalar(machine().program[axis]),
    "reshape": lambda x, shape: x.reshape(*shape),
    "rsqrt": elementwise(torch.rsqrt),
    "set_auto_layout": lambda x, layout: Value(x.data, layout),
    "split": lambda x: x.split(),
    "sqrt": elementwise(torch.sqrt),
    "static_assert": assertion,
    "static_print": lambda *_, **__: None,
    "static_range": range,
    "store": values.store,
    "sum": reduction(torch_sum),
    "thread_barrier": lambda: machine().step(),
    "to_tensor": as_value,
    "warp_specialize": warp_specialize,
    "where": where_,
    "zeros": lambda shape, dtype, layout=None: full(shape, 0, dtype, layout),
    "zeros_like": lambda x, **changes: full_like(x, 0, **changes),
}
