"""Tile sizes: a pure function over a committed table. Nothing is tuned when a kernel runs.

Each row compiles without a spill on its device, with Triton 3.6.0 and 3.7.1. `benchmarks/compile_kernels.py` prints
registers, shared memory and matrix instructions into docs/kernels.md. Which rows are fastest is unmeasured so far.
"""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch

KERNELS = ("decode", "forward", "backward_tokens", "backward_weights")
BLOCK_DS = (32, 64, 128, 256)
FEW_TOKENS = 16  # up to here the forward kernel takes the row named `decode`
SPLIT_TOKENS = 128  # up to here the forward splits the parameter rows over programs
# Two programs a processor (multiprocessor, compute unit) of the largest device of the class.
PROGRAMS = {"sm_80": 216, "sm_86": 284, "sm_90a": 264, "sm_100": 296, "gfx942": 608}


class Tile(NamedTuple):
    """Tokens and parameter rows of one tile, warps of a program, stages of the software pipeline."""

    block_t: int
    block_f: int
    num_warps: int
    num_stages: int


# Device class -> bytes of an element -> kernel -> one tile for each of BLOCK_DS; smaller head dims use the first.
TABLE: dict[str, dict[int, dict[str, tuple[Tile, Tile, Tile, Tile]]]] = {
    "sm_80": {
        2: {
            "decode": (Tile(16, 64, 4, 2), Tile(16, 64, 4, 2), Tile(16, 64, 4, 2), Tile(16, 32, 4, 2)),
            "forward": (Tile(128, 64, 8, 2), Tile(128, 64, 8, 2), Tile(128, 64, 8, 2), Tile(64, 32, 8, 2)),
            "backward_tokens": (Tile(128, 32, 8, 2), Tile(128, 32, 8, 2), Tile(64, 64, 8, 1), Tile(32, 32, 8, 2)),
            "backward_weights": (Tile(64, 128, 8, 2), Tile(32, 128, 8, 2), Tile(32, 64, 8, 2), Tile(32, 32, 8, 2)),
        },
        4: {
            "decode": (Tile(16, 32, 4, 2), Tile(16, 32, 4, 2), Tile(16, 32, 4, 2), Tile(16, 32, 4, 2)),
            "forward": (Tile(64, 32, 8, 2), Tile(32, 32, 8, 2), Tile(64, 16, 8, 2), Tile(32, 16, 8, 2)),
            "backward_tokens": (Tile(32, 32, 4, 2), Tile(32, 16, 4, 2), Tile(32, 16, 4, 1), Tile(16, 16, 4, 1)),
            "backward_weights": (Tile(32, 32, 4, 2), Tile(32, 32, 8, 2), Tile(16, 16, 4, 1), Tile(16, 16, 8, 1)),
        },
    },
    "sm_86": {
        2: {
            "decode": (Tile(16, 64, 4, 2), Tile(16, 64, 4, 2), Tile(16, 64, 4, 2), Tile(16, 32, 4, 2)),
            "forward": (Tile(128, 64, 8, 2), Tile(128, 64, 8, 2), Tile(128, 64, 8, 2), Tile(64, 32, 8, 2)),
            "backward_tokens": (Tile(128, 32, 8, 2), Tile(128, 32, 8, 2), Tile(64, 64, 8, 1), Tile(32, 32, 8, 2)),
            "backward_weights": (Tile(64, 128, 8, 2), Tile(32, 128, 8, 2), Tile(64, 64, 8, 2), Tile(32, 32, 8, 2)),
        },
        4: {
            "decode": (Tile(16, 32, 4, 2), Tile(16, 32, 4, 2), Tile(16, 32, 4, 2), Tile(16, 16, 8, 2)),
            "forward": (Tile(64, 32, 8, 2), Tile(32, 32, 8, 2), Tile(64, 16, 8, 2), Tile(32, 16, 8, 2)),
            "backward_tokens": (Tile(32, 32, 4, 2), Tile(32, 16, 4, 2), Tile(32, 16, 4, 1), Tile(16, 16, 4, 2)),
            "backward_weights": (Tile(32, 32, 4, 2), Tile(32, 32, 8, 2), Tile(16, 16, 4, 1), Tile(16, 16, 8, 1)),
        },
    },
    "sm_90a": {
        2: {
            "decode": (Tile(16, 64, 4, 2), Tile(16, 64, 4, 2), Tile(16, 64, 4, 2), Tile(16, 32, 4, 2)),
            "forward": (Tile(128, 64, 8, 2), Tile(128, 64, 8, 2), Tile(128, 64, 8, 2), Tile(128, 32, 8, 2)),
            "backward_tokens": (Tile(128, 64, 8, 2), Tile(128, 64, 8, 2), Tile(128, 64, 8, 2), Tile(128, 16, 8, 2)),
            "backward_weights": (Tile(64, 128, 8, 2), Tile(64, 64, 8, 2), Tile(32, 64, 8, 2), Tile(32, 32, 8, 2)),
        },
        4: {
            "decode": (Tile(16, 32, 4, 2), Tile(16, 32, 4, 2), Tile(16, 32, 4, 2), Tile(16, 16, 8, 2)),
            "forward": (Tile(64, 32, 8, 2), Tile(32, 32, 8, 2), Tile(64, 16, 8, 2), Tile(32, 16, 8, 2)),
            "backward_tokens": (Tile(32, 32, 4, 2), Tile(32, 16, 4, 2), Tile(32, 16, 4, 1), Tile(16, 16, 4, 1)),
            "backward_weights": (Tile(32, 32, 4, 2), Tile(32, 32, 8, 2), Tile(16, 16, 4, 1), Tile(16, 16, 8, 1)),
        },
    },
    "sm_100": {
        2: {
            "decode": (Tile(16, 64, 4, 2), Tile(16, 64, 4, 2), Tile(16, 64, 4, 2), Tile(16, 32, 4, 2)),
            "forward": (Tile(128, 64, 8, 2), Tile(128, 64, 8, 2), Tile(64, 64, 8, 2), Tile(128, 32, 8, 2)),
            "backward_tokens": (Tile(128, 64, 8, 2), Tile(128, 64, 8, 2), Tile(128, 32, 8, 2), Tile(64, 32, 8, 2)),
            "backward_weights": (Tile(64, 128, 8, 2), Tile(64, 128, 8, 2), Tile(64, 64, 8, 2), Tile(64, 32, 8, 1)),
        },
        4: {
            "decode": (Tile(16, 32, 4, 2), Tile(16, 32, 4, 2), Tile(16, 32, 4, 2), Tile(16, 32, 4, 2)),
            "forward": (Tile(64, 32, 8, 2), Tile(32, 32, 8, 2), Tile(64, 16, 8, 2), Tile(32, 16, 8, 2)),
            "backward_tokens": (Tile(32, 32, 4, 2), Tile(32, 16, 4, 2), Tile(32, 16, 4, 1), Tile(16, 16, 4, 1)),
            "backward_weights": (Tile(32, 32, 4, 2), Tile(32, 32, 8, 2), Tile(16, 16, 4, 1), Tile(16, 16, 8, 1)),
        },
    },
    "gfx942": {
        2: {
            "decode": (Tile(16, 64, 4, 2), Tile(16, 64, 4, 2), Tile(16, 64, 4, 2), Tile(16, 32, 4, 2)),
            "forward": (Tile(128, 64, 4, 2), Tile(128, 64, 4, 2), Tile(128, 64, 8, 2), Tile(64, 32, 4, 1)),
            "backward_tokens": (Tile(128, 64, 4, 1), Tile(128, 32, 4, 2), Tile(128, 32, 8, 1), Tile(32, 16, 4, 1)),
            "backward_weights": (Tile(32, 64, 4, 2), Tile(32, 64, 4, 1), Tile(32, 32, 4, 1), Tile(16, 16, 4, 1)),
        },
        4: {
            "decode": (Tile(16, 32, 4, 1), Tile(16, 32, 4, 1), Tile(16, 32, 4, 1), Tile(16, 32, 4, 1)),
            "forward": (Tile(64, 64, 4, 1), Tile(64, 64, 4, 1), Tile(64, 32, 4, 1), Tile(32, 32, 4, 1)),
            "backward_tokens": (Tile(64, 32, 4, 1), Tile(64, 32, 4, 1), Tile(32, 16, 4, 1), Tile(16, 16, 4, 1)),
            "backward_weights": (Tile(32, 32, 4, 1), Tile(32, 16, 4, 1), Tile(16, 16, 4, 1), Tile(16, 16, 4, 1)),
        },
    },
}


def tile_for(kernel: str, device: torch.device, dtype: torch.dtype, D: int, T: int) -> Tile:
    """The tile of `kernel` ("forward", "backward_tokens" or "backward_weights") at head dim D and T tokens."""
    if kernel == "forward" and T <= FEW_TOKENS:
        kernel = "decode"
    column = next(index for index, block_d in enumerate(BLOCK_DS) if block_d >= D)
    return TABLE[device_class(device)][dtype.itemsize][kernel][column]


def programs_wanted(device: torch.device, T: int) -> int:
    """How many programs the forward should start with T tokens, if splitting the parameter rows can give as many."""
    return PROGRAMS[device_class(device)] if T <= SPLIT_TOKENS else 1


def table_rows(device: str, element_bytes: int) -> Iterator[tuple[str, int, Tile]]:
    """Every (kernel, head dim, tile) that ships for a device class."""
    for kernel, tiles in TABLE[device][element_bytes].items():
        for block_d, tile in zip(BLOCK_DS, tiles, strict=True):
            yield kernel, block_d, tile


@functools.cache
def device_class(device: torch.device) -> str:
    """The key of a device's rows in the table. Devices without rows of their own take those of a smaller one."""
    if device.type != "cuda":
        return "sm_80"  # Triton's interpreter and tensors without data
    if torch.version.hip is not None:
        return "gfx942"
    major, minor = torch.cuda.get_device_capability(device)
    if major == 9:
        return "sm_90a"
    if major in (10, 11):
        return "sm_100"
    return "sm_80" if (major, minor) in ((8, 0), (8, 7)) else "sm_86"
