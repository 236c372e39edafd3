"""A bundle's three plans, deserialised once for all threads: what they take and give, and execution contexts of them.

Plans without weights get them here, from the graphs that they were built from.

For `mdnet_engines.tensorrt.session`, which runs them. *Unverified on a GPU.*
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mdnet_engines.bundle.manifest import GRAPH_NAMES, GraphName, PlanRuntime
from mdnet_engines.cuda import runtime as cuda
from mdnet_engines.errors import MDNetError, first_line
from mdnet_engines.tensorrt.builder_callbacks import make_logger, one_line
from mdnet_engines.tensorrt.plan_builder import NAMES, load
from mdnet_engines.tensorrt.runtime_cache import RuntimeCache, cache_file

_DTYPES: dict[str, np.dtype[Any]] = {
    "UINT8": np.dtype(np.uint8),
    "FLOAT": np.dtype(np.float32),
    "HALF": np.dtype(np.float16),
}


@dataclass(frozen=True)
class Files:
    """What to load, and how.

    `weights` are the ONNX files of plans that were built without weights. With a `digest` of the plans, TensorRT-RTX's
    kernels are kept in the user's cache. `host_code` allows plans that hold code for the CPU, as compatible ones do.
    """

    plans: Mapping[GraphName, Path]
    weights: Mapping[GraphName, Path] | None = None
    digest: str = ""
    host_code: bool = False


@dataclass(frozen=True)
class Tensor:
    """A graph's input or output; `row` is its shape without the batch."""

    name: str
    dtype: np.dtype[Any]
    row: tuple[int, ...]


class Model:
    """What all threads share: the library, the three engines, and what these take and give."""

    def __init__(self, files: Files, runtime: PlanRuntime, max_batch: int, cuda_graphs: bool, gpu: int):
        self.name, self.max_batch, self.cuda_graphs, self._gpu = runtime, max_batch, cuda_graphs, gpu
        self.trt = load(runtime)
        self.sizes = sorted({self.padded(rows) for rows in range(1, max_batch + 1)})
        self.profiles: dict[GraphName, list[range]] = {}  # the batch sizes that each takes
        self._configs: dict[GraphName, Any] = {}
        self.engines: dict[GraphName, Any] = {}
        self.inputs: dict[GraphName, list[Tensor]] = {}
        self.outputs: dict[GraphName, list[Tensor]] = {}
        self.log = make_logger(self.trt)
        try:
            self.runtime: Any = self.trt.Runtime(self.log)
        except Exception as error:  # pybind's, for a null pointer
            raise MDNetError(f"{NAMES[runtime]} did not start: {self.log.first_error or first_line(error)}") from None
        self.kernels = RuntimeCache(self._kernels_file(files.digest))
        try:
            if files.host_code:
                self.runtime.engine_host_code_allowed = True
            for graph in GRAPH_NAMES:
                self._load(graph, files.plans[graph])
                if problem := self._refit(graph, files.plans[graph], files.weights[graph] if files.weights else None):
                    raise MDNetError(problem)
            self.tensors = self._fitted()
            for graph in GRAPH_NAMES:
                self._configure(graph)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._configs.clear()
        self.kernels.close()
        while self.engines:
            self.engines.popitem()
        self.runtime = None

    def refused(self, what: str, todo: str = "") -> MDNetError:
        """The error to raise: what was refused, why as far as TensorRT logged it, and what to do."""
        reason, self.log.first_error = self.log.first_error, ""
        return MDNetError(f"{NAMES[self.name]} {what}{': ' if reason else ''}{reason}{todo}")

    def padded(self, rows: int) -> int:
        """How many rows run where `rows` are asked for."""
        return min(1 << (rows - 1).bit_length(), self.max_batch)

    def contexts(
        self, size: int, device: Mapping[str, int], scratch: Mapping[GraphName, int], stream: Any
    ) -> dict[GraphName, Any]:
        """A context of each engine, for batches of `size` and none other. Nothing may be pending on `stream`."""
        made: dict[GraphName, Any] = {}
        try:
            for graph in GRAPH_NAMES:
                self._prepare(made, graph, size, device, scratch[graph], stream)
        except BaseException:
            made.clear()
            raise
        return made

    # Below, engines and contexts have no name of their own: an error's traceback would keep them alive.

    def _configure(self, graph: GraphName) -> None:
        self._configs[graph] = config = self.engines[graph].create_runtime_config()
        if config is None:
            raise self.refused(f"can't configure {graph}")
        config.set_execution_context_allocation_strategy(self.trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if self.name == "tensorrt-rtx":  # else it compiles in the background, and a fallback might be captured
            config.dynamic_shapes_kernel_specialization_strategy = (
                self.trt.DynamicShapesKernelSpecializationStrategy.EAGER
            )
            self.kernels.attach(config)
            self.log.first_error = ""  # whatever it had against the cache: that is no reason for a later failure

    def _prepare(
        self,
        made: dict[GraphName, Any],
        graph: GraphName,
        size: int,
        device: Mapping[str, int],
        scratch: int,
        stream: Any,
    ) -> None:
        made[graph] = self.engines[graph].create_execution_context(self._configs[graph])
        if made[graph] is None:
            raise self.refused(f"can't create an execution context for {graph}")
        if profile := self._profile(graph, size):  # contexts start in the first; since TensorRT 10 they may share one
            if not made[graph].set_optimization_profile_async(profile, int(stream)):
                raise self.refused(f"refused profile {profile} of {graph}")
            cuda.call("cudaStreamSynchronize", stream)
        for tensor in self.inputs[graph]:
            if not made[graph].set_input_shape(tensor.name, (size, *tensor.row)):
                raise self.refused(f"refused {size} rows of {tensor.name}")
        made[graph].set_device_memory(scratch, self.scratch(graph))
        for tensor in self.inputs[graph] + self.outputs[graph]:
            if not made[graph].set_tensor_address(tensor.name, device[tensor.name]):
                raise self.refused(f"refused the buffer of {tensor.name}")

    def _kernels_file(self, digest: str) -> Path | None:
        if self.name == "tensorrt-rtx" and digest:
            with suppress(MDNetError):
                return cache_file(digest, self.trt.__version__, cuda.describe_gpu(self._gpu))
        return None

    def scratch(self, graph: GraphName) -> int:
        """Bytes that the engine's activations take at most, in the profiles that batches of ours run in."""
        used = {self._profile(graph, size) for size in self.sizes}
        return max(int(self.engines[graph].get_device_memory_size_for_profile_v2(profile)) for profile in used)

    def _profile(self, graph: GraphName, size: int) -> int:
        return next(number for number, sizes in enumerate(self.profiles[graph]) if size in sizes)

    def _load(self, graph: GraphName, plan: Path) -> None:
        try:
            self.engines[graph] = self.runtime.deserialize_cuda_engine(plan.read_bytes())
        except OSError as error:
            raise MDNetError(f"{plan.name} can't be read: {error.strerror}") from None
        if self.engines[graph] is None:
            # Plans are built for the first GPU that a process sees.
            where, choose = (f" on GPU {self._gpu}", f"CUDA_VISIBLE_DEVICES={self._gpu} ") if self._gpu else ("", "")
            rebuild = f"; rebuild with: {choose}mdnet-export engines BUNDLE --backend {self.name}"
            raise self.refused(f"can't load {plan.name}{where}, built for another GPU or version", rebuild)
        self.inputs[graph], self.outputs[graph] = [], []
        taken: list[range] = []
        for i in range(self.engines[graph].num_io_tensors):
            name = self.engines[graph].get_tensor_name(i)
            is_input = self.engines[graph].get_tensor_mode(name) == self.trt.TensorIOMode.INPUT
            (self.inputs if is_input else self.outputs)[graph].append(self._tensor(graph, name))
            if is_input:
                taken = [self._taken(graph, name, p) for p in range(self.engines[graph].num_optimization_profiles)]
                if any(not any(size in sizes for sizes in taken) for size in self.sizes):
                    takes = " and ".join(f"{sizes[0]} to {sizes[-1]}" for sizes in taken)
                    wanted = f"expected 1 to {self.max_batch}; choose another batch size, or rebuild the plan"
                    raise MDNetError(f"{plan.name} takes batches of {takes}; {wanted}")
        self.profiles[graph] = taken

    def _taken(self, graph: GraphName, name: str, profile: int) -> range:
        least, _, most = (shape[0] for shape in self.engines[graph].get_tensor_profile_shape(name, profile))
        return range(least, most + 1)

    def _refit(self, graph: GraphName, plan: Path, weights: Path | None) -> str | None:
        """Give a plan without weights those of its graph, or say why not. A plan that has weights can't be refitted."""
        if not self.engines[graph].refittable and weights is None:
            return None
        rebuild = f"build plans with weights: mdnet-export engines BUNDLE --backend {self.name}"
        if weights is None:
            return f"{plan.name} is without weights, and its graph was not named; open it by its bundle, or {rebuild}"
        if not weights.exists():
            return f"{plan.name} is without weights, and {weights} is missing; copy the whole bundle, or {rebuild}"
        try:
            refitter = self.trt.Refitter(self.engines[graph], self.log)
            parser = self.trt.OnnxParserRefitter(refitter, self.log)
            done = parser.refit_from_file(str(weights.absolute())) and not refitter.get_missing_weights()
            if done and refitter.refit_cuda_engine():
                return None
            reason = parser.get_error(0).desc() if parser.num_errors else self.log.first_error
            if not reason and (missing := refitter.get_missing_weights()):
                reason = f"it has no {missing[0]}"
        except Exception as error:  # pybind's, for a null pointer
            reason = self.log.first_error or first_line(error)
        self.log.first_error = ""
        why = f" ({one_line(reason)})" if reason else ""
        return f"{NAMES[self.name]} can't put the weights of {weights.name} into {plan.name}{why}; {rebuild}"

    def _tensor(self, graph: GraphName, name: str) -> Tensor:
        batch, *row = self.engines[graph].get_tensor_shape(name)
        kind = self.engines[graph].get_tensor_dtype(name).name
        if batch != -1 or -1 in row or kind not in _DTYPES:
            raise MDNetError(f"{graph}: {name} is {kind} {[batch, *row]}; expected a batch of rows of a fixed shape")
        return Tensor(name, _DTYPES[kind], tuple(row))

    def _fitted(self) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for tensor in [t for graph in GRAPH_NAMES for t in self.inputs[graph] + self.outputs[graph]]:
            if tensors.setdefault(tensor.name, tensor) != tensor:
                raise MDNetError(f"the plans disagree on {tensor.name}; rebuild all three of one bundle")
        encoder, vim, fusion = ({t.name for t in self.inputs[graph]} for graph in GRAPH_NAMES)
        given = {t.name for graph in ("encoder", "vim") for t in self.outputs[graph]}
        if encoder != {"image"} or vim != {"image"} or fusion - given or "score" not in tensors:
            raise MDNetError("the plans are not a bundle's encoder, vim and fusion; rebuild all three of one bundle")
        return tensors
