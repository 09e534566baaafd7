"""The Hopper backward kernels on the emulator: fused, with split tokens, deterministic; and broken variants."""

import pytest

pytest.importorskip("triton")

import torch
from problems import NAMES, Shape, assert_within_budget, eager_results, exact_results, make_inputs

from flashmhf.ops.flash_mhf import flash_mhf
from flashmhf.ops.hopper import backend as backend_module
from flashmhf.ops.hopper import backward as backward_module
from flashmhf.ops.hopper import backward_dq as dq_module
from flashmhf.ops.hopper import splits as splits_module
from flashmhf.ops.hopper import tiles
from flashmhf.ops.tensors import Gradients, Inputs
from gluon.emulator import emulate
from gluon.hopper_backend import DTYPES, HOOKS, SHAPES, caught, emulate_hopper, results, within_budget
from gluon.mutants import mutated


@pytest.mark.parametrize("wanted", ["q", "k", "u", "v", "gate", "k gate", "q v", "q gate"])
def test_only_the_gradients_that_are_needed(wanted, monkeypatch):
    emulate_hopper(monkeypatch)
    monkeypatch.setattr(backend_module, "portable_backward", None)
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


@pytest.fixture
def deterministic():
    """torch's deterministic algorithms, under which torch.empty returns NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("gate", [True, False], ids=["gate", "no_gate"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_deterministic_gradients(shape, dtype, gate, monkeypatch, deterministic):
    emulate_hopper(monkeypatch)
    monkeypatch.setattr(backend_module, "portable_backward", None)
    within_budget(make_inputs(shape, dtype, gate))


def test_deterministic_gradients_are_the_same_bits_in_every_interleaving(monkeypatch, deterministic):
    emulate_hopper(monkeypatch)
    monkeypatch.setitem(HOOKS, "tanh", lambda x: type(x)(torch.tanh(x.data), x.layout))
    inputs = make_inputs(Shape((300,), 4, 2, 3, 70, 64), torch.bfloat16)
    first, second = results(inputs), results(inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_many_interleavings_of_the_deterministic_backward(seed, monkeypatch, deterministic):
    emulate_hopper(monkeypatch)
    within_budget(make_inputs(Shape((300,), 2, 1, 3, 150, 64), torch.bfloat16, seed=seed))


def test_head_dim_256_uses_the_portable_backward(monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("the portable kernels, on the CPU")
    emulate_hopper(monkeypatch)
    monkeypatch.setattr(backend_module, "fused_backward", None)
    monkeypatch.setattr(backend_module, "backward_dq", None)
    within_budget(make_inputs(Shape((20,), 2, 1, 1, 20, 256), torch.float16))


@pytest.mark.parametrize("splits", [2, 3, 6])
@pytest.mark.parametrize("shape", [Shape((300,), 4, 2, 2, 100, 64), Shape((700,), 2, 2, 1, 65, 96)], ids=str)
def test_tokens_split_over_programs(shape, splits, monkeypatch):
    """Splits with equal and unequal numbers of tiles, and splits that start in a later head of their group."""
    emulate_hopper(monkeypatch)
    tile = tiles.backward_tile(shape.D)._replace(split_tokens=True)
    monkeypatch.setattr(tiles, "BACKWARD", (tile, tile, None))
    monkeypatch.setattr(splits_module, "num_splits_heuristic", lambda *sizes: splits)
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


def test_weight_gradients_are_the_same_bits_in_every_interleaving(monkeypatch):
    emulate_hopper(monkeypatch)
    monkeypatch.setitem(HOOKS, "tanh", lambda x: type(x)(torch.tanh(x.data), x.layout))
    inputs = make_inputs(Shape((300,), 2, 1, 2, 70, 64), torch.bfloat16)
    first, second = results(inputs), results(inputs)
    for name, a, b in zip(NAMES, first, second, strict=True):
        assert torch.equal(a, b) or name in ("dq", "dgate"), name


# Changes of one line that the emulator must report.
BACKWARD_MUTATIONS = {
    "S and dA are used in flight": ("num_outstanding=2, deps=[scores, da]", "num_outstanding=3, deps=[scores, da]"),
    "the first tile is released": ("release(empty, prev, STAGES, i > 0)", "release(empty, prev, STAGES)"),
    "Q and dO are released early": ("release(empty, prev, STAGES, i > 0)", "release(empty, i, STAGES)"),
    "P is stored without a fence": (
        "s_dmn.index(opaque_zero(i)).store(join_columns(dm, dn, mn_layout))\n    fence_async_shared()",
        "s_dmn.index(opaque_zero(i)).store(join_columns(dm, dn, mn_layout))",
    ),
    "P is overwritten in flight": (
        "dv, dku = warpgroup_mma_wait(num_outstanding=0, deps=[dv, dku])\n        dv = ",
        "dv, dku = warpgroup_mma_wait(num_outstanding=2, deps=[dv, dku])\n        dv = ",
    ),
}


DQ_KERNEL_MUTATIONS = {
    "S and dA are used in flight": ("num_outstanding=2 if NEEDS_DQ", "num_outstanding=3 if NEEDS_DQ"),
    "K and U are released early": ("release(empty, prev, STAGES, i > 0)", "release(empty, i, STAGES)"),
    "the first tile is released twice": ("release(empty, prev, STAGES, i > 0)", "release(empty, prev, STAGES)"),
    "dQ of the previous tile may still read K": (
        "dq = warpgroup_mma_init(warpgroup_mma_wait(num_outstanding=0, deps=[dq]))\n        release",
        "dq = warpgroup_mma_init(warpgroup_mma_wait(num_outstanding=1, deps=[dq]))\n        release",
    ),
    "V is read before it has arrived": ("wait_full(v_full, i, STAGES)", "wait_full(v_full, 0, STAGES)"),
    "dO is not waited for": ("q_full = allocate_barriers(2, 2)", "q_full = allocate_barriers(2, 1)"),
    "dQ is stored without a fence": ("    fence_async_shared()\n        tma", "    tma"),
}
# Changes that break no rule of the machine but give wrong results.
DQ_KERNEL_ERRORS = {
    "unchanged": None,
    "dgate is not reset for the next sub-network": ("gl.where(last, 0.0, dgate)", "dgate"),
    "dgate is stored at another tile": ("last = f + BLOCK_F >= F", "last = f + BLOCK_F < F"),
    "the gate of another sub-network": ("gate_ptrs + e.to(gl.int64) *", "gate_ptrs + 0 * e.to(gl.int64) *"),
    "rows of another sub-network": ("gl.where(f < F, e, e + 1)", "gl.where(f < F, e, e)"),
    "U in K's place": ("s_pair.slice(BLOCK_F, BLOCK_F)", "s_pair.slice(0, BLOCK_F)"),
    "the last tile is left out": ("issue_dq(dm, dn, s_ku, dq, tiles - 1", "issue_dq(dm * 0.0, dn, s_ku, dq, tiles - 1"),
}
# Changes that add dQ to the wrong place: no rule of the machine forbids them, but the results are wrong.
DQ_ACCUM_MUTATIONS = {
    "fragments": {
        "unchanged": None,
        "columns in their own order": ("columns *= 2", "columns *= 1"),
        "the next columns eight rows too near": ("(16 if FRAGMENTS else 1)", "(8 if FRAGMENTS else 1)"),
        "rows twice as near": ("rows % 8 * 16", "rows % 8 * 8"),
        "the next 16 rows too near": ("rows // 16 * (16 *", "rows // 16 * (8 *"),
        "half of the head before": ("head *= BLOCK_T", "head *= BLOCK_T // 2"),
        "a thread's values in another order": ("{$8, $9, $10, $11}", "{$8, $10, $9, $11}"),
        "the address of the second value": ("[$4], {$8", "[$5], {$8"),
        "two of four values": ("add.v4.f32 [$4], {$8, $9, $10, $11}", "add.v2.f32 [$4], {$8, $9}"),
        "packs of two": ("pack=4", "pack=2"),
    },
    "rows": {
        "unchanged": None,
        "a pair the wrong way round": ("{$4, $5}", "{$5, $4}"),
        "the next columns at the wrong place": ("(16 if FRAGMENTS else 1)", "(16 if FRAGMENTS else 2)"),
    },
    "tma": {
        "unchanged": None,
        "another head's": ("tma_reduce_add(dq_desc, [t, head, 0]", "tma_reduce_add(dq_desc, [t, 0, 0]"),
        "a tile is reduced without a fence": ("    fence_async_shared()\n    tma_reduce_add", "    tma_reduce_add"),
        "the previous tile may still be in flight": (
            "tma.store_wait(pendings=0)  # the previous tile",
            "tma.store_wait(pendings=1)  # the previous tile",
        ),
        "the last tile is not waited for": ("    if ACCUM_DQ and BY_TMA:\n        tma.store_wait(pendings=0)\n", ""),
    },
}


@pytest.mark.parametrize("change", BACKWARD_MUTATIONS.values(), ids=BACKWARD_MUTATIONS.keys())
def test_a_broken_backward_is_caught(change):
    launch, _ = backward_launch(make_inputs(Shape((900,), 1, 1, 1, 64, 64), torch.bfloat16), tiles.backward_tile(64))
    assert caught(launch.kernel, launch, change)


def dq_launch(inputs: list):
    """The launch of the dQ kernel, and the tensors that it writes."""
    q, k, u, v, gate, dout = inputs
    dq, dgate = (torch.full_like(x, torch.nan) for x in (q, gate))
    grads = Gradients(dq, None, None, None, dgate)
    return dq_module.plan_backward_dq(dout, Inputs(q, k, u, v, gate), grads), dq, dgate


@pytest.mark.parametrize("change", DQ_KERNEL_MUTATIONS.values(), ids=DQ_KERNEL_MUTATIONS.keys())
def test_a_broken_dq_kernel_is_caught(change):
    launch, *_ = dq_launch(make_inputs(Shape((130,), 1, 1, 3, 250, 64), torch.bfloat16))
    assert caught(launch.kernel, launch, change)


@pytest.mark.parametrize("change", DQ_KERNEL_ERRORS.values(), ids=DQ_KERNEL_ERRORS.keys())
def test_a_wrong_dq_kernel_is_noticed(change):
    inputs = make_inputs(Shape((130,), 2, 1, 2, 100, 96), torch.bfloat16)
    launch, *written = dq_launch(inputs)
    kernel = launch.kernel if change is None else mutated(launch.kernel, *change)
    emulate(kernel, launch.grid, launch.arguments, num_warps=launch.num_warps, hooks=HOOKS)
    exact, eager = exact_results(inputs), eager_results(inputs)
    wrong = False
    for index, mine in zip((1, 5), written, strict=True):
        try:
            assert_within_budget(NAMES[index], mine, eager[index], exact[index], precision=torch.bfloat16)
        except AssertionError:
            wrong = True
    assert wrong == (change is not None)


def backward_launch(inputs: list, tile: tiles.BackwardTile):
    """The launch of the fused backward, and its dQ accumulator."""
    q, k, u, v, gate, dout = inputs
    weights = [torch.empty_like(x) for x in (k, u, v)]
    dq_accum = backward_module.allocate_dq_accum(q, tile)
    grads = Gradients(dq_accum, *weights, torch.zeros_like(gate))
    return backward_module.plan_backward(dout, Inputs(q, k, u, v, gate), grads, tile), dq_accum


@pytest.mark.parametrize(
    ("dq", "change"),
    [(dq, change) for dq, changes in DQ_ACCUM_MUTATIONS.items() for change in changes.values()],
    ids=[f"{dq}, {name}" for dq, changes in DQ_ACCUM_MUTATIONS.items() for name in changes],
)
def test_dq_is_accumulated_in_the_right_place(dq, change):
    inputs = make_inputs(Shape((150,), 2, 1, 1, 70, 56 if dq == "tma" else 96), torch.bfloat16)
    tile = tiles.backward_tile(inputs[0].shape[-1])._replace(dq=dq)
    launch, dq_accum = backward_launch(inputs, tile)
    kernel = launch.kernel if change is None else mutated(launch.kernel, *change)
    try:
        emulate(kernel, launch.grid, launch.arguments, num_warps=launch.num_warps, hooks=HOOKS)
        dq = backward_module.convert_dq(dq_accum, inputs[0], tile)
        assert dq.is_contiguous()
        exact, eager = (results(inputs)[1] for results in (exact_results, eager_results))
        assert_within_budget("dq", dq, eager, exact, precision=torch.bfloat16)
        wrong = False
    except AssertionError:
        wrong = True
    assert wrong == (change is not None)
