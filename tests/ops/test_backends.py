"""The table of backends and the selection of one."""

import logging

import offline
import pytest
import torch

import flashmhf
from flashmhf import extras
from flashmhf.ops import backends
from flashmhf.ops.problem import Problem

PROBLEM = Problem.of(torch.randn(3, 2, 8), *(torch.randn(2, 1, 4, 8) for _ in range(3)))


@pytest.fixture
def compiled_triton(monkeypatch):
    """Triton as without TRITON_INTERPRET, which is set for the tests."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(backends, "interprets_triton", lambda: False)


def test_names_and_reasons(compiled_triton):
    assert list(flashmhf.backends()) == ["hopper", "triton", "onednn", "blockwise", "reference"]
    on_cpu = flashmhf.backends(PROBLEM)
    assert on_cpu["blockwise"] is None
    assert on_cpu["reference"] is None
    assert "got cpu" in on_cpu["triton"] or "needs triton" in on_cpu["triton"]


def test_auto_selects_the_first_backend_that_can_run_and_logs_it_once(caplog):
    without_onednn = flashmhf.backends(PROBLEM)["onednn"]
    backends._log_choice.cache_clear()
    with caplog.at_level(logging.INFO, logger="flashmhf"):
        for _ in range(3):
            chosen = backends.select(PROBLEM, "auto").__name__
            assert chosen == ("flashmhf.ops.blockwise" if without_onednn else "flashmhf.ops.onednn.backend")
    (record,) = caplog.records
    assert ("blockwise" if without_onednn else "onednn") in record.getMessage()
    assert "triton" in record.getMessage()


def test_auto_does_not_import_triton_for_cpu_tensors():
    script = """
import json, sys, torch, flashmhf
q, w = torch.ones(3, 2, 8), torch.ones(2, 1, 4, 8)
flashmhf.flash_mhf(q, w, w, w)
print(json.dumps("triton" in sys.modules))
"""
    assert offline.run(script) == [False]


def test_a_named_backend_never_falls_back(compiled_triton):
    with pytest.raises(ValueError, match="backend: 'triton' cannot run here: "):
        flashmhf.flash_mhf(*(torch.randn(3, 2, 8), *(torch.randn(2, 1, 4, 8) for _ in range(3))), backend="triton")


def test_an_unknown_backend_is_an_error():
    with pytest.raises(
        ValueError, match="backend: expected one of auto, hopper, triton, onednn, blockwise, reference, got 'cuda'"
    ):
        backends.select(PROBLEM, "cuda")


def test_reasons_why_triton_cannot_run(monkeypatch, compiled_triton):
    monkeypatch.setattr(extras, "_is_installed", lambda module: False)
    assert backends.backends()["triton"] == "needs triton: pip install 'flashmhf[triton]'"
    monkeypatch.setattr(extras, "_is_installed", lambda module: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    gpu = Problem(3, 2, 2, 1, 4, 8, torch.float32, torch.device("cuda"), has_gate=False)
    assert "needs compute capability 8.0" in backends._triton_unsupported_reason(gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert backends._triton_unsupported_reason(gpu) is None
    wide = Problem(3, 2, 2, 1, 4, 512, torch.float32, torch.device("cuda"), has_gate=False)
    assert backends._triton_unsupported_reason(wide) == "supports head dims up to 256, got 512"
    double = Problem(3, 2, 2, 1, 4, 8, torch.float64, torch.device("cuda"), has_gate=False)
    assert "got float64" in backends._triton_unsupported_reason(double)


SETTINGS = ("true", "before triton", "after triton", "after the kernels", "0", "")


@pytest.mark.parametrize("setting", ["1", *(pytest.param(setting, marks=pytest.mark.slow) for setting in SETTINGS)])
def test_tritons_interpreter(setting):
    """In a process of its own: the backend runs on CPU tensors, is named by backends(), and says what is wrong."""
    before, late = {"before triton": ("", "1"), "after triton": ("import triton", "1")}.get(setting, ("", None))
    if setting == "after the kernels":
        before, late = "import flashmhf.ops.triton.backend", "1"
    script = f"""
import os, json
import torch, flashmhf
from flashmhf.ops.problem import Problem
{before}
if {late!r}: os.environ["TRITON_INTERPRET"] = {late!r}
def attempt(**options):
    q, w = torch.ones(3, 2, 8, **options), torch.ones(2, 1, 4, 8, **options)
    try:
        close = (flashmhf.flash_mhf(q, w, w, w, backend="triton") - flashmhf.flash_mhf(q, w, w, w)).abs().max() < 1
    except ValueError as error:
        return str(error)
    return bool(close)
print(json.dumps([attempt(), attempt(dtype=torch.bfloat16), flashmhf.backends()]))
"""
    variables = {"TRITON_INTERPRET": setting} if setting in ("1", "true", "0", "") else {}
    ((float32, bfloat16, table),) = offline.run(script, **variables)
    cannot = "backend: 'triton' cannot run here: "
    if setting in ("1", "true", "before triton"):
        assert float32 is True
        assert bfloat16.startswith(cannot + "Triton's interpreter (TRITON_INTERPRET) multiplies bfloat16 wrongly")
        assert table["triton"] is None
        assert table["hopper"] == "Triton's interpreter (TRITON_INTERPRET) does not run Gluon kernels"
        return
    reason = {
        "after triton": "TRITON_INTERPRET was set after triton was imported; set it before",
        "after the kernels": "needs tensors on a CUDA or ROCm GPU, got cpu (TRITON_INTERPRET was set after the kernels "
        "were imported)",
    }.get(setting, "needs tensors on a CUDA or ROCm GPU, got cpu")
    assert float32 == cannot + reason
