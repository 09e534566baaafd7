"""Compiles kernels in many processes before one process launches them in turn, because compiling takes the longest.

What they leave in Triton's cache on disk, the launcher finds there.
"""

import functools
import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import torch

from compile_kernels import TARGETS, Compiled, compile_launch
from flashmhf.benchmarking.layer import describe
from flashmhf.ops.triton.tiles import Tile
from gpu_kernels import KERNELS

# Kernel, sizes T, H, H_kv, E, F, head dim, dtype, tile.
Case = tuple[str, tuple[int, int, int, int, int], int, torch.dtype, Tile]


def compile_ahead(target: str, cases: list[Case]) -> list[Compiled | str]:
    """What each case compiles to on a device class, or the compiler's complaint."""
    return list(_pool().map(functools.partial(_compile, target), cases))


@functools.cache
def _pool() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn"))  # a fork would share the GPU's context


def _compile(target: str, case: Case) -> Compiled | str:
    kernel, (T, H, H_kv, E, F), D, dtype, tile = case
    q, dout = (torch.empty(T, H, D, dtype=dtype, device="meta") for _ in range(2))
    weights = [torch.empty(H_kv, E, F, D, dtype=dtype, device="meta") for _ in range(3)]
    gate = torch.empty(T, H, E, device="meta")
    try:
        return compile_launch(KERNELS[kernel]([q, *weights, gate, dout], tile).launches[0], TARGETS[target])
    except Exception as error:
        return describe(error)
