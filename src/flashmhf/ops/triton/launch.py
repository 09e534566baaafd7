"""What the planners of all kernels share: token strides, arguments, and a launch that can be compiled without a GPU."""

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from flashmhf.ops.recording import recorder
from flashmhf.ops.triton.relaunch import Relaunch
from flashmhf.ops.triton.tiles import Tile, has_fast_tanh


@dataclass(frozen=True)
class Launch:
    """A kernel launch with all its arguments: `run()` it, or compile it for another device (compile_kernels.py).

    While an operator's call is being recorded, a launch that runs is added to the recording.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    num_warps: int
    num_stages: int

    def run(self) -> None:
        recording = recorder()
        if recording is None:
            self.start()
        else:
            relaunch = Relaunch(self, recording.launch(self.start), recording)
            recording.add_launch(relaunch.run, relaunch.reads)

    def start(self) -> Any:
        """Returns Triton's compiled kernel, or None in the interpreter."""
        tensor = next(x for x in self.arguments.values() if isinstance(x, Tensor))
        with torch.cuda.device_of(tensor):  # Triton launches on the current device
            return self.kernel[self.grid](**self.arguments, num_warps=self.num_warps, num_stages=self.num_stages)


@dataclass(frozen=True)
class Tokens:
    """The leading dimensions of several tensors, merged to one or two common token dimensions.

    Tokens are independent, so two strides describe every layout met in practice without a copy.
    """

    T: int
    L: int
    flat: bool
    tensors: tuple[Tensor | None, ...]

    @classmethod
    def of(cls, *tensors: Tensor | None) -> "Tokens":
        """Each tensor is (..., H, X) or None; the views are (B, L, H, X). Copies what needs three or more strides."""
        present = [x for x in tensors if x is not None]
        sizes = _merged_sizes(present)
        if len(sizes) > 2:
            sizes = [math.prod(sizes)]
        B, L = [1, 1, *sizes][-2:]
        views = tuple(None if x is None else x.reshape(B, L, *x.shape[-2:]) for x in tensors)
        return cls(B * L, L, B == 1, views)


def _merged_sizes(tensors: list[Tensor]) -> list[int]:
    """The fewest leading sizes with which every tensor can be viewed."""
    merged: list[int] = []
    strides: list[tuple[int, ...]] = []
    for dim, size in enumerate(tensors[0].shape[:-2]):
        if size == 1:
            continue
        dim_strides = tuple(x.stride(dim) for x in tensors)
        if merged and all(outer == inner * size for outer, inner in zip(strides[-1], dim_strides, strict=True)):
            merged[-1] *= size
            strides[-1] = dim_strides
        else:
            merged.append(size)
            strides.append(dim_strides)
    return merged


def token_arguments(name: str, x: Tensor | None) -> dict[str, Any]:
    """The pointer and the strides of a (B, L, H, X) view."""
    strides = (0, 0, 0, 0) if x is None else x.stride()
    if x is not None and x.shape[0] == 1:
        strides = (0, *strides[1:])  # unused, but it depends on T: Triton would specialise on its divisibility
    names = (f"stride_{name}{dim}" for dim in "blhx")
    return {f"{name}_ptr": x, **dict(zip(names, strides, strict=True))}


def weight_arguments(k: Tensor, u: Tensor, v: Tensor) -> dict[str, Any]:
    """Pointers and common strides of K, U and V. Parameters share their strides; anything else is copied."""
    if not k.stride() == u.stride() == v.stride():
        k, u, v = k.contiguous(), u.contiguous(), v.contiguous()
    strides = zip(("stride_wh", "stride_we", "stride_wf", "stride_wd"), k.stride(), strict=True)
    return {"k_ptr": k, "u_ptr": u, "v_ptr": v, **dict(strides)}


def size_arguments(tokens: Tokens, q: Tensor, k: Tensor, gate: Tensor | None, tile: Tile) -> dict[str, Any]:
    """Sizes, tile and the flags that change the generated code."""
    H, D = q.shape[-2:]
    H_kv, E, F, _ = k.shape
    return {
        "T": tokens.T, "L": tokens.L, "E": E, "F": F, "GROUP": H // H_kv,
        "D": D, "BLOCK_D": block_d(D), "BLOCK_T": tile.block_t, "BLOCK_F": tile.block_f,
        "FLAT": tokens.flat, "EVEN_F": F % tile.block_f == 0, "HAS_GATE": gate is not None,
        "PRECISION": dot_precision(q.dtype), "FAST_TANH": has_fast_tanh(q.device, q.dtype),
    }  # fmt: skip


def block_d(D: int) -> int:
    """The padded head dim: a power of two, and at least the 16 that a matrix instruction requires."""
    return max(16, triton.next_power_of_2(D))


def dot_precision(dtype: torch.dtype) -> str:
    """`input_precision` of tl.dot: exact float32 unless torch's float32 matmul precision allows TF32."""
    if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
        return "tf32"
    return "ieee"
