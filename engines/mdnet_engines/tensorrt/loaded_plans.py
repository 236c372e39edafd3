"""A bundle's three plans, deserialised once for all threads: what they take and give, and execution contexts of them.

For `mdnet_engines.tensorrt.session`, which runs them. *Unverified on a GPU.*
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mdnet_engines.bundle.manifest import GRAPH_NAMES, GraphName, PlanRuntime
from mdnet_engines.errors import MDNetError, first_line
from mdnet_engines.tensorrt.builder_callbacks import make_logger
from mdnet_engines.tensorrt.plan_builder import NAMES, load

_DTYPES: dict[str, np.dtype[Any]] = {
    "UINT8": np.dtype(np.uint8),
    "FLOAT": np.dtype(np.float32),
    "HALF": np.dtype(np.float16),
}
_PROFILE = 0  # contexts start in it, and since TensorRT 10 may share it


@dataclass(frozen=True)
class Tensor:
    """A graph's input or output; `row` is its shape without the batch."""

    name: str
    dtype: np.dtype[Any]
    row: tuple[int, ...]


class Model:
    """What all threads share: the library, the three engines, and what these take and give."""

    def __init__(self, plans: Mapping[GraphName, Path], runtime: PlanRuntime, max_batch: int, cuda_graphs: bool):
        self.name, self.max_batch, self.cuda_graphs = runtime, max_batch, cuda_graphs
        self.trt = load(runtime)
        self.engines: dict[GraphName, Any] = {}
        self.inputs: dict[GraphName, list[Tensor]] = {}
        self.outputs: dict[GraphName, list[Tensor]] = {}
        self.log = make_logger(self.trt)
        try:
            self.runtime: Any = self.trt.Runtime(self.log)
        except Exception as error:  # pybind's, for a null pointer
            raise MDNetError(f"{NAMES[runtime]} did not start: {self.log.first_error or first_line(error)}") from None
        try:
            for graph in GRAPH_NAMES:
                self._load(graph, plans[graph])
            self.tensors = self._fitted()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        while self.engines:
            self.engines.popitem()
        self.runtime = None

    def refused(self, what: str, todo: str = "") -> MDNetError:
        """The error to raise: what was refused, why as far as TensorRT logged it, and what to do."""
        reason, self.log.first_error = self.log.first_error, ""
        return MDNetError(f"{NAMES[self.name]} {what}{': ' if reason else ''}{reason}{todo}")

    def contexts(self, size: int, device: Mapping[str, int], scratch: Mapping[GraphName, int]) -> dict[GraphName, Any]:
        """A context of each engine, for batches of `size` and none other."""
        made: dict[GraphName, Any] = {}
        try:
            for graph in GRAPH_NAMES:
                self._prepare(made, graph, size, device, scratch[graph])
        except BaseException:
            made.clear()
            raise
        return made

    # Below, engines and contexts have no name of their own: an error's traceback would keep them alive.

    def _prepare(
        self, made: dict[GraphName, Any], graph: GraphName, size: int, device: Mapping[str, int], scratch: int
    ) -> None:
        if (config := self.engines[graph].create_runtime_config()) is None:
            raise self.refused(f"can't configure {graph}")
        config.set_execution_context_allocation_strategy(self.trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if self.name == "tensorrt-rtx":  # else it compiles in the background, and a fallback might be captured
            config.dynamic_shapes_kernel_specialization_strategy = (
                self.trt.DynamicShapesKernelSpecializationStrategy.EAGER
            )
        made[graph] = self.engines[graph].create_execution_context(config)
        if made[graph] is None:
            raise self.refused(f"can't create an execution context for {graph}")
        for tensor in self.inputs[graph]:
            if not made[graph].set_input_shape(tensor.name, (size, *tensor.row)):
                raise self.refused(f"refused {size} rows of {tensor.name}")
        made[graph].set_device_memory(scratch, self.scratch(graph))
        for tensor in self.inputs[graph] + self.outputs[graph]:
            if not made[graph].set_tensor_address(tensor.name, device[tensor.name]):
                raise self.refused(f"refused the buffer of {tensor.name}")

    def scratch(self, graph: GraphName) -> int:
        """Bytes that the engine's activations take at most."""
        return int(self.engines[graph].get_device_memory_size_for_profile_v2(_PROFILE))

    def _load(self, graph: GraphName, plan: Path) -> None:
        try:
            self.engines[graph] = self.runtime.deserialize_cuda_engine(plan.read_bytes())
        except OSError as error:
            raise MDNetError(f"{plan.name} can't be read: {error.strerror}") from None
        if self.engines[graph] is None:
            rebuild = f"; rebuild with: mdnet-export engines BUNDLE --backend {self.name}"
            raise self.refused(f"can't load {plan.name}, built for another GPU or version", rebuild)
        self.inputs[graph], self.outputs[graph] = [], []
        for i in range(self.engines[graph].num_io_tensors):
            name = self.engines[graph].get_tensor_name(i)
            is_input = self.engines[graph].get_tensor_mode(name) == self.trt.TensorIOMode.INPUT
            (self.inputs if is_input else self.outputs)[graph].append(self._tensor(graph, name))
            if is_input:
                least, _, most = (shape[0] for shape in self.engines[graph].get_tensor_profile_shape(name, _PROFILE))
                if least > 1 or most < self.max_batch:
                    wanted = f"expected 1 to {self.max_batch}; choose another batch size, or rebuild the plan"
                    raise MDNetError(f"{plan.name} takes batches of {least} to {most}; {wanted}")

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
