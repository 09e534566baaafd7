"""Tile sizes of the Hopper kernels, and which have been verified on a GPU. Imports only torch, for backends.py."""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch

from flashmhf.ops import measured

BLOCK_DS = (64, 128, 256)
HEAD_DIM_MULTIPLE = 8  # TMA requires strides that are multiples of 16 bytes


class ForwardTile(NamedTuple):
    """Tokens per warpgroup and parameter rows per tile, stages of the pipelines, and three options.

    q_in_registers: wgmma reads Q from registers. This takes BLOCK_D / 4 registers per thread and relieves shared
    memory, of whose 128 bytes per clock the product with Q otherwise uses 96 (at head dim 128) and the TMA loads 32.
    pingpong: the two warpgroups alternate in issuing their products, so that they do not both run the activation while
    the tensor cores idle.
    persistent: one program per SM processes many work tiles, and the producer prefetches across them. The output then
    needs its own shared memory, which leaves less for the pipelines.
    """

    block_t: int
    block_f: int
    stages: int
    q_in_registers: bool = False
    pingpong: bool = False
    persistent: bool = False


class BackwardTile(NamedTuple):
    """Tokens and parameter rows per tile, stages of the pipeline, and two options.

    dq: how dQ is accumulated in memory (dq_accum.py): "fragments" takes half as many reductions as "rows", each over
    four cache lines instead of eight; "tma" needs a tile of shared memory.
    split_tokens: over several programs where that improves wave quantisation (splits.py), at the cost of float32
    partial sums.
    """

    block_t: int
    block_f: int
    stages: int
    dq: str = "fragments"
    split_tokens: bool = False


class DqTile(NamedTuple):
    """The kernel for dQ and dgate only: tokens per warpgroup and parameter rows per tile, stages of the pipeline."""

    block_t: int
    block_f: int
    stages: int


HopperTile = ForwardTile | BackwardTile | DqTile
Tile = TypeVar("Tile", ForwardTile, BackwardTile | None, DqTile | None)


def _measured(kernel: str, make: Callable[..., Tile], tiles: tuple[Tile, ...]) -> tuple[Tile, ...]:
    """One tile for each of BLOCK_DS, replaced where another one measured faster."""
    faster = (measured.hopper_tile(kernel, block_d) for block_d in BLOCK_DS)
    return tuple(tile if fields is None else make(**fields) for tile, fields in zip(tiles, faster, strict=True))


# One tile for each of BLOCK_DS, or None where the accumulators do not fit the registers.
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

# One of BLOCK_DS -> the tiles that a GPU will compare, the most promising first, including the defaults above. Each
# compiles without spills (tests/ops/triton/test_triton_compiles.py).
FORWARD_CANDIDATES: dict[int, tuple[ForwardTile, ...]] = {
    64: (
        ForwardTile(64, 64, 4, True),
        ForwardTile(64, 64, 4, True, pingpong=True),
        ForwardTile(64, 64, 6, True, pingpong=True, persistent=True),
        ForwardTile(64, 64, 6, True, persistent=True),
        ForwardTile(128, 32, 6, True, pingpong=True),  # half the traffic from the L2 cache
        ForwardTile(128, 32, 6, True, pingpong=True, persistent=True),
        ForwardTile(64, 128, 3, True, pingpong=True),
        ForwardTile(64, 128, 3, True, pingpong=True, persistent=True),
        ForwardTile(64, 64, 6, True, pingpong=True),
        ForwardTile(64, 64, 4, pingpong=True, persistent=True),
        ForwardTile(64, 64, 4),
        ForwardTile(64, 128, 3, True),
    ),
    128: (
        ForwardTile(64, 64, 4, True),
        ForwardTile(64, 64, 4, True, pingpong=True),
        ForwardTile(64, 64, 3, True, pingpong=True, persistent=True),
        ForwardTile(64, 64, 3, True, persistent=True),
        ForwardTile(64, 64, 3, True, pingpong=True),
        ForwardTile(64, 64, 4, pingpong=True),
        ForwardTile(64, 64, 3, pingpong=True, persistent=True),
        ForwardTile(64, 32, 6, True, pingpong=True, persistent=True),
        ForwardTile(64, 64, 2, True, pingpong=True, persistent=True),
        ForwardTile(64, 64, 3, True),
        ForwardTile(64, 64, 4),
    ),
    256: (
        ForwardTile(64, 32, 3),
        ForwardTile(64, 32, 3, pingpong=True),
        ForwardTile(64, 32, 2, pingpong=True, persistent=True),
        ForwardTile(64, 32, 2, persistent=True),
        ForwardTile(64, 32, 2, pingpong=True),
        ForwardTile(64, 32, 2),
    ),
}
BACKWARD_CANDIDATES: dict[int, tuple[BackwardTile, ...]] = {
    64: (
        *(BackwardTile(128, 64, 2, dq) for dq in ("fragments", "rows", "tma")),
        BackwardTile(128, 64, 2, split_tokens=True),
    ),
    128: (
        *(BackwardTile(128, 64, 2, dq) for dq in ("fragments", "rows")),
        BackwardTile(128, 64, 2, split_tokens=True),
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
# (padded head dim, name of the dtype) whose kernels ran on a GPU within the error budget.
VERIFIED = measured.hopper_verified()
# For some of those, the number of tokens from which they measured faster than the backend `triton`; used by `auto`.
FASTER_FROM = measured.hopper_faster_from()


def configuration(D: int, dtype: torch.dtype) -> tuple[int, str]:
    """The key of VERIFIED and FASTER_FROM."""
    return block_d(D), str(dtype).removeprefix("torch.")


def block_d(D: int) -> int:
    """The padded head dim: TMA fills columns beyond D with zeros."""
    return next(size for size in BLOCK_DS if size >= D)


def head_dim_parts(D: int) -> tuple[int, int]:
    """The columns that products over the head dim read, in up to two parts: at 96, padded to 128, 64 and 32."""
    width = block_d(D)
    return (width // 2, width // 4) if width > BLOCK_DS[0] and width * 3 // 4 >= D else (width, 0)


def forward_tile(D: int) -> ForwardTile:
    """The forward's tile at head dim D."""
    return FORWARD[BLOCK_DS.index(block_d(D))]


def backward_tile(D: int) -> BackwardTile | None:
    """The fused backward's tile at head dim D, or None where it has none."""
    return BACKWARD[BLOCK_DS.index(block_d(D))]


def dq_tile(D: int) -> DqTile | None:
    """The dQ kernel's tile at head dim D, or None where it has none."""
    return BACKWARD_DQ[BLOCK_DS.index(block_d(D))]
