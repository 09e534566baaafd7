"""Reading machine code: basic blocks, loops, and the matrix FLOPs that a loop issues."""

import re

import pytest

from flashmhf.ops.triton.tiles import Tile
from machine_code import Instruction, MachineCode
from matrix_work import MATRIX_OPCODE, MatrixWork, instruction_flops, issued_ratio, work_of

# Two partitions, as a switch starts them; one's loop has a barrier's slow path behind all code, and a worker's loop
# around it.
SASS = """
kernel:
.text.kernel:
        /*0000*/                   S2R R0, SR_TID.X ;
.L_x_1:
        /*0010*/                   BRX R2 -0x20                       (*"BRANCH_TARGETS .L_x_2,.L_x_3"*);
.L_x_2:
        /*0020*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], RZ, !UPT ;
.L_x_4:
        /*0030*/              @!P3 BRA `(.L_x_6) ;
.L_x_7:
        /*0040*/                   HGMMA.64x128x16.F32.BF16 R24, R180, gdesc[UR16], R24 ;
        /*0050*/                   HGMMA.64x64x16.F32.BF16 R24, R180, gdesc[UR16], R24, gsb0 ;
        /*0060*/               @P0 BRA `(.L_x_4) ;
        /*0070*/                   BRA `(.L_x_1) ;
.L_x_3:
        /*0080*/                   HGMMA.64x128x16.F32.BF16 R24, R180, gdesc[UR16], R24 ;
        /*0090*/                   HGMMA.64x64x16.F32.BF16 R24, R180, gdesc[UR16], R24, gsb0 ;
        /*00a0*/                   BRA.U UP0, `(.L_x_3) ;
        /*00b0*/               @P1 EXIT ;
        /*00c0*/                   EXIT ;
.L_x_6:
        /*00d0*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P3, [UR4], R0 ;
        /*00e0*/              @!P3 BRA `(.L_x_6) ;
        /*00f0*/                   BRA `(.L_x_7) ;
.L_x_9:
        /*0100*/                   BRA `(.L_x_9);
"""
AMD = """
kernel:                                 ; @kernel
	s_load_dwordx2 s[0:1], s[4:5], 0x0
	s_cbranch_scc1 .LBB0_3
.LBB0_2:                                ; =>This Inner Loop Header: Depth=1
	v_mfma_f32_32x32x8_bf16 v[32:47], v[62:63], v[112:113], 0
	v_mfma_f32_16x16x16_bf16 v[0:3], v[62:63], v[112:113], v[0:3]
	s_cbranch_scc0 .LBB0_2
.LBB0_3:
	v_mfma_f32_32x32x8_bf16 v[32:47], v[62:63], v[112:113], 0
	s_endpgm
"""
WIDE, NARROW = 2 * 64 * 128 * 16, 2 * 64 * 64 * 16


def test_loops_of_partitions():
    """A worker's loop around a partition is not a main loop; a barrier's slow path belongs to its loop."""
    code = MachineCode.of_sass(SASS)
    main = code.innermost(MATRIX_OPCODE)
    assert [code.blocks[loop.header].labels for loop in main] == [[".L_x_4"], [".L_x_3"]]
    assert len(code.loops) == 5
    opcodes = [instruction.opcode.partition(".")[0] for instruction in code.instructions(main[0].blocks)]
    assert opcodes == ["BRA", "HGMMA", "HGMMA", "BRA", "SYNCS", "BRA", "BRA"]
    assert work_of(code, [4, 4]) == MatrixWork(loop=2 * (WIDE + NARROW), outside=WIDE)


@pytest.mark.parametrize(
    ("jump", "next_ones"),
    [
        ("BRA `(.L_x_3)", {2}), ("@P0 BRA `(.L_x_3)", {1, 2}), ("BRA.U !UP0, `(.L_x_3)", {1, 2}),
        ("EXIT", set()), ("@P0 EXIT", {1}), ("RET.REL.NODEC R2 `(kernel)", set()),
        ('BRX R2 -0x20 (*"BRANCH_TARGETS .L_x_2,.L_x_3"*)', {1, 2}),
    ],
)  # fmt: skip
def test_successors_of_a_block(jump, next_ones):
    lines = (jump, "NOP", "EXIT")
    text = "/*0000*/ {} ;\n.L_x_2:\n/*0010*/ {} ;\n.L_x_3:\n/*0020*/ {} ;".format(*lines)
    assert MachineCode.of_sass(text).blocks[0].successors == next_ones


def test_both_warpgroups_run_what_is_not_specialised():
    assert work_of(MachineCode.of_sass(SASS), [8]) == MatrixWork(
        loop=2 * (WIDE + NARROW), outside=2 * (WIDE + WIDE + NARROW)
    )


def test_amd_assembly():
    mfma32, mfma16 = 2 * 32 * 32 * 8, 2 * 16 * 16 * 16
    assert work_of(MachineCode.of_amd(AMD), [8]) == MatrixWork(loop=8 * (mfma32 + mfma16), outside=8 * mfma32)


def test_partitions_of_unequal_sizes_are_an_error():
    with pytest.raises(AssertionError, match=re.escape("partitions of unequal sizes, [8, 4]")):
        work_of(MachineCode.of_sass(SASS), [8, 4])


@pytest.mark.parametrize(
    ("instruction", "flops"),
    [
        ("HMMA.16816.F32.BF16 R8, R4, R2, R8", 8 * 4096),
        ("HMMA.1688.F32.TF32 R8, R4, R2, R8", 8 * 2048),
        ("HGMMA.64x16x16.F32.BF16 R8, R4, gdesc[UR4], R8", 2 * 32768),
        ("v_mfma_f32_32x32x8_bf16 v[0:15], v[2:3], v[4:5], 0", 8 * 16384),
        ("v_mfma_f32_4x4x4_16b_f16 v[0:3], v[2:3], v[4:5], 0", 8 * 16 * 128),
        ("v_mfma_f32_32x32x2_f32 v[0:15], v1, v2, 0", 8 * 4096),
    ],
)
def test_flops_of_one_instruction_on_eight_warps(instruction, flops):
    opcode, _, operands = instruction.partition(" ")
    assert instruction_flops(Instruction(opcode, operands), MachineCode([]), 8) == flops


@pytest.mark.parametrize(
    ("descriptor", "m", "n", "k"), [(0x4100490, 64, 64, 16), (0x8200490, 128, 128, 16), (0x8200510, 128, 128, 8)]
)
def test_flops_of_tcgen05_come_from_its_descriptor(descriptor, m, n, k):
    move = Instruction("UMOV", f"UR29, {descriptor:#x}")
    later = Instruction("UMOV", "UR29, 0x0")
    multiply = Instruction("UTCHMMA", "gdesc[UR6], gdesc[UR64], tmem[UR10], tmem[UR28], idesc[UR29], !UPT")
    assert instruction_flops(multiply, MachineCode([move, multiply, later]), 8) == 2 * m * n * k
    computed = Instruction("UIADD3", "UR29, UR28, 0x10, URZ")
    with pytest.raises(AssertionError, match="is not constant"):
        instruction_flops(multiply, MachineCode([move, computed, multiply]), 8)


def test_an_unknown_matrix_instruction_is_an_error():
    with pytest.raises(AssertionError, match="of unknown shape"):
        work_of(MachineCode([Instruction("QGMMA.64x128x32.F32.E4M3", "R0")]), [4])


@pytest.mark.parametrize(
    ("loop", "outside", "ratio"),
    [
        (3, 0, 1.0),
        (6, 0, 2.0),  # nothing is left for a remainder, so the loop takes one tile at a time, twice
        (3, 3, 1.0),  # a pipelined loop, whose first and last parts are outside
        (6, 3, 1.0),  # unrolled by two, with a remainder
        (12, 6, 2.0),  # unrolled by two, and each tile twice
        (6, 2, 2.0),  # what is outside is no whole tile
    ],
)
def test_tiles_of_an_iteration(loop, outside, ratio):
    product = 2 * 64 * 32 * 128
    assert issued_ratio(MatrixWork(loop * product, outside * product), "forward", Tile(64, 32, 4, 2), 128) == ratio


def test_no_ratio_without_matrix_instructions():
    assert issued_ratio(MatrixWork(0, 0), "forward", Tile(64, 32, 4, 2), 128) is None


def test_a_missing_loop_is_an_error():
    with pytest.raises(AssertionError, match="forward: products, but no loop"):
        issued_ratio(MatrixWork(0, 100), "forward", Tile(64, 32, 4, 2), 128)
    assert issued_ratio(MatrixWork(0, 2 * 2 * 32 * 16 * 128), "prologue_forward", Tile(32, 0, 8, 1), 128) == 2
