"""Runs the source of Gluon kernels on the CPU, with numerics and with Hopper's asynchrony.

    emulate(kernel, (programs,), {"q_desc": TensorDescriptor(...), "out_ptr": tensor, "tiles": 7, "BLOCK_T": 64})

`kernel` is a `@gluon.jit` function. Its Python source runs as it is, with other globals: what it took from Gluon is
emulated, and so is every jitted function it calls. `hooks` names further functions to replace, inline PTX for example.
Each seed is another interleaving of the partitions and another moment for every asynchronous operation.

What a pass proves, for the sizes and seeds that ran: the numerics (float32 sums, 16-bit rounding where the kernel
rounds), the tails, addresses within their tensors, no int32 overflow, no deadlock, the arrivals and bytes of each
mbarrier phase, no uninitialised shared memory read, no accumulator touched in flight, no shared tile touched by two
operations that no mbarrier, wait or fence orders (it need not have gone wrong), nothing left in flight at the end.

What it does not prove: that the kernel compiles, its layouts, bank conflicts, registers, speed, what the compiler or
ptxas make of it, ordering finer than whole operations, races between the warps of one partition (the compiler's own
barriers), on global memory or between programs: they run one after the other, in random order. Sums and exp2 round as
torch does. A bulk store is in global memory once its wait returns; Gluon's wait only says that shared memory was read.
It is stricter than Hopper in one place: bytes must be expected before the loads that bring them are issued.
"""

import builtins
import itertools
import random
import types
from collections.abc import Callable, Mapping

import gluon_hopper as hopper_language
import gluon_language as language
import torch
import triton.language as tl
from gluon_hopper import Descriptor, tma_reduce_add
from gluon_machine import RUNNING, EmulationError, Machine, where
from gluon_values import Pointer, scalar
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import ampere, hopper
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

__all__ = ["EmulationError", "emulate", "tma_reduce_add"]
JITTED = (JITFunction, InterpretedFunction)
EMULATED = {
    id(getattr(module, name)): function
    for module, functions in (
        (gl, language.LANGUAGE),
        (tl, language.LANGUAGE),
        (hopper, hopper_language.HOPPER),
        (hopper.tma, hopper_language.TMA),
        (hopper.mbarrier, hopper_language.MBARRIER),
        (ampere.mbarrier, hopper_language.MBARRIER),
    )
    for name, function in functions.items()
    if hasattr(module, name)
}


class Translation:
    """Puts emulated objects in place of real ones."""

    def __init__(self, hooks: Mapping[str, Callable]):
        self.hooks = hooks
        self.functions: dict[int, types.FunctionType] = {}

    def __call__(self, name: str, value):
        if name in self.hooks:
            return self.hooks[name]
        if id(value) in EMULATED:
            return EMULATED[id(value)]
        if isinstance(value, JITTED):
            return self.function(value.fn)
        if isinstance(value, gl.constexpr):
            return value.value
        if isinstance(value, types.ModuleType):
            return Module(self, value)
        if getattr(value, "__triton_builtin__", False):
            return self.missing(name)
        return value

    def function(self, real: types.FunctionType) -> types.FunctionType:
        if id(real) not in self.functions:
            names = {"__builtins__": builtins, "range": language.runtime_range}
            defaults = tuple(self("", value) for value in real.__defaults__ or ())
            emulated = types.FunctionType(real.__code__, names, real.__name__, defaults, real.__closure__)
            emulated.__kwdefaults__ = {name: self("", value) for name, value in (real.__kwdefaults__ or {}).items()}
            self.functions[id(real)] = emulated
            for name in used_names(real.__code__):
                if name in real.__globals__:
                    names[name] = self(name, real.__globals__[name])
        return self.functions[id(real)]

    def missing(self, name: str) -> Callable:
        def call(*_, **__):
            raise NotImplementedError(f"{where()}: {name} is not emulated; name a hook for it")

        return call


class Module:
    """A module seen through a translation."""

    def __init__(self, translation: Translation, real: types.ModuleType):
        self._translation, self._real = translation, real

    def __getattr__(self, name: str):
        return self._translation(name, getattr(self._real, name))


def used_names(code: types.CodeType) -> set[str]:
    nested = (used_names(constant) for constant in code.co_consts if isinstance(constant, types.CodeType))
    return set(code.co_names).union(*nested)


def argument(parameter, value):
    """A launch argument as the kernel sees it."""
    if isinstance(value, gl.constexpr):
        return value.value
    if parameter.is_constexpr:
        return value
    if isinstance(value, torch.Tensor):
        return Pointer(value)
    if isinstance(value, TensorDescriptor):
        return Descriptor(value)
    return scalar(value) if isinstance(value, bool | int | float) else value


def emulate(
    kernel,
    grid: tuple[int, ...],
    arguments: Mapping[str, object],
    *,
    num_warps: int = 4,
    seed: int = 0,
    hooks: Mapping[str, Callable] | None = None,
) -> None:
    """Runs every program of the grid, one after the other in random order; results are in the tensors of `arguments`.

    `arguments` holds one entry a parameter: tensors for pointers, TensorDescriptors, numbers, None, constexprs. Raises
    EmulationError where the kernel breaks a rule. `hooks` maps names, as the kernel's source spells them, to functions.
    """
    body = Translation(hooks or {}).function(kernel.fn)
    parameters = {parameter.name: parameter for parameter in kernel.params}
    values = {name: argument(parameters[name], value) for name, value in arguments.items()}
    programs = (*grid, 1, 1)[:3]
    order = list(itertools.product(*map(range, programs)))
    random.Random(seed).shuffle(order)
    for program in order:
        RUNNING.append(Machine(f"{seed} {program}", num_warps, program, programs))
        try:
            body(**values)
            RUNNING[-1].finish()
        finally:
            RUNNING.pop()
