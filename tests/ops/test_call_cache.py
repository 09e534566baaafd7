"""The call cache: it keeps only metadata, and no entry is ever stale."""

import contextlib
import copy
import gc
import threading
import weakref
from unittest import mock

import pytest
import torch
from torch import nn

from flashmhf.layers import FlashMHF
from flashmhf.ops import backends, call_cache, recording
from flashmhf.ops.flash_mhf import flash_mhf
from flashmhf.ops.gated_mhf import gated_mhf
from flashmhf.ops.triton.launch import Launch
from flashmhf.ops.triton.relaunch import Relaunch

SIZES = (16, 2, 2, 6)  # hidden, heads, sub-networks, rows


@pytest.fixture(autouse=True)
def triton_runs_here(monkeypatch):
    """Every name except "reference" selects the Triton kernels, which run in the interpreter."""
    from flashmhf.ops import reference
    from flashmhf.ops.triton import backend

    monkeypatch.setattr(backends, "select", lambda problem, name: reference if name == "reference" else backend)


def make_layer(**options) -> FlashMHF:
    layer = FlashMHF(*SIZES, **({"q_norm": True, "num_kv_heads": 1} | options))
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    return layer


def check(layer: FlashMHF, x: torch.Tensor) -> None:
    """Output and gradients equal those of a copy on the reference; twice, so that the second call is a replay."""
    for _ in range(2):
        x = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype).normal_() if x.is_contiguous() else x * 1.25
        results = []
        for variant in (layer, copy.deepcopy(layer)):
            variant.backend = "triton" if variant is layer else "reference"
            x_leaf = x.detach().requires_grad_()
            with contextlib.nullcontext() if variant is layer else mock.patch.object(call_cache, "_cache", {}):
                out = variant(x_leaf)
                weights = [parameter for parameter in variant.parameters() if parameter.requires_grad]
                results.append([out, *torch.autograd.grad(out.float().square().sum(), [x_leaf, *weights])])
        tolerance = 1e-3 if x.dtype == torch.float32 else 3e-2
        for mine, expected in zip(*results, strict=True):
            torch.testing.assert_close(
                mine, expected, rtol=tolerance, atol=tolerance * expected.detach().abs().max().item()
            )


def cached_launches() -> list[Relaunch]:
    """Every launch in the cache."""
    programs = [call.program for call in call_cache._cache.values() if call.program is not None]
    owners = [getattr(step, "__self__", None) for program in programs for step in program.steps]
    return [owner for owner in owners if isinstance(owner, Relaunch)]


def with_other_strides(weight: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(weight.detach().transpose(-1, -2).contiguous().transpose(-1, -2))


def test_a_repeated_call_plans_nothing(monkeypatch):
    layer, x = make_layer(), torch.randn(5, 16)
    layer(x)
    assert cached_launches()
    monkeypatch.setattr("flashmhf.ops.triton.launch.Tokens.of", None)
    monkeypatch.setattr(backends, "select", None)
    layer(torch.randn(5, 16))


def test_parameters_with_other_strides_one_after_another():
    layer, x = make_layer(), torch.randn(5, 16)
    check(layer, x)
    for name in ("k", "u", "v"):
        setattr(layer, name, with_other_strides(getattr(layer, name)))
        check(layer, x)  # copied to one layout in every call until all three agree


def test_the_data_of_a_parameter_are_replaced():
    layer, x = make_layer(), torch.randn(5, 16)
    check(layer, x)
    layer.k.data = with_other_strides(layer.k).data
    check(layer, x)
    layer.k.data = torch.randn(layer.k.shape)
    check(layer, x)


def test_reassigned_loaded_and_cast_parameters():
    layer, x = make_layer(), torch.randn(5, 16)
    check(layer, x)
    layer.k = nn.Parameter(torch.randn_like(layer.k))
    check(layer, x)
    layer.load_state_dict(make_layer().state_dict())
    check(layer, x)
    layer.to(torch.float16)
    check(layer, x.half())
    layer.to(torch.float32)
    check(layer, x)


@pytest.mark.parametrize("shape", [(5,), (6,), (2, 3), (1, 1), (1, 40)])
def test_other_tokens(shape):
    layer = make_layer()
    check(layer, torch.randn(4, 16))
    check(layer, torch.randn(*shape, 16))


def test_other_strides_of_the_input():
    layer = make_layer(projections=False)
    check(layer, torch.randn(3, 4, 16))
    check(layer, torch.randn(4, 3, 16).transpose(0, 1))
    check(layer, torch.randn(3, 4, 32)[..., :16])
    check(layer, torch.randn(3, 4, 16))


@pytest.mark.parametrize(
    "options", [{"gate_type": None}, {"q_norm": False}, {"gate_type": "softmax"}, {"output_scale": 3.0}]
)
def test_layers_of_the_same_sizes_that_differ_in_an_option(options):
    x = torch.randn(5, 16)
    check(make_layer(), x)
    check(make_layer(**options), x)
    check(make_layer(norm_eps=0.5), x)


def test_with_and_without_gradients():
    layer, x = make_layer(), torch.randn(5, 16)
    with torch.no_grad():
        expected = layer(x)
    check(layer, x)
    layer.k.requires_grad_(False)
    check(layer, x)
    torch.testing.assert_close(layer(x), expected)
    with torch.inference_mode():
        torch.testing.assert_close(layer(x), expected)


def inputs(T: int = 5, **changes) -> list[torch.Tensor]:
    shapes = {"q": (T, 2, 8), "k": (1, 2, 6, 8), "u": (1, 2, 6, 8), "v": (1, 2, 6, 8), "gate": (T, 2, 2)}
    return [torch.randn(shape) for shape in (shapes | changes).values()]


def compare(*given: torch.Tensor) -> None:
    torch.testing.assert_close(flash_mhf(*given), flash_mhf(*given, backend="reference"), rtol=1e-3, atol=1e-3)


def test_alignment_is_part_of_the_key():
    compare(*inputs())
    before = len(call_cache._cache)
    for _ in range(2):
        q, *rest = inputs()
        shifted = torch.randn(q.numel() + 1)[1:].view(q.shape)
        assert shifted.stride() == q.stride()
        compare(shifted, *rest)
    assert len(call_cache._cache) == before + 2  # one per backend


def test_a_gate_of_another_dtype():
    q, k, u, v, gate = inputs()
    compare(q, k, u, v, gate)
    compare(q, k, u, v, gate.half())
    compare(q, k, u, v, gate)


def test_a_tensor_passed_twice_is_not_recorded():
    for _ in range(2):
        q, k, _, _, gate = inputs()
        compare(q, k, k, k, gate)
    assert not cached_launches()  # the pointers cannot be distinguished
    for _ in range(3):
        compare(*inputs())
    assert len(cached_launches()) == 2
    q, k, _, _, gate = inputs()
    compare(q, k, k, k, gate)


def test_copies_are_replayed():
    strided = torch.randn(1, 2, 8, 6)
    for _ in range(3):
        q, k, _, v, gate = inputs()
        compare(q, k, strided.normal_().transpose(-1, -2), v, gate)


def test_precision_and_determinism_are_part_of_the_key():
    given = inputs()
    flash_mhf(*given)
    torch.set_float32_matmul_precision("high")
    try:
        flash_mhf(*given)
    finally:
        torch.set_float32_matmul_precision("highest")
    torch.use_deterministic_algorithms(True)
    try:
        flash_mhf(*given)
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(call_cache._cache) == 3
    named = [dict(zip(launch.kernel.arg_names, launch.arguments, strict=True)) for launch in cached_launches()]
    precisions = [arguments["PRECISION"] for arguments in named if "PRECISION" in arguments]
    assert sorted(precisions) == ["ieee", "ieee", "tf32"]


def test_no_tensor_is_kept_alive():
    given = inputs()
    references = [weakref.ref(x) for x in [*given, flash_mhf(*given)]]
    assert len(cached_launches()) == 2
    del given
    gc.collect()
    assert not [reference for reference in references if reference() is not None]


def test_the_cache_is_bounded(monkeypatch):
    monkeypatch.setattr(call_cache, "MAX_CACHED_CALLS", 3)
    for T in (*range(1, 8), 1, 2):
        flash_mhf(*inputs(T))
        assert 1 <= len(call_cache._cache) <= 3


def test_threads_do_not_interfere(monkeypatch):
    failures, one_at_a_time, start = [], threading.Lock(), Launch.start

    def start_alone(launch: Launch) -> None:
        with one_at_a_time:  # Triton's interpreter is not thread-safe
            start(launch)

    monkeypatch.setattr(Launch, "start", start_alone)

    def work(T: int) -> None:
        try:
            for i in range(6):
                compare(*inputs(T + i % 2))
        except Exception as error:  # exceptions in a thread are not propagated
            failures.append(error)

    threads = [threading.Thread(target=work, args=(1 + i % 3,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_a_failed_launch_ends_the_recording(monkeypatch):
    monkeypatch.setattr(Launch, "start", lambda launch: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        flash_mhf(*inputs())
    assert recording.recorder() is None
    assert not cached_launches()


def test_an_invalid_call_raises_every_time():
    q, k, u, v, gate = inputs()
    for _ in range(2):
        with pytest.raises(ValueError, match="gate: expected shape"):
            flash_mhf(q, k, u, v, gate[:, :1])
    compare(q, k, u, v, gate)
    with pytest.raises(ValueError, match="k: expected q's device cpu, got meta"):
        flash_mhf(q, torch.empty(k.shape, device="meta"), u, v, gate)


def test_tracing_leaves_no_entry():
    torch._dynamo.reset()
    weights = [torch.randn(1, 2, 6, 8) for _ in range(3)]
    compiled = torch.compile(gated_mhf, fullgraph=True, backend="aot_eager", dynamic=True)
    for T in (3, 4, 5, 6):
        q = torch.randn(T, 2, 8)
        torch.testing.assert_close(compiled(q, *weights), gated_mhf(q, *weights))
    sizes = [size for key in call_cache._cache for part in key if isinstance(part, tuple) for size in part]
    assert sizes
    assert not any(isinstance(size, torch.SymInt) for size in sizes)
    call_cache.clear()
    flash_mhf(*(x.to("meta") for x in inputs()))
    assert not call_cache._cache
