"""What this machine is to a runtime: instruction sets, GPU, and the versions of the runtimes that are installed."""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from mdnet_engines.system.gpu import visible_gpu

_FEATURES = {
    "x86": ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "avx512_fp16", "amx_int8", "amx_bf16"),
    "arm": ("asimddp", "i8mm", "bf16", "sve", "sve2", "sme"),
}
"""Flags of /proc/cpuinfo by which ONNX Runtime, OpenVINO or our own library choose a kernel."""
_RUNTIMES = ("mdnet", "onnxruntime", "openvino")
_GPU_RUNTIMES = ("onnxruntime-gpu", "tensorrt", "tensorrt-rtx")


class Machine(BaseModel):
    """What decides how a graph is computed: equal machines give equal scores.

    `features` are the CPU's instruction sets that a runtime chooses kernels by, `versions` those of the runtimes.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    architecture: str = Field(max_length=40)
    features: list[str]
    gpu: str | None = Field(default=None, max_length=200)
    versions: dict[str, str]

    def __str__(self) -> str:
        """For one line of output."""
        processor = " ".join([self.architecture, *self.features])
        versions = ", ".join(f"{name} {number}" for name, number in self.versions.items())
        return "; ".join(part for part in (processor, self.gpu, versions) if part)


@functools.cache
def this_machine() -> Machine:
    """The machine that this process runs on."""
    architecture = platform.machine().lower()
    known = _FEATURES["arm" if architecture in ("aarch64", "arm64") else "x86"]
    flags = set(_cpuinfo("flags", "Features").split())
    gpu_versions = _versions(_GPU_RUNTIMES)
    gpu = visible_gpu() if gpu_versions else None
    return Machine(
        architecture=architecture,
        features=[name for name in known if name in flags],
        gpu=f"{gpu.name} {gpu.sm}, driver {gpu.driver}" if gpu else None,
        versions=_versions(_RUNTIMES) | gpu_versions,
    )


def lacks_vnni() -> bool:
    """Whether this is an x86 CPU that adds pairs of int8 products in 16 bits, and gains little from int8."""
    machine = this_machine()
    vnni = {"avx512_vnni", "avx_vnni", "amx_int8"}
    return "avx2" in machine.features and vnni.isdisjoint(machine.features)


def processor_name() -> str:
    """The processor's name; on Linux Python itself does not know it."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def cache_folder(name: str) -> Path | None:
    """A folder of ours in the user's cache (`$XDG_CACHE_HOME/mdnet`), made if missing; None where that can't be."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "mdnet", name)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # the latter: no home
        return None
    return folder if os.access(folder, os.W_OK | os.X_OK) else None


def _cpuinfo(*names: str) -> str:
    """The value of the first of these lines in /proc/cpuinfo; empty where there is none."""
    with contextlib.suppress(OSError):
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        if found := re.search(rf"^(?:{'|'.join(names)})\s*:\s*(.+)$", text, re.MULTILINE):
            return found[1]
    return ""


def _versions(packages: tuple[str, ...]) -> dict[str, str]:
    found = {}
    for package in packages:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found
