"""Why the backend cannot run, and what `auto` does then."""

import importlib
import sys

import offline
import pytest
import torch
from problems import Shape, make_inputs

from flashmhf import extras
from flashmhf.ops import backends
from flashmhf.ops.flash_mhf import flash_mhf
from flashmhf.ops.onednn import library
from flashmhf.ops.problem import Problem

SHAPE = Shape((70,), 2, 1, 2, 20, 8)


def forget() -> None:
    """The reasons that have been found."""
    for function in (library._unsupported_reason, backends._numba_unsupported_reason):
        function.cache_clear()


@pytest.fixture(autouse=True)
def forget_afterwards():
    yield
    forget()


@pytest.fixture
def inputs(onednn) -> list:
    return make_inputs(SHAPE, torch.float32)[:5]


def assert_unsupported(inputs: list, reason: str) -> None:
    """By name the reason is raised; `auto` takes `blockwise`."""
    forget()
    with pytest.raises(ValueError, match="backend: 'onednn' cannot run here: ") as raised:
        flash_mhf(*inputs, backend="onednn")
    assert str(raised.value).removeprefix("backend: 'onednn' cannot run here: ") == reason
    assert backends.select(Problem.of(*inputs), "auto").__name__ == "flashmhf.ops.blockwise"
    assert torch.equal(flash_mhf(*inputs), flash_mhf(*inputs, backend="blockwise"))


def test_auto_takes_it(inputs):
    assert backends.select(Problem.of(*inputs), "auto") is sys.modules["flashmhf.ops.onednn.backend"]
    assert torch.equal(flash_mhf(*inputs), flash_mhf(*inputs, backend="onednn"))
    one = make_inputs(Shape((1,), 2, 1, 2, 20, 8), torch.float32)[:5]
    assert backends.select(Problem.of(*one), "auto") is sys.modules["flashmhf.ops.onednn.backend"]


def test_without_numba(inputs, monkeypatch):
    monkeypatch.setattr(extras, "_is_installed", lambda module: module != "numba")
    reason = "needs numba: pip install 'flashmhf[cpu]'"
    assert_unsupported(inputs, reason)
    assert backends.backends()["onednn"] == reason


def test_a_numba_that_cannot_be_imported(inputs, monkeypatch):
    import_module = importlib.import_module

    def fail(name: str):
        if name == "numba":
            raise ImportError("Numba needs NumPy 2.3 or less. Got NumPy 2.9.\nA second line.")
        return import_module(name)

    monkeypatch.setattr(backends.importlib, "import_module", fail)
    reason = "the package numba cannot be imported: Numba needs NumPy 2.3 or less. Got NumPy 2.9."
    assert_unsupported(inputs, reason)
    assert backends.backends()["onednn"] == reason


SYMBOLS = (library.BRGEMM[torch.float32], library.RELEASE, library.PARALLEL, library.THREAD_NUMBER)


@pytest.mark.parametrize("name", SYMBOLS)
def test_missing_symbols(name, inputs, monkeypatch):
    address = library.address
    monkeypatch.setattr(library, "address", lambda wanted: 0 if wanted == name else address(wanted))
    reason = f"PyTorch {torch.__version__} does not export oneDNN's micro-kernels or its OpenMP runtime here"
    assert_unsupported(inputs, reason)


def test_a_library_that_is_not_there(inputs, monkeypatch, tmp_path):
    monkeypatch.setattr(library.torch, "__file__", str(tmp_path / "__init__.py"))
    monkeypatch.setattr(library, "_library", library._library.__wrapped__)
    monkeypatch.setattr(library, "address", library.address.__wrapped__)
    assert library.address(library.RELEASE) == 0
    forget()
    assert "does not export" in library.unsupported_reason(torch.float32)


def test_symbols_are_found_or_zero():
    assert library.address("no_such_function") == 0


def test_wrong_products(inputs, monkeypatch):
    monkeypatch.setattr(library.operator, "mul", lambda x, y: x * y + 1)
    assert_unsupported(inputs, "oneDNN's micro-kernels give wrong results on this CPU")


def test_instructions_that_the_cpu_lacks(inputs, monkeypatch):
    for name in ("avx512_bf16", "amx_tile"):
        monkeypatch.setattr(torch.cpu, f"_is_{name}_supported", lambda: False)
    low = [x.bfloat16() for x in inputs]
    assert_unsupported(low, "needs a CPU with instructions for bfloat16 (AVX-512 BF16 or AMX)")
    assert library.unsupported_reason(torch.float32) is None
    monkeypatch.setattr(torch.cpu, "_is_avx2_supported", lambda: False)
    assert_unsupported(inputs, "needs a CPU with AVX2")


def test_onednn_is_switched_off_and_on(inputs):
    """Also for calls that have been made before, and between forward and backward."""
    expected = flash_mhf(*inputs, backend="onednn")
    leaves = [x.requires_grad_() for x in inputs]
    auto, named = flash_mhf(*leaves), flash_mhf(*leaves, backend="onednn")
    torch.backends.mkldnn.enabled = False
    try:
        assert_unsupported([x.detach() for x in inputs], "torch.backends.mkldnn is disabled")
        got = torch.autograd.grad(auto.sum(), leaves)
        with pytest.raises(ValueError, match="mkldnn is disabled"):
            torch.autograd.grad(named.sum(), leaves, retain_graph=True)
    finally:
        torch.backends.mkldnn.enabled = True
    torch.testing.assert_close(got, torch.autograd.grad(named.sum(), leaves), rtol=1e-4, atol=1e-4)
    assert torch.equal(flash_mhf(*inputs, backend="onednn"), expected)


def test_what_it_does_not_support(onednn):
    reasons = {
        torch.float64: "supports float32 and bfloat16, got torch.float64",
        torch.float16: "supports float32 and bfloat16, got torch.float16",
    }
    for dtype, reason in reasons.items():
        assert_unsupported(make_inputs(SHAPE, dtype)[:5], reason)
    odd = make_inputs(Shape((70,), 2, 1, 2, 20, 7), torch.bfloat16)[:5]
    assert_unsupported(odd, "supports even head dims with bfloat16, got 7")
    problem = Problem(70, 2, 1, 2, 20, 8, torch.float32, torch.device("cuda"), has_gate=True)
    assert backends.backends(problem)["onednn"] == "needs tensors on a CPU, got cuda"


def test_numba_is_imported_only_when_it_is_needed():
    script = """
import json, sys, torch
from flashmhf.ops.flash_mhf import flash_mhf
for dtype in (torch.float64, torch.float16):
    q, w = torch.ones(3, 2, 8, dtype=dtype), torch.ones(2, 1, 4, 8, dtype=dtype)
    flash_mhf(q, w, w, w)
print(json.dumps("numba" in sys.modules))
"""
    assert offline.run(script) == [False]
