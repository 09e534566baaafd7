"""Inline PTX of an emulated kernel, applied to the elements of a tensor in the register order of its layout.

`pack` consecutive registers of a thread are the operands of one execution of the assembly. Which elements they hold
comes from the compiler: a layout's linear form lists by how much each bit of register, lane and warp moves the element.
"""

import math
import re

import torch
from triton._C.libtriton import gluon_ir, ir

from gluon.machine import EmulationError, where
from gluon.values import Pointer, Value

REDUCTION = re.compile(r"red\.relaxed\.gpu\.global\.add(?:\.v(\d))?\.f32 \[\$(\d+)\], \{?([$\d, ]+?)\}?")
RESULT = re.compile(r"mov\.b32 \$\d+, 0")  # a dummy output, since inline assembly must have one
ORDERS: dict[str, torch.Tensor] = {}


def registers(layout, shape: list[int]) -> torch.Tensor:
    """(threads, registers): the flat index of the element in each register of each thread."""
    key = f"{layout!r} {shape}"
    if key not in ORDERS:
        context = ir.context()
        ir.load_dialects(context)
        builder = gluon_ir.GluonOpBuilder(context)
        linear = builder.to_linear_layout(layout._to_ir(builder), list(shape))
        strides = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
        index = torch.zeros(1, dtype=torch.int64)
        for basis in (*linear.reg_bases, *linear.lane_bases, *linear.warp_bases):
            index = torch.cat([index, index ^ sum(n * stride for n, stride in zip(basis, strides, strict=True))])
        ORDERS[key] = index.view(-1, 2 ** len(linear.reg_bases))
    return ORDERS[key]


def inline_asm_elementwise(asm: str, constraints: str, args, dtype, is_pure: bool, pack: int, **_) -> None:
    """Runs reductions to global memory; any other assembly needs a hook."""
    values = next(x for x in args if isinstance(x, Value))
    if values.layout is None:
        raise EmulationError(f"{where()}: the layout of {values!r} is unknown, and so is its register order")
    order = registers(values.layout, values.shape).view(-1, pack)  # one row per execution of the assembly
    results = sum(constraint.strip().startswith("=") for constraint in constraints.split(","))
    if len(constraints.split(",")) != results + pack * len(args):
        raise EmulationError(f"{where()}: {constraints} are not {pack} operands per argument")
    for statement in filter(None, map(str.strip, asm.split(";"))):
        if match := REDUCTION.fullmatch(statement):
            operands = [int(name) - results for name in re.findall(r"\$(\d+)", match[3])]
            if len(operands) != int(match[1] or 1):
                raise EmulationError(f"{where()}: {statement} adds {len(operands)} values")
            address = _operand(args, int(match[2]) - results, order)
            added = torch.stack([_operand(args, n, order) for n in operands], 1)
            pointer = next(x for x in args if isinstance(x, Pointer))
            _add(pointer.tensor, address, added)
        elif not RESULT.fullmatch(statement):
            raise EmulationError(f"{where()}: {statement!r} is not emulated; pass a hook for the function around it")


def _operand(args, number: int, order: torch.Tensor) -> torch.Tensor:
    """The values of operand `number`, counted from the first input, in each execution of the assembly."""
    pack = order.shape[1]
    argument = args[number // pack]
    data = argument.offsets if isinstance(argument, Pointer) else argument.data
    return data.flatten()[order[:, number % pack]]


def _add(tensor: torch.Tensor, first: torch.Tensor, added: torch.Tensor) -> None:
    """Adds each row of `added` to consecutive elements of memory, aligned to the size of the row."""
    count = added.shape[1]
    if bool((first % count != 0).any()) or tensor.data_ptr() % (count * tensor.element_size()) != 0:
        raise EmulationError(
            f"{where()}: a reduction of {count} values at an address that is not a multiple of its size"
        )
    pointer = Pointer(tensor, first[:, None] + torch.arange(count))
    flat, offsets, _ = pointer.place(None)
    flat.index_put_((offsets,), added.to(flat.dtype), accumulate=True)
