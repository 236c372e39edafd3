"""From a folder's float32 graphs to those of a precision, and what the manifest and the report say of how."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx

from mdnet_calib.passes.fp16 import near_overflow, to_fp16
from mdnet_engines.bundle.manifest import GRAPH_NAMES, GraphName, Precision
from mdnet_engines.bundle.precision_facts import CalibrationFacts
from mdnet_engines.parity.measure import Outputs
from mdnet_engines.progress import SILENT, Progress
from mdnet_engines.sessions.onnxruntime import OrtSession
from mdnet_export.graphs.cpu_variant import add_exact_variant
from mdnet_export.graphs.export import save_graph
from mdnet_export.graphs.gpu_variant import write_gpu_variant
from mdnet_export.quantise import Calibration, Fp8Result, Int8Result, quantise_encoder, quantise_encoder_fp8

FLOAT32_MODULES = ("fusion.head", "fusion.stream_heads")  # kept in float32 at every precision
OVERFLOW_IMAGES = 8
"""Of the images that int8 and fp8 calibrate on, how many are watched for values too large for float16."""

Float32Values = Mapping[GraphName, list[str]]
"""By graph, the values that must not be float16."""


@dataclass(frozen=True)
class PrecisionFacts:
    """What the manifest and the report say of how a precision came about."""

    calibration: CalibrationFacts | None = None
    int8: Int8Result | None = None
    fp8: Fp8Result | None = None
    float32_values: dict[GraphName, list[str]] = field(default_factory=dict)

    def for_people(self) -> dict[str, str]:
        """For the report's list of facts."""
        facts = {}
        if self.calibration is not None:
            facts["calibration"] = str(self.calibration)
        if self.int8 is not None:
            facts |= self.int8.for_people()
            facts["graphs for GPUs"] = "int8 in the same blocks, the rest float16"
        if self.fp8 is not None:
            facts |= self.fp8.for_people()
        for graph, values in self.float32_values.items():
            facts[f"kept in float32, {graph}"] = ", ".join(values)
        return facts


def rewrite(
    folder: Path, precision: Precision, calibration: Calibration | None, *, progress: Progress = SILENT
) -> PrecisionFacts:
    """Rewrite the three float32 graphs in `folder` to `precision` where they stand.

    In int8, graphs for ONNX Runtime on the CPU and for GPUs come next to them; in fp32, an encoder for the former if
    it has blocks that gain by that.

    Args:
        calibration: needed for int8 and fp8; for fp16, where overflow is looked for.

    Raises:
        MDNetError: as `quantise_encoder`, or a value is not finite on a calibration image.
    """
    facts = calibration.facts(precision) if calibration else None
    if precision == "fp32":
        progress.step("rewriting encoder for ONNX Runtime on the CPU")
        add_exact_variant(folder / "encoder.onnx")
        return PrecisionFacts(facts)
    large: dict[GraphName, list[str]] = {}
    if calibration is not None:
        pixels = calibration.images.pixels
        few = pixels if precision == "fp16" else pixels[:: max(1, len(pixels) // OVERFLOW_IMAGES)][:OVERFLOW_IMAGES]
        large = _too_large(folder, few, progress)
    if precision == "fp16":
        rewrite_fp16(folder, large, progress=progress)
        return PrecisionFacts(facts, float32_values=large)
    assert calibration is not None
    if precision == "fp8":
        fp8 = quantise_encoder_fp8(folder, calibration, progress=progress)
        rewrite_fp16(folder, large, progress=progress)
        return PrecisionFacts(facts, fp8=fp8, float32_values=large)
    int8 = quantise_encoder(folder, calibration, progress=progress)
    for name in GRAPH_NAMES:
        progress.step(f"rewriting {name} for GPUs")
        write_gpu_variant(folder / f"{name}.onnx", keep=FLOAT32_MODULES, float32_values=large.get(name, ()))
    return PrecisionFacts(facts, int8, float32_values=large)


def rewrite_fp16(folder: Path, float32_values: Float32Values, *, progress: Progress = SILENT) -> None:
    """Rewrite a folder's graphs to float16 where they stand; what is quantised stays so."""
    for name in GRAPH_NAMES:
        progress.step(f"rewriting {name} to fp16")
        file = folder / f"{name}.onnx"
        proto = onnx.load(file)
        file.with_name(f"{file.name}.data").unlink(missing_ok=True)
        save_graph(to_fp16(proto, keep=FLOAT32_MODULES, float32_values=float32_values.get(name, ())), file)


def graph_precision(name: GraphName, precision: Precision) -> Precision:
    """The precision of one graph in a bundle of `precision`: only the encoder becomes int8 or fp8."""
    rest: dict[Precision, Precision] = {"int8": "fp32", "fp8": "fp16"}
    return precision if name == "encoder" else rest.get(precision, precision)


def _too_large(folder: Path, pixels: np.ndarray, progress: Progress) -> dict[GraphName, list[str]]:
    """The values of a folder's float32 graphs that would overflow float16, by graph."""
    feeds = _feeds(folder, pixels, progress)
    large: dict[GraphName, list[str]] = {}
    for name in GRAPH_NAMES:
        progress.step(f"looking for values of {name} that overflow float16")
        large[name] = near_overflow(onnx.load(folder / f"{name}.onnx"), feeds, keep=FLOAT32_MODULES)
    return {name: values for name, values in large.items() if values}


def _feeds(folder: Path, pixels: np.ndarray, progress: Progress) -> list[Outputs]:
    """What goes into any of the graphs, for one calibration image at a time."""
    graphs = {name: OrtSession(folder / f"{name}.onnx") for name in GRAPH_NAMES}
    rows = []
    advance = progress.count("calibration images through the graphs", len(pixels))
    for i in range(len(pixels)):
        image = {"image": pixels[i : i + 1]}
        rows.append({**image, **graphs["encoder"].run(image), **graphs["vim"].run(image)})
        advance(1)
    return rows
