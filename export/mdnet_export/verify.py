"""Prove an existing bundle again: the same gates, on this machine's runtime and backend."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from mdnet_engines.backends.candidates import Backend, named, open_choice
from mdnet_engines.backends.choice import choose
from mdnet_engines.bundle.files import Bundle
from mdnet_engines.bundle.manifest import GRAPH_NAMES, MANIFEST_NAME, GraphName
from mdnet_engines.errors import UsageError
from mdnet_engines.parity.measure import Images, Outputs, measure
from mdnet_engines.parity.probes import PROBES
from mdnet_engines.parity.report import LayerParity, ParityReport
from mdnet_engines.progress import SILENT, Progress
from mdnet_engines.sessions.session import run_graphs
from mdnet_export.build import package_versions, reference_outputs, write_reports
from mdnet_export.graphs.export import export_graph
from mdnet_export.layers import compare_layers
from mdnet_export.model_source import Weights, weights_of
from mdnet_export.parity_images import parity_images


@dataclass(frozen=True)
class Reference:
    """What a bundle is held to: the PyTorch model of some weights, or another bundle."""

    weights: Weights | None = None
    bundle: Bundle | None = None

    def describe(self) -> str:
        """For one line of output."""
        return "PyTorch fp32" if self.bundle is None else str(self.bundle.path)

    def outputs(self, images: Images) -> Outputs:
        """`score` (n,) of one image at a time, and every other graph output of the first ones."""
        if self.weights is not None:
            outputs = reference_outputs(self.weights.load(), images.pixels)
            gc.collect()
            return outputs
        assert self.bundle is not None
        graphs = open_choice(self.bundle, named(self.bundle, "onnxruntime-cpu"))
        rows = [run_graphs(graphs, images.pixels[i : i + 1]) for i in range(len(images.pixels))]
        names = {name: len(rows) if name == "score" else PROBES for name in rows[0]}
        return {name: np.concatenate([row[name] for row in rows[:count]]) for name, count in names.items()}

    @contextmanager
    def float_graphs(self) -> Iterator[dict[GraphName, Path]]:
        """The float32 ONNX graphs, exported for as long as the block runs where they come from weights."""
        if self.bundle is not None:
            yield {name: self.bundle.graph_path(name) for name in GRAPH_NAMES}
            return
        assert self.weights is not None
        with TemporaryDirectory(prefix="mdnet-verify-") as folder:
            model = self.weights.load()
            yield {name: export_graph(model, name, Path(folder)) for name in GRAPH_NAMES}


def verify_bundle(
    path: Path,
    *,
    against: Path | None = None,
    images_folder: Path | None = None,
    num_images: int | None = None,
    backend: Backend = "auto",
    layers: bool = False,
    output: Path | None = None,
    progress: Progress = SILENT,
) -> ParityReport:
    """Measure the bundle at `path` against the PyTorch model it was built from, or against another bundle.

    Args:
        backend: by default what `mdnet-rt score` takes, and, where that is no GPU, the graphs that GPUs get as well, on
            the CPU. One that is named is measured alone, whatever its gates say.
        against: a checkpoint or a bundle; not needed where the bundle was built from the demo or from random weights.
        layers: compare the graphs layer by layer too. Where a gate fails this is done anyway.
        output: folder for `parity.json` and `parity.html`; made if missing.

    Raises:
        BundleError, UsageError: the bundle, what it is held against or the images can't be used.
    """
    bundle = Bundle.open(path)
    manifest = bundle.manifest
    reference = _reference(bundle, against)
    made = manifest.preprocessing
    images = parity_images(
        images_folder,
        made.image_size,
        num_images,
        face=made.face,
        training=manifest.provenance.training,
        progress=progress,
    )
    choice = choose(bundle, backend, check=backend == "auto")
    runtimes = str(choice)
    progress.step(f"{reference.describe()} on {images.source}")
    expected = reference.outputs(images)
    progress.step(f"{bundle.path} on {runtimes}")
    graphs = open_choice(bundle, choice)
    precision, scale = manifest.precision, manifest.score
    report = measure(graphs, expected, images, precision=precision, scale=scale, backend=runtimes)
    del graphs
    gpus = bundle.on_gpus()
    if backend == "auto" and gpus != bundle and not choice.on_gpu:
        on_cpu = named(bundle, "onnxruntime-cpu")
        progress.step(f"the graphs for GPUs on {on_cpu}")
        graphs = open_choice(gpus, on_cpu)
        others = measure(graphs, expected, images, precision=precision, scale=scale, backend=str(on_cpu))
        report = report.with_gates_of_gpu_graphs(others)
        del graphs
    if layers or not report.passed:
        progress.step("layer by layer")
        report = dataclasses.replace(report, layers=_layers(bundle, reference, expected, images))
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        versions = ", ".join(f"{name} {number}" for name, number in package_versions().items())
        facts = {
            "bundle": str(path),
            "against": reference.describe(),
            "preset": manifest.preset,
            "precision": manifest.precision,
            "versions": versions,
        }
        write_reports(output, report, facts, images)
    return report


def _reference(bundle: Bundle, against: Path | None) -> Reference:
    manifest = bundle.manifest
    if against is None or not against.is_dir():
        return Reference(weights=weights_of(manifest.provenance, manifest.preset, against))
    if not (against / MANIFEST_NAME).is_file():
        raise UsageError(f"--against {against} is neither a checkpoint nor a bundle (no {MANIFEST_NAME} in it)")
    other = Bundle.open(against)
    if other.manifest.preprocessing != manifest.preprocessing:
        raise UsageError(f"{against} prepares images differently from {bundle.path}; their scores can't be compared")
    return Reference(bundle=other)


def _layers(bundle: Bundle, reference: Reference, expected: Outputs, images: Images) -> dict[str, list[LayerParity]]:
    """Every graph, on the first image and on what the reference computed of it."""
    feed = {name: values[:1] for name, values in expected.items()} | {"image": images.pixels[:1]}
    with reference.float_graphs() as floats:
        return {name: compare_layers(floats[name], bundle.graph_path(name, cpu=True), feed) for name in GRAPH_NAMES}
