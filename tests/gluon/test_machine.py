"""The emulated machine: mbarriers, TMA stores and reductions, and ordering between partitions."""

import pytest

pytest.importorskip("triton")

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from gluon.emulator import EmulationError, emulate, tma_reduce_add
from gluon.machine import RUNNING, Barrier, Machine
from gluon.mutants import mutated

SEEDS = range(5)


@builtin
def reduce_add(desc, coord, smem, _semantic=None):
    raise NotImplementedError("a hook stands in for it")


@gluon.jit
def scatter(x_ptr, store_desc, sum_desc, BLOCK: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    rows = gl.arange(0, BLOCK, layout=gl.SliceLayout(1, layout))
    columns = gl.arange(0, BLOCK, layout=gl.SliceLayout(0, layout))
    tile = gl.allocate_shared_memory(gl.float32, [2, BLOCK, BLOCK], store_desc.layout)
    for i in range(3):
        buffer = tile.index(i % 2)
        tma.store_wait(pendings=2)
        buffer.store(gl.load(x_ptr + (i * BLOCK + rows)[:, None] * BLOCK + columns[None, :]))
        fence_async_shared()
        tma.async_copy_shared_to_global(store_desc, [i * BLOCK, 0], buffer)
        reduce_add(sum_desc, [0, 0], buffer)
    tma.store_wait(pendings=0)


@gluon.jit
def writer(tile, ready, LAYOUT: gl.constexpr):
    tile.store(gl.full([64, 64], 3, gl.float32, LAYOUT))
    mbarrier.arrive(ready, count=1)


@gluon.jit
def reader(tile, ready, out_ptr, LAYOUT: gl.constexpr):
    rows = gl.arange(0, 64, layout=gl.SliceLayout(1, LAYOUT))
    mbarrier.wait(ready, 0)
    gl.store(out_ptr + rows, gl.sum(tile.load(LAYOUT), axis=1))


@gluon.jit
def exchange(x_desc, out_ptr):
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    tile = gl.allocate_shared_memory(gl.float32, [64, 64], x_desc.layout)
    ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(ready, count=1)
    gl.warp_specialize([(reader, (tile, ready, out_ptr, layout)), (writer, (tile, ready, layout))], [4], [24])


def descriptor(tensor: torch.Tensor, *box: int) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(tensor, list(box), gl.NVMMASharedLayout.get_default_for(list(box), gl.float32))


def run_scatter(kernel=scatter, rows=96, seed=0):
    x = torch.randn(96, 32)
    copy, total = torch.full((rows, 32), torch.nan), torch.ones(20, 32)
    arguments = {"x_ptr": x, "store_desc": descriptor(copy, 32, 32), "sum_desc": descriptor(total, 32, 32), "BLOCK": 32}
    emulate(kernel, (1,), arguments, seed=seed, hooks={"reduce_add": tma_reduce_add})
    torch.testing.assert_close(copy, x[:rows])
    torch.testing.assert_close(total, 1 + x.view(3, 32, 32).sum(0)[:20])


@pytest.mark.parametrize("seed", SEEDS)
def test_bulk_stores_and_sums_clip_at_the_end(seed):
    run_scatter(rows=70, seed=seed)


SCATTER_MUTATIONS = {
    "no fence": ("[None, :]))\n        fence_async_shared()", "[None, :]))", r"no fence_async_shared on tile\[0\]"),
    "buffer still read": (
        "tma.store_wait(pendings=2)",
        "tma.store_wait(pendings=3)",
        r"race on tile\[0\]: a store writes it \(.*, while a TMA reduction reads it .* is still in flight",
    ),
    "load out of bounds": ("BLOCK + rows)", "BLOCK + rows + 1)", "offsets 2080 to 3103 of a tensor of 3072"),
    "only half is written": ("buffer.store(gl.load", "buffer.slice(0, 16).store(gl.load", r"tile\[0\]\[0:16\] is fp32"),
}


@pytest.mark.parametrize("name", SCATTER_MUTATIONS)
def test_mutations_of_bulk_stores_are_caught(name):
    old, new, message = SCATTER_MUTATIONS[name]
    with pytest.raises(EmulationError, match=message):
        run_scatter(mutated(scatter, old, new))


def run_exchange(kernel=exchange, seed=0):
    out = torch.empty(64)
    emulate(kernel, (1,), {"x_desc": descriptor(torch.randn(64, 64), 64, 64), "out_ptr": out}, seed=seed)
    assert out.tolist() == [192.0] * 64


@pytest.mark.parametrize("seed", SEEDS)
def test_an_mbarrier_orders_two_partitions(seed):
    run_exchange(seed=seed)


LOAD = """
    mbarrier.expect(ready, x_desc.block_type.nbytes)
    tma.async_copy_global_to_shared(x_desc, [0, 0], ready, tile)"""
OTHER_TILE = "\n    tile = gl.allocate_shared_memory(gl.float32, [64, 64], x_desc.layout)"
UNORDERED = "race on tile: .* is not ordered before it|tile is uninitialised"
EXCHANGE_MUTATIONS = {
    "no wait": ("mbarrier.wait(ready, 0)", "pass", UNORDERED),
    "arrives too early": (
        "    tile.store",
        "    mbarrier.arrive(ready, count=1)\n    tile.store",
        UNORDERED + "|arrivals",
    ),
    "a load in between": (
        "mbarrier.init(ready, count=1)",
        "mbarrier.init(ready, count=2)" + LOAD,
        "race on tile: a store writes it .*, while a TMA load writes it .* is still in flight",
    ),
    "a load left behind": (
        "[4], [24])",
        "[4], [24])" + OTHER_TILE + LOAD,
        "a TMA load onto ready that no wait has seen",
    ),
}


@pytest.mark.parametrize("name", EXCHANGE_MUTATIONS)
def test_mutations_of_an_exchange_are_caught(name):
    old, new, message = EXCHANGE_MUTATIONS[name]
    kernel = mutated(exchange, old, new)
    for seed in SEEDS:
        with pytest.raises(EmulationError, match=message):
            run_exchange(kernel, seed=seed)


@pytest.fixture
def barrier():
    """An mbarrier of two arrivals in a program of one partition."""
    RUNNING.append(Machine("", 4, (0, 0, 0), (1, 1, 1)))
    yield Barrier("bar", 2)
    RUNNING.pop()


def test_a_fresh_mbarrier_is_in_phase_0(barrier):
    barrier.wait(1)
    with pytest.raises(EmulationError, match="waits on bar for parity 0: it is in phase 0, 2 of 2 arrivals"):
        barrier.wait(0)


def test_a_phase_ends_with_its_last_arrival(barrier):
    barrier.arrive(1)
    assert (barrier.phase, barrier.pending) == (0, 1)
    barrier.arrive(1)
    assert (barrier.phase, barrier.pending) == (1, 2)
    barrier.wait(0)
    with pytest.raises(EmulationError, match="deadlock"):
        barrier.wait(1)


def test_a_phase_ends_with_its_last_byte(barrier):
    barrier.expect(96)
    barrier.arrive(1)
    barrier.land(64)
    assert barrier.phase == 0
    barrier.land(32)
    assert barrier.phase == 1


def test_too_many_arrivals_and_bytes(barrier):
    with pytest.raises(EmulationError, match="3 arrivals on bar, which expects 2 more of 2"):
        barrier.arrive(3)
    barrier.expect(16)
    barrier.land(32)
    with pytest.raises(EmulationError, match="bar got 16 bytes more than phase 0 expects"):
        barrier.arrive(1)
