"""What a reader of a benchmark's figures needs to know: the machine, what is installed, the bundle."""

from __future__ import annotations

import contextlib
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from mdnet_engines.bundle.manifest import Manifest
from mdnet_engines.system.cores import available_cores
from mdnet_engines.system.gpu import visible_gpu
from mdnet_engines.system.machine import processor_name, this_machine
from mdnet_rt.rows.result import Stamp

_PACKAGES = (
    *("mdnet", "numpy", "pillow", "onnxruntime", "onnxruntime-gpu"),
    *("openvino", "tensorrt", "tensorrt-rtx", "torch"),
)


def describe_host() -> dict[str, Any]:
    """The machine, and the versions of what may run on it."""
    gpu = visible_gpu()
    machine = {
        "system": platform.system(),
        "architecture": platform.machine(),
        "processor": processor_name(),
        "instruction_sets": this_machine().features,
        "cores": os.cpu_count(),
        "cores_usable": available_cores(),
        "gpu": gpu.name if gpu else None,
    }
    return {"machine": machine, "versions": {"python": platform.python_version(), **_versions()}}


def describe_bundle(manifest: Manifest) -> dict[str, Any]:
    """What a bundle holds. `digest` is what rows of its scores carry."""
    return {
        "digest": Stamp.of(manifest).bundle,
        "preset": manifest.preset,
        "precision": manifest.precision,
        "image_size": manifest.preprocessing.image_size,
        "face": manifest.preprocessing.face,
        "weights": manifest.provenance.weights,
    }


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found
