"""The GPU: memory, operations in an order that only streams and events make, graphs of them."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

Range = tuple[int, int]  # addresses, first and behind the last

_FIRST_ADDRESS = 0x7000_0000_0000_0000  # device memory is nowhere where the host could read or write
ALIGNMENT = 256


@dataclass(eq=False)
class Memory:
    """One allocation. The bytes stay after it was freed, so that a late access is noticed and harmless."""

    address: int
    data: np.ndarray
    pinned: bool
    gpu: int
    freed: bool = False

    @property
    def range(self) -> Range:
        return self.address, self.address + len(self.data)


@dataclass(eq=False)
class Operation:
    """Something enqueued: it runs when `after` have run. `before` are all those, and what they run after."""

    what: str
    run: Callable[[], None]
    reads: list[Range]
    writes: list[Range]
    after: set[Operation] = field(default_factory=set)
    before: set[Operation] = field(default_factory=set)
    done: bool = False

    def again(self) -> Operation:
        return Operation(self.what, self.run, self.reads, self.writes)


@dataclass(eq=False)
class Capture:
    origin: Stream
    thread: threading.Thread
    operations: list[Operation] = field(default_factory=list)
    interrupted: dict[Stream, Operation | None] = field(default_factory=dict)
    """Each stream that takes part → what was its last operation before."""
    broken: bool = False


@dataclass(eq=False)
class Stream:
    number: int
    gpu: int
    last: Operation | None = None
    capture: Capture | None = None
    destroyed: bool = False

    def __int__(self) -> int:
        return self.number


@dataclass(eq=False)
class Event:
    last: Operation | None = None
    capture: Capture | None = None
    destroyed: bool = False


@dataclass(eq=False)
class Graph:
    """A recorded graph, or one that can be launched."""

    operations: list[Operation]
    destroyed: bool = False


class Gpu:
    """What is behind the stand-ins of the CUDA runtime and TensorRT, and what they noted."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.memory: list[Memory] = []
        self.streams: dict[int, Stream] = {}
        self.pending: list[Operation] = []
        self.history: list[Operation] = []
        self.executable: list[Graph] = []
        self.problems: list[str] = []
        self.calls: Counter[str] = Counter()
        self.failing: dict[str, int] = {}
        """Function or method → which of its calls, counted from the first ever, fails."""
        self.alive: Counter[str] = Counter()
        self.destroyed: list[str] = []
        """Kinds of things, in the order in which they ended."""
        self.count = 2
        self.lost = False
        """Whether it fell off the bus: from then on every call fails."""
        self.machine = "this GPU and driver"
        """What a cache of kernels has to be of."""
        self.seen: list[tuple[str, dict[str, np.ndarray]]] = []
        """Each engine run: the graph and its inputs."""
        self._current = threading.local()
        self._next = _FIRST_ADDRESS

    def fails(self, name: str) -> bool:
        """Count a call; whether it is the one that is to fail."""
        with self.lock:
            self.calls[name] += 1
            return self.failing.get(name) == self.calls[name]

    def problem(self, text: str) -> None:
        self.problems.append(text)

    def born(self, kind: str) -> None:
        with self.lock:
            self.alive[kind] += 1

    def died(self, kind: str) -> None:
        with self.lock:
            self.alive[kind] -= 1
            self.destroyed.append(kind)

    def leaks(self) -> dict[str, int]:
        """What is alive, by kind."""
        return {kind: count for kind, count in self.alive.items() if count}

    @property
    def current(self) -> int:
        """The calling thread's current GPU."""
        return getattr(self._current, "number", 0)

    @current.setter
    def current(self, number: int) -> None:
        self._current.number = number

    def allocate(self, nbytes: int, *, pinned: bool) -> int:
        data = np.full(nbytes, 0xFF, np.uint8)  # NaN, for whoever reads it before it was written
        if pinned:
            address = data.ctypes.data
        else:
            address = self._next
            self._next += (nbytes // ALIGNMENT + 2) * ALIGNMENT  # a gap, so that nothing runs over into the next
        self.memory.append(Memory(address, data, pinned, self.current))
        self.born("pinned memory" if pinned else "device memory")
        return address

    def free(self, address: int, *, pinned: bool) -> bool:
        found = [m for m in self.memory if m.address == address and m.pinned == pinned and not m.freed]
        if not found:
            return False
        if any(_overlap(found[0].range, used) for op in self.pending for used in op.reads + op.writes):
            self.problem("memory was freed while an operation that uses it was pending")
        found[0].freed = True
        self.died("pinned memory" if pinned else "device memory")
        return True

    def bytes_at(self, used: Range, *, pinned: bool | None = None) -> np.ndarray:
        """The memory in this range, which must lie in one allocation (of this kind) that was not freed."""
        for memory in self.memory:
            if memory.address <= used[0] and used[1] <= memory.range[1] and pinned in (None, memory.pinned):
                if memory.freed:
                    continue
                return memory.data[used[0] - memory.address : used[1] - memory.address]
        self.problem(f"no memory of that kind at {used[0]:#x}, {used[1] - used[0]} bytes")
        return np.zeros(used[1] - used[0], np.uint8)

    def enqueue(self, stream: Stream, op: Operation, *after: Operation | None) -> None:
        """Put `op` behind what the stream has, and behind `after`."""
        if stream.gpu != self.current:
            self.problem(f"{op.what} on a stream of GPU {stream.gpu} in a thread whose current GPU is {self.current}")
        op.after = {each for each in (stream.last, *after) if each is not None and not each.done}
        op.before = op.after.union(*(each.before for each in op.after))
        others = stream.capture.operations if stream.capture else self.pending
        for other in others:
            if not other.done and other not in op.before and _conflict(op, other):
                self.problem(f"{op.what} and {other.what} use the same memory in no order")
        others.append(op)
        if not stream.capture:
            self.history.append(op)
        stream.last = op

    def wait(self, stream: Stream, op: Operation | None) -> None:
        """Let the stream's next operations come after `op` too."""
        if op is not None and not op.done:
            self.enqueue(stream, Operation("wait", _nothing, [], []), op)

    def launch(self, graph: Graph, stream: Stream) -> None:
        before, copies = stream.last, {op: op.again() for op in graph.operations}
        for op, copy in copies.items():
            stream.last = before
            self.enqueue(stream, copy, *(copies[each] for each in op.after))
        self.enqueue(stream, Operation("end of graph", _nothing, [], []), *copies.values())

    def synchronise(self, stream: Stream) -> None:
        """Run what the stream's last operation needs, of what may run the latest enqueued first; and nothing else."""
        if stream.last is None or stream.last.done:
            return
        needed = [op for op in self.pending if op is stream.last or op in stream.last.before]
        while needed:
            op = next(op for op in reversed(needed) if all(each.done for each in op.after))
            op.run()
            op.done = True
            needed.remove(op)
            self.pending.remove(op)

    def begin_capture(self, stream: Stream) -> bool:
        if stream.capture:
            return False
        self.join_capture(stream, Capture(stream, threading.current_thread()))
        return True

    def join_capture(self, stream: Stream, capture: Capture) -> None:
        capture.interrupted[stream] = stream.last
        stream.capture, stream.last = capture, None

    def end_capture(self, capture: Capture) -> tuple[Graph | None, bool]:
        """The graph, or None; and whether all streams that took part were joined again."""
        last = capture.origin.last
        joined = all(s.last is None or s.last is last or (last and s.last in last.before) for s in capture.interrupted)
        for stream, before in capture.interrupted.items():
            stream.capture, stream.last = None, before
        return (Graph(capture.operations) if joined and not capture.broken else None), joined

    def my_captures(self) -> list[Capture]:
        """What the calling thread is capturing."""
        captures = {stream.capture for stream in self.streams.values() if stream.capture}
        return [capture for capture in captures if capture.thread is threading.current_thread()]


def _conflict(a: Operation, b: Operation) -> bool:
    return any(_overlap(x, y) for x in a.writes for y in b.reads + b.writes) or any(
        _overlap(x, y) for x in b.writes for y in a.reads
    )


def _overlap(a: Range, b: Range) -> bool:
    return a[0] < b[1] and b[0] < a[1]


def _nothing() -> None:
    pass


def span(address: int, nbytes: int) -> Range:
    return address, address + nbytes
