"""Global and shared memory that check every access: bounds, alignment, what was never written, races.

Addresses and values are arrays with an element for each thread, `active` the places of those that take part. Errors
name the line of the PTX.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ptx_on_cpu.parse import PtxError

Array = np.ndarray
_GAP = 4096  # bytes between tensors
_NOBODY, _SEVERAL = -1, -2  # instead of a thread's number


@dataclass
class _Place:
    name: str
    start: int
    end: int


class Global:
    """Tensors far from each other: inputs can be read, outputs written once in each element and not read."""

    base = 0x7F00_0000_0000

    def __init__(self) -> None:
        self._bytes = np.zeros(_GAP, np.uint8)
        self._readable = np.zeros(_GAP // 2, bool)  # of every two bytes
        self._writer = np.full(_GAP // 2, _SEVERAL, np.int32)  # _SEVERAL where nobody may
        self._places: list[_Place] = []

    def input(self, name: str, values: Array) -> int:
        """Place a tensor that can only be read; give its address."""
        return self._add(name, np.ascontiguousarray(values).view(np.uint8).reshape(-1), True)

    def output(self, name: str, nbytes: int) -> int:
        """Place one that can only be written."""
        return self._add(name, np.zeros(nbytes, np.uint8), False)

    def result(self, name: str) -> Array:
        """The bytes of an output.

        Raises:
            PtxError: a part of it was not written.
        """
        place = next(place for place in self._places if place.name == name)
        missing = np.flatnonzero(self._writer[place.start // 2 : place.end // 2] == _NOBODY)
        if missing.size:
            raise PtxError(f"no thread writes {missing.size * 2} bytes of {name}, at {2 * missing[0]} and on")
        return self._bytes[place.start : place.end].copy()

    def _add(self, name: str, content: Array, readable: bool) -> int:
        start, size = len(self._bytes), -(-content.size // 256) * 256 + _GAP
        self._places.append(_Place(name, start, start + content.size))
        self._bytes = np.concatenate([self._bytes, np.zeros(size, np.uint8)])
        self._bytes[start : start + content.size] = content
        self._readable = np.concatenate([self._readable, np.zeros(size // 2, bool)])
        self._writer = np.concatenate([self._writer, np.full(size // 2, _SEVERAL, np.int32)])
        part = slice(start // 2, (start + content.size) // 2)
        self._readable[part] = readable
        self._writer[part] = _SEVERAL if readable else _NOBODY
        return self.base + start

    def load(self, line: int, address: Array, dtype: type) -> Array:
        """What the active threads read."""
        offset = self._offset(line, address, np.dtype(dtype).itemsize, "reads")
        allowed = self._readable[offset >> 1]
        if not allowed.all():
            raise PtxError(f"line {line}: reads {self._where(offset[~allowed][0])}")
        return self._bytes.view(dtype)[offset // np.dtype(dtype).itemsize]

    def store(self, line: int, address: Array, values: Array, threads: Array) -> None:
        """Write the active threads' values."""
        offset = self._offset(line, address, values.itemsize, "writes")
        for half in range(0, values.itemsize, 2):
            granule = (offset + half) >> 1
            free = self._writer[granule] == _NOBODY
            self._writer[granule] = np.where(free, threads, self._writer[granule])
            mine = free & (self._writer[granule] == threads)
            if not mine.all():
                again = " a second time" if (self._writer[granule[~mine]] >= 0).all() else ""
                raise PtxError(f"line {line}: writes {self._where(offset[~mine][0])}{again}")
        self._bytes.view(values.dtype)[offset // values.itemsize] = values

    def _offset(self, line: int, address: Array, size: int, does: str) -> Array:
        offset = address.view(np.int64) - self.base
        if (offset & (size - 1)).any():
            raise PtxError(f"line {line}: {does} {size} bytes at an address that is no multiple of {size}")
        outside = (offset < 0) | (offset > len(self._bytes) - size)
        if outside.any():
            raise PtxError(f"line {line}: {does} {self._where(offset[outside][0])}")
        return offset

    def _where(self, offset: int) -> str:
        nearest = min(self._places, key=lambda place: max(place.start - offset, offset - place.end + 1, 0))
        if offset < nearest.start:
            return f"outside of all tensors, {nearest.start - offset} bytes before {nearest.name}"
        if offset >= nearest.end:
            return f"outside of all tensors, {offset - nearest.end} bytes after the end of {nearest.name}"
        return f"byte {offset - nearest.start} of {nearest.name}"


class Shared:
    """The shared memory of all blocks, in words of four bytes.

    Between two barriers of a block, a word that one thread writes may not be touched by another.
    """

    def __init__(self, nbytes: int, blocks: int, threads: int) -> None:
        self._words = max(-(-nbytes // 4), 1)
        self._bytes = nbytes
        self._first = np.repeat(np.arange(blocks, dtype=np.int64) * self._words, threads)  # each thread's block's
        self._values = np.zeros(blocks * self._words, np.uint32)
        self._written = np.zeros(blocks * self._words, bool)
        self._writer = np.full(blocks * self._words, _NOBODY, np.int32)
        self._reader = np.full(blocks * self._words, _NOBODY, np.int32)

    def load(self, line: int, address: Array, count: int, threads: Array) -> list[Array]:
        """`count` consecutive words for each active thread."""
        first = self._word(line, address, count, threads, "reads")
        return [self._load(line, first + i, threads) for i in range(count)]

    def store(self, line: int, address: Array, values: list[Array], threads: Array) -> None:
        first = self._word(line, address, len(values), threads, "writes")
        for i, each in enumerate(values):
            self._store(line, first + i, each, threads)

    def release(self, blocks: Array) -> None:
        """A barrier of these blocks: what was done before comes before what is done from now on."""
        for owner in (self._writer, self._reader):
            owner.reshape(-1, self._words)[blocks] = _NOBODY

    def _load(self, line: int, word: Array, threads: Array) -> Array:
        if not self._written[word].all():
            raise PtxError(f"line {line}: reads shared memory that was never written")
        writer = self._writer[word]
        if ((writer != _NOBODY) & (writer != threads)).any():
            raise PtxError(f"line {line}: reads shared memory that another thread writes without a barrier between")
        before = self._reader[word]
        self._reader[word] = np.where((before == _NOBODY) | (before == threads), threads, _SEVERAL)
        self._reader[word[self._reader[word] != threads]] = _SEVERAL
        return self._values[word]

    def _store(self, line: int, word: Array, values: Array, threads: Array) -> None:
        for owner, does in ((self._writer, "writes"), (self._reader, "reads")):
            before = owner[word]
            if ((before != _NOBODY) & (before != threads)).any():
                raise PtxError(f"line {line}: writes shared memory that another {does} without a barrier between")
        self._writer[word] = threads
        if (self._writer[word] != threads).any():
            raise PtxError(f"line {line}: two threads write the same shared memory")
        self._written[word] = True
        self._values[word] = values

    def _word(self, line: int, address: Array, count: int, threads: Array, does: str) -> Array:
        address = address.view(np.int64)
        if (address & (4 * count - 1)).any():
            raise PtxError(f"line {line}: {does} shared memory at an address that is no multiple of {4 * count}")
        if ((address < 0) | (address > self._bytes - 4 * count)).any():
            raise PtxError(f"line {line}: {does} outside of shared memory")
        return self._first[threads] + (address >> 2)
