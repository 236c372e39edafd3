"""Basic blocks of a kernel as Python functions on NumPy arrays with an element for each thread of the grid.

A block's function is `run(R, K, X, m)`: the registers, the constants, the machine, and the mask of the threads that run
it, or None where all do. It ends where control may leave the straight line: `Block.end` says how.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ptx_on_cpu import arithmetic
from ptx_on_cpu.parse import Instruction, Kernel, PtxError

_TYPES = {
    **{"pred": np.bool_, "f32": np.float32, "f16": np.uint16, "bf16": np.uint16},
    **{f"{kind}{width}": np.dtype(f"u{width // 8}").type for kind in "ub" for width in (16, 32, 64)},
    **{f"s{width}": np.dtype(f"i{width // 8}").type for width in (16, 32, 64)},
}
_BINARY = {
    **{"add": "{a} + {b}", "sub": "{a} - {b}", "mul": "{a} * {b}", "mul.lo": "{a} * {b}"},
    **{"and": "{a} & {b}", "or": "{a} | {b}", "xor": "{a} ^ {b}", "min": "fmin({a}, {b})", "max": "fmax({a}, {b})"},
}
_UNARY = {"mov": "{a}", "not": "~{a}", "neg": "-{a}", "abs": "absolute({a})", "cvta.to.global": "{a}"}
_UNARY |= {"ex2.approx.ftz": "ex2({a})", "rcp.approx.ftz": "rcp({a})"}
_COMPARE = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
_FLOATS = {
    ("f32", "f16"): "from_float16({a})",
    ("rn.f16", "f32"): "to_float16({a})",
    ("rn.bf16", "f32"): "to_bfloat16({a})",
}
_SPECIAL = re.compile(r"%(?:tid|ctaid|ntid|nctaid)\.[xyz]")
_ENDS = ("bra", "ret", "bar.sync")
_NAMES = {
    **{name: getattr(np, name) for name in ("absolute", "fmin", "fmax", "where")},
    **{name: function for name, function in vars(arithmetic).items() if callable(function)},
}


@dataclass(frozen=True)
class Block:
    """`end` is "next", "bar.sync", "bra" or "ret"; the last two may depend on the register `guard`."""

    run: Callable[..., None]
    line: int  # of its last instruction
    end: str
    target: int  # of a branch: a block
    guard: int | None
    negated: bool


@dataclass(frozen=True)
class Program:
    kernel: Kernel
    blocks: tuple[Block, ...]
    registers: tuple[type, ...]  # the type of each
    constants: tuple[tuple[str | int | float, type], ...]  # a number, or the name of a special register


def translate(kernel: Kernel) -> Program:
    """Turn a kernel into functions.

    Raises:
        PtxError: an instruction is not known here.
    """
    writer = _Writer(kernel)
    starts = {0, *kernel.labels.values()}
    starts |= {i + 1 for i, each in enumerate(kernel.instructions) if each.opcode in _ENDS}
    edges = sorted(start for start in starts if start < len(kernel.instructions))
    number = {start: i for i, start in enumerate([*edges, len(kernel.instructions)])}
    blocks = []
    for start, stop in zip(edges, [*edges[1:], len(kernel.instructions)], strict=True):
        *body, last = kernel.instructions[start:stop]
        end = last.opcode if last.opcode in _ENDS else "next"
        if end == "next":
            body.append(last)
        target = number[kernel.labels[last.operands[0]]] if end == "bra" else -1
        guard = writer.register(last.guard.lstrip("!")) if last.guard and end != "next" else None
        if end == "bar.sync" and (last.guard or last.operands != ("0",)):
            raise PtxError(f"line {last.line}: only an unconditional bar.sync 0 is known here")
        run = _compiled([text for each in body for text in writer.statements(each)], f"{kernel.name}, line {last.line}")
        blocks.append(Block(run, last.line, end, target, guard, last.guard.startswith("!")))
    return Program(kernel, tuple(blocks), tuple(writer.types), tuple(writer.constants))


def _compiled(statements: list[str], name: str) -> Callable[..., None]:
    source = "def run(R, K, X, m):\n" + "".join(f"    {statement}\n" for statement in statements or ["pass"])
    scope: dict[str, Any] = dict(_NAMES)
    exec(compile(source, name, "exec"), scope)
    return scope["run"]


class _Writer:
    """Python statements for instructions; collects the registers and constants that they use."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self._numbers: dict[str, int] = {}
        self.types: list[type] = []
        self.constants: list[tuple[str | int | float, type]] = []

    def register(self, name: str) -> int:
        if name not in self._numbers:
            self._numbers[name] = len(self.types)
            self.types.append(_TYPES[self._kernel.registers[name.rstrip("0123456789")]])
        return self._numbers[name]

    def statements(self, each: Instruction) -> list[str]:
        try:
            mask = "m"
            before = []
            if each.guard:
                guard = f"{'~' * each.guard.startswith('!')}R[{self.register(each.guard.lstrip('!'))}]"
                before, mask = [f"g = {guard} if m is None else {guard} & m"], "g"
            return before + self._written(each, mask)
        except (KeyError, ValueError) as error:
            text = f"{each.opcode} {', '.join(each.operands)}"
            raise PtxError(f"line {each.line}: {text} is not known here ({error})") from error

    def _written(self, each: Instruction, mask: str) -> list[str]:
        base, *suffixes = each.opcode.split(".")
        if base in ("ld", "st"):
            return self._memory(each, mask)
        kind = _TYPES[suffixes[-1]]
        operands = each.operands
        if each.opcode == "shfl.sync.bfly.b32":
            to, partner, *rest = operands
            value, lanes, clamp, members = (self._value(x, np.uint32) for x in (partner, *rest))
            first, _, inside = to.partition("|")
            shuffle = f"s = X.shuffle({each.line}, {value}, {lanes}, {clamp}, {members}, {mask})"
            moved = [shuffle, self._assign(first, "s[0]", np.uint32, mask)]
            return moved + ([self._assign(inside, "s[1]", np.bool_, mask)] if inside else [])
        if base == "cvt":
            return [self._convert(each, suffixes, mask)]
        to, *inputs = operands
        if base == "setp":
            a, b = (self._value(x, kind) for x in inputs)
            if suffixes[0] == "ne" and kind is np.float32:
                raise ValueError("of floats")
            return [self._assign(to, f"{a} {_COMPARE[suffixes[0]]} {b}", np.bool_, mask)]
        if base == "selp":
            a, b, which = self._value(inputs[0], kind), self._value(inputs[1], kind), self._value(inputs[2], np.bool_)
            return [self._assign(to, f"where({which}, {a}, {b})", kind, mask)]
        if base in ("shl", "shr"):
            a, places = self._value(inputs[0], kind), self._value(inputs[1], np.uint32)
            return [self._assign(to, f"{base}({a}, {places})", kind, mask)]
        if each.opcode == "bfi.b32":
            return [self._assign(to, f"bfi({', '.join(self._value(x, np.uint32) for x in inputs)})", kind, mask)]
        name = ".".join([base, *suffixes[:-1]])
        values = dict(zip("abc", (self._value(x, kind) for x in inputs), strict=False))
        if name == "fma.rn" and kind is np.float32:
            return [self._assign(to, "fma({a}, {b}, {c})".format(**values), kind, mask)]
        if name in ("mul.wide", "mad.wide"):
            wide = np.dtype(f"{np.dtype(kind).kind}{2 * np.dtype(kind).itemsize}")
            product = "{a}.astype({t!r}) * {b}.astype({t!r})".format(**values, t=wide.str)
            plus = f" + {self._value(inputs[2], wide.type)}" if name == "mad.wide" else ""
            return [self._assign(to, product + plus, wide.type, mask)]
        if name == "mad.lo":
            return [self._assign(to, "{a} * {b} + {c}".format(**values), kind, mask)]
        pattern = (_UNARY if len(inputs) == 1 else _BINARY)[name]
        return [self._assign(to, pattern.format(**values), kind, mask)]

    def _convert(self, each: Instruction, suffixes: list[str], mask: str) -> str:
        to, source = each.operands
        *rounding, into, kind = suffixes
        pattern = _FLOATS.get((".".join([*rounding, into]), kind))
        if pattern is None:
            if rounding or "f" in into + kind:
                raise ValueError("between floats")
            pattern = f"{{a}}.astype({np.dtype(_TYPES[into]).str!r})"
        return self._assign(to, pattern.format(a=self._value(source, _TYPES[kind])), _TYPES[into], mask)

    def _memory(self, each: Instruction, mask: str) -> list[str]:
        base, space, *middle, kind = each.opcode.split(".")
        dtype = np.dtype(_TYPES[kind])
        if base == "st":
            address, items = each.operands
        else:
            items, address = each.operands
        inner = address.strip("[]")
        if space == "param":
            place = list(self._kernel.parameters).index(inner)
            return [self._assign(items, f"X.parameter({each.line}, {place}, {kind!r})", dtype.type, mask)]
        name, _, offset = inner.partition("+")
        where = self._value(name, np.uint64)
        if offset:
            where += f" + {self._constant(int(offset), np.uint64)}"
        names = [item.strip() for item in items.strip("{}").split(",")]
        vector = next((part for part in middle if part.startswith("v")), None)
        if len(names) != int((vector or "v1")[1:]) or set(middle) - {"nc", vector}:
            raise ValueError("form of access")
        if (space == "shared" and dtype.itemsize != 4) or (space == "global" and vector):
            raise ValueError("width")
        if base == "st":
            values = ", ".join(self._value(x, dtype.type) for x in names)
            return [f"X.store_{space}({each.line}, {where}, [{values}], {mask})"]
        old = ", ".join(f"R[{self.register(name)}]" for name in names)
        read = f"X.load_{space}({each.line}, {where}, {dtype.str!r}, [{old}], {mask})"
        return [f"{', '.join(f'R[{self.register(name)}]' for name in names)}, = {read}"]

    def _assign(self, to: str, value: str, dtype: type, mask: str) -> str:
        place = self.register(to)
        if self.types[place] is not dtype:
            if np.dtype(self.types[place]).itemsize != np.dtype(dtype).itemsize:
                raise ValueError(f"width of {to}")
            value = f"({value}).view({np.dtype(self.types[place]).str!r})"
        masked = f"where({mask}, {value}, R[{place}])"
        return f"R[{place}] = {masked}" if mask != "m" else f"R[{place}] = {value} if m is None else {masked}"

    def _value(self, operand: str, dtype: type) -> str:
        if operand in self._kernel.shared:
            return self._constant(self._kernel.shared[operand], dtype)
        if _SPECIAL.fullmatch(operand):
            return self._constant(operand, dtype)
        if not operand.startswith("%"):
            number = np.uint32(int(operand[2:], 16)).view(np.float32) if operand.startswith("0f") else int(operand, 0)
            return self._constant(number, dtype)
        place = self.register(operand)
        have = np.dtype(self.types[place])
        if have.itemsize != np.dtype(dtype).itemsize:
            raise ValueError(f"width of {operand}")
        return f"R[{place}]" if have == dtype else f"R[{place}].view({np.dtype(dtype).str!r})"

    def _constant(self, number: str | int | float, dtype: type) -> str:
        entry = (number, dtype)
        if entry not in self.constants:
            self.constants.append(entry)
        return f"K[{self.constants.index(entry)}]"
