"""Which runtimes can run which graph of a bundle, and opening the graphs on them.

| backend | encoder and fusion | Vim |
| --- | --- | --- |
| `tensorrt`, `tensorrt-rtx` | the bundle's plans (`mdnet-export engines`) | the same |
| `onnxruntime-cuda` | ONNX Runtime on the GPU, the graphs that plans are built from | the same |
| `openvino` | OpenVINO, float32 arithmetic | ONNX Runtime on the CPU |
| `openvino-bf16` | OpenVINO, bf16 for what is not int8 | ONNX Runtime on the CPU |
| `onnxruntime-cpu` | ONNX Runtime on the CPU | the same |

`openvino-bf16` is for bundles that are not fp32, on CPUs with native bf16. What `auto` takes:
`mdnet_engines.backends.choice`.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, cast, get_args

import numpy as np

from mdnet_engines.bundle.manifest import GRAPH_NAMES, GraphBackend, PlanRuntime
from mdnet_engines.errors import MDNetError, UsageError
from mdnet_engines.ops import native
from mdnet_engines.sessions import device_chain
from mdnet_engines.sessions import onnxruntime as session
from mdnet_engines.sessions import openvino as openvino_session
from mdnet_engines.sessions.onnxruntime import OrtSession
from mdnet_engines.sessions.openvino import OpenVINOSession
from mdnet_engines.sessions.session import Session, run_graphs
from mdnet_engines.system import machine
from mdnet_engines.tensorrt import plan_process
from mdnet_engines.tensorrt.plans import plan_path, usable_plans
from mdnet_engines.tensorrt.session import TensorRTSessions

if TYPE_CHECKING:
    from pathlib import Path

    from mdnet_engines.bundle.files import Bundle
    from mdnet_engines.bundle.manifest import GraphName, PlanSet

Backend = Literal[
    "auto", "onnxruntime-cpu", "onnxruntime-cuda", "openvino", "openvino-bf16", "tensorrt", "tensorrt-rtx"
]
BACKENDS: tuple[Backend, ...] = get_args(Backend)
_PLAN_RUNTIMES: tuple[PlanRuntime, ...] = get_args(PlanRuntime)
ON_GPU: frozenset[GraphBackend] = frozenset({"onnxruntime-cuda", *_PLAN_RUNTIMES})
_SCAN_GRAPHS: frozenset[GraphName] = frozenset({"vim"})  # they hold SelectiveScan, an operator that OpenVINO lacks


class Graphs(dict["GraphName", Session]):
    """A bundle's graphs, open. Close them to free what they hold."""

    def score(self, images: np.ndarray) -> np.ndarray:
        """uint8 images [n, S, S, 3] → scores [n]."""
        return run_graphs(self, images)["score"]

    def close(self) -> None:
        """Free the graphs. Closing again does nothing."""
        self.clear()


class _OnCuda(Graphs):
    """Graphs on ONNX Runtime's CUDA provider: what passes between them stays on the GPU."""

    def score(self, images: np.ndarray) -> np.ndarray:
        return device_chain.score(cast("Mapping[GraphName, OrtSession]", self), images)


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


@dataclass(frozen=True)
class Choice:
    """Which backend runs each graph of a bundle."""

    graphs: Mapping[GraphName, GraphBackend]
    plans: PlanSet | None = field(default=None, compare=False)
    """The plans, where they have been looked for already: their hashes take seconds."""

    @property
    def on_gpu(self) -> bool:
        """Whether a graph runs on a GPU; then all do."""
        return not ON_GPU.isdisjoint(self.graphs.values())

    def __str__(self) -> str:
        """In words: one name where all graphs have the same."""
        names = set(self.graphs.values())
        if len(names) == 1:
            return names.pop()
        return ", ".join(f"{graph} {backend}" for graph, backend in self.graphs.items())


def named(bundle: Bundle, backend: Backend) -> Choice:
    """The choice that the name of a backend stands for; whether it is installed shows when the graphs are opened.

    Raises:
        UsageError: an unknown backend, or one that is not for this bundle.
    """
    graphs = bundle.manifest.graphs
    if backend not in BACKENDS or backend == "auto":
        raise UsageError(f"unknown backend {backend!r}; known: {', '.join(BACKENDS)}")
    if backend == "openvino-bf16" and bundle.manifest.precision == "fp32":
        raise UsageError("openvino-bf16 can't meet the gates of an fp32 bundle; use the backend openvino")
    if backend in ("openvino", "openvino-bf16"):
        return Choice({name: "onnxruntime-cpu" if name in _SCAN_GRAPHS else backend for name in graphs})
    return Choice(dict.fromkeys(graphs, backend))


def candidates(bundle: Bundle) -> list[Choice]:
    """What `auto` may take on this machine, the likeliest to be fastest first.

    Never `openvino-bf16`: its arithmetic is coarser than the bundle's, and what that does to one score in hundreds a
    few probes don't show.
    """
    found = [plans for runtime in _PLAN_RUNTIMES if (plans := _find_plans(bundle, runtime))]
    if session.has_cuda():
        found.append(named(bundle, "onnxruntime-cuda"))
    on_cpu: list[Backend] = ["openvino"] if openvino_session.is_installed() else []
    # With our operators ONNX Runtime was the faster one at full size, with AVX2 alone too: 1.12 to 1.18 times in int8.
    has_ours = bundle.manifest.graphs["encoder"].cpu is not None and native.custom_op_library() is not None
    on_cpu.insert(0 if has_ours or bundle.manifest.precision == "int8" else 1, "onnxruntime-cpu")
    return found + [named(bundle, backend) for backend in on_cpu]


def open_choice(bundle: Bundle, choice: Choice, *, threads: int = 0, profile: Path | None = None) -> Graphs:
    """Open every graph of `bundle` on its backend.

    Args:
        threads: threads per graph on the CPU; 0 takes all the cores this process may use.
        profile: a folder for profiles of the graphs that ONNX Runtime runs.

    Raises:
        MDNetError: a backend is missing or can't load a graph.
    """
    _refuse_saturating(bundle, choice)
    for runtime in _PLAN_RUNTIMES:
        if runtime in choice.graphs.values():
            return _open_plans(bundle, choice.plans or usable_plans(bundle, plan_process.probe(runtime)))
    with ThreadPoolExecutor(len(choice.graphs)) as pool:  # optimising one graph takes one core
        opening = {
            name: pool.submit(open_graph, bundle, name, backend, threads, profile)
            for name, backend in choice.graphs.items()
        }
    graphs = {name: each.result() for name, each in opening.items()}
    return _OnCuda(graphs) if set(choice.graphs.values()) == {"onnxruntime-cuda"} else Graphs(graphs)


def open_graph(
    bundle: Bundle, graph: GraphName, backend: GraphBackend, threads: int = 0, profile: Path | None = None
) -> Session:
    """Open one graph on a backend that runs ONNX files; raises as `open_choice`."""
    bundle = bundle.on_gpus() if backend == "onnxruntime-cuda" else bundle
    path = bundle.graph_path(graph, cpu=backend == "onnxruntime-cpu")
    if backend == "openvino":
        return OpenVINOSession(path, threads=threads)
    if backend == "openvino-bf16":
        return OpenVINOSession(path, threads=threads, arithmetic="bf16")
    if backend == "tensorrt" or backend == "tensorrt-rtx":
        raise UsageError(f"plans of {backend} are opened all together")
    # An fp32 bundle is the reference, which TF32 would round; its plans are built without it too.
    tf32 = backend == "onnxruntime-cuda" and bundle.manifest.precision != "fp32"
    return OrtSession(path, backend=backend, threads=threads, tf32=tf32, profile=profile)


def _find_plans(bundle: Bundle, runtime: PlanRuntime) -> Choice | None:
    if not any(engines.runtime == runtime for engines in bundle.manifest.engines):
        return None  # before TensorRT is asked, which starts a process
    try:
        plans = usable_plans(bundle, plan_process.probe(runtime))
    except MDNetError:
        return None
    if plans.compatible:  # they hold code for the CPU: whoever gets a bundle from elsewhere has to ask for it by name
        return None
    return Choice(dict.fromkeys(bundle.manifest.graphs, runtime), plans)


def _open_plans(bundle: Bundle, engines: PlanSet) -> Graphs:
    sessions = TensorRTSessions(
        {name: plan_path(bundle, engines, name) for name in GRAPH_NAMES},
        runtime=engines.runtime,
        max_batch=engines.batch.maximum,
        weights={name: bundle.on_gpus().graph_path(name) for name in GRAPH_NAMES} if engines.stripped else None,
        digest=" ".join(entry.sha256 for entry in engines.files()),
        host_code=engines.compatible,
    )
    return _Plans(sessions)


def _refuse_saturating(bundle: Bundle, choice: Choice) -> None:
    old = bundle.manifest.schema_version == 1 and bundle.manifest.precision == "int8"
    on_cpu = {"onnxruntime-cpu", "openvino", "openvino-bf16"} & set(choice.graphs.values())
    if old and on_cpu and machine.lacks_vnni():
        raise MDNetError(
            f"{bundle.path} has int8 weights of 8 bits, which give wrong scores on a CPU without VNNI; "
            "build it again with: mdnet-export build --precision int8"
        )
