"""Checkpoint → bundle: export, rewrite to the precision, prove parity, write all or nothing."""

from __future__ import annotations

import dataclasses
import gc
import json
import platform
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import torch
from onnx import TensorProto

from mdnet.model import MDNet
from mdnet_calib.fp16 import to_fp16
from mdnet_engines.bundle import Bundle, check_replaceable, file_entry, write_bundle
from mdnet_engines.errors import MDNetError
from mdnet_engines.manifest import (
    GRAPH_NAMES,
    MANIFEST_NAME,
    GraphEntry,
    GraphName,
    Manifest,
    Precision,
    Preprocessing,
    Provenance,
    ScoreScale,
    TensorSpec,
)
from mdnet_engines.session import Backend, OrtSession
from mdnet_export.graphs import export_graph, save_graph
from mdnet_export.parity import Images, Outputs, ParityReport, measure
from mdnet_export.report import render_html, to_json
from mdnet_export.weights import Weights

FLOAT32_MODULES = ("fusion.head",)  # kept in float32 at every precision
_PACKAGES = ("mdnet", "torch", "diffusers", "onnx", "onnxscript", "onnxruntime", "onnxruntime-gpu")
_DTYPES: dict[int, Literal["uint8", "float32", "float16"]] = {
    TensorProto.UINT8: "uint8",
    TensorProto.FLOAT: "float32",
    TensorProto.FLOAT16: "float16",
}


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
    force: bool = False,
    command: str = "",
    on_step: Callable[[str], None] = lambda _: None,
) -> Bundle:
    """Build a bundle from `weights` at `destination`, replacing a bundle there in one step.

    Args:
        images: what parity is measured on.
        force: write the bundle although a gate failed; the manifest records it.
        on_step: called with what is being done, for progress.

    Raises:
        ParityError: a gate failed and `force` is not set.
        UsageError: `destination` is something that must not be replaced.
    """
    check_replaceable(destination.resolve())
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
        if precision == "fp16":
            for name in GRAPH_NAMES:
                on_step(f"rewriting {name} to fp16")
                rewrite_fp16(folder / f"{name}.onnx")
        on_step("parity with PyTorch")
        report = measure_folder(folder, reference, images, precision=precision)
        if not report.passed and not force:
            raise ParityError(_failures(report), report)
        report = dataclasses.replace(report, forced=not report.passed)
        on_step("writing")
        _write_manifest(folder, weights, report, precision, command)
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


def rewrite_fp16(file: Path) -> None:
    """Rewrite an exported graph to float16 where it stands."""
    proto = onnx.load(file)
    data = file.with_name(f"{file.name}.data")
    data.unlink(missing_ok=True)
    save_graph(to_fp16(proto, keep=FLOAT32_MODULES), file)


def measure_folder(
    folder: Path,
    reference: Outputs,
    images: Images,
    *,
    precision: Precision,
    backend: Backend = "onnxruntime-cpu",
) -> ParityReport:
    """`parity.measure` on the graphs in a bundle's folder."""
    sessions: dict[GraphName, OrtSession] = {
        name: OrtSession(folder / f"{name}.onnx", backend=backend) for name in GRAPH_NAMES
    }
    return measure(sessions, reference, images, precision=precision, backend=backend)


def write_reports(folder: Path, report: ParityReport, facts: dict[str, str]) -> list[Path]:
    """Write `parity.json` and `parity.html`."""
    files = [folder / "parity.json", folder / "parity.html"]
    files[0].write_text(json.dumps(to_json(report), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    files[1].write_text(render_html(report, title="MD-Net parity", facts=facts), encoding="utf-8")
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


def _write_manifest(folder: Path, weights: Weights, report: ParityReport, precision: Precision, command: str) -> None:
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
        "command": command,
        "versions": ", ".join(f"{name} {number}" for name, number in provenance.versions.items()),
    }
    manifest = Manifest(
        preset=config.preset,
        precision=precision,
        preprocessing=Preprocessing(image_size=config.image_size),
        score=ScoreScale(minimum=config.score_min, maximum=config.score_max),
        graphs={name: graph_entry(folder / f"{name}.onnx", precision) for name in GRAPH_NAMES},
        reports=[file_entry(file) for file in write_reports(folder, report, facts)],
        parity=report.summary(),
        provenance=provenance,
        licenses=["graphs and code: Apache-2.0", *weights.licenses()],
    )
    (folder / MANIFEST_NAME).write_text(manifest.model_dump_json(indent=1) + "\n", encoding="utf-8")


def graph_entry(file: Path, precision: Precision) -> GraphEntry:
    """Describe an ONNX file for the manifest."""
    graph = onnx.load(file, load_external_data=False).graph
    data = file.with_name(f"{file.name}.data")
    return GraphEntry(
        file=file_entry(file),
        data=[file_entry(data)] if data.exists() else [],
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
