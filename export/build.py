"""Checkpoint → bundle: export, rewrite to the precision, prove parity, write all or nothing."""

from __future__ import annotations

import dataclasses
import gc
import json
import platform
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import torch
from onnx import TensorProto

from mdnet.model import MDNet
from mdnet_calib.fp16 import near_overflow, to_fp16
from mdnet_calib.images import refuse_overlap
from mdnet_engines.bundle import Bundle, check_replaceable, file_entry, write_bundle
from mdnet_engines.errors import MDNetError, UsageError
from mdnet_engines.manifest import (
    GRAPH_NAMES,
    MANIFEST_NAME,
    CalibrationFacts,
    GraphEntry,
    GraphName,
    Manifest,
    Precision,
    Preprocessing,
    Provenance,
    ScoreScale,
    TensorSpec,
)
from mdnet_engines.session import OrtSession, Session
from mdnet_export.cpu_form import cpu_form, open_for_cpu
from mdnet_export.graphs import export_graph, save_graph
from mdnet_export.parity import Images, Outputs, ParityReport, measure
from mdnet_export.quantise import Calibration, Int8Result, quantise_encoder
from mdnet_export.report import render_html, to_json
from mdnet_export.weights import Weights

FLOAT32_MODULES = ("fusion.head",)  # kept in float32 at every precision
_PACKAGES = ("mdnet", "torch", "diffusers", "onnx", "onnxscript", "onnxruntime", "onnxruntime-gpu")
_DTYPES: dict[int, Literal["uint8", "float32", "float16"]] = {
    TensorProto.UINT8: "uint8",
    TensorProto.FLOAT: "float32",
    TensorProto.FLOAT16: "float16",
}


@dataclass(frozen=True)
class PrecisionFacts:
    """What the manifest and the report say of how a precision came about."""

    calibration: CalibrationFacts | None = None
    int8: Int8Result | None = None
    float32_values: dict[GraphName, list[str]] = field(default_factory=dict)

    def for_people(self) -> dict[str, str]:
        """For the report's list of facts."""
        facts = {}
        if self.calibration is not None:
            facts["calibration"] = str(self.calibration)
        if self.int8 is not None:
            facts |= self.int8.for_people()
        for graph, values in self.float32_values.items():
            facts[f"kept in float32, {graph}"] = ", ".join(values)
        return facts


class SlowerError(MDNetError):
    """int8 is slower than float on this machine; nothing was written."""

    def __init__(self, int8: Int8Result):
        self.int8 = int8
        speed = int8.speed
        super().__init__(
            f"int8 is slower than float: {speed.int8_seconds * 1e3:.3g} ms against {speed.float_seconds * 1e3:.3g} ms "
            f"in the encoder ({int8.backend}, batch {speed.batch}). Nothing was written; --force writes it all the same"
        )


class ParityError(MDNetError):
    """A gate failed. `report` says which; nothing was written, unless it was forced."""

    def __init__(self, message: str, report: ParityReport):
        super().__init__(message)
        self.report = report


def build_bundle(
    weights: Weights,
    destination: Path,
    *,
    precision: Precision = "fp32",
    images: Images,
    calibration: Calibration | None = None,
    force: bool = False,
    command: str = "",
    on_step: Callable[[str], None] = lambda _: None,
) -> Bundle:
    """Build a bundle from `weights` at `destination`, replacing a bundle there in one step.

    Args:
        images: what parity is measured on.
        calibration: for int8, what its ranges and blocks are chosen on; for fp16, where overflow is looked for (drawn
            faces by default).
        force: write the bundle although a gate failed or int8 is slower than float; the manifest records it.
        on_step: called with what is being done, for progress.

    Raises:
        ParityError: a gate failed and `force` is not set.
        SlowerError: int8 is slower than float here, and `force` is not set.
        UsageError: `destination` is something that must not be replaced, int8 lacks its calibration, or parity would be
            measured on calibration images.
    """
    check_replaceable(destination.resolve())
    if precision == "int8" and calibration is None:
        raise UsageError("int8 needs calibration images; give a folder of them with --calib")
    if calibration is not None:
        refuse_overlap(calibration.images, images.pixels, "images that parity is measured on")
    with write_bundle(destination) as folder:
        on_step(f"loading {weights.config.preset}")
        model = weights.load()
        on_step(f"PyTorch reference on {images.source}")
        reference = reference_outputs(model, images.pixels)
        for name in GRAPH_NAMES:
            on_step(f"exporting {name}")
            export_graph(model, name, folder)
        del model
        gc.collect()
        facts = PrecisionFacts(calibration.facts(precision) if calibration else None)
        if precision == "fp16":
            facts = dataclasses.replace(facts, float32_values=rewrite_fp16(folder, calibration, on_step=on_step))
        elif calibration is not None and precision == "int8":
            int8 = quantise_encoder(folder, calibration, on_step=on_step)
            if int8.speed.slower and not force:
                raise SlowerError(int8)
            facts = dataclasses.replace(facts, int8=int8)
        on_step("parity with PyTorch")
        report = measure_folder(folder, reference, images, precision=precision)
        if not report.passed and not force:
            raise ParityError(_failures(report), report)
        report = dataclasses.replace(report, forced=not report.passed)
        on_step("writing")
        _write_manifest(folder, weights, report, precision, facts, images, command)
    return Bundle.open(destination)


def reference_outputs(model: MDNet, pixels: np.ndarray) -> Outputs:
    """Every graph output of PyTorch fp32, one image at a time: (n, ...) each."""
    rows: list[Outputs] = []
    with torch.inference_mode():
        for i in range(len(pixels)):
            image = torch.from_numpy(pixels[i : i + 1])
            features, tokens = model.diffusion(image), model.vim(image)
            tensors = {**features, "tokens": tokens, "score": model.fusion(features, tokens)}
            rows.append({name: tensor.numpy() for name, tensor in tensors.items()})
    return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}


def rewrite_fp16(
    folder: Path, calibration: Calibration | None = None, *, on_step: Callable[[str], None] = lambda _: None
) -> dict[GraphName, list[str]]:
    """Rewrite a folder's float32 graphs to float16 where they stand; give the values that must not be, by graph."""
    feeds = [] if calibration is None else _feeds(folder, calibration, on_step)
    large: dict[GraphName, list[str]] = {}
    for name in GRAPH_NAMES:
        file = folder / f"{name}.onnx"
        proto = onnx.load(file)
        if feeds:
            on_step(f"looking for values of {name} that overflow float16")
            large[name] = near_overflow(proto, feeds, keep=FLOAT32_MODULES)
        on_step(f"rewriting {name} to fp16")
        file.with_name(f"{file.name}.data").unlink(missing_ok=True)
        save_graph(to_fp16(proto, keep=FLOAT32_MODULES, float32_values=large.get(name, ())), file)
    return {name: values for name, values in large.items() if values}


def _feeds(folder: Path, calibration: Calibration, on_step: Callable[[str], None]) -> list[Outputs]:
    """What goes into any of the graphs, for one calibration image at a time."""
    graphs = {name: OrtSession(folder / f"{name}.onnx") for name in GRAPH_NAMES}
    pixels, rows = calibration.images.pixels, []
    for i in range(len(pixels)):
        on_step(f"calibration image {i + 1} of {len(pixels)}")
        image = {"image": pixels[i : i + 1]}
        rows.append({**image, **graphs["encoder"].run(image), **graphs["vim"].run(image)})
    return rows


def measure_folder(folder: Path, reference: Outputs, images: Images, *, precision: Precision) -> ParityReport:
    """`parity.measure` on the graphs in a bundle's folder, by ONNX Runtime on the CPU."""
    sessions: dict[GraphName, Session] = {name: open_for_cpu(folder, name) for name in GRAPH_NAMES}
    return measure(sessions, reference, images, precision=precision, backend="onnxruntime-cpu")


def write_reports(folder: Path, report: ParityReport, facts: dict[str, str], images: Images) -> list[Path]:
    """Write `parity.json` and `parity.html`; of the `images` measured on, the page shows those that differ most."""
    pictures = dict(zip(images.names, images.pixels, strict=True))
    files = [folder / "parity.json", folder / "parity.html"]
    files[0].write_text(json.dumps(to_json(report), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    files[1].write_text(render_html(report, title="MD-Net parity", facts=facts, pictures=pictures), encoding="utf-8")
    return files


def package_versions() -> dict[str, str]:
    """Versions of what takes part in an export, where installed."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def _write_manifest(
    folder: Path,
    weights: Weights,
    report: ParityReport,
    precision: Precision,
    made: PrecisionFacts,
    images: Images,
    command: str,
) -> None:
    provenance = Provenance(
        weights=weights.kind,
        checkpoint_sha256=weights.sha256,
        seed=weights.seed,
        training=weights.training(),
        command=command,
        versions=package_versions(),
    )
    config = weights.config
    facts = {
        "preset": config.preset,
        "precision": precision,
        "weights": weights.kind + (f", sha256 {weights.sha256[:12]}…" if weights.sha256 else f", seed {weights.seed}"),
        **made.for_people(),
        "command": command,
        "versions": ", ".join(f"{name} {number}" for name, number in provenance.versions.items()),
    }
    manifest = Manifest(
        preset=config.preset,
        precision=precision,
        preprocessing=Preprocessing(image_size=config.image_size, colour="srgb"),
        score=ScoreScale(minimum=config.score_min, maximum=config.score_max),
        graphs={name: graph_entry(folder / f"{name}.onnx", graph_precision(name, precision)) for name in GRAPH_NAMES},
        reports=[file_entry(file) for file in write_reports(folder, report, facts, images)],
        parity=report.summary(),
        calibration=made.calibration,
        int8=made.int8.facts() if made.int8 else None,
        float32_values=made.float32_values,
        provenance=provenance,
        licenses=["graphs and code: Apache-2.0", *weights.licenses()],
    )
    (folder / MANIFEST_NAME).write_text(manifest.model_dump_json(indent=1) + "\n", encoding="utf-8")


def graph_precision(name: GraphName, precision: Precision) -> Precision:
    """The precision of one graph in a bundle of `precision`: only the encoder becomes int8."""
    return "fp32" if precision == "int8" and name != "encoder" else precision


def graph_entry(file: Path, precision: Precision) -> GraphEntry:
    """Describe an ONNX file for the manifest."""
    graph = onnx.load(file, load_external_data=False).graph
    data = file.with_name(f"{file.name}.data")
    cpu = cpu_form(file)
    return GraphEntry(
        file=file_entry(file),
        data=[file_entry(data)] if data.exists() else [],
        cpu=file_entry(cpu) if cpu.exists() else None,
        precision=precision,
        inputs=[_tensor_spec(value) for value in graph.input],
        outputs=[_tensor_spec(value) for value in graph.output],
    )


def _tensor_spec(value: onnx.ValueInfoProto) -> TensorSpec:
    kind = value.type.tensor_type
    shape: list[int | str] = [dim.dim_param or dim.dim_value for dim in kind.shape.dim]
    return TensorSpec(name=value.name, dtype=_DTYPES[kind.elem_type], shape=shape)


def _failures(report: ParityReport) -> str:
    failed = [
        f"{gate.name} is {gate.value:.6g}, allowed is {'at most' if gate.at_most else 'at least'} {gate.limit:g}"
        for gate in report.gates
        if not gate.passed and gate.value is not None
    ]
    return f"parity with PyTorch failed: {'; '.join(failed)}. Nothing was written; --force writes it all the same"
