"""Over how many programs the backward splits the tokens that meet one tile of rows: a pure function of the sizes.

A program of the fused backward fills a processor, so the last wave of a launch may leave most of the device idle:
336 programs on 132 processors are three waves, 0.85 of the device. Splitting the tokens makes more and shorter waves.
It costs float32 partial sums of dK, dU and dV, which a second kernel adds in fixed order, and a start for each program.
"""

from torch import Tensor

from flashmhf.ops.hopper.launch import PROCESSORS, processors
from flashmhf.ops.hopper.tiles import BackwardTile

MAX_SPLITS = 16
MAX_PARTIAL_BYTES = 2**28  # of the partial sums of one launch
# What a program costs beside its tiles, in tiles of 128 tokens: an estimate from bytes and clocks, not a measurement.
START_TILES = 1  # K, U and V arrive, and then the first Q and dO
PARTIAL_TILES = 2  # 96 KiB of partial sums are written and read


def fraction_busy(programs: int, tiles: int, splits: int, width: int = PROCESSORS) -> float:
    """The share of `width` processors' time that goes into tiles, if each of `programs` has `tiles` to split."""
    waves = -(-programs * splits // width)
    return programs * tiles / (width * waves * -(-tiles // splits))


def token_splits(programs: int, tiles: int, bytes_of_a_split: int, width: int = PROCESSORS) -> int:
    """How many programs share the `tiles` of each of `programs`, on `width` processors; none is left without a tile."""

    def clocks(splits: int) -> int:
        waves = -(-programs * splits // width)
        return waves * (-(-tiles // splits) + START_TILES + (PARTIAL_TILES if splits > 1 else 0))

    most = min(tiles, MAX_SPLITS, MAX_PARTIAL_BYTES // max(bytes_of_a_split, 1))
    best = min(range(1, max(most, 1) + 1), key=clocks)  # the fewest of equals
    return -(-tiles // -(-tiles // best)) if tiles else 1


def splits_for(q: Tensor, k: Tensor, tile: BackwardTile) -> int:
    """Over how many programs the tokens of q (T, H, D) are split."""
    if not tile.splits_tokens:
        return 1
    bytes_of_a_split = 3 * 4 * k.numel()
    return token_splits(row_tiles(k, tile), token_tiles(q, k, tile), bytes_of_a_split, processors(q.device))


def row_tiles(k: Tensor, tile: BackwardTile) -> int:
    """Tiles of rows, a program each where the tokens are not split."""
    H_kv, E, F, _ = k.shape
    return H_kv * E * -(-F // tile.block_f)


def token_tiles(q: Tensor, k: Tensor, tile: BackwardTile) -> int:
    """Tiles of tokens that meet each tile of rows: those of all heads that share it."""
    T, H, _ = q.shape
    return H // len(k) * -(-T // tile.block_t)
