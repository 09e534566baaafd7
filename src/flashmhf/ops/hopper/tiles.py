"""Tile sizes of the Hopper kernels, and which of them a GPU has verified. Imports torch alone: backends.py asks it."""

from typing import NamedTuple

import torch

BLOCK_DS = (64, 128, 256)
HEAD_DIM_MULTIPLE = 8  # TMA wants strides of 16 bytes


class Tile(NamedTuple):
    """Tokens and parameter rows of one tile, stages of the ring, and where the forward's products read Q from.

    From registers Q costs a thread BLOCK_D / 4 of them and spares shared memory, which at head dim 128 is asked for 96
    of its 128 bytes a clock by the product with Q otherwise, and 32 more by the tiles that arrive.
    """

    block_t: int
    block_f: int
    stages: int
    q_in_registers: bool = False


# Kernel -> one configuration for each of BLOCK_DS, or None where the accumulators do not fit the registers.
TABLE: dict[str, tuple[Tile | None, ...]] = {
    "forward": (Tile(64, 64, 4, True), Tile(64, 64, 4, True), Tile(64, 32, 3)),
    "backward": (Tile(128, 64, 2), Tile(128, 64, 2), None),
}
# (padded head dim, name of the dtype) whose kernels a GPU has run within the error budget. None so far.
VERIFIED: frozenset[tuple[int, str]] = frozenset()
# Of those: the number of tokens from which they measured faster than the backend `triton`; `auto` takes them there.
FASTER_FROM: dict[tuple[int, str], int] = {}


def configuration(D: int, dtype: torch.dtype) -> tuple[int, str]:
    """The key of VERIFIED and FASTER_FROM."""
    return block_d(D), str(dtype).removeprefix("torch.")


def block_d(D: int) -> int:
    """The head dim as the kernels see it: TMA fills what lies beyond D with zeros."""
    return next(size for size in BLOCK_DS if size >= D)


def low_and_high(D: int) -> tuple[int, int]:
    """Columns that products over the head dim read, in two parts: at 96, padded to 128, they are 64 and 32."""
    width = block_d(D)
    return (width // 2, width // 4) if width > BLOCK_DS[0] and width * 3 // 4 >= D else (width, 0)


def tile_for(kernel: str, D: int) -> Tile | None:
    """The configuration of a kernel at head dim D."""
    return TABLE[kernel][BLOCK_DS.index(block_d(D))]
