"""`cuda.bindings.runtime` on the stand-in: the functions that the sessions use, each giving (status, result)."""

# ruff: noqa: N801, N802, N815 (the names are CUDA's)

from __future__ import annotations

import enum
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

from gpu_stand_in.device import Capture, Event, Gpu, Graph, Operation, Stream, span


class cudaError_t(enum.IntEnum):
    cudaSuccess = 0
    cudaErrorInvalidValue = 1
    cudaErrorMemoryAllocation = 2
    cudaErrorInsufficientDriver = 35
    cudaErrorNoDevice = 100
    cudaErrorInvalidResourceHandle = 400
    cudaErrorLaunchFailure = 719
    cudaErrorStreamCaptureUnsupported = 900
    cudaErrorStreamCaptureInvalidated = 901
    cudaErrorStreamCaptureUnjoined = 904
    cudaErrorStreamCaptureWrongThread = 908


class cudaMemcpyKind(enum.IntEnum):
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2


class cudaStreamCaptureMode(enum.IntEnum):
    cudaStreamCaptureModeGlobal = 0
    cudaStreamCaptureModeThreadLocal = 1


CONSTANTS = {"cudaStreamNonBlocking": 1, "cudaEventDisableTiming": 2}
ENUMS = (cudaError_t, cudaMemcpyKind, cudaStreamCaptureMode)

OK = cudaError_t.cudaSuccess
BAD = cudaError_t.cudaErrorInvalidValue
BROKEN = cudaError_t.cudaErrorLaunchFailure
GONE = cudaError_t.cudaErrorInvalidResourceHandle
OUT_OF_MEMORY = ("cudaMalloc", "cudaMallocHost", "cudaGraphInstantiate")
GETS = {"cudaGetErrorString", "cudaGetDeviceCount", "cudaGetDevice", "cudaGetDeviceProperties", "cudaDriverGetVersion"}
MAKES = {"cudaMalloc", "cudaMallocHost", "cudaStreamCreateWithFlags", "cudaEventCreateWithFlags"}
WITH_RESULT = {*GETS, *MAKES, "cudaStreamEndCapture", "cudaGraphInstantiate"}
NEVER_WHILE_CAPTURING = ("cudaMalloc", "cudaMallocHost", "cudaFree", "cudaFreeHost", "cudaStreamSynchronize")


def make_cuda(gpu: Gpu) -> ModuleType:
    """The module."""
    module = ModuleType("cuda.bindings.runtime")
    for each in ENUMS:
        setattr(module, each.__name__, each)
    for name, value in CONSTANTS.items():
        setattr(module, name, value)
    for name in FUNCTIONS:
        setattr(module, name, _entry(gpu, name, vars(_Functions)[name]))
    return module


def _entry(gpu: Gpu, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def entry(*arguments: Any) -> tuple[Any, ...]:
        with gpu.lock:
            nothing = (None,) if name in WITH_RESULT else ()
            if gpu.fails(name):
                if name == "cudaStreamEndCapture":  # which ends the capture even so
                    gpu.end_capture(arguments[0].capture)
                return (cudaError_t.cudaErrorMemoryAllocation if name in OUT_OF_MEMORY else BROKEN), *nothing
            if gpu.lost and name != "cudaGetErrorString":
                return cudaError_t.cudaErrorNoDevice, *nothing
            if name in NEVER_WHILE_CAPTURING and (captures := gpu.my_captures()):
                for capture in captures:
                    capture.broken = True
                return cudaError_t.cudaErrorStreamCaptureUnsupported, *nothing
            answer = function(gpu, *arguments)
            if isinstance(answer, tuple):
                return answer
            return (answer, *nothing) if isinstance(answer, cudaError_t) else (OK, answer)

    entry.__wrapped__ = function  # type: ignore[attr-defined]
    return entry


class _Functions:
    """A status, or the result of what went well."""

    def cudaGetErrorString(self: Gpu, error: int) -> Any:
        return OK, cudaError_t(error).name.removeprefix("cudaError").lower().encode()

    def cudaGetDeviceCount(self: Gpu) -> Any:
        return OK, self.count

    def cudaGetDevice(self: Gpu) -> Any:
        return OK, self.current

    def cudaGetDeviceProperties(self: Gpu, device: int) -> Any:
        return OK, SimpleNamespace(name=f"GPU {device}".encode(), major=12, minor=0)

    def cudaDriverGetVersion(self: Gpu) -> Any:
        return OK, 13000

    def cudaSetDevice(self: Gpu, device: int) -> Any:
        if not 0 <= device < self.count:
            return BAD
        self.current = device
        return OK

    def cudaMalloc(self: Gpu, size: int) -> Any:
        return OK, self.allocate(size, pinned=False)

    def cudaFree(self: Gpu, devPtr: int) -> Any:
        return OK if self.free(devPtr, pinned=False) else _wrong(self, "cudaFree of what is not allocated")

    def cudaMallocHost(self: Gpu, size: int) -> Any:
        return OK, self.allocate(size, pinned=True)

    def cudaFreeHost(self: Gpu, ptr: int) -> Any:
        return OK if self.free(ptr, pinned=True) else _wrong(self, "cudaFreeHost of what is not allocated")

    def cudaStreamCreateWithFlags(self: Gpu, flags: int) -> Any:
        if flags != CONSTANTS["cudaStreamNonBlocking"]:
            self.problem("a stream that the default stream waits for")
        stream = Stream(0x5000 + len(self.streams), self.current)
        self.streams[int(stream)] = stream
        self.born("stream")
        return OK, stream

    def cudaStreamDestroy(self: Gpu, stream: Stream) -> Any:
        if stream.destroyed or stream.capture or (stream.last and not stream.last.done):
            return _wrong(self, "cudaStreamDestroy of a stream that is destroyed or in use")
        stream.destroyed = True
        self.died("stream")
        return OK

    def cudaStreamSynchronize(self: Gpu, stream: Stream) -> Any:
        if stream.destroyed:
            return _wrong(self, "cudaStreamSynchronize of a destroyed stream")
        self.synchronise(stream)
        return OK

    def cudaEventCreateWithFlags(self: Gpu, flags: int) -> Any:
        self.born("event")
        return OK, Event()

    def cudaEventDestroy(self: Gpu, event: Event) -> Any:
        if event.destroyed:
            return _wrong(self, "cudaEventDestroy of a destroyed event")
        event.destroyed = True
        self.died("event")
        return OK

    def cudaEventRecord(self: Gpu, event: Event, stream: Stream) -> Any:
        if event.destroyed or stream.destroyed:
            return _wrong(self, "cudaEventRecord with what is destroyed")
        event.last, event.capture = stream.last, stream.capture
        return OK

    def cudaStreamWaitEvent(self: Gpu, stream: Stream, event: Event, flags: int) -> Any:
        if event.destroyed or stream.destroyed:
            return _wrong(self, "cudaStreamWaitEvent with what is destroyed")
        if event.capture and stream.capture is None:
            self.join_capture(stream, event.capture)
        if event.capture is not stream.capture:
            _break(stream.capture)
            return _wrong(self, "a stream that is captured waits for an event that is not")
        self.wait(stream, event.last)
        return OK

    def cudaMemcpyAsync(self: Gpu, dst: int, src: int, count: int, kind: int, stream: Stream) -> Any:
        into_device = kind == cudaMemcpyKind.cudaMemcpyHostToDevice
        to, source = span(dst, count), span(src, count)
        for used, pinned in ((to, not into_device), (source, into_device)):
            self.bytes_at(used, pinned=pinned)  # a host buffer that is not pinned would make the copy synchronous

        def run() -> None:
            self.bytes_at(to)[:] = self.bytes_at(source)

        self.enqueue(stream, Operation("copy", run, [source], [to]))
        return OK

    def cudaStreamBeginCapture(self: Gpu, stream: Stream, mode: int) -> Any:
        if mode != cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal:
            self.problem("a capture that other threads can spoil")
        return OK if self.begin_capture(stream) else _wrong(self, "a capture within a capture")

    def cudaStreamEndCapture(self: Gpu, stream: Stream) -> Any:
        capture = stream.capture
        if capture is None or capture.origin is not stream:
            return _wrong(self, "the end of a capture that did not begin here")
        graph, joined = self.end_capture(capture)
        if not joined:
            return cudaError_t.cudaErrorStreamCaptureUnjoined
        if graph is None:
            return cudaError_t.cudaErrorStreamCaptureInvalidated
        self.born("graph")
        return OK, graph

    def cudaGraphInstantiate(self: Gpu, graph: Graph, flags: int) -> Any:
        if graph.destroyed:
            return _wrong(self, "cudaGraphInstantiate of a destroyed graph")
        self.born("executable graph")
        self.executable.append(Graph(graph.operations))
        return OK, self.executable[-1]

    def cudaGraphDestroy(self: Gpu, graph: Graph) -> Any:
        if graph.destroyed:
            return _wrong(self, "cudaGraphDestroy of a destroyed graph")
        graph.destroyed = True
        self.died("graph")
        return OK

    def cudaGraphExecDestroy(self: Gpu, graphExec: Graph) -> Any:
        if graphExec.destroyed:
            return _wrong(self, "cudaGraphExecDestroy of a destroyed graph")
        graphExec.destroyed = True
        self.died("executable graph")
        return OK

    def cudaGraphLaunch(self: Gpu, graphExec: Graph, stream: Stream) -> Any:
        if graphExec.destroyed or stream.destroyed:
            return _wrong(self, "cudaGraphLaunch with what is destroyed")
        self.launch(graphExec, stream)
        return OK


def _wrong(gpu: Gpu, text: str) -> cudaError_t:
    gpu.problem(text)
    return GONE


def _break(capture: Capture | None) -> None:
    if capture:
        capture.broken = True


FUNCTIONS = [name for name in vars(_Functions) if name.startswith("cuda")]
