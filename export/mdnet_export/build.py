"""Checkpoint → bundle: export, rewrite to the precision, prove parity, write all or nothing."""

from __future__ import annotations

import dataclasses
import gc
import json
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import torch
from onnx import TensorProto

from mdnet.model.net import MDNet
from mdnet_calib.calibration_set import refuse_overlap
from mdnet_engines.backends.candidates import Choice
from mdnet_engines.backends.choice import Trial, explain, try_candidates, tune
from mdnet_engines.backends.trial import Measured, measure_apart, measure_gpu_graphs
from mdnet_engines.bundle.files import Bundle, check_replaceable, file_entry, write_bundle
from mdnet_engines.bundle.manifest import (
    GRAPH_NAMES,
    MANIFEST_NAME,
    GpuGraph,
    GraphEntry,
    Manifest,
    Precision,
    Preprocessing,
    Provenance,
    ScoreScale,
    TensorSpec,
)
from mdnet_engines.bundle.parity_summary import ParitySummary
from mdnet_engines.errors import MDNetError, UsageError
from mdnet_engines.parity.measure import Images, Outputs
from mdnet_engines.parity.probes import PROBES, PROBES_NAME, write_probes
from mdnet_engines.parity.report import ParityReport
from mdnet_engines.parity.report_json import to_json
from mdnet_engines.progress import SILENT, Progress
from mdnet_engines.system.machine import lacks_vnni, this_machine
from mdnet_export.graphs.cpu_variant import cpu_variant
from mdnet_export.graphs.export import export_graph
from mdnet_export.graphs.gpu_variant import gpu_variant
from mdnet_export.model_source import Weights
from mdnet_export.parity_images import probe_pixels
from mdnet_export.parity_page import render_html
from mdnet_export.quantise import NOISE, Calibration, Int8Result
from mdnet_export.rewrite import PrecisionFacts, graph_precision, rewrite

_PACKAGES = ("mdnet", "torch", "diffusers", "onnx", "onnxscript", "onnxruntime", "onnxruntime-gpu")
_FORCE = "Nothing was written; --force writes it anyway"
_DTYPES: dict[int, Literal["uint8", "float32", "float16"]] = {
    TensorProto.UINT8: "uint8",
    TensorProto.FLOAT: "float32",
    TensorProto.FLOAT16: "float16",
}


class SlowerError(MDNetError):
    """int8 is slower than float on this machine; nothing was written."""

    def __init__(self, int8: Int8Result):
        self.int8 = int8
        speed = int8.speed
        super().__init__(
            f"int8 is slower than float: {speed.int8_seconds * 1e3:.3g} ms against {speed.float_seconds * 1e3:.3g} ms "
            f"in the encoder ({speed.backend}, batch {speed.batch}); {NOISE:.0%} more is allowed as noise. {_FORCE}"
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
    progress: Progress = SILENT,
) -> Bundle:
    """Build a bundle from `weights` at `destination`; an existing bundle is replaced atomically.

    Args:
        images: what parity is measured on. Private ones are in the bundle by number alone.
        calibration: for int8 and fp8, what their ranges and blocks are chosen on; for fp16, where overflow is looked
            for (drawn faces by default).
        force: write the bundle although a gate failed or int8 is slower than float; the manifest records it. On a CPU
            without VNNI slower int8 is still written: it may be for another machine.
        progress: receives each step.

    Raises:
        ParityError: a gate failed and `force` is not set.
        SlowerError: int8 is slower than float on a CPU that has VNNI, and `force` is not set.
        UsageError: `destination` is something that must not be replaced, int8 lacks its calibration, or parity would be
            measured on calibration images.
    """
    check_replaceable(destination.resolve())
    images = images.without_names() if images.private else images
    if precision in ("int8", "fp8") and calibration is None:
        raise UsageError(f"{precision} needs calibration images; give a folder of them with --calib")
    if calibration is not None:
        refuse_overlap(calibration.images, images.pixels, "images that parity is measured on")
    with write_bundle(destination) as folder:
        progress.step(f"loading {weights.config.preset}")
        model = weights.load()
        progress.step(f"PyTorch reference on {images.source}")
        probes = probe_pixels(weights.config.image_size)
        reference, reference_of_probes = _references(model, images.pixels, probes)
        for name in GRAPH_NAMES:
            progress.step(f"exporting {name}")
            export_graph(model, name, folder)
        del model
        gc.collect()
        facts = rewrite(folder, precision, calibration, progress=progress)
        # Without VNNI a small model gains only elsewhere.
        if facts.int8 and facts.int8.speed.slower and not force and not lacks_vnni():
            raise SlowerError(facts.int8)
        write_probes(folder / PROBES_NAME, probes, reference_of_probes)
        draft = _write_draft(folder, weights, precision, facts, command)
        trials, report = _prove(draft, images, reference, force=force, progress=progress)
        progress.step("writing")
        _finish(draft, weights, trials, report, facts, images)
    return Bundle.open(destination)


def _references(model: MDNet, pixels: np.ndarray, probes: np.ndarray) -> tuple[Outputs, Outputs]:
    """Every output for both sets of images; drawn images and probes begin alike, and no image is computed twice."""
    longer, shorter = (pixels, probes) if len(pixels) >= len(probes) else (probes, pixels)
    outputs = reference_outputs(model, longer)
    if np.array_equal(longer[: len(shorter)], shorter):
        others = {name: values[: len(shorter)] for name, values in outputs.items()}
    else:
        others = reference_outputs(model, shorter)
    return (outputs, others) if longer is pixels else (others, outputs)


def _prove(
    bundle: Bundle, images: Images, reference: Outputs, *, force: bool, progress: Progress
) -> tuple[list[Trial], ParityReport]:
    """Hold every backend that `auto` may take here to the gates, and find the fastest.

    Gives all trials, and the report of what `auto` takes from now on, with the gates of the graphs that GPUs get.
    """

    def measure(choice: Choice) -> Measured:
        return measure_apart(bundle, choice, against=(images, reference), progress=progress)

    trials = try_candidates(bundle, measure=measure, progress=progress)
    if any(trial.holds for trial in trials):
        tuning = tune(bundle, trials=trials, measure=measure, progress=progress)
        chosen = next(trial for trial in tuning.trials if trial.choice == tuning.choice)
        assert chosen.report is not None
        held = chosen.report
        if bundle.on_gpus() != bundle:
            progress.step("gates of the graphs for GPUs")
            held = held.with_gates_of_gpu_graphs(measure_gpu_graphs(bundle, (images, reference), progress=progress))
        if not held.passed and not force:
            raise ParityError(f"parity with PyTorch failed: {held.failures()}. {_FORCE}", held)
        return tuning.trials, dataclasses.replace(held, forced=not held.passed)
    report = next((trial.report for trial in trials if trial.report is not None), None)
    if report is None:
        raise MDNetError(f"no backend can run the graphs: {explain(trials)}")
    if not force:
        reasons = f"parity with PyTorch failed: {explain(trials)}"
        raise ParityError(f"{reasons}. {_FORCE}", report)
    return trials, dataclasses.replace(report, forced=True)


def reference_outputs(model: MDNet, pixels: np.ndarray, *, whole: int = PROBES) -> Outputs:
    """PyTorch fp32, one image at a time: `score` (n,), and every other graph output of the first `whole` images.

    At full size the latter take 1.4 MB an image.
    """
    rows: list[Outputs] = []
    with torch.inference_mode():
        for i in range(len(pixels)):
            image = torch.from_numpy(pixels[i : i + 1])
            features, tokens = model.diffusion(image), model.vim(image)
            tensors = {**features, "tokens": tokens, "score": model.fusion(features, tokens)}
            rows.append({name: tensor.numpy() for name, tensor in tensors.items() if name == "score" or i < whole})
    return {name: np.concatenate([row[name] for row in rows if name in row]) for name in rows[0]}


def write_reports(
    folder: Path, report: ParityReport, facts: dict[str, str], images: Images, *, pictured: bool = True
) -> list[Path]:
    """Write `parity.json` and `parity.html`; of the `images` measured on, the page shows those that differ most.

    It shows none where `pictured` is false.
    """
    pictures = dict(zip(images.names, images.pixels, strict=True)) if pictured else {}
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


def _write_draft(folder: Path, weights: Weights, precision: Precision, made: PrecisionFacts, command: str) -> Bundle:
    """Write a manifest with all but what is measured, so that the graphs can be opened as a bundle's are."""
    config = weights.config
    manifest = Manifest(
        preset=config.preset,
        precision=precision,
        preprocessing=Preprocessing(image_size=config.image_size, colour="srgb", face=config.face),
        score=ScoreScale(minimum=config.score_min, maximum=config.score_max),
        graphs={name: graph_entry(folder / f"{name}.onnx", graph_precision(name, precision)) for name in GRAPH_NAMES},
        probes=file_entry(folder / PROBES_NAME),
        parity=ParitySummary(passed=False, images=0, source="not measured yet", max_abs=None, mean_abs=None),
        calibration=made.calibration,
        int8=made.int8.facts() if made.int8 else None,
        fp8=made.fp8.facts() if made.fp8 else None,
        float32_values=made.float32_values,
        provenance=Provenance(
            weights=weights.kind,
            checkpoint=weights.name,
            checkpoint_sha256=weights.sha256,
            seed=weights.seed,
            training=weights.training(),
            command=command,
            versions=package_versions(),
        ),
        licenses=["graphs and code: Apache-2.0", *weights.licenses()],
    )
    _write(folder, manifest)
    return Bundle(folder, manifest)


def _finish(
    draft: Bundle,
    weights: Weights,
    trials: list[Trial],
    report: ParityReport,
    made: PrecisionFacts,
    images: Images,
) -> None:
    """Write the reports, and the manifest with what was measured."""
    provenance = draft.manifest.provenance
    facts = {
        "preset": draft.manifest.preset,
        "precision": draft.manifest.precision,
        "weights": provenance.name
        + (f", sha256 {weights.sha256[:12]}…" if weights.sha256 else f", seed {weights.seed}"),
        **made.for_people(),
        **{f"gates on {trial.choice}": trial.verdict() for trial in trials},
        "machine": str(this_machine()),
        "command": provenance.command,
        "versions": ", ".join(f"{name} {number}" for name, number in provenance.versions.items()),
    }
    reports = write_reports(draft.path, report, facts, images, pictured=not images.private)
    measured = {
        "reports": [file_entry(file) for file in reports],
        "parity": report.summary(),
        "backends": [check for check in (trial.as_check() for trial in trials) if check],
    }
    _write(draft.path, draft.manifest.model_copy(update=measured))


def _write(folder: Path, manifest: Manifest) -> None:
    (folder / MANIFEST_NAME).write_text(manifest.model_dump_json(indent=1) + "\n", encoding="utf-8")


def graph_entry(file: Path, precision: Precision) -> GraphEntry:
    """Describe an ONNX file for the manifest."""
    graph = onnx.load(file, load_external_data=False).graph
    data = file.with_name(f"{file.name}.data")
    cpu, gpu = cpu_variant(file), gpu_variant(file)
    gpu_data = gpu.with_name(f"{gpu.name}.data")
    return GraphEntry(
        file=file_entry(file),
        data=[file_entry(data)] if data.exists() else [],
        cpu=file_entry(cpu) if cpu.exists() else None,
        gpu=GpuGraph(file=file_entry(gpu), data=[file_entry(gpu_data)] if gpu_data.exists() else [])
        if gpu.exists()
        else None,
        precision=precision,
        inputs=[_tensor_spec(value) for value in graph.input],
        outputs=[_tensor_spec(value) for value in graph.output],
    )


def _tensor_spec(value: onnx.ValueInfoProto) -> TensorSpec:
    kind = value.type.tensor_type
    shape: list[int | str] = [dim.dim_param or dim.dim_value for dim in kind.shape.dim]
    return TensorSpec(name=value.name, dtype=_DTYPES[kind.elem_type], shape=shape)
