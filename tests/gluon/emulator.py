"""Runs the source of Gluon kernels on the CPU, with numerics and with Hopper's asynchrony.

    emulate(kernel, (programs,), {"q_desc": TensorDescriptor(...), "out_ptr": tensor, "tiles": 7, "BLOCK_T": 64})

`kernel` is a `@gluon.jit` function. Its Python source runs unchanged with other globals: Gluon's functions are replaced
by emulated ones, in every jitted function that it calls, too. `hooks` names further functions to replace, for example
inline PTX. Each seed is another interleaving of the partitions and other completion times of asynchronous operations.
README.md lists what is modelled and what is not.
"""

import builtins
import itertools
import random
import types
from collections.abc import Callable, Mapping

import torch
import triton.language as tl
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import ampere, hopper
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from gluon import hopper as hopper_language
from gluon import language as language
from gluon.hopper import Descriptor, tma_reduce_add
from gluon.machine import RUNNING, EmulationError, Machine, where
from gluon.values import Pointer, scalar

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
    """Replaces real objects by emulated ones."""

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
            raise NotImplementedError(f"{where()}: {name} is not emulated; pass a hook for it")

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
    """Runs the programs of the grid one after another in random order; results are in the tensors of `arguments`.

    `arguments` holds one entry per parameter: tensors for pointers, TensorDescriptors, numbers, None, constexprs.
    `hooks` maps names, as spelled in the kernel's source, to functions. Raises EmulationError if the kernel breaks a
    rule.
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
