"""The Hopper kernels' own source under the emulator: numerics, schedules, and what happens when one line is wrong."""

import dataclasses

import pytest

pytest.importorskip("triton")

import torch
from emulated_hopper import HOOKS, emulate_hopper
from gluon_emulator import EmulationError, emulate
from gluon_mutants import mutated
from problems import NAMES, Shape, assert_within_budget, eager_results, exact_results, make_inputs

from flashmhf.ops import backends
from flashmhf.ops.flash_mhf import flash_mhf
from flashmhf.ops.hopper import backward as backward_module
from flashmhf.ops.hopper import forward as forward_module
from flashmhf.ops.hopper import splits as splits_module
from flashmhf.ops.hopper import tiles
from flashmhf.ops.hopper.launch import for_tma
from flashmhf.ops.problem import Problem

SHAPES = [
    Shape((1,), 1, 1, 1, 1, 64),
    Shape((200,), 4, 2, 2, 100, 64),
    Shape((3, 50), 2, 1, 3, 40, 96),
    Shape((130,), 1, 1, 2, 384, 128),
    Shape((260,), 2, 2, 1, 65, 24),
]
DTYPES = (torch.bfloat16, torch.float16)


def results(inputs: list) -> list:
    *arguments, dout = inputs
    leaves = [None if x is None else x.detach().requires_grad_() for x in arguments]
    out = flash_mhf(*leaves, backend="hopper")
    return [out.detach(), *torch.autograd.grad(out, [x for x in leaves if x is not None], dout)]


def within_budget(inputs: list) -> None:
    for name, mine, eager, exact in zip(
        NAMES, results(inputs), eager_results(inputs), exact_results(inputs), strict=False
    ):
        assert_within_budget(name, mine, eager, exact, precision=inputs[0].dtype)


@pytest.mark.parametrize("gate", [True, False], ids=["gate", "no_gate"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_gradients(shape, dtype, gate, monkeypatch):
    emulate_hopper(monkeypatch)
    within_budget(make_inputs(shape, dtype, gate))


def test_forward_at_head_dim_256(monkeypatch):
    emulate_hopper(monkeypatch)
    inputs = make_inputs(Shape((70,), 2, 1, 2, 50, 256), torch.bfloat16)
    out = flash_mhf(*inputs[:5], backend="hopper")
    assert_within_budget("out", out, eager_results(inputs)[0], exact_results(inputs)[0], precision=torch.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_many_interleavings(seed, monkeypatch):
    emulate_hopper(monkeypatch)
    within_budget(make_inputs(Shape((700,), 2, 1, 3, 150, 64), torch.bfloat16, seed=seed))


def test_strides(monkeypatch):
    emulate_hopper(monkeypatch)
    q, k, u, v, gate, dout = make_inputs(Shape((3, 40), 2, 2, 2, 20, 64), torch.float16)
    for layout in (
        lambda x: torch.cat([x[:, :1], x, x[:, :1]], 1)[:, 1:-1],
        lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        lambda x: x.repeat_interleave(2, -1)[..., ::2],
        lambda x: x[:1, :1].expand(x.shape),
    ):
        within_budget([layout(q), k, u, v, layout(gate), layout(dout)])
    within_budget([q, k.mT.contiguous().mT, u, v[..., :].clone(), gate.half(), dout])


@pytest.mark.parametrize("wanted", ["q", "k", "u", "v", "gate", "k gate", "q v"])
def test_only_the_gradients_that_are_needed(wanted, monkeypatch):
    emulate_hopper(monkeypatch)
    tokens_alone = not set(wanted.split()) & {"k", "u", "v"}
    if tokens_alone and torch.cuda.is_available():
        pytest.skip("the portable kernels, on the CPU")
    inputs = make_inputs(Shape((70,), 4, 2, 2, 20, 64), torch.float16)
    named = dict(zip(("q", "k", "u", "v", "gate"), inputs[:5], strict=True))
    for name in wanted.split():
        named[name].requires_grad_()
    flash_mhf(**named, backend="hopper").backward(inputs[5])
    eager = dict(zip(NAMES, eager_results([x.detach() for x in inputs]), strict=True))
    exact = dict(zip(NAMES, exact_results([x.detach() for x in inputs]), strict=True))
    for name, tensor in named.items():
        assert (tensor.grad is not None) == (name in wanted.split())
        if tensor.grad is not None:
            assert_within_budget(name, tensor.grad, eager[f"d{name}"], exact[f"d{name}"], precision=torch.float16)


def test_deterministic_algorithms_take_the_portable_backward(monkeypatch):
    emulate_hopper(monkeypatch)
    monkeypatch.setattr(backward_module, "plan_backward", None)
    inputs = make_inputs(Shape((20,), 2, 1, 2, 20, 64), torch.float16)
    torch.use_deterministic_algorithms(True)
    try:
        first, second = results(inputs), results(inputs)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first[1:], second[1:], strict=True))


def test_what_is_not_finite_stays_in_its_row(monkeypatch):
    emulate_hopper(monkeypatch)
    q, k, u, v, gate, _ = make_inputs(Shape((150,), 2, 2, 2, 20, 96), torch.bfloat16)
    monkeypatch.setitem(HOOKS, "tanh", lambda x: type(x)(torch.tanh(x.data), x.layout))
    clean = flash_mhf(q, k, u, v, gate, backend="hopper")
    q[3, 1, 5] = float("inf")
    q[66, 0, 2] = float("nan")
    dirty = flash_mhf(q, k, u, v, gate, backend="hopper")
    spoiled = torch.zeros(150, 2, dtype=torch.bool)
    spoiled[3, 1] = spoiled[66, 0] = True
    assert not dirty[spoiled].isfinite().any(1).all()
    assert torch.equal(dirty[~spoiled], clean[~spoiled])


def test_no_tokens(monkeypatch):
    emulate_hopper(monkeypatch)
    inputs = make_inputs(Shape((0,), 2, 1, 2, 20, 64), torch.bfloat16)
    for mine, exact in zip(results(inputs), exact_results(inputs), strict=True):
        assert torch.equal(mine.double(), exact)


@pytest.mark.parametrize("splits", [2, 3, 6])
@pytest.mark.parametrize("shape", [Shape((300,), 4, 2, 2, 100, 64), Shape((700,), 2, 2, 1, 65, 96)], ids=str)
def test_tokens_split_over_programs(shape, splits, monkeypatch):
    """Splits with as many tiles, with fewer, and beginning in another head than the first of their group."""
    emulate_hopper(monkeypatch)
    tile = tiles.backward_tile(shape.D)._replace(splits_tokens=True)
    monkeypatch.setattr(tiles, "BACKWARD", (tile, tile, None))
    monkeypatch.setattr(splits_module, "token_splits", lambda programs, tiles, size: splits)
    monkeypatch.setitem(HOOKS, "tanh", lambda x: type(x)(torch.tanh(x.data), x.layout))
    combined = []
    plan = backward_module.plan_combine
    monkeypatch.setattr(
        backward_module, "plan_combine", lambda sums, out: combined.append(len(sums)) or plan(sums, out)
    )
    inputs = make_inputs(shape, torch.bfloat16)
    within_budget(inputs)
    assert len(combined) == 3
    first, second = results(inputs), results(inputs)
    for name, a, b in zip(NAMES, first, second, strict=True):
        assert torch.equal(a, b) or name in ("dq", "dgate"), name


def test_weights_gradients_keep_their_bits_whatever_the_interleaving(monkeypatch):
    emulate_hopper(monkeypatch)
    monkeypatch.setitem(HOOKS, "tanh", lambda x: type(x)(torch.tanh(x.data), x.layout))
    inputs = make_inputs(Shape((300,), 2, 1, 2, 70, 64), torch.bfloat16)
    first, second = results(inputs), results(inputs)
    for name, a, b in zip(NAMES, first, second, strict=True):
        assert torch.equal(a, b) or name in ("dq", "dgate"), name


# Where a line of the forward or the backward is changed, and what the emulator must say of it.
FORWARD_MUTATIONS = {
    "P V of the tile before may still read V": (
        "release(v_empty, i - 1, STAGES)",
        "release(v_empty, i, STAGES)",
    ),
    "S is used in flight": ("num_outstanding=1, deps=[scores]", "num_outstanding=2, deps=[scores]"),
    "V is read before it has arrived": ("wait_full(v_full, i - 1, STAGES)", "wait_full(v_full, 0, STAGES)"),
    "another tile of K and U is released": (
        "release(ku_empty, i, STAGES)\n        p = activate",
        "release(ku_empty, i + 1, STAGES)\n        p = activate",
    ),
    "the output leaves without a fence": ("    fence_async_shared()\n    tma", "    tma"),
}
BACKWARD_MUTATIONS = {
    "S and dA are used in flight": ("num_outstanding=2, deps=[scores, da]", "num_outstanding=3, deps=[scores, da]"),
    "the first tile is released": ("release(empty, before, STAGES, i > 0)", "release(empty, before, STAGES)"),
    "Q and dO are released early": ("release(empty, before, STAGES, i > 0)", "release(empty, i, STAGES)"),
    "P is shared without a fence": (
        "s_dmn.index(zero(i)).store(side_by_side(dm, dn, pair))\n    fence_async_shared()",
        "s_dmn.index(zero(i)).store(side_by_side(dm, dn, pair))",
    ),
    "P is overwritten in flight": (
        "dv, dku = warpgroup_mma_wait(num_outstanding=0, deps=[dv, dku])\n        dv = ",
        "dv, dku = warpgroup_mma_wait(num_outstanding=2, deps=[dv, dku])\n        dv = ",
    ),
}


# Where dQ would be added to the wrong place, or something else to it. The emulator cannot know, but the sums are wrong.
DQ_MUTATIONS = {
    "fragments, unchanged": None,
    "columns in their own order": ("columns *= 2", "columns *= 1"),
    "the next columns eight rows too near": ("(16 if FRAGMENTS else 1)", "(8 if FRAGMENTS else 1)"),
    "rows twice as near": ("rows % 8 * 16", "rows % 8 * 8"),
    "the next 16 rows too near": ("rows // 16 * (16 *", "rows // 16 * (8 *"),
    "half of the head before": ("head *= BLOCK_T", "head *= BLOCK_T // 2"),
    "a thread's values in another order": ("{$8, $9, $10, $11}", "{$8, $10, $9, $11}"),
    "the address of the second value": ("[$4], {$8", "[$5], {$8"),
    "two of four values": ("add.v4.f32 [$4], {$8, $9, $10, $11}", "add.v2.f32 [$4], {$8, $9}"),
    "packs of two": ("pack=4", "pack=2"),
}
DQ_MUTATIONS_BY_ROWS = {
    "rows, unchanged": None,
    "a pair the wrong way round": ("{$4, $5}", "{$5, $4}"),
    "the next columns at the wrong place": ("(16 if FRAGMENTS else 1)", "(16 if FRAGMENTS else 2)"),
}


def caught(kernel, launch, change: tuple[str, str]) -> bool:
    broken = mutated(kernel, *change)
    for seed in range(8):
        try:
            emulate(broken, launch.grid, launch.arguments, num_warps=launch.num_warps, seed=seed, hooks=HOOKS)
        except EmulationError:
            return True
    return False


@pytest.mark.parametrize("change", FORWARD_MUTATIONS.values(), ids=FORWARD_MUTATIONS.keys())
def test_a_broken_forward_is_caught(change):
    q, k, u, v, gate, _ = make_inputs(Shape((130,), 1, 1, 3, 250, 64), torch.bfloat16)
    launch = forward_module.plan_forward(q, k, u, v, gate, torch.empty_like(q))
    assert caught(launch.kernel, launch, change)


@pytest.mark.parametrize("change", BACKWARD_MUTATIONS.values(), ids=BACKWARD_MUTATIONS.keys())
def test_a_broken_backward_is_caught(change):
    launch, _ = backward_launch(make_inputs(Shape((900,), 1, 1, 1, 64, 64), torch.bfloat16), tiles.backward_tile(64))
    assert caught(launch.kernel, launch, change)


def backward_launch(inputs: list, tile: tiles.BackwardTile):
    """The launch of the one-pass backward, and the memory that dQ is added to."""
    q, k, u, v, gate, dout = inputs
    weights = (torch.empty_like(x) for x in (k, u, v))
    added = backward_module.dq_buffer(q, tile)
    dgate = torch.zeros_like(gate)
    return backward_module.plan_backward(dout, q, k, u, v, gate, *weights, added, dgate, tile), added


@pytest.mark.parametrize(
    ("fragments", "change"),
    [*((True, x) for x in DQ_MUTATIONS.values()), *((False, x) for x in DQ_MUTATIONS_BY_ROWS.values())],
    ids=[*DQ_MUTATIONS, *DQ_MUTATIONS_BY_ROWS],
)
def test_dq_in_memory_has_its_order(fragments, change):
    inputs = make_inputs(Shape((150,), 2, 1, 1, 70, 96), torch.bfloat16)
    tile = tiles.backward_tile(96)._replace(dq_fragments=fragments)
    launch, added = backward_launch(inputs, tile)
    kernel = launch.kernel if change is None else mutated(launch.kernel, *change)
    try:
        emulate(kernel, launch.grid, launch.arguments, num_warps=launch.num_warps, hooks=HOOKS)
        dq = backward_module.rounded_dq(added, inputs[0], tile)
        assert dq.is_contiguous()
        exact, eager = (results(inputs)[1] for results in (exact_results, eager_results))
        assert_within_budget("dq", dq, eager, exact, precision=torch.bfloat16)
        wrong = False
    except AssertionError:
        wrong = True
    assert wrong == (change is not None)


def test_what_tma_cannot_address_is_copied():
    x = torch.randn(6, 2, 64, dtype=torch.bfloat16)
    assert for_tma(x) is x
    assert for_tma(x[::2]).data_ptr() == x.data_ptr()
    for odd in (x.transpose(1, 2), x[..., 1:57], x[:1].expand(6, 2, 64), torch.randn(5, 2, 12).bfloat16()[..., :8]):
        copy = for_tma(odd)
        assert copy.is_contiguous()
        assert torch.equal(copy, odd)


def test_why_not(monkeypatch):
    gpu = Problem(3, 2, 2, 1, 4, 64, torch.bfloat16, torch.device("cuda"), has_gate=False)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    (hopper,) = (row for row in backends.BACKENDS if row.name == "hopper")
    assert hopper.why_not(gpu) is None
    assert "has not been measured" in hopper.why_not_auto(gpu)
    for change, reason in (
        ({"dtype": torch.float32}, "runs bfloat16 and float16, got torch.float32"),
        ({"D": 36}, "runs head dims that are multiples of 8, got 36"),
        ({"D": 264}, "runs head dims up to 256, got 264"),
    ):
        assert hopper.why_not(dataclasses.replace(gpu, **change)) == reason
    with monkeypatch.context() as patch:
        patch.setattr(backends, "_triton_version", lambda: "3.5.1")
        assert hopper.why_not(gpu) == "needs Triton 3.6 or later, got 3.5.1"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (10, 0))
    assert hopper.why_not(gpu) == "needs compute capability 9.0, got (10, 0)"


def test_auto_takes_it_where_it_measured_faster(monkeypatch):
    emulate_hopper(monkeypatch)
    inputs = make_inputs(Shape((70,), 1, 1, 1, 20, 64), torch.bfloat16)
    problem = Problem.of(*inputs[:5])
    assert backends.select(problem, "auto").__name__ == "flashmhf.ops.blockwise"
    monkeypatch.setattr(tiles, "FASTER_FROM", {(64, "bfloat16"): 64})
    assert backends.select(problem, "auto").__name__ == "flashmhf.ops.hopper.backend"
    monkeypatch.setattr(tiles, "FASTER_FROM", {(64, "bfloat16"): 128})
    assert backends.select(problem, "auto").__name__ == "flashmhf.ops.blockwise"


def test_a_user_who_names_it_is_warned_once(monkeypatch, caplog):
    emulate_hopper(monkeypatch)
    backends._warn_once.cache_clear()
    problem = Problem.of(*make_inputs(Shape((70,), 1, 1, 1, 20, 64), torch.bfloat16)[:5])
    backends.select(problem, "hopper")
    backends.select(problem, "hopper")
    (record,) = caplog.records
    assert "no GPU has verified" in record.getMessage()
    monkeypatch.setattr(tiles, "VERIFIED", frozenset({(64, "bfloat16")}))
    backends._warn_once.cache_clear()
    backends.select(problem, "hopper")
    assert len(caplog.records) == 1
