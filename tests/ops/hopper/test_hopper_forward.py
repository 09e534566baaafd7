"""The Hopper forward on the emulator: ping-pong, persistence, candidate tiles; and broken variants."""

import dataclasses
from itertools import product

import pytest

pytest.importorskip("triton")

import torch
from problems import Shape, assert_within_budget, eager_results, exact_results, make_inputs

from flashmhf.ops.hopper.forward import plan_forward
from flashmhf.ops.hopper.launch import NUM_SMS
from flashmhf.ops.hopper.tiles import FORWARD_CANDIDATES, forward_tile
from flashmhf.ops.triton.launch import Launch
from gluon import hopper
from gluon.emulator import EmulationError, emulate
from gluon.hopper_backend import HOOKS, caught, start
from gluon.machine import machine
from gluon.mutants import mutated

SHAPES = [
    Shape((1,), 1, 1, 1, 1, 64),
    Shape((200,), 4, 2, 2, 100, 64),
    Shape((150,), 2, 1, 3, 40, 96),
    Shape((130,), 1, 1, 2, 384, 128),
    Shape((260,), 2, 2, 1, 65, 24),
    Shape((70,), 2, 1, 2, 50, 256),
]
PINGPONG = {"pingpong": True}
PERSISTENT = {"persistent": True}
BOTH = PINGPONG | PERSISTENT
OPTIONS = (PINGPONG, PERSISTENT, BOTH, BOTH | {"q_in_registers": False})


def plan(shape: Shape, options: dict, dtype=torch.bfloat16, gate=True, seed=0, programs=None) -> tuple[Launch, list]:
    """The launch for a shape with some options changed, on at most `programs` programs, and its inputs."""
    inputs = make_inputs(shape, dtype, gate, seed)
    stages = 2 if options.get("persistent") else forward_tile(shape.D).stages
    tile = forward_tile(shape.D)._replace(**{"stages": stages} | options)
    launch = plan_forward(*inputs[:5], torch.full_like(inputs[0], torch.nan), tile)
    return dataclasses.replace(launch, grid=(min(programs or launch.grid[0], launch.grid[0]),)), inputs


def within_budget(launch: Launch, inputs: list) -> None:
    start(launch)
    out = launch.arguments["out_desc"].base
    eager, exact = eager_results(inputs)[0], exact_results(inputs)[0]
    assert_within_budget("out", out, eager, exact, precision=out.dtype)


@pytest.mark.parametrize("gate", [True, False], ids=["gate", "no_gate"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_options(shape, options, gate):
    within_budget(*plan(shape, options, torch.bfloat16 if gate else torch.float16, gate))


@pytest.mark.parametrize("programs", [1, 2, 3, 5, 100])
@pytest.mark.parametrize("shape", [Shape((300,), 4, 2, 2, 100, 64), Shape((129,), 5, 1, 1, 70, 128)], ids=str)
def test_more_work_tiles_than_programs(shape, programs):
    for options, dtype in product(OPTIONS[1:], (torch.bfloat16, torch.float16)):
        within_budget(*plan(shape, options, dtype, programs=programs))


@pytest.mark.parametrize("D", FORWARD_CANDIDATES)
def test_every_tile_that_a_gpu_will_compare(D):
    for tile in FORWARD_CANDIDATES[D]:
        within_budget(*plan(Shape((300,), 2, 1, 2, 140, D), tile._asdict(), programs=2 if tile.persistent else None))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_many_interleavings(options, seed):
    programs = 1 + seed % 4 if options.get("persistent") else None
    within_budget(*plan(Shape((700,), 2, 1, 3, 150, 64), options, seed=seed, programs=programs))


def test_a_persistent_forward_has_one_program_per_sm_or_work_tile():
    for T, programs in ((129, 4), (128 * 66, 132), (128 * 66 + 1, 132), (100_000, 132)):
        q, k = (torch.empty(size, dtype=torch.bfloat16, device="meta") for size in ((T, 2, 64), (1, 2, 40, 64)))
        for persistent in (True, False):
            launch = plan_forward(q, k, k, k, None, q, forward_tile(64)._replace(persistent=persistent))
            assert launch.grid == ((programs,) if persistent else (2 * -(-T // 128),))
    assert NUM_SMS == 132


def alternates(kernel, launch: Launch, seed: int) -> bool:
    """Whether the warpgroups alternate in issuing S and the previous P V, 0 first, except for the last P V."""
    issues: dict[str, list[str]] = {"default": [], "consume#1": []}
    order = []

    def warpgroup_mma(*operands, use_acc=True, **options):
        mine = issues[machine().current.name]
        mine.append("P V" if use_acc else "S")
        if len(mine) % (2 * TILES) != 0:
            order.append((machine().current.name, mine[-1]))
        return hopper.warpgroup_mma(*operands, use_acc=use_acc, **options)

    hooks = HOOKS | {"warpgroup_mma": warpgroup_mma}
    emulate(kernel, launch.grid, launch.arguments, num_warps=launch.num_warps, seed=seed, hooks=hooks)
    first = [(name, "S") for name in issues]
    rest = [(name, product) for name in issues for product in ("S", "P V")]
    return order == (first + rest * (TILES - 1)) * (len(order) // (4 * TILES - 2))


TILES = 5
PINGPONG_SHAPE = Shape((200,), 2, 1, 1, 64 * TILES, 64)


@pytest.mark.parametrize("options", [PINGPONG, BOTH], ids=str)
def test_warpgroups_alternate_with_pingpong(options):
    launch, _ = plan(PINGPONG_SHAPE, options, programs=1 if options.get("persistent") else None)
    assert all(alternates(launch.kernel, launch, seed) for seed in range(10))


def test_warpgroups_do_not_alternate_without_pingpong():
    launch, _ = plan(PINGPONG_SHAPE, {})
    assert not any(alternates(launch.kernel, launch, seed) for seed in range(10))


PARITY = "(i & 1) ^ 1 ^ WARPGROUP"
PINGPONG_MUTATIONS = {
    "warpgroup 1 begins": (PARITY, "(i & 1) ^ WARPGROUP"),
    "both begin": (PARITY, "(i & 1) ^ 1"),
    "nobody begins": (PARITY, "i & 1"),
    "the parity stays": (PARITY, "1 ^ WARPGROUP"),
    "the other's barrier": ("pingpong.index(WARPGROUP)", "pingpong.index(1 - WARPGROUP)"),
    "one's own turn is passed on": ("pingpong.index(1 - WARPGROUP)", "pingpong.index(WARPGROUP)"),
    "the first tile has no turn": ("pingpong_wait(pingpong, first, WARPGROUP)", "pass"),
    "the first turn is kept": (
        "D_LOW, D_HIGH)\n    if PINGPONG:\n        pingpong_arrive",
        "D_LOW, D_HIGH)\n    if False:\n        pingpong_arrive",
    ),
    "no tile has a turn": ("pingpong_wait(pingpong, i, WARPGROUP)", "pass"),
    "a turn is kept": (
        "out)\n        if PINGPONG:\n            pingpong_arrive",
        "out)\n        if False:\n            pingpong_arrive",
    ),
    "a turn is passed on between the products": (
        "out = mma_add(p, as_matrix(s_v.index((i - 1) % STAGES)), out)\n        if PINGPONG:\n"
        "            pingpong_arrive(pingpong, WARPGROUP)",
        "pingpong_arrive(pingpong, WARPGROUP)\n        out = mma_add(p, as_matrix(s_v.index((i - 1) % STAGES)), out)",
    ),
}


@pytest.mark.parametrize("change", PINGPONG_MUTATIONS.values(), ids=PINGPONG_MUTATIONS.keys())
def test_broken_pingpong_is_noticed(change):
    launch, _ = plan(PINGPONG_SHAPE, BOTH, programs=1)
    broken = mutated(launch.kernel, *change)

    def noticed(seed: int) -> bool:
        try:
            return not alternates(broken, launch, seed)
        except EmulationError:
            return True

    assert any(noticed(seed) for seed in range(8))


# Changes of one line that the emulator must report.
MUTATIONS = {
    "P V of the previous tile may still read V": ("release(v_empty, i - 1, STAGES)", "release(v_empty, i, STAGES)"),
    "S is used in flight": ("num_outstanding=1, deps=[scores]", "num_outstanding=2, deps=[scores]"),
    "V is read before it has arrived": ("wait_full(v_full, i, STAGES)", "wait_full(v_full, first, STAGES)"),
    "the first V is read before it has arrived": ("dtype)\n    wait_full(v_full, first, STAGES)", "dtype)"),
    "another tile of K and U is released": (
        "release(ku_empty, i, STAGES)\n        p = activate",
        "release(ku_empty, i + 1, STAGES)\n        p = activate",
    ),
    "the output is stored without a fence": ("        fence_async_shared()\n        tma", "        tma"),
    "Q is read before it has arrived": ("mbarrier.wait(q_full.index(WARPGROUP), n & 1)", "pass"),
}
PERSISTENT_MUTATIONS = {
    "Q is overwritten while products read it": ("mbarrier.wait(q_empty.index(warpgroup), (n & 1) ^ 1)", "pass"),
    "Q's parity stays": ("mbarrier.wait(q_full.index(WARPGROUP), n & 1)", "mbarrier.wait(q_full.index(WARPGROUP), 0)"),
    "Q is released before it is read": ("PERSISTENT and Q_IN_REGISTERS:", "PERSISTENT:"),
    "Q is never released": ("PERSISTENT and not Q_IN_REGISTERS:", "False:"),
    "the output is overwritten while it is stored": ("tma.store_wait(pendings=0)  # of the previous work tile", "pass"),
    "the last V is never released": ("release(v_empty, (n + 1) * tiles - 1, STAGES)", "pass"),
    "the last V is released in use": (
        "out = warpgroup_mma_wait(num_outstanding=0, deps=[out])\n        if PERSISTENT:",
        "release(v_empty, (n + 1) * tiles - 1, STAGES)\n        "
        "out = warpgroup_mma_wait(num_outstanding=0, deps=[out])\n        if False:",
    ),
    "every item's tiles count from 0": ("n * tiles, tiles_f", "0, tiles_f"),
    "the last output is in flight at the end": ("    tma.store_wait(pendings=0)\n\n", "\n"),
}


@pytest.mark.parametrize("change", MUTATIONS.values(), ids=MUTATIONS.keys())
def test_a_broken_forward_is_caught(change):
    launch, _ = plan(Shape((130,), 1, 1, 3, 250, 64), {})
    assert caught(launch.kernel, launch, change)


@pytest.mark.parametrize("name", [*MUTATIONS, *PERSISTENT_MUTATIONS])
def test_a_broken_persistent_forward_is_caught(name):
    launch, _ = plan(Shape((300,), 2, 1, 3, 150, 64), BOTH | {"q_in_registers": False}, programs=2)
    assert caught(launch.kernel, launch, (MUTATIONS | PERSISTENT_MUTATIONS)[name])


def test_a_persistent_forward_that_never_releases_q_is_caught():
    launch, _ = plan(Shape((300,), 2, 1, 3, 150, 64), BOTH, programs=2)
    assert caught(launch.kernel, launch, ("PERSISTENT and Q_IN_REGISTERS:", "False:"))
