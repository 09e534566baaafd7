"""Over how many programs the Hopper backward splits the tokens, and the wave efficiency that results."""

import pytest

pytest.importorskip("triton")

import torch

from flashmhf.ops.hopper.launch import NUM_SMS
from flashmhf.ops.hopper.splits import MAX_PARTIAL_BYTES, MAX_SPLITS, num_splits, num_splits_heuristic
from flashmhf.ops.hopper.tiles import BackwardTile

TILE = BackwardTile(128, 64, 2, split_tokens=True)
SIZES = {"128m": (6, 8, 256), "370m": (8, 7, 384), "1.3b": (16, 15, 384)}  # H, E, F of the presets, D = 128
MANY = 2**20


def wave_efficiency(programs: int, tiles: int, splits: int, sms: int = NUM_SMS) -> float:
    """The fraction of the SMs' time spent on tiles, with `tiles` per program before splitting."""
    waves = -(-programs * splits // sms)
    return programs * tiles / (sms * waves * -(-tiles // splits))


def splits_of(preset: str, T: int) -> int:
    H, E, F = SIZES[preset]
    q, k = (torch.empty(size, device="meta") for size in ((T, H, 128), (H, E, F, 128)))
    return num_splits(q, k, TILE)


@pytest.mark.parametrize(
    ("programs", "splits", "fraction"),
    [(336, 1, 0.848), (336, 3, 0.955), (336, 5, 0.979), (192, 1, 0.727), (192, 2, 0.970), (1440, 1, 0.992)],
)
def test_the_documented_wave_efficiencies(programs, splits, fraction):
    assert wave_efficiency(programs, MANY, splits) == pytest.approx(fraction, abs=5e-4)


@pytest.mark.parametrize(
    ("preset", "T", "splits"),
    [
        *(("128m", 1024, 1), ("128m", 4096, 2), ("128m", 65536, 2)),
        *(("370m", 4096, 1), ("370m", 16384, 3), ("370m", 65536, 5)),
        *(("1.3b", 1024, 1), ("1.3b", 65536, 1)),
    ],
)
def test_splits_of_the_presets(preset, T, splits):
    assert splits_of(preset, T) == splits


def test_no_split_unless_the_tile_allows_it():
    q, k = torch.empty(65536, 8, 128, device="meta"), torch.empty(8, 7, 384, 128, device="meta")
    assert num_splits(q, k, TILE._replace(split_tokens=False)) == 1


@pytest.mark.parametrize("programs", [1, 5, 96, 131, 132, 133, 336, 1000])
def test_splits_are_bounded_and_never_lower_the_efficiency(programs):
    for tiles in (0, 1, 2, 7, 33, 128, 1000):
        for size in (1, MAX_PARTIAL_BYTES // 3, MAX_PARTIAL_BYTES, MAX_PARTIAL_BYTES + 1):
            splits = num_splits_heuristic(programs, tiles, size)
            assert 1 <= splits <= min(MAX_SPLITS, max(tiles, 1))
            assert splits == 1 or splits * size <= MAX_PARTIAL_BYTES
            per_split = -(-tiles // splits)
            assert tiles == 0 or (splits - 1) * per_split < tiles  # every split has tiles
            assert wave_efficiency(programs, max(tiles, 1), splits) >= wave_efficiency(programs, max(tiles, 1), 1)
