"""What a reader of a benchmark's figures needs to know: the machine, what is installed, the bundle."""

from __future__ import annotations

import contextlib
import os
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from mdnet_engines.cpu import available_cores
from mdnet_engines.gpu import visible_gpu
from mdnet_engines.manifest import Manifest
from mdnet_rt.results import Stamp

INSTRUCTION_SETS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8")
"""Those that decide which kernels run, by Linux' names."""
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
        "processor": _cpuinfo("model name") or platform.processor() or None,
        "instruction_sets": [name for name in INSTRUCTION_SETS if name in _cpuinfo("flags").split()],
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
        "weights": manifest.provenance.weights,
    }


def _cpuinfo(key: str) -> str:
    """What Linux says of the first processor, whose name Python itself does not know; "" where it says nothing."""
    with contextlib.suppress(OSError):
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        if found := re.search(rf"^{key}\s*:\s*(.+)$", text, re.MULTILINE):
            return found[1]
    return ""


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found
