"""Processors that this one is not: OpenVINO told to be an older one, ONNX Runtime and our library in qemu-user."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mdnet_engines.backends.candidates import named
from mdnet_engines.backends.trial import measure_apart
from mdnet_engines.bundle.files import Bundle
from mdnet_engines.ops import native

pytestmark = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="of x86 processors")
needs_openvino = pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="needs the [openvino] extra")
needs_qemu = pytest.mark.skipif(shutil.which("qemu-x86_64") is None, reason="needs qemu-x86_64 (package qemu-user)")


def emulate(cpu: str, program: str) -> Any:
    """What a Python program prints, as JSON, on another processor; BLAS takes its kernels by name there."""
    command = ["qemu-x86_64", "-cpu", cpu, sys.executable, "-c", program]
    environment = {**os.environ, "OPENBLAS_CORETYPE": "Nehalem"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@needs_openvino
@pytest.mark.parametrize("isa", ["AVX2", "AVX512_CORE"])
def test_int8_on_openvino_needs_no_vnni(
    isa: str, bundles: dict[str, Bundle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With 8-bit weights the outputs were 10 dB worse there: the gate against the build allows 6."""
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", isa)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # OpenVINO's compiled graphs are for the processor that it had
    bundle = bundles["int8"]
    report = measure_apart(bundle, named(bundle, "openvino")).report
    assert report.passed, report.failures()
    assert report.gates[-1].value is not None


@needs_qemu
def test_seven_bit_weights_are_exact_on_onnxruntime_without_vnni() -> None:
    """The largest products there are, 64 of them; with 8-bit weights the same processor overflows."""
    program = """
import json
import numpy as np, onnxruntime
from onnx import TensorProto, helper, numpy_helper

def product(weight):
    node = helper.make_node("MatMulInteger", ["x", "w"], ["y"])
    x = helper.make_tensor_value_info("x", TensorProto.UINT8, ["n", 64])
    y = helper.make_tensor_value_info("y", TensorProto.INT32, ["n", 8])
    weights = numpy_helper.from_array(np.full((64, 8), weight, np.int8), "w")
    graph = helper.make_graph([node], "g", [x], [y], [weights])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return int(session.run(None, {"x": np.full((1, 64), 255, np.uint8)})[0][0, 0])

print(json.dumps([product(64), product(-64), product(127)]))
"""
    seven, negative, eight = emulate("Haswell", program)
    assert (seven, negative) == (64 * 255 * 64, -64 * 255 * 64)
    assert eight < 64 * 255 * 127  # what 7 bits are for


@needs_qemu
@pytest.mark.skipif(native.custom_op_library() is None, reason="no native library")
@pytest.mark.parametrize(("cpu", "isa"), [("Haswell", "avx2"), ("Nehalem", "portable")])
def test_the_native_library_takes_the_build_that_the_processor_has(cpu: str, isa: str) -> None:
    program = "import json; from mdnet_engines.ops import native; print(json.dumps(native.best_isa()))"
    assert emulate(cpu, program) == isa
