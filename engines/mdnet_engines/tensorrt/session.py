"""Run a bundle's three plans with TensorRT 11 or TensorRT-RTX: encoder and Vim side by side, then the fusion.

    main ── image in ──┬── encoder ──┬── fusion ── score out ── the host waits here, once for a batch
    side               └── Vim ──────┘

- What passes from graph to graph stays on the device. Host buffers are pinned.
- A batch is padded to a power of two (or `max_batch`) with copies of its last image, and cut again. Each such size has
  execution contexts of its own: with every change of shapes TensorRT 11.2 is reported to leak the plugins' CUDA modules
  (NVIDIA/TensorRT#4849).
- Of each size the first batch is enqueued call by call, after which TensorRT allocates no more; the second is captured
  as one CUDA graph, fork and join included, which then runs every batch of this size.
- Each thread has contexts, streams and buffers of its own (NVIDIA/TensorRT#1300); engines are loaded once. A thread
  that ended leaves its set to the next new one.
- A size's first batches, in which TensorRT-RTX compiles kernels, run one at a time; its kernels are kept for the next
  process (`runtime_cache`).
- Activation memory is ours, not the contexts': a thread needs one area for Vim and one that the encoder and then the
  fusion use, for all batch sizes (NVIDIA/TensorRT#3276).

*Unverified on a GPU.* What is tested is this orchestration, with a stand-in for both NVIDIA modules.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from mdnet_engines.bundle.manifest import GRAPH_NAMES, GraphName, PlanRuntime
from mdnet_engines.cuda import runtime as cuda
from mdnet_engines.errors import GpuLostError, MDNetError, UsageError
from mdnet_engines.tensorrt.loaded_plans import Files, Model, Tensor
from mdnet_engines.tensorrt.plan_builder import MODULES


class TensorRTSessions:
    """The three graphs, ready to run. Safe to call from several threads; close it, or use it in a `with` block.

    `graphs` has each graph as a session of its own, for `mdnet_engines.sessions.session.run_graphs` and the parity
    gates; `run` is the way to scores. All run on the GPU that is the constructing thread's current one.

    Args:
        plans: the three plan files. A plan is native code: check its hash and its sidecar before you name it here.
        runtime: which library built the plans.
        max_batch: images that run at once; more are cut into pieces. Device memory is taken for this many.
        cuda_graphs: False enqueues every batch call by call, for plans that can't be captured.
        weights: of plans that were built without weights, the ONNX files that they were built from.
        digest: of the plans; with it, the kernels that TensorRT-RTX compiles are kept in the user's cache.
        host_code: allow plans that hold code for the CPU, as those for later versions do.

    Raises:
        MDNetError: no GPU, no such library, or plans that it can't load, don't fit together or take smaller batches.
    """

    def __init__(
        self,
        plans: Mapping[GraphName, Path],
        *,
        runtime: PlanRuntime = "tensorrt",
        max_batch: int,
        cuda_graphs: bool = True,
        weights: Mapping[GraphName, Path] | None = None,
        digest: str = "",
        host_code: bool = False,
    ):
        if runtime not in MODULES:
            raise UsageError(f"unknown runtime {runtime!r}; known: {', '.join(MODULES)}")
        if max_batch < 1:
            raise UsageError(f"max_batch is {max_batch}; expected 1 or more")
        self._gpu = cuda.current_gpu()
        files = Files(plans, weights, digest, host_code)
        self._model = Model(files, runtime, max_batch, cuda_graphs, self._gpu)
        self._workers: dict[threading.Thread, _Worker] = {}
        self._lock = threading.Lock()
        self._closed = False
        self.graphs: dict[GraphName, GraphSession] = {name: GraphSession(self, name) for name in GRAPH_NAMES}

    def run(self, images: np.ndarray, *, all_outputs: bool = False) -> dict[str, np.ndarray]:
        """Run the three graphs on uint8 images [n, S, S, 3]; give `score` [n], or every output of every graph.

        Raises:
            MDNetError: another type or shape, CUDA or TensorRT failed, or the sessions are closed.
        """
        every = [tensor.name for outputs in self._model.outputs.values() for tensor in outputs]
        return self._run(None, {"image": images}, every if all_outputs else ["score"])

    def close(self) -> None:
        """Wait for the batches that run, then free everything. Closing again does nothing."""
        with self._lock:
            self._closed = True
            workers = [*self._workers.values()]
            self._workers.clear()
        with suppress(MDNetError):
            cuda.call("cudaSetDevice", self._gpu)
        while workers:
            workers.pop().close()
        self._model.close()

    def __enter__(self) -> TensorRTSessions:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(
        self, graph: GraphName | None, feeds: Mapping[str, np.ndarray], wanted: list[str]
    ) -> dict[str, np.ndarray]:
        tensors, step = self._model.tensors, self._model.max_batch
        rows = _check(feeds, tensors)
        cuda.call("cudaSetDevice", self._gpu)  # a setting of each thread
        worker = self._worker()
        pieces = []
        with worker.lock:
            if self._closed:  # since the line before
                raise MDNetError("these TensorRT sessions are closed")
            for start in range(0, rows, step):
                piece = {name: value[start : start + step] for name, value in feeds.items()}
                pieces.append(worker.run(graph, piece, wanted))
        none = {name: np.zeros((0, *tensors[name].row), tensors[name].dtype) for name in wanted}
        return {name: np.concatenate([piece[name] for piece in pieces or [none]]) for name in wanted}

    def _worker(self) -> _Worker:
        me = threading.current_thread()
        with self._lock:
            if self._closed:
                raise MDNetError("these TensorRT sessions are closed")
            if me not in self._workers:
                ended = next((thread for thread in self._workers if not thread.is_alive()), None)
                self._workers[me] = self._workers.pop(ended) if ended else _Worker(self._model)
            return self._workers[me]


class GraphSession:
    """One graph of `TensorRTSessions` by itself, its inputs and outputs on the host, as `OrtSession` has them."""

    def __init__(self, sessions: TensorRTSessions, name: GraphName):
        self._sessions, self._name = sessions, name
        self.inputs: tuple[str, ...] = tuple(tensor.name for tensor in sessions._model.inputs[name])
        self.outputs: tuple[str, ...] = tuple(tensor.name for tensor in sessions._model.outputs[name])

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run the graph on `feeds` (input name → array, batch first); give its outputs by name.

        Raises:
            MDNetError: a feed is missing or has another shape or type, CUDA or TensorRT failed, or it is closed.
        """
        if missing := set(self.inputs) - set(feeds):
            raise MDNetError(f"the graph needs the input {min(missing)}; it was given {', '.join(feeds)}")
        return self._sessions._run(self._name, {name: feeds[name] for name in self.inputs}, list(self.outputs))


class _Worker:
    """One thread's streams, buffers and contexts. Whoever calls `run` holds `lock`."""

    def __init__(self, model: Model):
        self.lock = threading.Lock()
        self._model = model
        self._contexts: dict[int, dict[GraphName, Any]] = {}  # by batch size
        self._ran: set[tuple[GraphName | None, int]] = set()
        self._captured: dict[int, Any] = {}
        self._own = cuda.Resources()
        try:
            self._main, self._side = self._own.stream(), self._own.stream()
            self._forked, self._joined = self._own.event(), self._own.event()
            self._host = {t.name: self._own.pinned((model.max_batch, *t.row), t.dtype) for t in model.tensors.values()}
            self._device = {name: self._own.device(rows.nbytes) for name, rows in self._host.items()}
            shared = self._own.device(max(model.scratch("encoder"), model.scratch("fusion")))
            vim = self._own.device(model.scratch("vim"))
            self._scratch: dict[GraphName, int] = {"encoder": shared, "vim": vim, "fusion": shared}
        except BaseException:
            self._own.close()
            raise

    def run(self, graph: GraphName | None, feeds: Mapping[str, np.ndarray], wanted: list[str]) -> dict[str, np.ndarray]:
        """Run one graph, or all three, on at most `max_batch` rows."""
        size = self._model.padded(len(next(iter(feeds.values()))))
        if (graph, size) in self._ran:
            return self._run(graph, feeds, wanted, size)
        with self._model.kernels.filling():
            if size not in self._contexts:
                self._contexts[size] = self._model.contexts(size, self._device, self._scratch, self._main)
                self._own.at_close(self._contexts[size].clear)
            outputs = self._run(graph, feeds, wanted, size)
        self._ran.add((graph, size))
        return outputs

    def _run(
        self, graph: GraphName | None, feeds: Mapping[str, np.ndarray], wanted: list[str], size: int
    ) -> dict[str, np.ndarray]:
        rows = len(next(iter(feeds.values())))
        try:
            for name, value in feeds.items():
                self._host[name][:rows] = value
                self._host[name][rows:size] = value[-1]  # a real image: no NaN can come of it
                cuda.upload(self._device[name], self._host[name][:size], self._main)
            if graph is None:
                self._chain(size)
            else:
                self._execute(graph, size, self._main)
            for name in wanted:
                cuda.download(self._host[name][:rows], self._device[name], self._main)
            cuda.call("cudaStreamSynchronize", self._main)
        except BaseException as error:
            lost = self._drain()  # what was enqueued before the failure still uses the buffers
            if lost and isinstance(error, MDNetError) and not isinstance(error, GpuLostError):
                raise GpuLostError(f"{error}; {lost}") from None
            raise
        return {name: self._host[name][:rows].copy() for name in wanted}

    def close(self) -> None:
        with self.lock:
            self._drain()
            self._own.close()

    def _chain(self, size: int) -> None:
        if not self._model.cuda_graphs or (None, size) not in self._ran:
            self._enqueue(size)
            return
        if size not in self._captured:
            contexts, stream = self._contexts[size], int(self._main)
            asks = [graph for graph in contexts if hasattr(contexts[graph], "is_stream_capturable")]  # TensorRT-RTX
            if stuck := [graph for graph in asks if not contexts[graph].is_stream_capturable(stream)]:
                raise MDNetError(
                    f"{stuck[0]}.plan can't be captured in a CUDA graph; build it with REQUIRE_USER_ALLOCATION, "
                    "or run it with cuda_graphs=False"
                )
            self._captured[size] = self._own.capture(self._main, lambda: self._enqueue(size))
        cuda.call("cudaGraphLaunch", self._captured[size], self._main)

    def _enqueue(self, size: int) -> None:
        cuda.call("cudaEventRecord", self._forked, self._main)
        cuda.call("cudaStreamWaitEvent", self._side, self._forked, 0)
        self._execute("encoder", size, self._main)
        self._execute("vim", size, self._side)
        cuda.call("cudaEventRecord", self._joined, self._side)
        cuda.call("cudaStreamWaitEvent", self._main, self._joined, 0)
        self._execute("fusion", size, self._main)

    def _execute(self, graph: GraphName, size: int, stream: Any) -> None:
        if not self._contexts[size][graph].execute_async_v3(int(stream)):
            raise self._model.refused(f"failed to run {graph}")

    def _drain(self) -> GpuLostError | None:
        """Wait for what is enqueued; give the error after which nothing runs any more."""
        lost = None
        for stream in (self._main, self._side):
            try:
                cuda.call("cudaStreamSynchronize", stream)
            except GpuLostError as error:
                lost = error.with_traceback(None)
            except MDNetError:  # of what was enqueued
                pass
        return lost


def _check(feeds: Mapping[str, np.ndarray], tensors: Mapping[str, Tensor]) -> int:
    """How many rows the feeds have, all of them."""
    rows = len(next(iter(feeds.values())))
    for name, value in feeds.items():
        expected = (rows, *tensors[name].row)
        if value.dtype != tensors[name].dtype or value.shape != expected:
            wanted = f"{tensors[name].dtype} {list(expected)}"
            raise MDNetError(f"{name} is {value.dtype} {list(value.shape)}; the plan takes {wanted}")
    return rows
