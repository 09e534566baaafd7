"""Fixtures for the operator's tests."""

import itertools

import pytest


@pytest.fixture(params=[False, True], ids=["rows_first", "tokens_first"])
def fused(request, monkeypatch):
    """Makes the backend `triton` use its fused backward, on the CPU; whether tokens come first."""
    from flashmhf.ops.triton import tiles

    rows = itertools.product(tiles.FUSED, tiles.BLOCK_DS)
    monkeypatch.setattr(tiles, "FUSED_FASTER", frozenset(rows))
    tiles_by_device = {
        name: tuple(tile and tile._replace(tokens_first=request.param) for tile in row)
        for name, row in tiles.FUSED.items()
    }
    monkeypatch.setattr(tiles, "FUSED", tiles_by_device)
    return request.param
