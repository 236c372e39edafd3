"""Build plans, in a process of its own: `python -m mdnet_engines.tensorrt.plan_builder`, started by `plan_process`.

TensorRT is native code that may end its process (a damaged file, no driver), so no other process imports it to build.

Requests: {"ask": "probe", "runtime": …} gives the version, the GPU and the targets. {"ask": "build", …} writes the
plans of `graphs` into `folder`. {"ask": "layers", …} reads the plans' layers back, which takes a GPU.

TensorRT 11 and TensorRT-RTX have one Python API. They differ in this: TensorRT needs the GPU it builds for, has the
plugin of the selective scan and a timing cache; TensorRT-RTX builds without a GPU, for one compute capability, several,
or none in particular, takes the scan's function body, and its timing cache does nothing since 1.2.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import time
from pathlib import Path
from typing import Any

from mdnet_engines.errors import MDNetError, first_line
from mdnet_engines.system.child_process import Say, serve
from mdnet_engines.system.gpu import visible_gpu
from mdnet_engines.tensorrt import plugin as tensorrt_plugin
from mdnet_engines.tensorrt.builder_callbacks import BuilderProgress, make_logger, make_monitor, one_line

LAYERS, TIMING_CACHE = "layers.json", "timing.cache"
MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
NAMES = {"tensorrt": "TensorRT", "tensorrt-rtx": "TensorRT-RTX"}
EXTRAS = {"tensorrt": "tensorrt", "tensorrt-rtx": "rtx"}
OLDEST = {"tensorrt": 11, "tensorrt-rtx": 1}  # major versions; TensorRT 10 has networks that are not strongly typed

NEEDS_GPU = (
    "TensorRT builds for the GPU in the machine, and there is none (or no driver); run this on the machine that will "
    "serve, or build for RTX GPUs with --backend tensorrt-rtx, which needs none"
)


def load(runtime: str) -> Any:
    """The module of `runtime`, or `MDNetError` that says what to install."""
    module, name, extra = MODULES[runtime], NAMES[runtime], EXTRAS[runtime]
    try:
        trt = importlib.import_module(module)
        version = str(trt.__version__)
    except Exception as error:  # a missing package, or one of its libraries
        raise MDNetError(f"{name} can't be imported; it is the extra mdnet[{extra}] ({first_line(error)})") from error
    major = version.partition(".")[0]
    if not major.isdecimal() or int(major) < OLDEST[runtime]:
        raise MDNetError(f"{name} {version} is too old; {OLDEST[runtime]} or newer is the extra mdnet[{extra}]")
    return trt


def probe(request: dict[str, Any], say: Say) -> dict[str, Any]:
    """What there is to build with, and for."""
    trt, gpu = load(request["runtime"]), visible_gpu()
    names = trt.ComputeCapability.__members__ if request["runtime"] == "tensorrt-rtx" else ()
    targets = [f"sm_{name[2:]}" for name in names if name.startswith("SM")]
    return {"version": trt.__version__, "gpu": gpu and dataclasses.asdict(gpu), "targets": targets}


def build(request: dict[str, Any], say: Say) -> dict[str, Any]:
    """Write the plans, the layers and, of TensorRT, the timing cache into `folder`; give their figures."""
    runtime, folder = request["runtime"], Path(request["folder"])
    trt, gpu = load(runtime), visible_gpu()
    logger = make_logger(trt)
    if runtime == "tensorrt":
        if gpu is None:  # its Builder would be a null pointer
            raise MDNetError(NEEDS_GPU)
        tensorrt_plugin.register_plugins()
    builder = trt.Builder(logger)
    cache = _timing_cache(trt, builder, request.get("timing_cache"), say) if runtime == "tensorrt" else None
    figures: dict[str, Any] = {}
    layers: dict[str, Any] = {}
    for name, graph in request["graphs"].items():
        start = time.perf_counter()
        logger.first_error = ""
        monitor = make_monitor(trt, BuilderProgress(name, lambda text: say("step", text)))
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, logger)
        if not parser.parse_from_file(graph["onnx"]):
            raise MDNetError(f"{NAMES[runtime]} can't read the graph {name}: {_parser_error(parser, logger)}")
        layers[name] = _layers(network)
        config = _config(trt, builder, network, request, monitor, tf32=graph["tf32"])
        if request["compatible"] and (libraries := parser.get_used_vc_plugin_libraries()):
            config.plugins_to_serialize = libraries  # NVIDIA's own; ours is in the plan as PTX
        if cache is not None:
            config.set_timing_cache(cache, False)
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            reason = logger.first_error or "it gives no reason"
            raise MDNetError(f"{NAMES[runtime]} can't build {name}: {reason}{_advice(request)}")
        (folder / f"{name}.plan").write_bytes(plan)
        seconds = round(time.perf_counter() - start, 1)
        figures[name] = {"layers": len(layers[name]), "bytes": plan.nbytes, "seconds": seconds}
        del plan, config, parser, network  # in this order: what is made from a thing must not outlive it
    (folder / LAYERS).write_text(json.dumps({"of": "network", "graphs": layers}, indent=1), encoding="utf-8")
    if cache is not None:
        (folder / TIMING_CACHE).write_bytes(cache.serialize())
    return {"graphs": figures, "gpu": gpu and dataclasses.asdict(gpu), "peak_gib": peak_gib()}


def layers(request: dict[str, Any], say: Say) -> dict[str, Any]:
    """What TensorRT made of each network: the layers of the plans in `folder`, in place of the networks' own."""
    trt, folder = load(request["runtime"]), Path(request["folder"])
    if visible_gpu() is None:
        raise MDNetError("a plan's layers can be read only where there is a GPU")
    runtime = trt.Runtime(make_logger(trt))
    runtime.engine_host_code_allowed = request["compatible"]
    found = {}
    for name in request["graphs"]:
        engine = runtime.deserialize_cuda_engine((folder / f"{name}.plan").read_bytes())
        if engine is None:
            raise MDNetError(f"TensorRT can't read its own plan of {name} back")
        information = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
        found[name] = json.loads(information)
        del engine
    (folder / LAYERS).write_text(json.dumps({"of": "engine", "graphs": found}, indent=1), encoding="utf-8")
    return {}


def _config(trt: Any, builder: Any, network: Any, request: dict[str, Any], monitor: Any, *, tf32: bool) -> Any:
    config = builder.create_builder_config()
    config.progress_monitor = monitor
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # or the plan's layers have no more than a name
    if not tf32:
        config.clear_flag(trt.BuilderFlag.TF32)
    if hasattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION"):  # TensorRT-RTX: else not sure to become a CUDA graph
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
    if request["level"] is not None:
        config.builder_optimization_level = request["level"]
    if request["stripped"]:
        config.set_flag(trt.BuilderFlag.STRIP_PLAN)
        config.set_flag(trt.BuilderFlag.REFIT_IDENTICAL)  # NVIDIA's notes on 11.3: REFIT may drop a product's bias
    if request["compatible"]:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    if request["workspace"]:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, request["workspace"])
    if targets := request["targets"]:
        config.num_compute_capabilities = len(targets)
        for index, target in enumerate(targets):
            config.set_compute_capability(getattr(trt.ComputeCapability, target.upper().replace("_", "")), index)
    for sizes in request["profiles"]:
        profile = builder.create_optimization_profile()
        for index in range(network.num_inputs):
            tensor = network.get_input(index)
            profile.set_shape(tensor.name, *([batch, *list(tensor.shape)[1:]] for batch in sizes))
        config.add_optimization_profile(profile)
    return config


def _advice(request: dict[str, Any]) -> str:
    advice = ["try a larger --workspace, or none"] if request["workspace"] else []
    advice += ["leave sm_75 out of --gpu"] if "sm_75" in request["targets"] else []  # it has no float32 products
    return "".join(f"; {words}" for words in advice)


def _timing_cache(trt: Any, builder: Any, file: str | None, say: Say) -> Any:
    """The cache of an earlier build where it can be used, or an empty one."""
    config = builder.create_builder_config()
    if file:
        cache = config.create_timing_cache(Path(file).read_bytes())
        if cache is not None and config.set_timing_cache(cache, False):
            return cache
        say("note", "the timing cache is damaged, or for another GPU or version: built without it")
    return config.create_timing_cache(b"")


def _layers(network: Any) -> list[dict[str, Any]]:
    """Name, type, and outputs (type and shape) of every layer; −1 is the batch."""
    return [
        {
            "name": layer.name,
            "type": layer.type.name,
            "outputs": [_describe(layer.get_output(i)) for i in range(layer.num_outputs)],
        }
        for layer in (network.get_layer(index) for index in range(network.num_layers))
    ]


def _describe(tensor: Any) -> str | None:
    if tensor is None:  # an optional output that nothing reads
        return None
    try:
        return f"{tensor.dtype.name} {list(tensor.shape)}"
    except ValueError:  # the shape of a loop's tensor is known only when it runs
        return tensor.dtype.name


def _parser_error(parser: Any, logger: Any) -> str:
    return one_line(parser.get_error(0).desc()) if parser.num_errors else logger.first_error or "it gives no reason"


def peak_gib() -> float | None:
    """The most memory this process has had, in GiB; None where Linux' /proc is not there to say."""
    # Not `getrusage`: its maximum is that of the process that started this one, where that had more.
    try:
        (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    except (OSError, ValueError):
        return None
    return round(int(line.split()[1]) / 2**20, 2)


if __name__ == "__main__":
    serve({"probe": probe, "build": build, "layers": layers})
