"""3x3 convolutions of the encoder by Winograd's algorithm and directly, layer by layer: python benchmarks/winograd.py

The layers are those of Stable Diffusion 1.x at 256 px. Winograd: our kernel in each of its builds, on floats, from
bytes to bytes, and with weights that stay bytes too, which each call transforms anew. Direct: ONNX Runtime's
convolution between bytes, channels last as in an int8 bundle; its float32 convolution; OpenVINO's, if it is installed.

One thread. A time is CPU time, so that other work on the machine counts little; contestants take turns; a time is the
median of the rounds, a ratio the median of the rounds' ratios. What can't run here has the reason in place of figures.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from onnx import ModelProto, TensorProto, helper, numpy_helper

from mdnet_engines.ops import native
from mdnet_engines.ops.selective_scan import DOMAIN, OPSET, VERSION
from mdnet_engines.ops.winograd import CONV_QUANTIZE, function
from mdnet_rt.bench.facts import describe_host

LAYERS = {  # height and width, channels, outputs; how many of them the encoder has
    "VAE, level 1": (256, 128, 128, 4),
    "VAE, level 2, first": (128, 128, 256, 1),
    "VAE, level 2": (128, 256, 256, 3),
    "VAE, level 3, first": (64, 256, 512, 1),
    "VAE, level 3": (64, 512, 512, 3),
    "VAE, level 4 and middle": (32, 512, 512, 8),
    "U-Net, level 1": (32, 320, 320, 4),
    "U-Net, level 2": (16, 640, 640, 3),
    "U-Net, level 3": (8, 1280, 1280, 3),
}
INT8, FLOAT32 = "direct int8, ONNX Runtime", "direct float32, ONNX Runtime"
KINDS = ("", ", bytes", ", bytes, also weights")
BUILDS = {"float32, AVX2": (0, 2), "float32, AVX-512": (0, 3), "bfloat16, AVX-512 BF16": (1, 0)}
Run = Callable[[], object]


class Call(ctypes.Structure):
    """`MdnetWinograd` of `engines/cpp/winograd/winograd.h`."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "height", "width")),
        *((name, ctypes.c_void_p) for name in ("x", "scale", "offset", "weights", "bias", "residual", "y")),
        *((name, ctypes.c_float) for name in ("x_scale", "y_scale")),
        *((name, ctypes.c_int32) for name in ("x_zero_point", "y_zero_point")),
        *((name, ctypes.c_int32) for name in ("x_is_uint8", "y_is_uint8", "silu")),
        ("residual_scale", ctypes.c_float),
        *((name, ctypes.c_int32) for name in ("residual_zero_point", "residual_is_uint8")),
    ]


class Layer:
    """Inputs of one layer, and its contestants."""

    def __init__(self, size: int, channels: int, outputs: int):
        random = np.random.default_rng(0)
        self.shape, self.outputs = (1, size, size, channels), outputs
        self.x = random.normal(size=self.shape).astype(np.float32)
        self.bytes = random.integers(0, 256, self.shape, np.uint8)
        self.w = random.integers(-64, 65, (outputs, channels, 3, 3), np.int8)
        self.w_scale = np.full(outputs, 1 / (37 * np.sqrt(9 * channels)), np.float32)
        self.w_float = (self.w * self.w_scale[:, None, None, None]).astype(np.float32)
        self.bias = random.normal(size=outputs).astype(np.float32)
        self.multiplications = size * size * channels * outputs * 9

    def winograd(self, products: int, isa: int, kind: str) -> Run | str:
        library = native.library()
        assert library is not None
        of_bytes, keep_bytes = kind != "", kind == KINDS[2]
        pack = library.mdnet_winograd_pack_bytes if keep_bytes else library.mdnet_winograd_pack
        given = [self.w, self.w_scale] if keep_bytes else [self.w_float]
        pack.restype = ctypes.c_void_p
        pack.argtypes = [*[ctypes.c_void_p] * len(given), *[ctypes.c_int64] * 2, *[ctypes.c_int32] * 2]
        pointers = [array.ctypes.data for array in given]
        weights = pack(*pointers, self.shape[3], self.outputs, products, isa)
        if not weights:
            return "this processor lacks the instructions"
        x = self.bytes if of_bytes else self.x
        y = np.empty((*self.shape[:3], self.outputs), x.dtype)
        call = Call(*self.shape[:3], x.ctypes.data, None, None, weights, self.bias.ctypes.data, None, y.ctypes.data)
        call.x_is_uint8 = call.y_is_uint8 = of_bytes
        call.x_scale, call.y_scale, call.x_zero_point, call.y_zero_point = 0.02, 0.05, 117, 121

        def run(kept: tuple[np.ndarray, np.ndarray] = (x, y)) -> None:
            if status := library.mdnet_winograd(ctypes.byref(call), None, None):
                raise RuntimeError(f"mdnet_winograd: status {status}")

        return run

    def direct_int8(self) -> Run:
        """The function body of our operator, which ONNX Runtime makes its own convolution of."""
        given = {
            "x": self.bytes,
            **{"x_scale": np.float32(0.02), "x_zero_point": np.uint8(117)},
            **{"w": self.w, "w_scale": self.w_scale, "bias": self.bias},
            **{"y_scale": np.float32(0.05), "y_zero_point": np.uint8(121)},
        }
        return self.opened(self.model(CONV_QUANTIZE, given, TensorProto.UINT8, DOMAIN, keep_bytes=0), given["x"])

    def direct_float(self) -> ModelProto:
        x = np.ascontiguousarray(self.x.transpose(0, 3, 1, 2))
        return self.model("Conv", {"x": x, "w": self.w_float, "bias": self.bias}, TensorProto.FLOAT, pads=[1] * 4)

    def openvino(self) -> Run | str:
        if importlib.util.find_spec("openvino") is None:
            return "OpenVINO is not installed"
        import openvino

        core = openvino.Core()
        settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1}
        compiled = core.compile_model(core.read_model(self.direct_float().SerializeToString()), "CPU", settings)
        x = np.ascontiguousarray(self.x.transpose(0, 3, 1, 2))
        return lambda: compiled([x])

    def model(
        self, operator: str, given: dict[str, np.ndarray], kind: int, domain: str = "", **attributes: object
    ) -> ModelProto:
        node = helper.make_node(operator, list(given), ["y"], domain=domain, **attributes)
        x = helper.make_tensor_value_info("x", helper.np_dtype_to_tensor_dtype(given["x"].dtype), given["x"].shape)
        constants = [numpy_helper.from_array(np.asarray(a), name) for name, a in given.items() if name != "x"]
        y = helper.make_tensor_value_info("y", kind, [None] * 4)
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, VERSION)]
        bodies = [function(operator)] if domain else []
        graph = helper.make_graph([node], operator, [x], [y], constants)
        return helper.make_model(graph, opset_imports=opsets, functions=bodies, ir_version=10)

    def opened(self, model: ModelProto, x: np.ndarray) -> Run:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return lambda: session.run(None, {"x": x})

    def contestants(self) -> dict[str, Run | str]:
        direct = self.direct_float()
        return {
            INT8: self.direct_int8(),
            FLOAT32: self.opened(direct, np.ascontiguousarray(self.x.transpose(0, 3, 1, 2))),
            "direct float32, OpenVINO": self.openvino(),
            **{name + kind: self.winograd(*build, kind) for kind in KINDS for name, build in BUILDS.items()},
        }


def measure(layer: Layer, rounds: int) -> dict[str, Any]:
    """A row for each contestant: median time, and its speed against both direct convolutions of ONNX Runtime."""
    contestants = layer.contestants()
    runs = {name: run for name, run in contestants.items() if not isinstance(run, str)}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            start = time.process_time()
            run()
            if turn:  # the first warms up
                seconds[name].append(time.process_time() - start)
    rows: dict[str, Any] = {name: {"reason": run} for name, run in contestants.items() if isinstance(run, str)}
    for name, own in seconds.items():
        rows[name] = {
            "ms": statistics.median(own) * 1e3,
            "multiplications_per_second": layer.multiplications / statistics.median(own),
            **{f"against {one}": ratio(seconds[one], own) for one in (INT8, FLOAT32)},
        }
    return rows


def ratio(others: list[float], own: list[float]) -> float:
    return statistics.median(other / mine for other, mine in zip(others, own, strict=True))


def show(name: str, rows: dict[str, Any]) -> None:
    print(name)
    for contestant, row in rows.items():
        if "reason" in row:
            print(f"  not measured: {contestant}: {row['reason']}")
            continue
        line = "  {:7.2f} ms  {:4.0f} G/s  {:5.2f}× int8  {:5.2f}× float32  {}".format
        speeds = (row[f"against {one}"] for one in (INT8, FLOAT32))
        print(line(row["ms"], row["multiplications_per_second"] / 1e9, *speeds, contestant), flush=True)


def main() -> None:
    """Measure, print, and write the figures where `-o` says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", default="", help="layers whose name contains this")
    parser.add_argument("-o", "--output", type=Path, help="JSON file for the figures")
    options = parser.parse_args()
    if native.custom_op_library() is None:
        sys.exit(f"error: {native.MISSING}")
    chosen = {name: sizes for name, sizes in LAYERS.items() if options.only in name}
    if not chosen or options.rounds < 1:
        parser.error(f"--rounds must be 1 or more, and --only in one of: {'; '.join(LAYERS)}")
    results = {}
    facts = {"command": f"python {' '.join(sys.argv)}", **describe_host(), "threads": 1, "time": "CPU"}
    print(facts["machine"]["processor"])
    for name, (size, channels, outputs, count) in chosen.items():
        layer = Layer(size, channels, outputs)
        rows = measure(layer, options.rounds)
        show(f"{name}: {channels} → {outputs} at {size}², {count} of them", rows)
        results[name] = {"size": size, "channels": channels, "outputs": outputs, "layers": count, "rows": rows}
    if options.output:
        options.output.write_text(json.dumps({**facts, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
