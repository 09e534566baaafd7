"""Tile sizes of the Hopper kernels, and which of them a GPU has verified. Imports torch alone: backends.py asks it."""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch

from flashmhf.ops import measured

BLOCK_DS = (64, 128, 256)
HEAD_DIM_MULTIPLE = 8  # TMA wants strides of 16 bytes


class ForwardTile(NamedTuple):
    """Tokens of a warpgroup and parameter rows of one tile, stages of the rings, and how the warpgroups work.

    q_in_registers: products read Q from registers. It costs a thread BLOCK_D / 4 of them and spares shared memory, of
    whose 128 bytes a clock the product with Q wants 96 otherwise (at head dim 128), and the tiles that arrive 32 more.
    turns: the two warpgroups issue their products in turn, lest both activate at once and the tensor cores idle.
    persistent: a program for every processor works through many pairs of token tiles, and the producer runs ahead into
    the next pair. The output then has shared memory of its own, and the rings have less.
    """

    block_t: int
    block_f: int
    stages: int
    q_in_registers: bool = False
    turns: bool = False
    persistent: bool = False


class BackwardTile(NamedTuple):
    """Tokens and parameter rows of one tile, stages of the rings, and two options.

    dq: how it is added up in memory (dq_accum.py): in "fragments" it takes half as many reductions as by "rows", and a
    warp's meet four cache lines instead of eight; by "tma" it needs room in shared memory. splits_tokens: over several
    programs, where more of the device is then busy (splits.py), at the price of float32 partial sums.
    """

    block_t: int
    block_f: int
    stages: int
    dq: str = "fragments"
    splits_tokens: bool = False


class DqTile(NamedTuple):
    """Tokens of a warpgroup and parameter rows of one tile, stages of the rings: of the kernel for dQ and dR alone."""

    block_t: int
    block_f: int
    stages: int


HopperTile = ForwardTile | BackwardTile | DqTile
Tile = TypeVar("Tile", ForwardTile, BackwardTile | None, DqTile | None)


def _measured(kernel: str, make: Callable[..., Tile], tiles: tuple[Tile, ...]) -> tuple[Tile, ...]:
    """The tiles, one for each of BLOCK_DS, with those that measured faster in their place."""
    chosen = (measured.hopper_tile(kernel, block_d) for block_d in BLOCK_DS)
    return tuple(tile if fields is None else make(**fields) for tile, fields in zip(tiles, chosen, strict=True))


# What ships: one configuration for each of BLOCK_DS, or None where the accumulators do not fit the registers.
FORWARD = _measured(
    "forward", ForwardTile, (ForwardTile(64, 64, 4, True), ForwardTile(64, 64, 4, True), ForwardTile(64, 32, 3))
)
BACKWARD = _measured("backward", BackwardTile, (BackwardTile(128, 64, 2), BackwardTile(128, 64, 2), None))
BACKWARD_DQ = _measured("backward_dq", DqTile, (DqTile(64, 64, 4), DqTile(64, 64, 3), None))
TABLE: dict[str, tuple[HopperTile | None, ...]] = {
    "forward": FORWARD,
    "backward": BACKWARD,
    "backward_dq": BACKWARD_DQ,
}

# One of BLOCK_DS -> the configurations among which a GPU is to choose, the most promising first; each compiles without
# a spill (tests/ops/test_triton_compiles.py). The shipped ones are among them.
FORWARD_CANDIDATES: dict[int, tuple[ForwardTile, ...]] = {
    64: (
        ForwardTile(64, 64, 4, True),
        ForwardTile(64, 64, 4, True, turns=True),
        ForwardTile(64, 64, 6, True, turns=True, persistent=True),
        ForwardTile(64, 64, 6, True, persistent=True),
        ForwardTile(128, 32, 6, True, turns=True),  # half the bytes from the L2 cache
        ForwardTile(128, 32, 6, True, turns=True, persistent=True),
        ForwardTile(64, 128, 3, True, turns=True),
        ForwardTile(64, 128, 3, True, turns=True, persistent=True),
        ForwardTile(64, 64, 6, True, turns=True),
        ForwardTile(64, 64, 4, turns=True, persistent=True),
        ForwardTile(64, 64, 4),
        ForwardTile(64, 128, 3, True),
    ),
    128: (
        ForwardTile(64, 64, 4, True),
        ForwardTile(64, 64, 4, True, turns=True),
        ForwardTile(64, 64, 3, True, turns=True, persistent=True),
        ForwardTile(64, 64, 3, True, persistent=True),
        ForwardTile(64, 64, 3, True, turns=True),
        ForwardTile(64, 64, 4, turns=True),
        ForwardTile(64, 64, 3, turns=True, persistent=True),
        ForwardTile(64, 32, 6, True, turns=True, persistent=True),
        ForwardTile(64, 64, 2, True, turns=True, persistent=True),
        ForwardTile(64, 64, 3, True),
        ForwardTile(64, 64, 4),
    ),
    256: (
        ForwardTile(64, 32, 3),
        ForwardTile(64, 32, 3, turns=True),
        ForwardTile(64, 32, 2, turns=True, persistent=True),
        ForwardTile(64, 32, 2, persistent=True),
        ForwardTile(64, 32, 2, turns=True),
        ForwardTile(64, 32, 2),
    ),
}
BACKWARD_CANDIDATES: dict[int, tuple[BackwardTile, ...]] = {
    64: (
        *(BackwardTile(128, 64, 2, dq) for dq in ("fragments", "rows", "tma")),
        BackwardTile(128, 64, 2, splits_tokens=True),
    ),
    128: (
        *(BackwardTile(128, 64, 2, dq) for dq in ("fragments", "rows")),
        BackwardTile(128, 64, 2, splits_tokens=True),
    ),
}
BACKWARD_DQ_CANDIDATES: dict[int, tuple[DqTile, ...]] = {
    64: tuple(DqTile(64, 64, stages) for stages in (2, 4, 6)),
    128: tuple(DqTile(64, 64, stages) for stages in (2, 3)),
}
CANDIDATES = {
    "forward": FORWARD_CANDIDATES,
    "backward": BACKWARD_CANDIDATES,
    "backward_dq": BACKWARD_DQ_CANDIDATES,
}
# (padded head dim, name of the dtype) whose kernels a GPU has run within the error budget.
VERIFIED = measured.hopper_verified()
# Of those: the number of tokens from which they measured faster than the backend `triton`; `auto` takes them there.
FASTER_FROM = measured.hopper_faster_from()


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


def forward_tile(D: int) -> ForwardTile:
    """The forward's configuration at head dim D."""
    return FORWARD[BLOCK_DS.index(block_d(D))]


def backward_tile(D: int) -> BackwardTile | None:
    """The backward's configuration at head dim D, or None where it has none."""
    return BACKWARD[BLOCK_DS.index(block_d(D))]


def dq_tile(D: int) -> DqTile | None:
    """The configuration of the kernel for dQ and dR alone at head dim D, or None where it has none."""
    return BACKWARD_DQ[BLOCK_DS.index(block_d(D))]
