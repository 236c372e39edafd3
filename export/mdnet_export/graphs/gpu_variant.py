"""The variant of an int8 bundle's graphs for GPUs: Q/DQ where it was chosen, float16 for the rest.

encoder.onnx      encoder.onnx.data      encoder.gpu.onnx      encoder.gpu.onnx.data

It shares the first file of weights with the other variants: what is int8, and what stays float32. The second has what
is float16. To store int8 and float16 alone would take one file less, but then OpenVINO, which reads the stored graph,
rounds what it computes in float32 once more.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import onnx

from mdnet_calib.passes.fp16 import to_fp16
from mdnet_engines.ops import selective_scan as scan_op


def gpu_variant(file: Path) -> Path:
    """Where the variant of a graph for GPUs lies, if it has one."""
    return file.with_name(f"{file.stem}.gpu.onnx")


def write_gpu_variant(file: Path, *, keep: Collection[str] = (), float32_values: Collection[str] = ()) -> None:
    """Write the variant for GPUs of the int8 or float32 graph in `file`; arguments as of `to_fp16`."""
    variant = gpu_variant(file)
    data = variant.with_name(f"{variant.name}.data")
    data.unlink(missing_ok=True)  # onnx appends to an existing file
    proto = to_fp16(
        onnx.load(file, load_external_data=False), keep=keep, float32_values=float32_values, folder=file.parent
    )
    # What is external already stays where it is.
    onnx.save(proto, variant, save_as_external_data=True, location=data.name, size_threshold=1024)
    scan_op.register_schemas()
    onnx.checker.check_model(variant, full_check=True)
