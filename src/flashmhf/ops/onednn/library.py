"""What PyTorch's own library exports: oneDNN's micro-kernels, and the OpenMP runtime whose threads PyTorch uses.

The names are mangled C++ and no public interface. They contain the types of all arguments, so a changed signature is a
missing name. `unsupported_reason` also multiplies two small matrices before anything relies on it, after it has asked
for the instructions for bfloat16, without which the function ends the process.
"""

import array
import ctypes
import functools
import math
import operator
import os
import random
from pathlib import Path
from typing import Any

import torch

BRGEMM = {
    torch.float32: "_ZN2at6native7cpublas6brgemmEllllllbPKfS3_Pfb",
    torch.bfloat16: "_ZN2at6native7cpublas6brgemmEllllllbPKN3c108BFloat16ES5_Pfb",
}
RELEASE = "_ZN2at6native7cpublas14brgemm_releaseEb"
ISA_LIMITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")  # environment variables of oneDNN
PARALLEL, THREAD_NUMBER = "GOMP_parallel", "omp_get_thread_num"


@functools.cache
def _library() -> ctypes.CDLL:
    """With the libraries that it depends on."""
    return ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))


@functools.cache
def address(name: str) -> int:
    """Of a function; 0 if there is none of that name."""
    try:
        return ctypes.cast(getattr(_library(), name), ctypes.c_void_p).value or 0
    except (OSError, AttributeError):
        return 0


def unsupported_reason(dtype: torch.dtype) -> str | None:
    """Why products of this dtype cannot be computed here."""
    if not torch.backends.mkldnn.is_available():
        return f"PyTorch {torch.__version__} is built without oneDNN"
    if not torch.backends.mkldnn.enabled:
        return "torch.backends.mkldnn is disabled"
    return _unsupported_reason(dtype)


@functools.cache
def _unsupported_reason(dtype: torch.dtype) -> str | None:
    if not torch.cpu._is_avx2_supported():
        return "needs a CPU with AVX2"
    if dtype == torch.bfloat16:
        if not (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()):
            return "needs a CPU with instructions for bfloat16 (AVX-512 BF16 or AMX)"
        if limits := [name for name in ISA_LIMITS if os.environ.get(name, "ALL") not in ("ALL", "DEFAULT")]:
            return f"{limits[0]} forbids instructions that may be needed for bfloat16"
    if not all(map(address, (BRGEMM[dtype], RELEASE, PARALLEL, THREAD_NUMBER))):
        return f"PyTorch {torch.__version__} does not export oneDNN's micro-kernels or its OpenMP runtime here"
    return None if _multiplies(dtype) else "oneDNN's micro-kernels give wrong results on this CPU"


def _multiplies(dtype: torch.dtype) -> bool:
    """Whether a product of small integers, which is exact in any order, is right.

    Without tensors: the first use may be within vmap, a fake mode or any other that changes what tensors do.
    """
    rows, inner, columns = 20, 34, 48
    draw = random.Random(0).choices
    a, b = (draw(range(-4, 5), k=inner * size) for size in (rows, columns))
    pairs = dtype == torch.bfloat16
    left: array.array[Any]
    right: array.array[Any]
    if pairs:  # 16-bit products read two rows of their second matrix at once (oneDNN: VNNI)
        packed = [b[(2 * p + half) * columns + c] for p in range(inner // 2) for c in range(columns) for half in (0, 1)]
        words = (memoryview(array.array("f", values)).cast("B").cast("I") for values in (a, packed))
        left, right = (array.array("H", (word >> 16 for word in each)) for each in words)
    else:
        left, right = array.array("f", a), array.array("f", b)
    product = array.array("f", [math.nan] * (rows * columns))
    multiply = ctypes.CFUNCTYPE(None, *([ctypes.c_int64] * 6), ctypes.c_bool, *([ctypes.c_void_p] * 3), ctypes.c_bool)
    pointers = (values.buffer_info()[0] for values in (left, right, product))
    multiply(address(BRGEMM[dtype]))(rows, columns, inner, inner, columns, columns, False, *pointers, pairs)
    ctypes.CFUNCTYPE(None, ctypes.c_bool)(address(RELEASE))(pairs)
    exact = (
        sum(map(operator.mul, a[r : r + inner], b[c::columns])) for r in range(0, len(a), inner) for c in range(columns)
    )
    return all(map(operator.eq, product, exact))
