"""Which runtime runs which graph of a bundle.

| backend | encoder and fusion | Vim |
| --- | --- | --- |
| `auto` | the first of `AUTO_ORDER` that this machine has | likewise; never OpenVINO |
| `tensorrt`, `tensorrt-rtx` | the bundle's plans (`mdnet-export engines`) | the same |
| `onnxruntime-cuda` | ONNX Runtime on the GPU | the same |
| `openvino` | OpenVINO, float32 arithmetic | ONNX Runtime on the CPU |
| `openvino-bf16` | OpenVINO, bf16 for what is not int8 | ONNX Runtime on the CPU |
| `onnxruntime-cpu` | ONNX Runtime on the CPU | the same |

`openvino-bf16` is for bundles that are not fp32, on CPUs with native bf16. `auto` never takes it: of 768 drawn faces it
put 15 scores of the fp16 demo further than the fp16 gate's 0.01 from the fp32 demo's, up to 0.016. Whether it does for
other weights is for `mdnet-export verify --backend openvino-bf16` to say.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

from mdnet_engines import openvino_session, plan_process, session
from mdnet_engines.errors import MDNetError, UsageError
from mdnet_engines.manifest import GRAPH_NAMES, PlanRuntime
from mdnet_engines.openvino_session import OpenVINOSession
from mdnet_engines.plans import plan_path, usable_plans
from mdnet_engines.session import OrtSession, Session, chain
from mdnet_engines.tensorrt_session import TensorRTSessions

if TYPE_CHECKING:
    from mdnet_engines.bundle import Bundle
    from mdnet_engines.manifest import EngineSet, GraphName

GraphBackend = Literal["onnxruntime-cpu", "onnxruntime-cuda", "openvino", "openvino-bf16", "tensorrt", "tensorrt-rtx"]
Backend = Literal[
    "auto", "onnxruntime-cpu", "onnxruntime-cuda", "openvino", "openvino-bf16", "tensorrt", "tensorrt-rtx"
]
BACKENDS: tuple[Backend, ...] = get_args(Backend)
_PLAN_RUNTIMES: tuple[PlanRuntime, ...] = get_args(PlanRuntime)
AUTO_ORDER: tuple[GraphBackend, ...] = ("tensorrt", "tensorrt-rtx", "onnxruntime-cuda", "openvino", "onnxruntime-cpu")
_SCAN_GRAPHS: frozenset[GraphName] = frozenset({"vim"})  # which hold SelectiveScan, an operator OpenVINO has not


class Graphs(dict["GraphName", Session]):
    """A bundle's graphs, open. Close them to free what they hold."""

    def score(self, images: np.ndarray) -> np.ndarray:
        """uint8 images [n, S, S, 3] → scores [n]."""
        return chain(self, images)["score"]

    def close(self) -> None:
        """Free the graphs. Closing again does nothing."""
        self.clear()


class _Plans(Graphs):
    """Graphs on TensorRT: encoder and Vim run side by side, and what passes between graphs stays on the GPU."""

    def __init__(self, sessions: TensorRTSessions):
        super().__init__(sessions.graphs)
        self._sessions = sessions

    def score(self, images: np.ndarray) -> np.ndarray:
        return self._sessions.run(images)["score"]

    def close(self) -> None:
        self.clear()
        self._sessions.close()


def choose(bundle: Bundle, backend: Backend = "auto") -> dict[GraphName, GraphBackend]:
    """Which backend runs each graph of `bundle` on this machine. Opens nothing.

    Args:
        backend: the one that is asked for. `auto` looks at what is installed; any other name is taken at its word, and
            what it lacks is an error when the graphs are opened.

    Raises:
        UsageError: an unknown backend, or one that is not for this bundle.
    """
    return _choose(bundle, backend)[0]


def _choose(bundle: Bundle, backend: Backend) -> tuple[dict[GraphName, GraphBackend], EngineSet | None]:
    """As `choose`, with the plans where `auto` has looked for them and found some: their hashes take seconds."""
    if backend not in BACKENDS:
        raise UsageError(f"unknown backend {backend!r}; known: {', '.join(BACKENDS)}")
    graphs = bundle.manifest.graphs
    if backend == "auto":
        for runtime in _PLAN_RUNTIMES:
            if plans := _find_plans(bundle, runtime):
                return dict.fromkeys(graphs, runtime), plans
        order = [each for each in AUTO_ORDER if each not in _PLAN_RUNTIMES]
        return {name: next(each for each in order if _can_run(each, name)) for name in graphs}, None
    if backend == "openvino-bf16" and bundle.manifest.precision == "fp32":
        raise UsageError("openvino-bf16 can't hold the gates of an fp32 bundle; take the backend openvino")
    if backend in ("openvino", "openvino-bf16"):
        return {name: "onnxruntime-cpu" if name in _SCAN_GRAPHS else backend for name in graphs}, None
    return dict.fromkeys(graphs, backend), None


def open_graphs(bundle: Bundle, *, backend: Backend = "auto", threads: int = 0) -> Graphs:
    """Open every graph of `bundle` on the backend that `choose` gives it.

    Args:
        threads: threads per graph on the CPU; 0 takes all the cores this process may use.

    Raises:
        UsageError: as `choose`.
        MDNetError: a backend is missing or can't load a graph.
    """
    choice, plans = _choose(bundle, backend)
    for runtime in _PLAN_RUNTIMES:
        if runtime in choice.values():
            return _open_plans(bundle, plans or usable_plans(bundle, plan_process.probe(runtime)))
    with ThreadPoolExecutor(len(choice)) as pool:  # optimising one graph takes one core
        opening = {name: pool.submit(_open, bundle, name, chosen, threads) for name, chosen in choice.items()}
    return Graphs({name: each.result() for name, each in opening.items()})


def describe(choice: Mapping[GraphName, GraphBackend]) -> str:
    """A choice in words: one name where all graphs have the same."""
    names = set(choice.values())
    return names.pop() if len(names) == 1 else ", ".join(f"{graph} {backend}" for graph, backend in choice.items())


def _find_plans(bundle: Bundle, runtime: PlanRuntime) -> EngineSet | None:
    if not any(engines.runtime == runtime for engines in bundle.manifest.engines):
        return None  # before TensorRT is asked, which starts a process
    try:
        return usable_plans(bundle, plan_process.probe(runtime))
    except MDNetError:
        return None


def _open_plans(bundle: Bundle, engines: EngineSet) -> Graphs:
    plans = {name: plan_path(bundle, engines, name) for name in GRAPH_NAMES}
    return _Plans(TensorRTSessions(plans, runtime=engines.runtime, max_batch=engines.batch.maximum))


def _can_run(backend: GraphBackend, graph: GraphName) -> bool:
    if backend == "onnxruntime-cuda":
        return session.has_cuda()
    if backend == "openvino":
        return graph not in _SCAN_GRAPHS and openvino_session.is_installed()
    return True


def _open(bundle: Bundle, graph: GraphName, backend: GraphBackend, threads: int) -> Session:
    path = bundle.graph_path(graph, cpu=backend == "onnxruntime-cpu")
    if backend == "openvino":
        return OpenVINOSession(path, threads=threads)
    if backend == "openvino-bf16":
        return OpenVINOSession(path, threads=threads, arithmetic="bf16")
    if backend == "tensorrt" or backend == "tensorrt-rtx":
        raise AssertionError("plans are opened all together, by _open_plans")
    return OrtSession(path, backend=backend, threads=threads)
