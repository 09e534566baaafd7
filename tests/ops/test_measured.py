"""measured.json: its format, and that the tile tables follow it."""

import importlib
import json

import pytest

from flashmhf.ops import measured
from flashmhf.ops.hopper import tiles as hopper_tiles
from flashmhf.ops.triton import tiles as triton_tiles

PROOF = {"proof": {"device": "toy"}}
ENTRIES = [
    {"claim": "hopper tile", "kernel": "forward", "D": 128, "tile": {"block_t": 64, "block_f": 64, "stages": 2}},
    {"claim": "hopper verified", "D": 128, "dtype": "bfloat16"},
    {"claim": "hopper faster", "D": 128, "dtype": "bfloat16", "from_tokens": 4096},
    {
        "claim": "triton tile",
        "device": "sm_90a",
        "element_bytes": 2,
        "kernel": "forward",
        "D": 64,
        "tile": [64, 32, 4, 2],
    },
    {
        "claim": "triton tile",
        "device": "sm_90a",
        "element_bytes": 2,
        "kernel": "backward_fused",
        "D": 64,
        "tile": [32, 32, 4, 2, True],
    },
    {"claim": "fused faster", "device": "sm_90a", "D": 64},
]


@pytest.fixture
def reload_tables(monkeypatch):
    """Reloads the tables from given entries, and restores them afterwards."""
    modules = (hopper_tiles, triton_tiles)
    before = [dict(vars(module)) for module in modules]

    def reload(entries: list[dict]) -> None:
        monkeypatch.setattr(measured, "entries", lambda: measured.parse(json.dumps(entries)))
        for module in modules:
            importlib.reload(module)

    yield reload
    for module, names in zip(modules, before, strict=True):
        vars(module).update(names)


def test_the_tables_follow_what_is_measured(reload_tables):
    reload_tables([entry | PROOF for entry in ENTRIES])
    assert hopper_tiles.forward_tile(128) == hopper_tiles.ForwardTile(64, 64, 2)
    assert hopper_tiles.TABLE["forward"][1] == hopper_tiles.forward_tile(128)
    assert {(128, "bfloat16")} == hopper_tiles.VERIFIED
    assert hopper_tiles.FASTER_FROM == {(128, "bfloat16"): 4096}
    rows = {(kernel, D): tile for kernel, D, tile in triton_tiles.table_rows("sm_90a", 2)}
    assert rows["forward", 64] == triton_tiles.Tile(64, 32, 4, 2)
    assert rows["backward_fused", 64] == triton_tiles.Tile(32, 32, 4, 2, tokens_first=True)
    assert {("sm_90a", 64)} == triton_tiles.FUSED_FASTER


def test_without_entries_nothing_is_verified_or_faster(reload_tables):
    reload_tables([])
    assert not hopper_tiles.VERIFIED
    assert not hopper_tiles.FASTER_FROM
    assert not triton_tiles.FUSED_FASTER


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[", "measured.json: expected JSON, got '['"),
        ("{}", "measured.json: expected a list of entries, got dict"),
        ('[{"claim": "fast"}]', "entry 1: claim: expected one of hopper tile, "),
        (
            '[{"claim": "fused faster", "device": 9, "D": 64, "proof": {}}]',
            "entry 1: device: expected str, got 9",
        ),
        ('[{"claim": "fused faster", "device": "sm_90a", "D": 64}]', "entry 1: proof: expected dict, got None"),
    ],
)
def test_invalid_files_are_errors(text, message):
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        measured.parse(text)
