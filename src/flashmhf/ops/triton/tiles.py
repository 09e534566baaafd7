"""Tile sizes: a lookup in a committed table. Nothing is autotuned at run time.

Every tile compiles without spills for its device with Triton 3.6.0 and 3.7.1; docs/kernels.csv lists registers, shared
memory and matrix instructions. Which tiles are fastest has not been measured yet.
"""

import copy
import functools
import logging
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton

from flashmhf.ops import measured
from flashmhf.ops.triton.common import INTERPRETED

logger = logging.getLogger(__name__)

KERNELS = ("decode", "forward", "backward_dq", "backward_dkuv", "backward_fused")
BLOCK_DS = (32, 64, 128, 256)
DECODE_MAX_TOKENS = 16  # up to here the forward kernel uses the tile named `decode`
SPLIT_MAX_TOKENS = 128  # up to here the forward splits the parameter rows over programs
# SMs (AMD: compute units) of the largest device of a class, for planning without a device.
NUM_SMS = {"sm_80": 108, "sm_86": 84, "sm_89": 142, "sm_90a": 132, "sm_100": 148, "sm_120": 188, "gfx942": 304}


class Tile(NamedTuple):
    """Tokens and parameter rows per tile, warps per program, stages of the software pipeline.

    tokens_first: the orientation of score tiles in `backward_dkuv` and `backward_fused`, see backward_dkuv.py.
    """

    block_t: int
    block_f: int
    num_warps: int
    num_stages: int
    tokens_first: bool = False


# Device class -> bytes per element -> kernel -> one tile for each of BLOCK_DS; smaller head dims use the first.
TABLE: dict[str, dict[int, dict[str, tuple[Tile, Tile, Tile, Tile]]]] = {
    "sm_80": {
        2: {
            "decode": (Tile(16, 64, 4, 2), Tile(16, 64, 4, 2), Tile(16, 64, 4, 2), Tile(16, 32, 4, 2)),
            "forward": (Tile(128, 64, 8, 2), Tile(128, 64, 8, 2), Tile(128, 64, 8, 2), Tile(64, 64, 8, 2)),
            "backward_dq": (Tile(128, 32, 8, 2), Tile(128, 32, 8, 2), Tile(64, 64, 8, 1), Tile(32, 64, 8, 2)),
            "backward_dkuv": (Tile(64, 128, 8, 2), Tile(32, 128, 8, 2), Tile(64, 64, 8, 2), Tile(64, 32, 8, 1)),
        },
        4: {
            "decode": (Tile(16, 32, 4, 2), Tile(16, 32, 4, 2), Tile(16, 32, 8, 2), Tile(16, 16, 4, 1)),
            "forward": (Tile(64, 32, 8, 2), Tile(32, 32, 8, 2), Tile(64, 16, 8, 2), Tile(32, 16, 8, 2)),
            "backward_dq": (Tile(32, 32, 4, 2), Tile(32, 16, 4, 2), Tile(32, 16, 4, 1), Tile(16, 16, 4, 1)),
            "backward_dkuv": (Tile(32, 32, 4, 2), Tile(32, 32, 8, 2), Tile(16, 16, 8, 1), Tile(16, 16, 8, 2)),
        },
    },
    "sm_86": {
        2: {
            "decode": (Tile(16, 64, 4, 2), Tile(16, 64, 4, 2), Tile(16, 64, 4, 2), Tile(16, 32, 4, 2)),
            "forward": (Tile(128, 64, 8, 2), Tile(128, 64, 8, 2), Tile(128, 64, 8, 2), Tile(32, 32, 4, 2)),
            "backward_dq": (Tile(128, 32, 8, 2), Tile(128, 32, 8, 2), Tile(64, 64, 8, 1), Tile(32, 32, 4, 2)),
            "backward_dkuv": (Tile(64, 128, 8, 2), Tile(32, 128, 8, 2), Tile(64, 32, 8, 2), Tile(64, 16, 8, 2)),
        },
        4: {
            "decode": (Tile(16, 32, 4, 2), Tile(16, 32, 4, 2), Tile(16, 32, 8, 2), Tile(16, 16, 4, 2)),
            "forward": (Tile(64, 32, 8, 2), Tile(32, 32, 8, 2), Tile(64, 16, 8, 2), Tile(32, 16, 8, 2)),
            "backward_dq": (Tile(32, 32, 4, 2), Tile(32, 16, 4, 2), Tile(32, 16, 4, 1), Tile(16, 16, 4, 2)),
            "backward_dkuv": (Tile(32, 32, 4, 2), Tile(32, 32, 8, 2), Tile(16, 16, 8, 1), Tile(16, 16, 8, 2)),
        },
    },
    "sm_90a": {
        2: {
            "decode": (Tile(16, 64, 4, 2), Tile(16, 64, 4, 2), Tile(16, 64, 4, 2), Tile(16, 32, 4, 2)),
            "forward": (Tile(128, 64, 8, 2), Tile(128, 64, 8, 2), Tile(128, 64, 8, 2), Tile(128, 32, 8, 2)),
            "backward_dq": (Tile(128, 64, 8, 2), Tile(128, 64, 8, 2), Tile(128, 64, 8, 2), Tile(128, 16, 8, 2)),
            "backward_dkuv": (
                Tile(64, 128, 8, 2),
                Tile(128, 64, 8, 2, True),
                Tile(128, 32, 8, 2, True),
                Tile(64, 32, 8, 1),
            ),
        },
        4: {
            "decode": (Tile(16, 32, 4, 2), Tile(16, 32, 4, 2), Tile(16, 32, 4, 2), Tile(16, 16, 4, 2)),
            "forward": (Tile(64, 32, 8, 2), Tile(32, 32, 8, 2), Tile(64, 16, 8, 2), Tile(32, 16, 8, 2)),
            "backward_dq": (Tile(32, 32, 4, 2), Tile(32, 16, 4, 2), Tile(32, 16, 4, 1), Tile(16, 16, 4, 1)),
            "backward_dkuv": (Tile(32, 32, 4, 2), Tile(32, 32, 8, 2), Tile(16, 16, 4, 1), Tile(16, 16, 8, 1)),
        },
    },
    "sm_100": {
        2: {
            "decode": (Tile(16, 64, 4, 2), Tile(16, 64, 4, 2), Tile(16, 64, 4, 2), Tile(16, 32, 4, 2)),
            "forward": (Tile(128, 64, 8, 2), Tile(128, 64, 8, 2), Tile(64, 64, 8, 2), Tile(128, 32, 8, 2)),
            "backward_dq": (Tile(128, 64, 8, 2), Tile(128, 64, 8, 2), Tile(128, 32, 8, 2), Tile(64, 32, 8, 2)),
            "backward_dkuv": (
                Tile(64, 128, 8, 2),
                Tile(64, 128, 8, 2),
                Tile(64, 64, 8, 2),
                Tile(64, 32, 8, 1),
            ),
        },
        4: {
            "decode": (Tile(16, 32, 4, 2), Tile(16, 32, 4, 2), Tile(16, 32, 4, 2), Tile(16, 32, 4, 2)),
            "forward": (Tile(64, 32, 8, 2), Tile(32, 32, 8, 2), Tile(64, 16, 8, 2), Tile(32, 16, 8, 2)),
            "backward_dq": (Tile(32, 32, 4, 2), Tile(32, 16, 4, 2), Tile(32, 16, 4, 1), Tile(16, 16, 4, 1)),
            "backward_dkuv": (Tile(32, 32, 4, 2), Tile(32, 32, 8, 2), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
        },
    },
    "sm_120": {
        2: {
            "decode": (Tile(16, 64, 4, 2), Tile(16, 64, 4, 2), Tile(16, 64, 4, 2), Tile(16, 32, 4, 2)),
            "forward": (Tile(128, 64, 8, 2), Tile(128, 64, 8, 2), Tile(128, 64, 8, 2), Tile(64, 64, 8, 1)),
            "backward_dq": (Tile(128, 32, 8, 2), Tile(128, 32, 8, 2), Tile(64, 64, 8, 1), Tile(32, 32, 4, 2)),
            "backward_dkuv": (Tile(64, 128, 8, 2), Tile(64, 32, 4, 2), Tile(64, 32, 8, 2), Tile(64, 16, 8, 2)),
        },
        4: {
            "decode": (Tile(16, 32, 4, 2), Tile(16, 32, 4, 2), Tile(16, 32, 8, 2), Tile(16, 16, 4, 2)),
            "forward": (Tile(64, 32, 8, 2), Tile(32, 32, 8, 2), Tile(64, 16, 8, 2), Tile(32, 16, 8, 2)),
            "backward_dq": (Tile(32, 32, 4, 2), Tile(32, 16, 4, 2), Tile(32, 16, 4, 1), Tile(16, 16, 4, 2)),
            "backward_dkuv": (Tile(32, 32, 4, 2), Tile(32, 32, 8, 2), Tile(16, 16, 4, 1), Tile(16, 16, 8, 2)),
        },
    },
    "gfx942": {
        2: {
            "decode": (Tile(16, 64, 1, 2), Tile(16, 32, 1, 2), Tile(16, 32, 1, 2), Tile(16, 16, 1, 2)),
            "forward": (Tile(128, 64, 4, 2), Tile(128, 64, 4, 2), Tile(128, 64, 4, 2), Tile(128, 32, 4, 1)),
            "backward_dq": (Tile(128, 64, 4, 1), Tile(128, 32, 4, 2), Tile(128, 32, 4, 1), Tile(64, 16, 4, 1)),
            "backward_dkuv": (
                Tile(32, 128, 4, 1),
                Tile(32, 128, 4, 1),
                Tile(128, 32, 4, 1, True),
                Tile(16, 64, 4, 1),
            ),
        },
        4: {
            "decode": (Tile(16, 32, 1, 1), Tile(16, 16, 1, 1), Tile(16, 16, 1, 1), Tile(16, 16, 1, 1)),
            "forward": (Tile(128, 32, 4, 1), Tile(128, 32, 4, 1), Tile(128, 32, 4, 1), Tile(64, 16, 4, 1)),
            "backward_dq": (Tile(64, 32, 2, 1), Tile(64, 16, 4, 1), Tile(64, 16, 4, 1), Tile(64, 16, 4, 1)),
            "backward_dkuv": (Tile(32, 32, 1, 1), Tile(16, 64, 4, 1), Tile(16, 64, 4, 1), Tile(16, 16, 4, 1)),
        },
    },
}


# Device class -> one tile of the fused backward for each of BLOCK_DS, 2-byte elements; None: every candidate spills.
FUSED: dict[str, tuple[Tile | None, ...]] = {
    "sm_80": (Tile(32, 32, 2, 2), Tile(32, 64, 4, 2), Tile(64, 64, 8, 1), None),
    "sm_86": (Tile(32, 32, 2, 2), Tile(32, 64, 4, 2), Tile(64, 32, 8, 2), None),
    "sm_90a": (Tile(32, 32, 2, 2, True), Tile(128, 32, 8, 2, True), Tile(128, 32, 8, 1, True), None),
    "sm_100": (Tile(64, 64, 8, 2), Tile(64, 64, 8, 2), Tile(32, 128, 8, 2), None),
    "sm_120": (Tile(32, 32, 2, 2), Tile(32, 64, 4, 2), Tile(64, 32, 8, 2), None),
    "gfx942": (Tile(32, 32, 1, 1), Tile(64, 32, 2, 1, True), Tile(64, 16, 4, 1, True), None),
}
# Occupancy of the forward: resident programs per SM, which `benchmarks/occupancy.py` computes from registers and shared
# memory of the tiles above; the smaller value of Triton 3.6.0 and 3.7.1.
OCCUPANCY: dict[str, dict[int, dict[str, tuple[int, int, int, int]]]] = {
    "sm_80": {
        2: {"decode": (6, 5, 2, 2), "forward": (1, 1, 1, 1)},
        4: {"decode": (7, 5, 2, 3), "forward": (1, 3, 2, 1)},
    },
    "sm_86": {
        2: {"decode": (6, 3, 1, 1), "forward": (2, 1, 1, 1)},
        4: {"decode": (5, 3, 1, 1), "forward": (1, 2, 1, 1)},
    },
    "sm_90a": {
        2: {"decode": (8, 5, 4, 3), "forward": (2, 2, 1, 1)},
        4: {"decode": (7, 6, 3, 3), "forward": (1, 3, 2, 2)},
    },
    "sm_100": {
        2: {"decode": (8, 5, 4, 3), "forward": (2, 2, 2, 1)},
        4: {"decode": (8, 6, 3, 1), "forward": (2, 3, 2, 2)},
    },
    "sm_120": {
        2: {"decode": (6, 3, 1, 1), "forward": (1, 1, 1, 1)},
        4: {"decode": (5, 3, 1, 1), "forward": (1, 2, 1, 1)},
    },
    "gfx942": {
        2: {"decode": (5, 5, 2, 2), "forward": (2, 1, 1, 1)},
        4: {"decode": (16, 16, 8, 4), "forward": (3, 2, 1, 1)},
    },
}
# Same shared memory and registers as sm_86, but measured tiles of its own.
TABLE["sm_89"], FUSED["sm_89"], OCCUPANCY["sm_89"] = copy.deepcopy((TABLE["sm_86"], FUSED["sm_86"], OCCUPANCY["sm_86"]))
# (device class, one of BLOCK_DS) where the fused backward measured faster than two kernels.
FUSED_FASTER = measured.fused_faster()


def _put_measured_tiles() -> None:
    """Replaces tiles of the table by tiles that measured faster."""
    sizes: Any
    for (device, element_bytes, kernel, block_d), sizes in measured.triton_tiles().items():
        tiles: dict[str, Any] = FUSED if kernel == "backward_fused" else TABLE[device][element_bytes]
        row = device if kernel == "backward_fused" else kernel
        column = BLOCK_DS.index(block_d)
        tiles[row] = (*tiles[row][:column], Tile(*sizes), *tiles[row][column + 1 :])


_put_measured_tiles()


def tile_for(kernel: str, device: torch.device, dtype: torch.dtype, D: int, T: int) -> Tile:
    """The tile of `kernel` ("forward", "backward_dq" or "backward_dkuv") at head dim D and T tokens."""
    if kernel == "forward" and T <= DECODE_MAX_TOKENS:
        kernel = "decode"
    return TABLE[device_class(device)][dtype.itemsize][kernel][_column(D)]


def _column(D: int) -> int:
    return next(index for index, block_d in enumerate(BLOCK_DS) if block_d >= D)


def fused_tile(device: torch.device, dtype: torch.dtype, D: int) -> Tile | None:
    """The tile of the fused backward, or None where the two separate kernels are used."""
    name, column = device_class(device), _column(D)
    if dtype.itemsize != 2 or (name, BLOCK_DS[column]) not in FUSED_FASTER:
        return None
    tile = FUSED[name][column]
    if tile is None or torch.are_deterministic_algorithms_enabled():
        return None
    return None if not tile.tokens_first and miscompiles_transposed_results(name) else tile


@functools.cache
def miscompiles_transposed_results(name: str) -> bool:
    """Whether this Triton may miscompile the fused kernel with rows first; logged once if so.

    That kernel multiplies the transpose of another product's result (fla-org/flash-linear-attention issue 640, pull
    983). No other kernel here does, and neither does the fused one with tokens first.
    """
    affected = name == "sm_90a" and (3, 4, 0) <= triton_version() < (3, 7, 1)
    if affected:
        logger.warning(
            "Triton %s can miscompile the fused backward on Hopper; using two kernels instead. Fixed in Triton 3.7.1.",
            triton.__version__,
        )
    return affected


def triton_version() -> tuple[int, ...]:
    """The installed Triton's version as numbers."""
    return tuple(int(part) for part in re.findall(r"\d+", triton.__version__)[:3])


def has_fast_tanh(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether SiLU uses NVIDIA's `tanh.approx.f32`, whose error of 2^-11 does not exceed float16's rounding.

    Triton's interpreter does not have the instruction.
    """
    return dtype.itemsize == 2 and not INTERPRETED and device_class(device) != "gfx942"


def target_programs(device: torch.device, dtype: torch.dtype, D: int, T: int) -> int:
    """How many programs the forward should launch for T tokens: one full wave if it can split the rows."""
    if T > SPLIT_MAX_TOKENS:
        return 1
    kernel = "decode" if T <= DECODE_MAX_TOKENS else "forward"
    return num_sms(device) * OCCUPANCY[device_class(device)][dtype.itemsize][kernel][_column(D)]


@functools.cache
def num_sms(device: torch.device) -> int:
    """SMs (AMD: compute units) of a device."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).multi_processor_count)
    return NUM_SMS[device_class(device)]


def table_rows(device: str, element_bytes: int) -> Iterator[tuple[str, int, Tile]]:
    """Every (kernel, head dim, tile) of a device class."""
    kernels: dict[str, tuple[Tile | None, ...]] = {**TABLE[device][element_bytes]}
    if element_bytes == 2:
        kernels["backward_fused"] = FUSED[device]
    for kernel, tiles in kernels.items():
        for block_d, tile in zip(BLOCK_DS, tiles, strict=True):
            if tile is not None:
                yield kernel, block_d, tile


@functools.cache
def device_class(device: torch.device) -> str:
    """The key of a device's tiles in the table. Devices without tiles of their own use those of a smaller one."""
    if device.type != "cuda":
        return "sm_80"  # Triton's interpreter and tensors without data
    if torch.version.hip is not None:
        return "gfx942"
    major, minor = torch.cuda.get_device_capability(device)
    if major == 9:
        return "sm_90a"
    if major in (10, 11):
        return "sm_100"
    if major == 12:
        return "sm_120"
    if (major, minor) == (8, 9):
        return "sm_89"
    return "sm_80" if (major, minor) in ((8, 0), (8, 7)) else "sm_86"
