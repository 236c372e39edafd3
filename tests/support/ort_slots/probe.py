"""Run the operators of `libslots.so` in a session: python -m ort_slots.probe libslots.so

A process of its own, since an entry in a wrong place may do anything. Prints which entries were called, what ONNX
Runtime calls its version, the outputs, and how a refusal was told.
"""

from __future__ import annotations

import ctypes
import json
import sys

import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

SCALE, OFFSET, CONSTANT = 0.25, 3, 100.0
X = np.arange(6000, dtype=np.float32).reshape(3, 2000)


def model(offset: int) -> bytes:
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", 2000]) for name in ("x", "y", "again")]
    nodes = [
        helper.make_node("Affine", ["x", "c"], ["y"], domain="slots", scale=SCALE, offset=offset),
        helper.make_node("Copies", ["x", "y"], ["first", "again"], domain="slots"),
    ]
    constant = numpy_helper.from_array(np.full((1, 1), CONSTANT, np.float32), "c")
    graph = helper.make_graph(nodes, "slots", value[:1], value[1:], [constant])
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("slots", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


def session(library: str, offset: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 2
    options.register_custom_ops_library(library)
    return onnxruntime.InferenceSession(model(offset), options, providers=["CPUExecutionProvider"])


def main(library: str) -> None:
    slots = ctypes.CDLL(library)  # before ONNX Runtime, which unloads it with the last session
    running = session(library, OFFSET)
    y, again = running.run(None, {"x": X})
    del running  # its kernels too
    try:
        session(library, -1).run(None, {"x": X})
        refused = ""
    except Exception as error:
        refused = f"{type(error).__name__}: {error}"
    slots.slots_called.restype = slots.slots_version.restype = ctypes.c_char_p
    found = {"called": slots.slots_called().decode().split(), "version": slots.slots_version().decode()}
    print(json.dumps({**found, "y": y.tolist(), "again": again.tolist(), "refused": refused}))


if __name__ == "__main__":
    main(sys.argv[1])
