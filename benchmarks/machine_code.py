"""Parses SASS of NVIDIA GPUs and assembly of AMD GPUs into basic blocks and natural loops.

Only the instructions of each loop matter here, not addresses, schedules or registers.
"""

import os
import re
import subprocess
import tempfile
from dataclasses import dataclass, field
from functools import cached_property

import triton

SASS_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(@\S+\s+)?([A-Z][A-Z0-9_.a-z]*)\s*(.*?)\s*;?\s*$")
SASS_TARGET = re.compile(r"`\(([^)]+)\)")
SASS_TARGETS = re.compile(r"BRANCH_TARGETS ([^\"*]+)")
AMD_INSTRUCTION = re.compile(r"^\s+([a-z][a-z0-9_]+)\s*([^;]*)")
LABEL = re.compile(r"^([.$\w]+):")
ENDS = ("EXIT", "RET", "s_endpgm", "s_setpc_b64")


@dataclass(frozen=True)
class Instruction:
    """`guard` is the predicate it runs under ("@!P0"), if any."""

    opcode: str
    operands: str
    guard: str = ""

    @property
    def targets(self) -> list[str]:
        """Labels of possible branch targets."""
        if self.opcode.startswith("BRX"):
            listed = SASS_TARGETS.search(self.operands)
            return [] if listed is None else listed[1].strip().split(",")
        if self.opcode.startswith("BRA"):
            return SASS_TARGET.findall(self.operands)
        if self.opcode == "s_branch" or self.opcode.startswith("s_cbranch"):
            return [self.operands.strip()]
        return []

    @property
    def falls_through(self) -> bool:
        """Whether the next instruction may follow it."""
        if self.guard:
            return True
        if self.opcode.startswith("BRA"):  # "BRA.U UP0, `(label)" depends on UP0
            return not self.operands.startswith("`")
        return not self.opcode.startswith(("BRX", *ENDS)) and self.opcode != "s_branch"


@dataclass
class Block:
    """A basic block: its instructions, labels and successors."""

    instructions: list[Instruction] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    successors: set[int] = field(default_factory=set)


@dataclass(frozen=True)
class Loop:
    """A natural loop: its header and all blocks from which a back edge reaches the header."""

    header: int
    blocks: frozenset[int]


class MachineCode:
    """The basic blocks of one kernel in order, and its loops."""

    def __init__(self, lines: list[str | Instruction]) -> None:
        """Takes labels (text) and instructions, in order."""
        self.blocks = _blocks(lines)

    @classmethod
    def of_sass(cls, text: str) -> "MachineCode":
        """Parses the output of `nvdisasm -c`."""
        return cls([line for line in map(_sass_line, text.splitlines()) if line is not None])

    @classmethod
    def of_amd(cls, text: str) -> "MachineCode":
        """Parses LLVM's assembly."""
        return cls([line for line in map(_amd_line, text.splitlines()) if line is not None])

    def instructions(self, blocks: frozenset[int] | None = None) -> list[Instruction]:
        """The instructions of some blocks, or of all."""
        return [
            instruction
            for index, block in enumerate(self.blocks)
            if blocks is None or index in blocks
            for instruction in block.instructions
        ]

    @cached_property
    def loops(self) -> list[Loop]:
        """All natural loops, those with the same header merged."""
        dominators = self._dominators()
        predecessors: list[set[int]] = [set() for _ in self.blocks]
        for index, block in enumerate(self.blocks):
            for successor in block.successors:
                predecessors[successor].add(index)
        bodies: dict[int, set[int]] = {}
        for index, block in enumerate(self.blocks):
            for header in block.successors & dominators[index]:
                body, open_blocks = bodies.setdefault(header, {header}), [index]
                while open_blocks:
                    current = open_blocks.pop()
                    if current not in body:
                        body.add(current)
                        open_blocks += predecessors[current]
        return [Loop(header, frozenset(body)) for header, body in sorted(bodies.items())]

    def innermost(self, opcode: str) -> list[Loop]:
        """Loops with an instruction that matches `opcode` and no inner loop with one."""
        pattern = re.compile(opcode)
        having = [loop for loop in self.loops if any(pattern.match(x.opcode) for x in self.instructions(loop.blocks))]
        return [loop for loop in having if not any(other.blocks < loop.blocks for other in having)]

    def _dominators(self) -> list[set[int]]:
        """The dominators of each block. Blocks without predecessors are roots."""
        everything = set(range(len(self.blocks)))
        entered = {successor for block in self.blocks for successor in block.successors}
        roots = {0} | (everything - entered)
        dominators = [{index} if index in roots else set(everything) for index in range(len(self.blocks))]
        predecessors = {
            index: [other for other, block in enumerate(self.blocks) if index in block.successors]
            for index in everything - roots
        }
        changed = True
        while changed:
            changed = False
            for index, ways in predecessors.items():
                found = {index} | set.intersection(*(dominators[way] for way in ways))
                if found != dominators[index]:
                    dominators[index], changed = found, True
        return dominators


def machine_code(asm: dict) -> MachineCode:
    """The code of a kernel that Triton compiled: `asm` holds a cubin or AMD's assembly."""
    return MachineCode.of_amd(asm["amdgcn"]) if "amdgcn" in asm else MachineCode.of_sass(disassemble(asm["cubin"]))


def disassemble(cubin: bytes) -> str:
    """SASS, by the nvdisasm that comes with Triton."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = os.path.join(os.path.dirname(triton.__file__), "backends/nvidia/bin/nvdisasm")
        return subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True).stdout


def _sass_line(line: str) -> str | Instruction | None:
    if match := SASS_INSTRUCTION.search(line):
        return Instruction(match[2], match[3], (match[1] or "").strip())
    match = LABEL.match(line)
    return match[1] if match else None


def _amd_line(line: str) -> str | Instruction | None:
    if match := AMD_INSTRUCTION.match(line):
        return Instruction(match[1], match[2].strip())
    match = LABEL.match(line)
    return match[1] if match else None


def _blocks(lines: list[str | Instruction]) -> list[Block]:
    blocks = [Block()]
    for line in lines:
        if isinstance(line, str):
            if blocks[-1].instructions:
                blocks.append(Block())
            blocks[-1].labels.append(line)
            continue
        if blocks[-1].instructions and (before := blocks[-1].instructions[-1]) and _ends_a_block(before):
            blocks.append(Block())
        blocks[-1].instructions.append(line)
    places = {label: index for index, block in enumerate(blocks) for label in block.labels}
    for index, block in enumerate(blocks):
        last = block.instructions[-1] if block.instructions else None
        if last is not None:
            block.successors |= {places[label] for label in last.targets}
        if (last is None or last.falls_through) and index + 1 < len(blocks):
            block.successors.add(index + 1)
    return blocks


def _ends_a_block(instruction: Instruction) -> bool:
    return bool(instruction.targets) or not instruction.falls_through or instruction.opcode.startswith(ENDS)
