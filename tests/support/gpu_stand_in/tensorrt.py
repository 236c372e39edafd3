"""`tensorrt` and `tensorrt_rtx` on the stand-in, as far as the sessions use them, for the plans of networks.py."""

from __future__ import annotations

import enum
import json
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from gpu_stand_in.device import ALIGNMENT, Gpu, Operation, Range, span
from gpu_stand_in.networks import ENGINES, TYPES, Tensors


class Severity(enum.IntEnum):
    INTERNAL_ERROR = 0
    ERROR = 1
    WARNING = 2


class TensorIOMode(enum.Enum):
    NONE = 0
    INPUT = 1
    OUTPUT = 2


class ExecutionContextAllocationStrategy(enum.Enum):
    STATIC = 0
    USER_MANAGED = 2


class DynamicShapesKernelSpecializationStrategy(enum.Enum):
    LAZY = 0
    EAGER = 1


class IRuntimeCache:
    """TensorRT-RTX's alone. As bytes: the machine, then the kernels."""

    def __init__(self, gpu: Gpu):
        self.gpu = gpu
        self._kernels: set[str] = set()

    def deserialize(self, blob: bytes) -> bool:
        if self.gpu.fails("deserialize"):
            raise RuntimeError("no luck with the cache")
        machine, *kernels = bytes(blob).decode().split("\n")
        if machine != self.gpu.machine:
            return False
        self._kernels = set(kernels)
        return True

    def serialize(self) -> bytes | None:
        return None if self.gpu.fails("serialize") else "\n".join([self.gpu.machine, *sorted(self._kernels)]).encode()


Specialization = DynamicShapesKernelSpecializationStrategy
DataType = enum.Enum("DataType", {name: name for name in TYPES})  # type: ignore[misc]


class ILogger:
    Severity = Severity
    INTERNAL_ERROR, ERROR, WARNING = Severity.INTERNAL_ERROR, Severity.ERROR, Severity.WARNING

    def log(self, severity: Severity, msg: str) -> None:
        raise NotImplementedError


class Runtime:
    engine_host_code_allowed: bool
    gpu: Gpu  # of the subclass that a module has

    def __init__(self, logger: ILogger):
        self.logger, self._started, self.engine_host_code_allowed = logger, False, False
        if self.gpu.fails("Runtime"):
            logger.log(Severity.ERROR, "no\nluck")
            raise TypeError("pybind11::init(): factory function returned nullptr")
        self._started = True
        self.gpu.born("runtime")

    def __del__(self) -> None:
        if self._started:
            self.gpu.died("runtime")

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> ICudaEngine | None:
        if self.gpu.fails("deserialize_cuda_engine") or not serialized_engine.startswith(b"{"):
            self.logger.log(Severity.ERROR, "Error Code 6: Internal Error (it is\tnot\nmine)")
            return None
        plan = json.loads(serialized_engine)
        if plan.get("host_code") and not self.engine_host_code_allowed:
            self.logger.log(Severity.ERROR, "the plan has a runtime of its own, which is not allowed")
            return None
        return ICudaEngine(self, plan)


class IRuntimeConfig:
    # TensorRT-RTX's alone, and there LAZY until it is set
    dynamic_shapes_kernel_specialization_strategy = Specialization.LAZY

    def __init__(self, gpu: Gpu) -> None:
        self.gpu, self._strategy = gpu, ExecutionContextAllocationStrategy.STATIC
        self._cache: IRuntimeCache | None = None

    def set_execution_context_allocation_strategy(self, strategy: ExecutionContextAllocationStrategy) -> None:
        self._strategy = strategy

    def create_runtime_cache(self) -> IRuntimeCache:
        if self.gpu.fails("create_runtime_cache"):
            raise AttributeError("no such call")
        return IRuntimeCache(self.gpu)

    def set_runtime_cache(self, cache: IRuntimeCache) -> bool:
        if self.gpu.fails("set_runtime_cache"):
            return False
        self._cache = cache
        return True


class ICudaEngine:
    def __init__(self, runtime: Runtime, plan: dict[str, Any]):
        self._runtime, self._plan = runtime, plan
        self._network = ENGINES[plan.get("is", plan["graph"])]
        self._profiles: list[list[int]] = plan.get("profiles", [plan["batches"]])
        self._weights = not plan.get("stripped")
        self._all = {**self._network.inputs, **self._network.outputs}
        runtime.gpu.born("engine")

    def __del__(self) -> None:
        self._runtime.gpu.died("engine")

    @property
    def num_io_tensors(self) -> int:
        return len(self._all)

    @property
    def num_optimization_profiles(self) -> int:
        return len(self._profiles)

    @property
    def refittable(self) -> bool:
        return bool(self._plan.get("stripped"))

    def get_tensor_name(self, index: int) -> str:
        return list(self._all)[index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if name in self._network.inputs else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> Any:
        return DataType(self._plan.get("dtype", self._all[name][0]))

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (self._plan.get("batch", -1), *self._plan.get("row", self._all[name][1]))

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[tuple[int, ...]]:
        return [(batch, *self._all[name][1]) for batch in self._profiles[profile_index]]

    def get_device_memory_size_for_profile_v2(self, profile_index: int) -> int:
        return self._plan["memory"] * self._profiles[profile_index][-1] // self._profiles[-1][-1]

    def create_runtime_config(self) -> IRuntimeConfig | None:
        return None if self._runtime.gpu.fails("create_runtime_config") else IRuntimeConfig(self._runtime.gpu)

    def create_execution_context(self, runtime_config: IRuntimeConfig) -> IExecutionContext | None:
        if self._runtime.gpu.fails("create_execution_context"):
            self._runtime.logger.log(Severity.INTERNAL_ERROR, "out of everything")
            return None
        return self._context(self, runtime_config)

    @property
    def _context(self) -> type[IExecutionContext]:
        return self._runtime.context  # type: ignore[attr-defined]


class Refitter:
    def __init__(self, engine: ICudaEngine, logger: ILogger):
        self._engine, self.logger, self._given = engine, logger, False
        if engine._runtime.gpu.fails("Refitter") or not engine.refittable:
            raise TypeError("pybind11::init(): factory function returned nullptr")

    def get_missing_weights(self) -> list[str]:
        return [] if self._given else ["conv_in.weight"]

    def refit_cuda_engine(self) -> bool:
        if self._engine._runtime.gpu.fails("refit_cuda_engine"):
            self.logger.log(Severity.ERROR, "Error Code 1: Cuda Runtime (unlucky)")
            return False
        self._engine._weights = self._given
        return self._given


class ParserError:
    def desc(self) -> str:
        return "Failed to open file:\nencoder.onnx.data"


class OnnxParserRefitter:
    """Of graphs as `networks.write_weights` makes them."""

    def __init__(self, refitter: Refitter, logger: ILogger):
        self._refitter, self.logger, self.num_errors = refitter, logger, 0

    def refit_from_file(self, model: str) -> bool:
        if self._refitter._engine._runtime.gpu.fails("refit_from_file"):
            return False
        graph = json.loads(Path(model).read_bytes())
        if not all(Path(model).with_name(name).exists() for name in graph["data"]):
            self.num_errors = 1
            return False
        self._refitter._given = graph["graph"] == self._refitter._engine._plan["graph"]
        return True

    def get_error(self, index: int) -> ParserError:
        return ParserError()


class IExecutionContext:
    def __init__(self, engine: ICudaEngine, config: IRuntimeConfig):
        self._engine, self._config = engine, config
        self._gpu, self._plan, self._network = engine._runtime.gpu, engine._plan, engine._network
        self._owner = threading.current_thread()
        self._rows: dict[str, int] = {}
        self._profile = 0
        self._ran_with: dict[str, int] | None = None
        self._addresses: dict[str, int] = {}
        self._scratch: Range | None = None
        self._runs: list[Callable[[], None]] = []
        self._gpu.born("context")

    def __del__(self) -> None:
        launchable = [op for graph in self._gpu.executable if not graph.destroyed for op in graph.operations]
        if any(op.run in self._runs for op in self._gpu.pending + launchable):
            self._gpu.problem("a context was destroyed while it ran, or before the CUDA graph that it is in")
        self._gpu.died("context")

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        self._used()
        if self._rows or stream_handle not in self._gpu.streams:
            self._gpu.problem("a profile was set after the shapes, or on no stream")
        self._profile = profile_index
        return not self._gpu.fails("set_optimization_profile_async")

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self._used()
        least, _, most = self._engine._profiles[self._profile]
        if self._gpu.fails("set_input_shape") or name not in self._network.inputs:
            return False
        self._rows[name] = shape[0]
        if self._ran_with is not None and self._rows != self._ran_with:
            self._gpu.problem(f"a context of {self._plan['graph']} went to another batch size")
        return shape[1:] == self._network.inputs[name][1] and least <= shape[0] <= most

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self._used()
        if self._gpu.fails("set_tensor_address"):
            return False
        self._addresses[name] = memory
        return memory % ALIGNMENT == 0

    def set_device_memory(self, memory: int, size: int) -> None:
        self._used()
        if memory % ALIGNMENT or size < self._engine.get_device_memory_size_for_profile_v2(self._profile):
            self._gpu.problem("device memory of a context that is too small, or not aligned")
        self._scratch = span(memory, size)

    def execute_async_v3(self, stream_handle: int) -> bool:
        with self._gpu.lock:
            self._used()
            stream = self._gpu.streams.get(stream_handle)
            if self._gpu.fails("execute_async_v3"):
                if stream and stream.capture:
                    stream.capture.broken = True
                self._engine._runtime.logger.log(Severity.ERROR, "Error Code 1: Cuda Runtime (unlucky)")
                return False
            if self._gpu.lost:
                self._engine._runtime.logger.log(Severity.ERROR, "Error Code 1: Cuda Runtime (no device)")
                return False
            problem = self._not_ready(stream)
            if problem or stream is None:
                self._gpu.problem(f"{self._plan['graph']}: {problem}")
                return False
            if self._ran_with is None:
                self._compile()
            self._ran_with = dict(self._rows)
            op = self._operation()
            self._runs.append(op.run)
            self._gpu.enqueue(stream, op)
            return True

    def _compile(self) -> None:
        """What TensorRT-RTX does when a shape first runs, unless its cache has the kernels."""
        kernel, cache = f"{self._plan['graph']} {self._rows}", self._config._cache
        if cache is None or kernel not in cache._kernels:
            self._gpu.calls["compile"] += 1
        if cache is not None:
            cache._kernels.add(kernel)

    def _not_ready(self, stream: Any) -> str | None:
        inputs, outputs = self._network.inputs, self._network.outputs
        if stream is None or stream.destroyed:
            return "no such stream"
        if set(self._rows) != set(inputs) or len(set(self._rows.values())) != 1:
            return "shapes are not set"
        if set(self._addresses) != {*inputs, *outputs}:
            return "addresses are not set"
        if self._config._strategy is not ExecutionContextAllocationStrategy.USER_MANAGED or self._scratch is None:
            return "device memory is not set"
        if stream.capture and self._ran_with is None:  # the first run allocates
            stream.capture.broken = True
            return "captured before it ran once"
        strategy, eager = self._config.dynamic_shapes_kernel_specialization_strategy, Specialization.EAGER
        if hasattr(self, "is_stream_capturable") and stream.capture and strategy is not eager:  # TensorRT-RTX
            return "captured with kernels that may be the fallback"
        return None

    def _operation(self) -> Operation:
        """The run, as the context is now: a graph that was captured goes on with these addresses."""
        rows, graph, scratch = next(iter(self._rows.values())), self._plan["graph"], self._scratch
        assert scratch is not None

        def where(tensors: Tensors) -> dict[str, Range]:
            return {
                name: span(self._addresses[name], rows * int(np.prod(row, initial=1)) * np.dtype(TYPES[kind]).itemsize)
                for name, (kind, row) in tensors.items()
            }

        inputs, outputs = where(self._network.inputs), where(self._network.outputs)
        network, gpu, has_weights = self._network, self._gpu, self._engine._weights

        def view(name: str, tensors: Tensors, used: Range) -> np.ndarray:
            kind, row = tensors[name]
            return gpu.bytes_at(used, pinned=False).view(TYPES[kind]).reshape(rows, *row)

        def run() -> None:
            gpu.bytes_at(scratch, pinned=False)[:] = 0xFF
            given = {name: view(name, network.inputs, used).copy() for name, used in inputs.items()}
            gpu.seen.append((graph, given))
            for name, value in network.compute(**given).items():
                view(name, network.outputs, outputs[name])[:] = value if has_weights else 0

        return Operation(graph, run, [*inputs.values()], [*outputs.values(), scratch])

    def _used(self) -> None:
        me = threading.current_thread()
        if me is not self._owner and self._owner.is_alive():
            self._gpu.problem(f"a context of {self._plan['graph']} is used by two threads")
        self._owner = me


class RtxExecutionContext(IExecutionContext):
    def is_stream_capturable(self, stream: int) -> bool:
        return self._plan.get("capturable", True)


def make_tensorrt(gpu: Gpu, name: str = "tensorrt") -> ModuleType:
    """The module of that name."""
    module = ModuleType(name)
    rtx = name == "tensorrt_rtx"
    context = RtxExecutionContext if rtx else IExecutionContext
    contents = {
        "__version__": "1.7.1.116" if rtx else "11.4.0.106",
        "ILogger": ILogger,
        "Refitter": Refitter,
        "OnnxParserRefitter": OnnxParserRefitter,
        "Runtime": type("Runtime", (Runtime,), {"gpu": gpu, "context": context}),
        "TensorIOMode": TensorIOMode,
        "ExecutionContextAllocationStrategy": ExecutionContextAllocationStrategy,
    }
    if rtx:
        contents["DynamicShapesKernelSpecializationStrategy"] = DynamicShapesKernelSpecializationStrategy
    for key, value in contents.items():
        setattr(module, key, value)
    return module
