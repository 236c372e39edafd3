"""TensorRT 11 for the builder's tests: NVIDIA's bindings, with a builder, a parser and a runtime that only take notes.

`tensorrt_hosts` makes the environment in which `import tensorrt` finds it. The names, enums, callbacks and plugin
registry are the real ones (`tensorrt_stubs`). What the three libraries of the full package would do is a stand-in: it
has no name that the real class lacks, calls the progress monitor and the logger as TensorRT does, and appends each
call as a JSON line to the file that `STAND_IN_NOTES` names.

`STAND_IN_FAULTS` is JSON of what is to go wrong: {"parse": graph}, {"build": graph}, {"abort": graph}, {"wait": graph}
(the build takes for ever), {"full": graph} (its plan is written to a full disk; `STAND_IN_SCRATCH` is the bundle's
engines/), {"layers": true} (no plan can be read back), {"libraries": true} (compatible plans need a plugin library).
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import tensorrt_bindings as real

CACHE = b"timing cache of this GPU"


def note(call: str, **arguments: Any) -> None:
    with Path(os.environ["STAND_IN_NOTES"]).open("a", encoding="utf-8") as file:
        print(json.dumps({"call": call, **arguments}), file=file)


def fault(kind: str, graph: str = "") -> bool:
    value = json.loads(os.environ.get("STAND_IN_FAULTS", "{}")).get(kind)
    return value is True or (bool(graph) and value == graph)


class Checked:
    """Has no public name that the real class of the same name has not."""

    def __init_subclass__(cls) -> None:
        true = getattr(real, cls.__name__, None)
        unknown = [name for name in vars(cls) if not name.startswith("_") and true and not hasattr(true, name)]
        assert not unknown, f"{cls.__name__} has no {unknown}"

    def __setattr__(self, name: str, value: Any) -> None:
        assert name.startswith("_") or hasattr(getattr(real, type(self).__name__), name), name
        object.__setattr__(self, name, value)


class Builder(Checked):
    def __init__(self, logger: real.ILogger):
        self._logger = logger
        plugins = [c.name for c in real.get_plugin_registry().all_creators if c.plugin_namespace == "mdnet"]
        note("Builder", plugins=sorted(plugins))

    def create_network(self, flags: int) -> INetworkDefinition:
        return INetworkDefinition(flags)

    def create_builder_config(self) -> IBuilderConfig:
        return IBuilderConfig()

    def create_optimization_profile(self) -> IOptimizationProfile:
        return IOptimizationProfile()

    def build_serialized_network(self, network: INetworkDefinition, config: IBuilderConfig) -> Any:
        name, monitor = network._name, config.progress_monitor
        note("build", graph=name, network=network._flags, **config._notes())
        monitor.phase_start("Building Engine", None, 4)
        for step in range(4):
            assert monitor.step_complete("Building Engine", step)
            while fault("wait", name):
                time.sleep(0.01)
                monitor.step_complete("Building Engine", step)
        monitor.phase_finish("Building Engine")
        if fault("abort", name):
            os.abort()
        if fault("build", name):
            self._logger.log(real.ILogger.Severity.WARNING, "a warning comes first")
            self._logger.log(real.ILogger.Severity.ERROR, "Error Code 10: no tactic\nfor node scan")
            self._logger.log(real.ILogger.Severity.ERROR, "and so it failed")
            return None
        if fault("full", name):
            (folder,) = Path(os.environ["STAND_IN_SCRATCH"]).glob(".building.*")
            (folder / f"{name}.plan").symlink_to("/dev/full")
        return np.frombuffer(f"plan of {name}".encode(), np.uint8)


class INetworkDefinition(Checked):
    def __init__(self, flags: int):
        self._flags, self._name = flags, ""
        self._inputs: list[Any] = []
        self._layers: list[Any] = []

    @property
    def num_inputs(self) -> int:
        return len(self._inputs)

    @property
    def num_layers(self) -> int:
        return len(self._layers)

    def get_input(self, index: int) -> ITensor:
        return self._inputs[index]

    def get_layer(self, index: int) -> ILayer:
        return self._layers[index]


class ITensor(Checked):
    def __init__(self, name: str, shape: list[int], dtype: real.DataType):
        self.name, self.shape, self.dtype = name, shape, dtype


class ILayer(Checked):
    num_outputs = 1

    def __init__(self, node: onnx.NodeProto):
        self.name, self.type = node.name or node.op_type, real.LayerType.CAST
        self._output = ITensor(node.output[0], [-1], real.DataType.FLOAT)

    def get_output(self, index: int) -> ITensor:
        return self._output


class OnnxParser(Checked):
    def __init__(self, network: INetworkDefinition, logger: real.ILogger):
        self._network, self.num_errors = network, 0

    def parse_from_file(self, path: str) -> bool:
        self._network._name = Path(path).stem
        if fault("parse", self._network._name):
            self.num_errors = 1
            return False
        graph = onnx.load(path, load_external_data=False).graph
        for value in graph.input:
            shape = [dim.dim_value or -1 for dim in value.type.tensor_type.shape.dim]
            self._network._inputs.append(ITensor(value.name, shape, real.DataType.FLOAT))
        self._network._layers = [ILayer(node) for node in graph.node]
        return True

    def get_error(self, index: int) -> ParserError:
        return ParserError()

    def get_used_vc_plugin_libraries(self) -> list[str]:
        return ["libnvinfer_vc_plugin.so.11"] if fault("libraries") else []


class ParserError(Checked):
    def desc(self) -> str:
        return "Unsupported operator\nSelectiveScan"


class IOptimizationProfile(Checked):
    def __init__(self) -> None:
        self._shapes: dict[str, Any] = {}

    def set_shape(self, name: str, *shapes: list[int]) -> None:
        self._shapes[name] = shapes


class ITimingCache(Checked):
    def __init__(self, content: bytes):
        self._content = content

    def serialize(self) -> Any:
        return np.frombuffer(CACHE, np.uint8)


class IBuilderConfig(Checked):
    progress_monitor: Any = None
    profiling_verbosity: Any = None
    builder_optimization_level: int | None = None
    hardware_compatibility_level: Any = real.HardwareCompatibilityLevel.NONE
    plugins_to_serialize: list[str] = []  # noqa: RUF012 (a property of the real class)

    def __init__(self) -> None:
        self._flags = [real.BuilderFlag.TF32.name]
        self._limits: dict[str, int] = {}
        self._profiles: list[IOptimizationProfile] = []
        self._cache: ITimingCache | None = None

    def set_flag(self, flag: real.BuilderFlag) -> None:
        self._flags.append(flag.name)

    def clear_flag(self, flag: real.BuilderFlag) -> None:
        self._flags.remove(flag.name)

    def set_memory_pool_limit(self, pool: real.MemoryPoolType, size: int) -> None:
        self._limits[pool.name] = size

    def add_optimization_profile(self, profile: IOptimizationProfile) -> int:
        self._profiles.append(profile)
        return 0

    def create_timing_cache(self, content: bytes) -> ITimingCache:
        note("create_timing_cache", content=bytes(content).decode())
        return ITimingCache(bytes(content))

    def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool:
        self._cache = cache
        return cache._content in (b"", CACHE)

    def _notes(self) -> dict[str, Any]:
        assert isinstance(self.progress_monitor, real.IProgressMonitor)
        return {
            "flags": self._flags,
            "limits": self._limits,
            "profiles": [profile._shapes for profile in self._profiles],
            "cache": self._cache and self._cache._content.decode(),
            "verbosity": self.profiling_verbosity.name,
            "level": self.builder_optimization_level,
            "hardware": self.hardware_compatibility_level.name,
            "libraries": self.plugins_to_serialize,
        }


class Runtime(Checked):
    engine_host_code_allowed = False

    def __init__(self, logger: real.ILogger):
        note("Runtime")

    def deserialize_cuda_engine(self, plan: bytes) -> ICudaEngine | None:
        note("deserialize", host_code=self.engine_host_code_allowed)
        return None if fault("layers") else ICudaEngine(plan)


class ICudaEngine(Checked):
    def __init__(self, plan: bytes):
        self._plan = plan

    def create_engine_inspector(self) -> EngineInspector:
        return EngineInspector(self._plan)


class EngineInspector(Checked):
    def __init__(self, plan: bytes):
        self._plan = plan

    def get_engine_information(self, layout: real.LayerInformationFormat) -> str:
        assert layout == real.LayerInformationFormat.JSON
        return json.dumps({"Layers": [self._plan.decode()]})
