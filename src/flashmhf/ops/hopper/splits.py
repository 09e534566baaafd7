"""Over how many programs the fused backward splits the tokens of a row tile: a pure function of the sizes.

A program of the fused backward occupies a whole SM, so the last wave of a launch may leave most of the device idle: 336
programs on 132 SMs are three waves at 0.85 of the device. Splitting the tokens makes more and shorter waves. It costs
float32 partial sums of dK, dU and dV, which a second kernel adds in fixed order, and a start-up per program.
"""

from torch import Tensor

from flashmhf.ops.hopper.launch import NUM_SMS, num_sms
from flashmhf.ops.hopper.tiles import BackwardTile

MAX_SPLITS = 16
MAX_PARTIAL_BYTES = 2**28  # of the partial sums of one launch
# Overhead of a program in units of 128-token tiles: estimated from bytes and clocks, not measured.
STARTUP_TILES = 1  # the loads of K, U and V, then of the first Q and dO
COMBINE_TILES = 2  # 96 KiB of partial sums are written and read


def num_splits_heuristic(programs: int, tiles: int, partial_bytes: int, sms: int = NUM_SMS) -> int:
    """How many programs share the `tiles` of each of `programs`; every one of them gets a tile.

    partial_bytes: of one split's partial sums.
    """

    def clocks(splits: int) -> int:
        waves = -(-programs * splits // sms)
        return waves * (-(-tiles // splits) + STARTUP_TILES + (COMBINE_TILES if splits > 1 else 0))

    limit = min(tiles, MAX_SPLITS, MAX_PARTIAL_BYTES // max(partial_bytes, 1))
    best = min(range(1, max(limit, 1) + 1), key=clocks)  # the smallest on a tie
    return -(-tiles // -(-tiles // best)) if tiles else 1


def num_splits(q: Tensor, k: Tensor, tile: BackwardTile) -> int:
    """Over how many programs the tokens of q (T, H, D) are split."""
    if not tile.split_tokens:
        return 1
    partial_bytes = 3 * 4 * k.numel()
    return num_splits_heuristic(num_row_tiles(k, tile), num_token_tiles(q, k, tile), partial_bytes, num_sms(q.device))


def num_row_tiles(k: Tensor, tile: BackwardTile) -> int:
    """Row tiles: one program each where the tokens are not split."""
    H_kv, E, F, _ = k.shape
    return H_kv * E * -(-F // tile.block_f)


def num_token_tiles(q: Tensor, k: Tensor, tile: BackwardTile) -> int:
    """Token tiles per row tile: those of all heads that share it."""
    T, H, _ = q.shape
    return H // len(k) * -(-T // tile.block_t)
