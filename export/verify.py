"""Prove an existing bundle again: the same gates, on this machine's runtime and backend."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path

from mdnet_engines.bundle import Bundle
from mdnet_engines.session import Backend
from mdnet_export.build import measure_folder, package_versions, reference_outputs, write_reports
from mdnet_export.images import parity_images
from mdnet_export.parity import ParityReport
from mdnet_export.weights import weights_of


def verify_bundle(
    path: Path,
    *,
    checkpoint: Path | None = None,
    images_folder: Path | None = None,
    num_images: int = 16,
    backend: Backend = "onnxruntime-cpu",
    output: Path | None = None,
    on_step: Callable[[str], None] = lambda _: None,
) -> ParityReport:
    """Measure the bundle at `path` against the PyTorch model it was built from.

    Args:
        checkpoint: the weights; not needed where the bundle was built from the demo or from random weights.
        output: folder for `parity.json` and `parity.html`; made if missing.

    Raises:
        BundleError, UsageError: the bundle, the checkpoint or the images can't be used.
    """
    bundle = Bundle.open(path)
    manifest = bundle.manifest
    weights = weights_of(manifest.provenance, manifest.preset, checkpoint)
    images = parity_images(images_folder, manifest.preprocessing.image_size, num_images)
    on_step(f"PyTorch reference on {images.source}")
    model = weights.load()
    reference = reference_outputs(model, images.pixels)
    del model
    gc.collect()
    on_step(f"{bundle.path} on {backend}")
    report = measure_folder(bundle.path, reference, images, precision=manifest.precision, backend=backend)
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        versions = ", ".join(f"{name} {number}" for name, number in package_versions().items())
        facts = {"bundle": str(path), "preset": manifest.preset, "precision": manifest.precision, "versions": versions}
        write_reports(output, report, facts)
    return report
