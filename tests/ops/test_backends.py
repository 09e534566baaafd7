"""The table of backends and the selection of one."""

import logging

import pytest
import torch

import flashmhf
from flashmhf.ops import backends
from flashmhf.ops.problem import Problem

PROBLEM = Problem.of(torch.randn(3, 2, 8), *(torch.randn(2, 1, 4, 8) for _ in range(3)))


def test_names_and_reasons():
    assert list(flashmhf.backends()) == ["hopper", "triton", "blockwise", "reference"]
    on_cpu = flashmhf.backends(PROBLEM)
    assert on_cpu["blockwise"] is None
    assert on_cpu["reference"] is None
    assert "got cpu" in on_cpu["triton"] or "not installed" in on_cpu["triton"]


def test_auto_selects_the_first_backend_that_can_run_and_logs_it_once(caplog):
    backends._log_choice.cache_clear()
    with caplog.at_level(logging.INFO, logger="flashmhf"):
        for _ in range(3):
            assert backends.select(PROBLEM, "auto").__name__ == "flashmhf.ops.blockwise"
    (record,) = caplog.records
    assert "blockwise" in record.getMessage()
    assert "triton" in record.getMessage()


def test_a_named_backend_never_falls_back():
    with pytest.raises(ValueError, match="backend: 'triton' cannot run here: "):
        flashmhf.flash_mhf(*(torch.randn(3, 2, 8), *(torch.randn(2, 1, 4, 8) for _ in range(3))), backend="triton")


def test_an_unknown_backend_is_an_error():
    with pytest.raises(
        ValueError, match="backend: expected one of auto, hopper, triton, blockwise, reference, got 'cuda'"
    ):
        backends.select(PROBLEM, "cuda")


def test_reasons_why_triton_cannot_run(monkeypatch):
    monkeypatch.setattr(backends, "find_spec", lambda name: None)
    assert backends.backends()["triton"] == "the package triton is not installed"
    monkeypatch.setattr(backends, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    gpu = Problem(3, 2, 2, 1, 4, 8, torch.float32, torch.device("cuda"), has_gate=False)
    assert "needs compute capability 8.0" in backends._triton_unsupported_reason(gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert backends._triton_unsupported_reason(gpu) is None
    wide = Problem(3, 2, 2, 1, 4, 512, torch.float32, torch.device("cuda"), has_gate=False)
    assert backends._triton_unsupported_reason(wide) == "supports head dims up to 256, got 512"
    double = Problem(3, 2, 2, 1, 4, 8, torch.float64, torch.device("cuda"), has_gate=False)
    assert "got float64" in backends._triton_unsupported_reason(double)
