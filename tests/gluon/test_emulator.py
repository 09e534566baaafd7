"""The emulator runs a warp-specialised forward correctly, and names the error in each broken variant of it."""

import pytest

pytest.importorskip("triton")

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from gluon.emulator import EmulationError, emulate
from gluon.mutants import mutated

SEEDS = range(5)


@gluon.jit
def producer(k_desc, u_desc, v_desc, sk, su, sv, full, empty, tiles, STAGES: gl.constexpr):
    BLOCK_F: gl.constexpr = k_desc.block_shape[0]
    for tile in range(tiles):
        stage = tile % STAGES
        mbarrier.wait(empty.index(stage), ((tile // STAGES) & 1) ^ 1)
        mbarrier.expect(full.index(stage), 3 * k_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(k_desc, [tile * BLOCK_F, 0], full.index(stage), sk.index(stage))
        tma.async_copy_global_to_shared(u_desc, [tile * BLOCK_F, 0], full.index(stage), su.index(stage))
        tma.async_copy_global_to_shared(v_desc, [tile * BLOCK_F, 0], full.index(stage), sv.index(stage))


@gluon.jit
def silu(x):
    return x / (1.0 + gl.exp2(-1.4426950408889634 * x))


@gluon.jit
def consumer(sq, sk, su, sv, so, full, empty, o_desc, row, tiles, STAGES: gl.constexpr, WARPS: gl.constexpr):
    BLOCK_T: gl.constexpr = sq.shape[0]
    BLOCK_F: gl.constexpr = sk.shape[1]
    BLOCK_D: gl.constexpr = sk.shape[2]
    score: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BLOCK_F, 16])
    out: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BLOCK_D, 16])
    zero = gl.zeros([BLOCK_T, BLOCK_F], gl.float32, score)
    acc = warpgroup_mma_init(gl.zeros([BLOCK_T, BLOCK_D], gl.float32, out))
    for i in range(tiles):
        stage = i % STAGES
        mbarrier.wait(full.index(stage), (i // STAGES) & 1)
        m = warpgroup_mma(sq, sk.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True)
        n = warpgroup_mma(sq, su.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True)
        m, n = warpgroup_mma_wait(num_outstanding=0, deps=[m, n])
        if i > 0:  # P V of the tile before has retired, too
            mbarrier.arrive(empty.index((i - 1) % STAGES), count=1)
        p = gl.convert_layout((silu(m) * n).to(so.dtype), gl.DotOperandLayout(0, out, 2))
        acc = warpgroup_mma(p, sv.index(stage), acc, is_async=True)
    acc = warpgroup_mma_wait(num_outstanding=0, deps=[acc])
    so.store(acc.to(so.dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(o_desc, [row, 0], so)
    tma.store_wait(pendings=0)


@gluon.jit
def forward(q_desc, k_desc, u_desc, v_desc, o_desc, tiles, STAGES: gl.constexpr, WARPS: gl.constexpr):
    BLOCK_T: gl.constexpr = q_desc.block_shape[0]
    BLOCK_F: gl.constexpr = k_desc.block_shape[0]
    BLOCK_D: gl.constexpr = k_desc.block_shape[1]
    sq = gl.allocate_shared_memory(q_desc.dtype, [BLOCK_T, BLOCK_D], q_desc.layout)
    so = gl.allocate_shared_memory(q_desc.dtype, [BLOCK_T, BLOCK_D], q_desc.layout)
    sk = gl.allocate_shared_memory(q_desc.dtype, [STAGES, BLOCK_F, BLOCK_D], k_desc.layout)
    su = gl.allocate_shared_memory(q_desc.dtype, [STAGES, BLOCK_F, BLOCK_D], k_desc.layout)
    sv = gl.allocate_shared_memory(q_desc.dtype, [STAGES, BLOCK_F, BLOCK_D], k_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=1)
    mbarrier.init(ready, count=1)
    row = gl.program_id(0) * BLOCK_T
    mbarrier.expect(ready, q_desc.block_type.nbytes)
    tma.async_copy_global_to_shared(q_desc, [row, 0], ready, sq)
    mbarrier.wait(ready, 0)
    gl.warp_specialize(
        [
            (consumer, (sq, sk, su, sv, so, full, empty, o_desc, row, tiles, STAGES, WARPS)),
            (producer, (k_desc, u_desc, v_desc, sk, su, sv, full, empty, tiles, STAGES)),
        ],
        [1],
        [24],
    )


def descriptor(tensor: torch.Tensor, rows: int, columns: int) -> TensorDescriptor:
    kind = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.float32: gl.float32}[tensor.dtype]
    return TensorDescriptor.from_tensor(
        tensor, [rows, columns], gl.NVMMASharedLayout.get_default_for([rows, columns], kind)
    )


def run_forward(kernel=forward, *, T=100, F=200, D=64, dtype=torch.bfloat16, stages=2, seed=0, **changes):
    q, k, u, v = (torch.randn(n, D).to(dtype) for n in (T, F, F, F))
    out = torch.full((T, D), torch.nan, dtype=dtype)
    block_d = max(64, 2 ** (D - 1).bit_length())
    arguments = {
        "q_desc": descriptor(q, 64, block_d),
        **{f"{name}_desc": descriptor(tensor, 64, block_d) for name, tensor in zip("kuv", (k, u, v), strict=True)},
        "o_desc": descriptor(out, 64, block_d),
        "tiles": -(-F // 64),
        "STAGES": stages,
        "WARPS": 4,
    }
    emulate(kernel, (-(-T // 64),), arguments | changes, seed=seed)
    m = q.double() @ k.double().T
    expected = (torch.nn.functional.silu(m) * (q.double() @ u.double().T)) @ v.double()
    return float((out.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    "size",
    [{}, {"T": 1, "F": 1}, {"T": 64, "F": 64, "stages": 1}, {"T": 130, "F": 513, "D": 40, "stages": 3}, {"D": 128}],
    ids=str,
)
def test_forward_is_correct_in_every_interleaving(size, seed):
    assert run_forward(**size, seed=seed) < 2**-8


def test_forward_in_float16():
    assert run_forward(dtype=torch.float16) < 2**-10


WAIT_FULL = "mbarrier.wait(full.index(stage), (i // STAGES) & 1)"
WAIT_EMPTY = "mbarrier.wait(empty.index(stage), ((tile // STAGES) & 1) ^ 1)"
ARRIVE = """if i > 0:  # P V of the tile before has retired, too
            mbarrier.arrive(empty.index((i - 1) % STAGES), count=1)"""
WAIT_SCORES = "m, n = warpgroup_mma_wait(num_outstanding=0, deps=[m, n])"
IN_FLIGHT = r"an accumulator issued at mutant\d+.py:\d+ is used before a warpgroup_mma_wait returned it"
MUTATIONS = {
    "no wait on full": (
        WAIT_FULL,
        "pass",
        r"race on sk\[0\]: a wgmma reads it|sk\[0\] is uninitialised: a wgmma reads",
    ),
    "wrong phase of full": (WAIT_FULL, WAIT_FULL[:-1] + " ^ 1)", r"race on sk\[0\]|sk\[0\] is uninitialised|deadlock"),
    "no wait on empty": (WAIT_EMPTY, "pass", r"race on s.\[[01]\]: a TMA load writes it|arrivals on full"),
    "wrong phase of empty": (
        WAIT_EMPTY,
        WAIT_EMPTY[:-5] + ")",
        r"deadlock(.|\n)*empty\[0\] for parity 0: it is in phase 0",
    ),
    "arrive before the wgmma has retired": (
        ARRIVE,
        "mbarrier.arrive(empty.index(stage), count=1)",
        r"race on sv\[[01]\]: (a TMA load writes it .*, while a wgmma reads|a wgmma reads it .*, while a TMA load)",
    ),
    "too few bytes": (
        "3 * k_desc",
        "2 * k_desc",
        r"loads bring \d+ bytes more than full\[0\] expects|sv\[0\] is uninitialised",
    ),
    "too many bytes": ("3 * k_desc", "4 * k_desc", r"deadlock(.|\n)*full\[0\] .* 0 of 1 arrivals and 8192 bytes"),
    "no fence": ("    fence_async_shared()\n", "", r"no fence_async_shared on so: a TMA store reads it"),
    "no wait for an accumulator": (WAIT_SCORES, "n = warpgroup_mma_wait(num_outstanding=0, deps=[n])", IN_FLIGHT),
    "a wait that leaves it in flight": (WAIT_SCORES, WAIT_SCORES.replace("=0", "=1"), IN_FLIGHT),
    "accumulator of the tile before": (
        "acc = warpgroup_mma(p",
        "_ = warpgroup_mma(p",
        "this accumulator was already consumed",
    ),
    "one tile too few": (
        "for tile in range(tiles)",
        "for tile in range(tiles - 1)",
        r"deadlock(.|\n)*default at mutant\d+.py:\d+ waits on full\[1\] for parity 1: it is in phase 1, 1 of 1",
    ),
    "one tile too many": (
        "for tile in range(tiles)",
        "for tile in range(tiles + 1)",
        r"the kernel ends with a TMA load onto full\[0\] that no wait has seen",
    ),
    "two tiles too many": (
        "for tile in range(tiles)",
        "for tile in range(tiles + 2)",
        r"deadlock(.|\n)*producer#1 at mutant\d+.py:\d+ waits on empty\[1\] for parity 1: it is in phase 1",
    ),
    "no wait for the output": (
        "tma.store_wait(pendings=0)",
        "pass",
        r"ends with a TMA store of mutant\d+.py:\d+ in flight",
    ),
    "stage out of range": ("stage = i % STAGES", "stage = i", "full has no index 2, only 2"),
    "barrier not initialised": ("mbarrier.init(ready, count=1)", "pass", "ready is not an initialised mbarrier"),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutations_are_caught(name):
    old, new, message = MUTATIONS[name]
    kernel = mutated(forward, old, new)
    for seed in SEEDS:
        with pytest.raises(EmulationError, match=message):
            run_forward(kernel, seed=seed)


def test_a_pipeline_of_one_stage_deadlocks():
    """A stage is released only while the next tile is being processed."""
    with pytest.raises(EmulationError, match=r"deadlock(.|\n)*waits on full\[0\](.|\n)*waits on empty\[0\]"):
        run_forward(stages=1)
