"""Run a grid: all threads of all blocks in step, those that part ways one group after the other.

Of the threads that can run, those at the lowest place of the program go first, so that a group that took a branch waits
for the others where the ways meet again. A barrier lets a block pass when all of its threads have come to it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ptx_on_cpu.blocks import Program
from ptx_on_cpu.memory import Global, Shared
from ptx_on_cpu.parse import PtxError

Array = np.ndarray
_WARP = 32
_MOST_BLOCKS = 200_000  # basic blocks that a launch may run
_WORD = np.dtype(np.uint32)


class Machine:
    """One launch; the functions of `blocks` call its methods."""

    def __init__(
        self, program: Program, grid: Sequence[int], block: Sequence[int], arguments: Sequence[int], memory: Global
    ) -> None:
        kernel = program.kernel
        self._threads, *flat = block
        if flat != [1, 1] or self._threads % _WARP or self._threads > (kernel.max_threads or 1024):
            raise PtxError(f"{kernel.name} is for blocks of at most {kernel.max_threads} threads, not {list(block)}")
        if len(arguments) != len(kernel.parameters):
            raise PtxError(f"{kernel.name} takes {len(kernel.parameters)} arguments, not {len(arguments)}")
        self._program, self._arguments, self._memory = program, arguments, memory
        self._parameter_types = list(kernel.parameters.values())
        blocks = int(np.prod(grid))
        self._count = blocks * self._threads
        self._all = np.arange(self._count, dtype=np.int32)
        self._shared = Shared(kernel.shared_bytes, blocks, self._threads)
        self._lane = self._all % _WARP
        index = self._all // self._threads
        self._special = {"%tid.x": self._all % self._threads, "%tid.y": 0, "%tid.z": 0}
        for axis, size, each in zip("xyz", grid, (index, index // grid[0], index // grid[0] // grid[1]), strict=True):
            self._special |= {f"%ctaid.{axis}": each % size, f"%nctaid.{axis}": size}
            self._special |= {f"%ntid.{axis}": block["xyz".index(axis)]}

    def run(self) -> None:
        """Run every thread to its end.

        Raises:
            PtxError: an access is wrong, threads of a block part ways at a barrier, or there is no end.
        """
        blocks = self._program.blocks
        done = len(blocks)
        registers = [_poison(self._count, dtype) for dtype in self._program.registers]
        constants = [self._constant(value, dtype) for value, dtype in self._program.constants]
        at = np.zeros(self._count, np.int32)  # each thread's next block; `done` is past the last
        waiting = np.zeros(self._count, bool)
        together: int | None = 0  # the next block of all threads, where it is the same
        with np.errstate(all="ignore"):
            for _ in range(_MOST_BLOCKS):
                if together is None:
                    place, mask = self._next_group(at, waiting)
                    if mask is None:
                        together = place
                else:
                    place, mask = together, None
                if place == done:
                    return
                block = blocks[place]
                block.run(registers, constants, self, mask)
                if block.end == "bar.sync" and mask is None:
                    self._shared.release(slice(None))
                follows = done if block.end == "ret" else block.target if block.end == "bra" else place + 1
                if block.guard is None:
                    if mask is None:
                        together = follows
                    else:
                        at[mask] = follows
                        waiting[mask] = block.end == "bar.sync"
                    continue
                taken = registers[block.guard] ^ block.negated
                if mask is not None:
                    at[mask] = np.where(taken, follows, place + 1)[mask]
                elif taken.all() or not taken.any():
                    together = follows if taken.all() else place + 1
                else:
                    together, at = None, np.where(taken, follows, place + 1).astype(np.int32)
        raise PtxError(f"{self._program.kernel.name} does not end")

    def _next_group(self, at: Array, waiting: Array) -> tuple[int, Array | None]:
        """The next block and the threads that run it; None for all of them."""
        done = len(self._program.blocks)
        if waiting.any() and not (~waiting & (at < done)).any():
            self._release(at, waiting)
        place = int(at[~waiting].min())
        mask = (at == place) & ~waiting
        return place, None if mask.all() else mask

    def _release(self, at: Array, waiting: Array) -> None:
        """Let those blocks pass their barrier whose threads are all there; no thread can do anything else."""
        rows = at.reshape(-1, self._threads)
        come = waiting.reshape(rows.shape)
        arrived = come.any(axis=1)
        split = arrived & (~come.all(axis=1) | (rows != rows[:, :1]).any(axis=1))
        if split.any():
            where = at[waiting].min() - 1
            line = self._program.blocks[where].line
            raise PtxError(f"line {line}: some threads of a block wait at this barrier, others do not come to it")
        self._shared.release(arrived)
        waiting[:] = False

    def _constant(self, value: str | int | float, dtype: type) -> Array:
        if isinstance(value, str):
            return np.broadcast_to(self._special[value], self._count).astype(dtype)
        if isinstance(value, int) and dtype is not np.float32:
            width = 8 * np.dtype(dtype).itemsize
            return np.full(self._count, value % (1 << width), f"u{width // 8}").view(dtype)
        return np.full(self._count, value, dtype)

    # What the blocks' functions call: `mask` is that of the threads that take part, None for all.

    def parameter(self, line: int, place: int, kind: str) -> Array:
        if kind != self._parameter_types[place]:
            raise PtxError(f"line {line}: argument {place} is {self._parameter_types[place]}, not {kind}")
        value, dtype = int(self._arguments[place]), np.dtype(f"u{int(kind[1:]) // 8}")
        if value >> 8 * dtype.itemsize:
            raise PtxError(f"line {line}: argument {place} is {value}, which is no {kind}")
        return np.full(self._count, value, dtype)

    def shuffle(
        self, line: int, value: Array, lanes: Array, clamp: Array, members: Array, mask: Array | None
    ) -> tuple[Array, Array]:
        """`shfl.sync.bfly`, of whole warps."""
        active = slice(None) if mask is None else mask
        if (members[active] != 0xFFFFFFFF).any() or (clamp[active] != _WARP - 1).any():
            raise PtxError(f"line {line}: only whole warps can shuffle here")
        if mask is not None:
            rows = mask.reshape(-1, _WARP)
            if (rows.any(axis=1) != rows.all(axis=1)).any():
                raise PtxError(f"line {line}: some lanes of a warp do not come to this shuffle")
        partner = self._all ^ lanes.astype(np.int32)
        inside = self._lane ^ lanes.astype(np.int32)
        inside = (inside >= 0) & (inside < _WARP)
        return value[np.where(inside, partner, self._all)], inside

    def load_global(self, line: int, address: Array, dtype: str, old: list[Array], mask: Array | None) -> list[Array]:
        if mask is None:
            return [self._memory.load(line, address, np.dtype(dtype).type)]
        return [_merged(old[0], mask, self._memory.load(line, address[mask], np.dtype(dtype).type))]

    def store_global(self, line: int, address: Array, values: list[Array], mask: Array | None) -> None:
        if mask is None:
            self._memory.store(line, address, values[0], self._all)
        else:
            self._memory.store(line, address[mask], values[0][mask], self._all[mask])

    def load_shared(self, line: int, address: Array, dtype: str, old: list[Array], mask: Array | None) -> list[Array]:
        if mask is None:
            return [word.view(dtype) for word in self._shared.load(line, address, len(old), self._all)]
        words = self._shared.load(line, address[mask], len(old), self._all[mask])
        return [_merged(each, mask, word.view(dtype)) for each, word in zip(old, words, strict=True)]

    def store_shared(self, line: int, address: Array, values: list[Array], mask: Array | None) -> None:
        words = [value.view(_WORD) for value in values]
        if mask is None:
            self._shared.store(line, address, words, self._all)
        else:
            self._shared.store(line, address[mask], [word[mask] for word in words], self._all[mask])


def _poison(count: int, dtype: type) -> Array:
    """What a register has before it is first written: nothing that would do for a result."""
    if dtype is np.bool_:
        return np.arange(count) % 3 == 0
    return np.full(count * np.dtype(dtype).itemsize, 0xFF, np.uint8).view(dtype) - dtype(5)


def _merged(old: Array, mask: Array, new: Array) -> Array:
    made = old.copy()
    made[mask] = new.view(old.dtype)
    return made
