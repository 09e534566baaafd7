"""The portable tiles: which kernel a device runs with which tile, and how its programs fill it."""

import itertools

import pytest
import torch

from flashmhf.ops.triton import tiles
from flashmhf.ops.triton.forward import num_splits, plan_forward


def test_two_kernels_replace_the_fused_one_where_it_is_not_deterministic_or_miscompiled(fused, monkeypatch, caplog):
    device, row = torch.device("cpu"), tiles.FUSED["sm_80"][2]
    assert tiles.fused_tile(device, torch.float16, 128) == row
    assert tiles.fused_tile(device, torch.float32, 128) is None
    torch.use_deterministic_algorithms(True)
    try:
        assert tiles.fused_tile(device, torch.float16, 128) is None
    finally:
        torch.use_deterministic_algorithms(False)
    monkeypatch.setattr(tiles, "device_class", lambda device: "sm_90a")
    for version, right in (("3.3.1", True), ("3.4.0", False), ("3.7.0+git1", False), ("3.7.1", True)):
        monkeypatch.setattr(tiles.triton, "__version__", version)
        tiles.miscompiles_transposed_results.cache_clear()
        assert (tiles.fused_tile(device, torch.float16, 128) is not None) == (right or fused), version
    tiles.miscompiles_transposed_results.cache_clear()
    assert [record.args for record in caplog.records] == ([] if fused else [("3.4.0",), ("3.7.0+git1",)])


def test_hopper_tiles_put_tokens_first():
    """Then no product reads the transpose of another's result, and every Triton compiles them correctly."""
    assert all(tile is None or tile.tokens_first for tile in tiles.FUSED["sm_90a"])


def test_no_hopper_tile_that_triton_is_known_to_miscompile():
    """64 rows and 4 warps (fla-org/flash-linear-attention issue 984)."""
    rows = [tile for element_bytes in (2, 4) for _, _, tile in tiles.table_rows("sm_90a", element_bytes)]
    assert not [tile for tile in rows if tile.num_warps == 4 and 64 in tile[:2] and tile.block_t != 16]


def test_every_split_has_rows():
    for E, F, H, T in itertools.product((1, 3, 15), (1, 40, 384), (1, 6, 16), (1, 16, 17, 128, 129)):
        q, k = torch.empty(T, H, 128, device="meta"), torch.empty(H, E, F, 128, device="meta")
        splits = num_splits(q, k, tiles.tile_for("forward", q.device, q.dtype, 128, T))
        launch = plan_forward(q, k, k, k, None, torch.empty(splits, T, H, 128, device="meta").squeeze(0), splits=splits)
        per_split, rows = launch.arguments["tiles_per_split"], E * -(-F // launch.arguments["BLOCK_F"])
        assert (splits - 1) * per_split < rows <= splits * per_split
        assert splits == 1 or T <= tiles.SPLIT_MAX_TOKENS
        if T == 1 and (E, F, H) == (15, 384, 6):
            assert launch.grid == (6, 36)  # 216 programs, two for each of 108 SMs


def test_a_split_forward_fills_the_device_in_one_wave(monkeypatch):
    """As many programs as SMs times occupancy of the tile in use; a device is asked for its number of SMs."""
    device = torch.device("cpu")
    for name, rows in tiles.OCCUPANCY.items():
        monkeypatch.setattr(tiles, "device_class", lambda device, name=name: name)
        tiles.num_sms.cache_clear()
        for (size, kernels), (column, D) in itertools.product(rows.items(), enumerate(tiles.BLOCK_DS)):
            dtype = {2: torch.bfloat16, 4: torch.float32}[size]
            for T, kernel in ((1, "decode"), (16, "decode"), (17, "forward"), (128, "forward")):
                programs = tiles.target_programs(device, dtype, D, T)
                assert programs == tiles.NUM_SMS[name] * kernels[kernel][column]
            assert tiles.target_programs(device, dtype, D, 129) == 1
    tiles.num_sms.cache_clear()
    properties = type("Properties", (), {"multi_processor_count": 114})  # an H100 with PCI Express
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(tiles, "device_class", lambda device: "sm_90a")
    occupancy = tiles.OCCUPANCY["sm_90a"][2]["forward"][2]
    assert tiles.target_programs(torch.device("cuda", 0), torch.bfloat16, 128, 100) == 114 * occupancy
    tiles.num_sms.cache_clear()


@pytest.mark.parametrize(
    ("capability", "name"),
    [
        *(((8, 0), "sm_80"), ((8, 6), "sm_86"), ((8, 7), "sm_80"), ((8, 9), "sm_89"), ((9, 0), "sm_90a")),
        *(((10, 0), "sm_100"), ((10, 3), "sm_100"), ((11, 0), "sm_100"), ((12, 0), "sm_120"), ((12, 1), "sm_120")),
    ],
)
def test_device_class(capability, name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    tiles.device_class.cache_clear()
    assert tiles.device_class(torch.device("cuda", 0)) == name
    assert {name} <= set(tiles.TABLE) & set(tiles.FUSED) & set(tiles.OCCUPANCY) & set(tiles.NUM_SMS)
    tiles.device_class.cache_clear()


@pytest.mark.parametrize(("allowed", "float32"), [("highest", "ieee"), ("high", "tf32"), ("medium", "tf32")])
def test_tf32_only_where_torch_allows_it(allowed, float32):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(allowed)
    try:
        for dtype, expected in ((torch.float32, float32), (torch.float16, "ieee"), (torch.bfloat16, "ieee")):
            q, k = torch.empty(1, 1, 16, device="meta", dtype=dtype), torch.empty(1, 1, 16, 16, device="meta")
            launch = plan_forward(q, k, k, k, None, torch.empty_like(q))
            assert launch.arguments["PRECISION"] == expected
    finally:
        torch.set_float32_matmul_precision(before)
