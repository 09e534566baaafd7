"""Compiles the additions to dQ and interprets their PTX, to check the emulator's register order against the compiler's.

`python probe.py FRAGMENTS` prints the PTX of `probe`; `run_ptx` runs such code, straight from top to bottom, for
all threads at once. Integers do not wrap: none here comes near 2^31.
"""

import json
import re
import sys

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from flashmhf.ops.hopper.dq_accum import red_add_tile

THREADS = 256
ARGUMENTS = {"t": 128, "head": 1, "H": 3}
BLOCK_T, COLUMNS = 128, 64


@gluon.jit
def probe(dq_ptr, t, head, H, BLOCK_T: gl.constexpr, COLUMNS: gl.constexpr, FRAGMENTS: gl.constexpr):
    """Adds a tile whose elements are their own numbers."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, COLUMNS, 16])
    rows = gl.arange(0, BLOCK_T, layout=gl.SliceLayout(1, layout))
    columns = gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, layout))
    red_add_tile(dq_ptr, (rows[:, None] * COLUMNS + columns[None, :]).to(gl.float32), t, t, head, H, FRAGMENTS)


def compile_probe(fragments: bool) -> str:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    signature = {"dq_ptr": "*fp32", "t": "i32", "head": "i32", "H": "i32"}
    constants = {"BLOCK_T": BLOCK_T, "COLUMNS": COLUMNS, "FRAGMENTS": fragments}
    source = GluonASTSource(probe, signature | dict.fromkeys(constants, "constexpr"), constants, {})
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": THREADS // 32}).asm["ptx"]


def run_ptx(ptx: str, memory: torch.Tensor, numbers: list[int]) -> None:
    """`memory` is the first parameter, at address 0; `numbers` are the ones after it."""
    known = {"%tid.x": torch.arange(THREADS)}
    parameters = [0, *numbers]

    def value(name: str) -> torch.Tensor:
        return known[name] if name in known else torch.tensor(int(name, 0))

    body = re.sub(r"//.*", "", ptx.partition("{")[2].partition("ret;")[0])
    for statement in filter(
        None, (re.sub(r"\$L\S+:|\.(loc|reg)\b.*", "", x).strip() for x in re.split(r"[;\n]", body))
    ):
        name, _, rest = statement.partition(" ") if "\t" not in statement else statement.partition("\t")
        operation, *types = name.split(".")
        target, *operands = re.findall(r"%?[\w.]+", rest)
        if operation == "red":
            count = int(types[-2].removeprefix("v"))
            assert len(operands) == count
            assert bool((value(target) % (4 * count) == 0).all()), "not aligned"
            for i, operand in enumerate(operands):
                memory.index_put_((value(target) // 4 + i,), value(operand).float(), accumulate=True)
        elif operation == "ld":
            known[target] = torch.tensor(parameters[int(operands[0].rpartition("_")[2])])
        else:
            known[target] = OPERATIONS[operation](*map(value, operands))


OPERATIONS = {
    "add": torch.add,
    "and": torch.bitwise_and,
    "bfe": lambda x, start, length: (x >> start) & ((1 << length) - 1),
    "cvt": lambda x: x,
    "mad": lambda x, y, z: x * y + z,
    "mov": lambda x: x,
    "mul": torch.mul,
    "or": torch.bitwise_or,
    "shl": torch.bitwise_left_shift,
    "shr": torch.bitwise_right_shift,
}

if __name__ == "__main__":
    print(json.dumps(compile_probe(sys.argv[1] == "True")))
