"""Fixtures for the backend "onednn"."""

import pytest
import torch

from flashmhf.ops import backends


def skip_unless_supported(dtype: torch.dtype = torch.float32) -> None:
    """Skips a test with the backend's own reason."""
    from flashmhf.ops.onednn import library

    if reason := backends.backends()["onednn"] or library.unsupported_reason(dtype):
        pytest.skip(reason)


@pytest.fixture
def onednn():
    """The backend's module."""
    skip_unless_supported()
    from flashmhf.ops.onednn import backend

    return backend


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def dtype(request) -> torch.dtype:
    """Every dtype that the backend supports."""
    skip_unless_supported(request.param)
    return request.param


@pytest.fixture
def cut(onednn, monkeypatch):
    """cut(threads, panel_rows, head_dim, dtype): cuts calls into many segments and panels, small as they are."""
    from flashmhf.ops.onednn import launch

    def cut(threads: int, panel_rows: int | None = None, head_dim: int = 1, dtype: torch.dtype = torch.float32) -> None:
        torch.set_num_threads(threads)
        monkeypatch.setattr(launch, "MIN_SEGMENT", 16)
        if panel_rows is not None:
            monkeypatch.setattr(launch, "FORWARD_PANEL_BYTES", panel_rows * head_dim * dtype.itemsize)
            monkeypatch.setattr(launch, "BACKWARD_PANEL_ELEMENTS", panel_rows * head_dim)

    return cut
