"""What PyTorch's own library exports: oneDNN's micro-kernels, and the OpenMP runtime whose threads PyTorch uses.

The names are mangled C++ and no public interface. They contain the types of all arguments, so a changed signature is a
missing name. `unsupported_reason` also multiplies two small matrices before anything relies on it, after it has asked
for the instructions for bfloat16, without which the function ends the process.
"""

import ctypes
import functools
import os
from pathlib import Path

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
    generator = torch.Generator("cpu").manual_seed(0)
    a, b = (torch.randint(-4, 5, shape, generator=generator, device="cpu").to(dtype) for shape in ((20, 34), (34, 48)))
    product = torch.full((20, 48), torch.nan, dtype=torch.float32, device="cpu")
    packed = pack_pairs(b) if dtype == torch.bfloat16 else b
    multiply = ctypes.CFUNCTYPE(None, *([ctypes.c_int64] * 6), ctypes.c_bool, *([ctypes.c_void_p] * 3), ctypes.c_bool)
    pairs = dtype == torch.bfloat16
    pointers = (a.data_ptr(), packed.data_ptr(), product.data_ptr())
    multiply(address(BRGEMM[dtype]))(20, 48, 34, 34, 48, 48, False, *pointers, pairs)
    ctypes.CFUNCTYPE(None, ctypes.c_bool)(address(RELEASE))(pairs)
    exact = a.float() @ b.float()  # of small integers, so in any order
    return None if torch.equal(product, exact) else "oneDNN's micro-kernels give wrong results on this CPU"


def pack_pairs(b: torch.Tensor) -> torch.Tensor:
    """(K, N) -> (K / 2, N, 2), the layout in which 16-bit products read their second matrix (oneDNN: VNNI)."""
    return b.unflatten(0, (-1, 2)).transpose(1, 2).contiguous()
