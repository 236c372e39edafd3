"""Two variants of a graph in one folder, on one file of weights: for every runtime, and for ONNX Runtime on the CPU.

encoder.onnx      encoder.cpu.onnx      encoder.onnx.data
"""

from __future__ import annotations

from pathlib import Path

import onnx

from mdnet_calib.passes.onnxruntime_cpu import for_onnxruntime_cpu
from mdnet_engines.bundle.manifest import GraphName
from mdnet_engines.ops import resnet, winograd
from mdnet_engines.ops import selective_scan as scan_op
from mdnet_engines.sessions.onnxruntime import OrtSession


def cpu_variant(file: Path) -> Path:
    """Where the variant of a graph for ONNX Runtime on the CPU lies, if it has one."""
    return file.with_name(f"{file.stem}.cpu.onnx")


def winograd_convolutions(file: Path) -> list[onnx.NodeProto]:
    """The convolutions of a variant that our kernel runs by Winograd's algorithm."""
    nodes = onnx.load(file, load_external_data=False).graph.node
    return [node for node in nodes if node.op_type in (*resnet.CONVOLUTIONS.values(), *winograd.NAMES)]


def add_exact_variant(file: Path) -> None:
    """Write the variant of a float32 graph, in float32 too, next to it, where it has blocks that gain by that."""
    variant = for_onnxruntime_cpu(onnx.load(file, load_external_data=False), exact=True)
    if any(node.op_type in resnet.CONVOLUTIONS.values() for node in variant.graph.node):
        write_variants(onnx.load(file), file, exact=True)


def write_variants(proto: onnx.ModelProto, file: Path, *, exact: bool = False) -> None:
    """Write a graph, int8 or float32, to `file`, and its variant for ONNX Runtime's CPU kernels next to it.

    Args:
        exact: whether what is float32 stays so in the variant; else wide products become bfloat16.
    """
    data = file.with_name(f"{file.name}.data")
    data.unlink(missing_ok=True)  # onnx appends to an existing file
    onnx.save(proto, file, save_as_external_data=True, location=data.name, size_threshold=1024)
    light = onnx.load(file, load_external_data=False)
    onnx.save(for_onnxruntime_cpu(light, exact=exact), cpu_variant(file))
    scan_op.register_schemas()
    for variant in (file, cpu_variant(file)):
        onnx.checker.check_model(variant, full_check=True)


def open_for_cpu(folder: Path, name: GraphName) -> OrtSession:
    """A graph in a bundle's folder, on ONNX Runtime's CPU provider."""
    file = folder / f"{name}.onnx"
    return OrtSession(cpu_variant(file) if cpu_variant(file).exists() else file)
