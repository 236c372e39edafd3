"""A kernel of a PTX text as data: its parameters, registers, shared memory and instructions, each with its line."""

from __future__ import annotations

import re
from dataclasses import dataclass


class PtxError(Exception):
    """Text that this interpreter does not take, or what a GPU may do silently; names the line of the PTX."""


@dataclass(frozen=True)
class Instruction:
    """One instruction: `@guard opcode operands;`."""

    line: int
    guard: str  # "%p1", "!%p1", or "" for none
    opcode: str
    operands: tuple[str, ...]


@dataclass(frozen=True)
class Kernel:
    """An entry point. `labels` name the instruction, by its place, that a branch goes to."""

    name: str
    parameters: dict[str, str]  # name → type, in order
    registers: dict[str, str]  # "%f" → type, of %f0, %f1, …
    shared: dict[str, int]  # name → address
    shared_bytes: int
    max_threads: int | None
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]


_STATEMENT = re.compile(r"(?:@(!?%p\d+)\s+)?([a-z][\w.:]*)\s*(.*);$")
_OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+")
_REGISTERS = re.compile(r"\.reg \.(\w+)\s+(%[a-z]+)<\d+>;")
_SHARED = re.compile(r"\.shared \.align (\d+) \.b8 (\w+)\[(\d+)\];")
_LABEL = re.compile(r"(\$?\w+):$")


def parse(ptx: str, name: str) -> Kernel:
    """Read one entry point of a PTX text.

    Raises:
        PtxError: there is no such entry point, or one of its lines is in no form that is known here.
    """
    lines = ptx.splitlines()
    start = next((i for i, line in enumerate(lines) if re.search(rf"\.entry {re.escape(name)}\(", line)), None)
    if start is None:
        raise PtxError(f"there is no kernel {name}")
    opened = lines.index("{", start)
    head = "\n".join(lines[start:opened])
    limit = re.search(r"\.maxntid (\d+), 1, 1", head)
    registers: dict[str, str] = {}
    shared: dict[str, int] = {}
    shared_bytes = 0
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for number in range(opened + 1, lines.index("}", opened)):
        line = lines[number].partition("//")[0].strip()
        if not line or line.startswith(".pragma"):
            continue
        if match := _LABEL.match(line):
            labels[match[1]] = len(instructions)
        elif match := _REGISTERS.match(line):
            registers[match[2]] = match[1]
        elif match := _SHARED.match(line):
            alignment = int(match[1])
            shared[match[2]] = -(-shared_bytes // alignment) * alignment
            shared_bytes = shared[match[2]] + int(match[3])
        elif match := _STATEMENT.match(line):
            operands = tuple(_OPERAND.findall(match[3]))
            opcode = match[2].removesuffix(".uni")  # a promise to ptxas, which this machine has no use for
            instructions.append(Instruction(number + 1, match[1] or "", opcode, operands))
        else:
            raise PtxError(f"line {number + 1}: {line} is not understood")
    return Kernel(
        name=name,
        parameters={found: kind for kind, found in re.findall(r"\.param \.(\w+) (\w+)", head)},
        registers=registers,
        shared=shared,
        shared_bytes=shared_bytes,
        max_threads=int(limit[1]) if limit else None,
        instructions=tuple(instructions),
        labels=labels,
    )
