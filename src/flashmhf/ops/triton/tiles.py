"""Tile sizes as a pure function of what changes the generated code. Placeholder table; see below."""

from typing import NamedTuple


class Tile(NamedTuple):
    block_t: int
    block_f: int
    num_warps: int
    num_stages: int


def tile_for(kernel, device, dtype, D, T):
    return Tile(32, 32, 4, 2)
