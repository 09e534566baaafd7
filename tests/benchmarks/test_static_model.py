"""The static model: clocks and fractions by hand, and against counts by a person who read the SASS."""

import csv
import json

import pytest
import torch
from offline import run

from flashmhf.ops.hopper.tiles import BackwardTile, ForwardTile
from flashmhf.ops.roofline import GPUS
from flashmhf.ops.triton.tiles import Tile
from kernel_table import tile_name
from loop_costs import PROCESSORS, Clocks, loop_clocks
from machine_code import MachineCode
from model_table import SHOWN, measured, measurements, short_table, write_csv
from occupancy import resident_programs
from static_model import ROOT, Loop, cases, predict, tma_bytes, two_kernels

SASS = """
kernel:
        /*0000*/                   MUFU.RCP R0, R0 ;
.L_x_1:
        /*0010*/              @!P0 BRA `(.L_x_3) ;
.L_x_2:
        /*0020*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0030*/                   HGMMA.64x64x16.F32.BF16 R24, R180, gdesc[UR16], R24, gsb0 ;
        /*0040*/                   MUFU.TANH R0, R0 ;
        /*0050*/                   STSM.16.M88.4 [R0], R4 ;
        /*0060*/                   LDS.64 R2, [R0] ;
        /*0070*/                   SHFL.BFLY PT, R0, R0, 0x1, 0x1f ;
        /*0080*/                   LDGSTS.E.BYPASS.128 [R0], desc[UR4][R2.64] ;
        /*0090*/                   LDG.E R0, desc[UR4][R2.64] ;
        /*00a0*/                   REDG.E.ADD.F32x2.FTZ.RN.STRONG.GPU desc[UR4][R2.64], R4 ;
        /*00b0*/                   HMMA.16816.F32.BF16 R8, R4, R2, R8 ;
        /*00c0*/               @P1 BRA `(.L_x_1) ;
        /*00d0*/                   EXIT ;
.L_x_3:
        /*00e0*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R0 ;
        /*00f0*/              @!P0 BRA `(.L_x_3) ;
        /*0100*/                   BRA `(.L_x_2) ;
"""
H100 = PROCESSORS["sm_90a"]
CACHE = 5120 / 132  # bytes per clock and SM


def test_clocks_of_a_small_loop_by_hand():
    """For eight warps; waiting at a barrier costs only the branches to it and back."""
    clocks = loop_clocks(MachineCode.of_sass(SASS), [8], H100, tma_bytes=1280)
    hgmma = 2 * 2 * 64 * (128 + 64) * 16  # two warpgroups
    hmma = 8 * 2 * 16 * 8 * 16
    assert clocks.matrix == pytest.approx(hgmma / 4096 + hmma / (4096 * 0.629))
    assert clocks.special == 8 * 32 / 16
    assert clocks.issue == 13 * 8 / 4
    operands = 2 * ((64 + 128) * 32 + 64 * 32)  # the second product has A in registers
    assert clocks.shared == (operands + 8 * (512 + 32 * 8 + 32 * 4 + 32 * 16) + 1280) / 128
    assert clocks.loads == pytest.approx((8 * (32 * 16 + 32 * 4) + 1280) / CACHE)
    assert clocks.additions == pytest.approx(8 * 32 * 8 / CACHE)


def test_bounds_with_and_without_overlap():
    clocks = Clocks(matrix=10, special=4, issue=6, shared=8, loads=7, additions=2)
    assert (clocks.overlapped, clocks.exposed, clocks.bound) == (10, 10 + 6 + 2, "matrix")
    clocks = clocks._replace(additions=5)
    assert (clocks.overlapped, clocks.exposed, clocks.bound) == (12, 10 + 6 + 5, "L2 cache")


@pytest.mark.parametrize(("target", "gpu", "ghz"), [("sm_90a", "h100", 1.83), ("sm_80", "a100", 1.41)])
def test_rates_are_those_of_the_data_sheets(target, gpu, ghz):
    processor = PROCESSORS[target]
    tflops = processor.count * processor.matrix_flops * ghz / 1e3
    assert tflops == pytest.approx(GPUS[gpu].tflops_16bit, rel=2e-3)


@pytest.mark.parametrize(
    ("warps", "registers", "shared_bytes", "held"),
    [
        (12, 168, 229752, 1),
        (4, 126, 55360, 4),
        (4, 126, 20000, 4),
        (4, 73, 0, 6),
        (4, 32, 1024, 16),
        (1, 32, 0, 32),
        (8, 128, 90000, 2),
    ],
)
def test_occupancy_by_hand(warps, registers, shared_bytes, held):
    assert resident_programs("sm_90a", registers, shared_bytes, warps) == held


def loop(kernel, tile, clocks, target="sm_90a", D=128, held=1) -> Loop:
    return Loop((target, kernel, D, torch.bfloat16, tile), True, Clocks(clocks, 0, 0, 0, 0, 0), held)


def test_fractions_of_peak_follow_from_full_waves():
    """The 370M shape: 8 heads x 7 sub-networks x 6 tiles of rows are 336 programs, three waves of 132."""
    backward = predict(loop("hopper_backward", BackwardTile(128, 64, 2), 4096), "370m", 16384)
    assert (backward.programs, backward.waves) == (336, 3)
    assert backward.overlapped == backward.exposed == pytest.approx(336 / (3 * 132))
    forward = predict(loop("hopper_forward", ForwardTile(64, 64, 4, True), 2 * 1536), "1.3b", 4096)
    assert (forward.programs, forward.waves) == (512, 4)
    assert forward.overlapped == pytest.approx(0.5 * 512 / (4 * 132))
    shared = predict(loop("forward", Tile(64, 64, 4, 2), 768, held=3), "1.3b", 4096)
    assert (shared.programs, shared.waves) == (1024, 3)
    assert shared.overlapped == pytest.approx(1024 / (8 * 132))


def test_two_kernels_compute_eleven_products_of_which_eight_count():
    """At peak both kernels take the time of eleven products for the algorithm's eight."""
    tokens, weights = (
        predict(loop(kernel, Tile(64, 64, 8, 2), products * 256), "1.3b", 65536)
        for kernel, products in (("backward_dq", 5), ("backward_dkuv", 6))
    )
    both = two_kernels(tokens, weights)
    assert both.overlapped == pytest.approx(8 / (5 / tokens.overlapped + 6 / weights.overlapped))
    assert both.overlapped == pytest.approx(8 / 11, rel=0.02)


def line(**changes) -> dict:
    tile = ForwardTile(64, 64, 4, True)._asdict()
    values = {"device": "NVIDIA H100 80GB HBM3", "backend": "hopper", "kernel": "forward", "D": 128, "tile": tile}
    values |= {"dtype": "bfloat16", "shape": "1.3b", "tokens": 4096, "ratio_to_cublas": 0.5}
    return values | changes


def test_a_prediction_finds_the_measurement_of_its_kernel_tile_and_shape(tmp_path):
    row = predict(loop("hopper_forward", ForwardTile(64, 64, 4, True), 1536), "1.3b", 4096)
    others = [
        {"device": "NVIDIA A100"}, {"backend": "triton"}, {"kernel": "backward"}, {"D": 64}, {"dtype": "float16"},
        {"shape": "370m"}, {"tokens": 16384}, {"tile": ForwardTile(64, 64, 4)._asdict()},
    ]  # fmt: skip
    (tmp_path / "h100").mkdir()
    (tmp_path / "h100/rows.jsonl").write_text("\n".join(json.dumps(line(**other)) for other in others))
    assert measured(row, measurements(tmp_path)) is None
    assert measured(row, [line(ratio_to_cublas=0.4), line(), line(state="done", shape="370m")]) == 0.5
    portable = predict(loop("forward", Tile(128, 64, 8, 2), 1536), "1.3b", 4096)
    assert measured(portable, [line(backend="triton", tile=None)]) == 0.5


def test_predictions_far_from_their_measurement_are_flagged(tmp_path):
    row = predict(loop("hopper_forward", ForwardTile(64, 64, 4, True), 1536), "1.3b", 16384)
    assert [row._replace(measured=row.overlapped * part).flag for part in (1, 0.86, 0.84, 1.16)] == [
        "", "", "differs by -16%", "differs by +16%",
    ]  # fmt: skip
    flagged = row._replace(measured=row.overlapped / 2)
    assert "| unmeasured |" in short_table([row])
    assert f"| {flagged.measured:.3f} differs by -50% |" in short_table([flagged])
    write_csv([row, flagged], tmp_path / "rows.csv")
    assert (tmp_path / "rows.csv").read_text().count("unmeasured,\n") == 1


def test_the_csv_has_the_rows_of_one_shape(tmp_path):
    rows = [
        predict(loop("hopper_forward", ForwardTile(64, 64, 4, True), 1536), *place) for place in (SHOWN, ("128m", 4096))
    ]
    write_csv(rows, tmp_path / "rows.csv")
    assert len((tmp_path / "rows.csv").read_text().splitlines()) == 2


def test_every_candidate_is_among_the_cases():
    kernels = cases("sm_90a")
    assert len(kernels) == len(set(kernels))
    assert {case[1] for case, _ in kernels} == {
        "forward", "backward_dq", "backward_dkuv", "backward_fused", "hopper_forward", "hopper_backward",
        "hopper_backward_dq",
    }  # fmt: skip
    assert {ships for case, ships in kernels if case[1] == "hopper_forward"} == {True, False}


def test_the_committed_rows_are_those_kernels():
    """Where this fails: python benchmarks/static_model.py."""
    with (ROOT / "docs/static_model.csv").open() as file:
        rows = list(csv.DictReader(file))
    committed = {tuple(row[key] for key in ("target", "kernel", "head_dim", "tile")) for row in rows if row["tile"]}
    today = [case for target in PROCESSORS for case, _ in cases(target)]
    assert committed == {(case[0], case[1], str(case[2]), tile_name(case[4]._asdict())) for case in today}


def test_bytes_that_the_producer_loads_per_iteration():
    assert tma_bytes(("sm_90a", "hopper_forward", 128, torch.bfloat16, ForwardTile(64, 64, 4))) == 3 * 64 * 128 * 2
    assert tma_bytes(("sm_90a", "hopper_backward", 128, torch.bfloat16, BackwardTile(128, 64, 2))) == 2 * 128 * 128 * 2
    assert tma_bytes(("sm_90a", "forward", 128, torch.bfloat16, Tile(64, 64, 8, 2))) == 0


COUNTED = """
import json, torch
from collections import Counter
from compile_kernels import TARGETS, TargetTile, compiled_kernel
from flashmhf.ops.hopper.tiles import BackwardTile, ForwardTile
from machine_code import machine_code
from gpu_kernels import KernelCase, launches
from matrix_work import main_loops, partitions
from occupancy import resident_programs
from static_model import read_loop
for kernel, tile in (("hopper_forward", ForwardTile(64, 64, 4, True)), ("hopper_backward", BackwardTile(128, 64, 2))):
    launch = launches("sm_90a", KernelCase(kernel, (4096, 8, 8, 7, 384), 128, torch.bfloat16, tile))[0]
    compiled = compiled_kernel(launch, TARGETS["sm_90a"])
    code = machine_code(compiled.asm)
    loops = main_loops(code, partitions(compiled))
    counts = [Counter(x.opcode for x in code.instructions(loop.blocks)) for loop in loops]
    loop = read_loop((TargetTile("sm_90a", kernel, 128, torch.bfloat16, tile), True))
    print(json.dumps([counts, loop.clocks._asdict(), loop.programs_per_sm]))
"""


def test_hopper_kernels_match_a_count_by_hand():
    """Per warp, from reading the SASS: products, special functions, bytes of shared memory."""
    (forward, forward_clocks, _), (backward, backward_clocks, held) = run(COUNTED)
    assert len(forward) == 2  # one loop per warpgroup
    for counts in forward:
        assert (counts["HGMMA.64x128x16.F32.BF16"], counts["MUFU.TANH"]) == (12, 32)
    assert forward_clocks["matrix"] == 2 * 768
    assert 512 <= forward_clocks["special"] <= 512 + 16  # a division takes a reciprocal
    assert forward_clocks["issue"] < 600
    assert forward_clocks["shared"] == 96 / 128 * 1536
    (counts,) = backward
    assert (counts["HGMMA.64x128x16.F32.BF16"], counts["HGMMA.64x64x16.F32.BF16"]) == (24, 16)
    assert (counts["MUFU.TANH"], counts["STSM.16.M88.4"]) == (32, 12)
    assert backward_clocks["matrix"] == 4096
    assert backward_clocks["shared"] == pytest.approx(124 / 128 * 4096, rel=0.01)
    assert held == 1
