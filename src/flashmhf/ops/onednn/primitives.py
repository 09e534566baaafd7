"""How Numba compiles the kernels, and the instructions that it has no word for."""

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.compiler import Compiler
from numba.extending import intrinsic

I64, I32, I16, F32 = ir.IntType(64), ir.IntType(32), ir.IntType(16), ir.FloatType()


class _BFloat16(ir.types._BaseFloatType):
    null = "0.0"
    intrinsic_name = "bf16"

    def __str__(self) -> str:
        return "bfloat"


_BFloat16._create_instance()


class _NoAliasCompiler(Compiler):
    """Array arguments do not overlap: otherwise loops over several of them are not vectorised."""

    def define_pipelines(self) -> Any:
        self.state.flags.noalias = True
        return super().define_pipelines()


def kernel(function: Callable[..., Any]) -> Any:
    """Compiles a function without Python objects and without the interpreter's lock."""
    return numba.njit(nogil=True, error_model="numpy")(function)


def vector_kernel(function: Callable[..., Any]) -> Any:
    """A kernel whose array arguments do not overlap. a * b + c may be one instruction; no other liberties."""
    compile_function = numba.njit(
        pipeline_class=_NoAliasCompiler, nogil=True, error_model="numpy", fastmath={"contract"}
    )
    return compile_function(function)


def summing_kernel(function: Callable[..., Any]) -> Any:
    """A kernel that may add up in any order, for sums over arrays and nothing else."""
    return numba.njit(nogil=True, error_model="numpy", fastmath={"contract", "reassoc", "nsz"})(function)


def inlined(function: Callable[..., Any]) -> Any:
    return numba.njit(inline="always", error_model="numpy", fastmath={"contract"})(function)


@intrinsic
def call_brgemm(typing, function, m, n, k, lda, ldb, ldc, add, a, b, c, pairs):
    """C (m, n) = A (m, k) B (k, n), or += with `add`; C is float32. Addresses and row strides in elements.

    at::native::cpublas::brgemm, in aten/src/ATen/native/CPUBlas.h.
    """

    def codegen(context, builder, signature, arguments):
        pointer = builder.inttoptr(arguments[0], ir.FunctionType(ir.VoidType(), [I64] * 11).as_pointer())
        builder.call(pointer, arguments[1:])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 12), codegen


@intrinsic
def call_release(typing, function, pairs):
    """Frees this thread's matrix unit: at::native::cpublas::brgemm_release."""

    def codegen(context, builder, signature, arguments):
        pointer = builder.inttoptr(arguments[0], ir.FunctionType(ir.VoidType(), [I64]).as_pointer())
        builder.call(pointer, arguments[1:])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def thread_number(typing, function):
    """omp_get_thread_num."""

    def codegen(context, builder, signature, arguments):
        pointer = builder.inttoptr(arguments[0], ir.FunctionType(I32, []).as_pointer())
        return builder.sext(builder.call(pointer, []), I64)

    return types.int64(types.int64), codegen


@intrinsic
def fetch_add(typing, address):
    """Adds one to the int64 at the address and returns what it was, atomically."""

    def codegen(context, builder, signature, arguments):
        pointer = builder.inttoptr(arguments[0], I64.as_pointer())
        return builder.atomic_rmw("add", pointer, I64(1), "monotonic")

    return types.int64(types.int64), codegen


@intrinsic
def pointer_to(typing, address):
    def codegen(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), codegen


@intrinsic
def to_bfloat16(typing, x):
    """The bits of a float32 rounded to nearest, ties to even."""

    def codegen(context, builder, signature, arguments):
        return builder.bitcast(builder.fptrunc(arguments[0], _BFloat16()), I16)

    return types.uint16(types.float32), codegen


@intrinsic
def from_bfloat16(typing, bits):
    """The float32 with these upper bits."""

    def codegen(context, builder, signature, arguments):
        return builder.bitcast(builder.shl(builder.zext(arguments[0], I32), I32(16)), F32)

    return types.float32(types.uint16), codegen


@intrinsic
def pair(typing, low, high):
    """Two 16-bit values in one word."""

    def codegen(context, builder, signature, arguments):
        low, high = (builder.zext(argument, I32) for argument in arguments)
        return builder.or_(low, builder.shl(high, I32(16)))

    return types.uint32(types.uint16, types.uint16), codegen


@intrinsic
def power_of_two(typing, exponent):
    """2^exponent for integers from -126 to 127, infinity for 128."""

    def codegen(context, builder, signature, arguments):
        biased = builder.add(builder.fptosi(arguments[0], I32), I32(127))
        return builder.bitcast(builder.shl(biased, I32(23)), F32)

    return types.float32(types.float32), codegen


@inlined
def floats(address, size):
    return numba.carray(pointer_to(address), (size,), np.float32)


@inlined
def halves(address, size):
    return numba.carray(pointer_to(address), (size,), np.uint16)


@inlined
def words(address, size):
    return numba.carray(pointer_to(address), (size,), np.uint32)
